# SPDX-License-Identifier: Apache-2.0
"""Linear CKA: how alike the activations of two layers are, whatever their widths.

Of rows X [n, p] and Y [n, q] at the same n positions, columns centred:

    CKA = ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)
        = <K, L> / (||K||_F ||L||_F),    K = X X^T, L = Y Y^T

from 0 to 1, the same for X Q (Q orthogonal) and for c X. With fewer rows than columns every K comes
near a multiple of the identity, and all layers look alike. The debiased estimate leaves the
diagonals out; it may be a little below 0 where nothing is alike.

Layers whose rows are all the same, as a single one is, resemble nothing: 0, and not 0 / 0.

Source: Kornblith et al., ICML 2019 (arXiv 1905.00414); debiased: Song et al., JMLR 2012, HSIC_1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_PIECE = 4096  # rows at a time in float64


def linear_cka(x: torch.Tensor, y: torch.Tensor, *, debiased: bool = False) -> float:
    """CKA of two layers; see `cka_matrix`."""
    return float(cka_matrix([x], [y], debiased=debiased))


@torch.no_grad()
def cka_matrix(
    ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], *, debiased: bool = False
) -> torch.Tensor:
    """CKA of every layer of one model with every layer of another.

    Args:
        ours:     by layer, its rows [n, p], any floating dtype, on the CPU; p may differ.
        theirs:   likewise, the same n positions.
        debiased: take the estimate that is not drawn to 1 by few rows. It always works with
                  [n, n] matrices, one for each of `theirs` at once, as does the other where there
                  are fewer rows than columns.
    Returns:
        float64 [len(ours), len(theirs)]; summed in float64 throughout.
    Raises:
        ValueError: different numbers of rows, too few of them, or rows that are not finite.
    """
    rows = {len(x) for x in (*ours, *theirs)}
    least = 4 if debiased else 1
    if len(rows) != 1 or min(rows) < least:
        raise ValueError(f"layers must have one number of rows, at least {least}, got {rows}")
    if not all(torch.isfinite(x).all() for x in (*ours, *theirs)):
        raise ValueError("rows must be finite")
    if debiased or min(rows) < min(x.shape[1] for x in (*ours, *theirs)):
        grams = torch.stack([_unit_gram(y, debiased).flatten() for y in theirs])
        found = torch.stack([grams @ _unit_gram(x, debiased).flatten() for x in ours])
    else:
        products = torch.stack([torch.stack([_product(x, y) for y in theirs]) for x in ours])
        sizes = [torch.stack([_product(x, x) for x in side]).sqrt() for side in (ours, theirs)]
        norms = torch.outer(*sizes)
        found = torch.where(norms > 0, products / norms, 0.0)
    return found.clamp(max=1.0)


def _unit_gram(x: torch.Tensor, debiased: bool) -> torch.Tensor:
    """float64 [n, n] of norm 1: the Gram matrix of the rows, centred; zeros of equal rows."""
    count = len(x)
    if _constant(x):
        return torch.zeros(count, count, dtype=torch.float64)
    rows = x.double()
    rows = rows - rows.mean(0)
    gram = rows @ rows.T
    if debiased:
        gram.fill_diagonal_(0)
        sums = gram.sum(0) / (count - 2)
        gram += sums.sum() / (count - 1) - sums - sums[:, None]
        gram.fill_diagonal_(0)
    return gram / gram.norm()


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """float64 []: the squared norm of Y^T X, columns centred."""
    if _constant(x) or _constant(y):
        return torch.zeros((), dtype=torch.float64)
    total = torch.zeros(y.shape[1], x.shape[1], dtype=torch.float64)
    means = [side.mean(0, dtype=torch.float64) for side in (y, x)]
    for pieces in zip(y.split(_PIECE), x.split(_PIECE), strict=True):
        left, right = (piece - mean for piece, mean in zip(pieces, means, strict=True))
        total += left.T @ right
    return total.square().sum()


def _constant(x: torch.Tensor) -> bool:
    return bool((x == x[:1]).all())
