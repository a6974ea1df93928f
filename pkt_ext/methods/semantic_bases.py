# SPDX-License-Identifier: Apache-2.0
"""The semantic basis of a head: the hidden vector that each token's logit asks for.

H [m, D] holds the head's rows of m tokens, times the gain of the final norm where that is folded:

    S_raw = H (H^T H)^-1,  row i = s_i: the least-squares vector whose logits are token i's   (A1)

Neither H nor S_raw is ever in memory. What is kept is R of H = Q R, from the Gram matrix, and
rows of S_raw are made from rows of H when asked for. Everything is float64. The Gram matrix squares
the condition number k of H, so of one estimated above 1e3 the Gram matrix of H R^-1 is factored
too, in a second pass over H, as CholeskyQR2 does: S_raw^T H is then the identity to 1e-16 k, not
1e-16 k^2. Singular values below 1 / 3e6 of the largest are noise in float32 weights and would
outweigh all others in S_raw: where there are any, or the Cholesky factorisation fails, they are
left out by eigen-decomposition. S_raw is then the pseudo-inverse of what remains, S_raw^T H a
projector of rank r < D; a direction kept right beside the cut is good to 1e-3 only.

Source: METHODS 4.1; vocabulary-defined semantics; CholeskyQR2: Yamamoto et al., ETNA 44 (2015).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from pkt_ext.errors import InputError, NonFiniteError
from pkt_ext.models.norms import read_norm
from pkt_ext.streaming.blocks import StreamedModel

log = logging.getLogger(__name__)

REFINE_ABOVE = 1e3  # condition number: without a second pass the error is 1e-16 of its square
CUT_ABOVE = 3e6  # the Gram matrix has 1e-13 for it, still above its own rounding
_ITERATIONS = 20  # of the estimate of a condition number, good to some per cent


class HeadRows:
    """Rows of a model's head, float64, times the final norm's gain where that is folded.

    Args:
        stream: the model; its head is read as it computes with it, in its dtype.
        ids:    int64 [m], the tokens.
        fold_norm: multiply by the gain, so that the basis is of states that were normalised but
            not yet scaled. A mean that a LayerNorm subtracts and its bias are left out.
    Raises:
        InputError: a final norm that is neither LayerNorm nor RMSNorm, to be folded.
        NonFiniteError: a gain that holds NaN or Inf.
    """

    def __init__(self, stream: StreamedModel, ids: torch.Tensor, *, fold_norm: bool):
        self.stream, self.ids = stream, ids.cpu()
        self.width = stream.checkpoint.shape(stream.head_name)[1]
        self.gain = _final_gain(stream) if fold_norm else None  # float32 [D]

    def __len__(self) -> int:
        return len(self.ids)

    def stored(self, start: int, stop: int) -> torch.Tensor:
        """Some of the rows as the model has them: [C, D] in its dtype, on its device."""
        some = self.ids[start:stop]
        first, last = int(some[0]), int(some[-1])
        # ids without a gap are read as one piece
        ordered = last - first == len(some) - 1 and bool((some[1:] > some[:-1]).all())
        index = slice(first, last + 1) if ordered else some
        return self.stream.fetch_rows(self.stream.head_name, index)

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        """Some of the rows: float64 [C, D], on the model's device.

        Raises:
            NonFiniteError: one of them holds NaN or Inf.
        """
        rows = self.stored(start, stop).double()
        if not torch.isfinite(rows).all():
            row = int((~torch.isfinite(rows)).any(1).nonzero()[0])
            raise _damaged(self.stream, f"{self.stream.head_name}, token {self.ids[start + row]},")
        return rows if self.gain is None else rows.mul_(self.gain)


@dataclass(frozen=True, eq=False)
class SemanticBasis:
    """What makes rows of S_raw [m, D] from rows of H [m, D] = Q R.

    It is exact for the chunks of rows that it was made from. Other chunks may round otherwise on
    their way through R, by 1e-16 of the condition number, which R^-T can multiply by it once more.

    Attributes:
        factors:   of R, the first one applied first.
        rank:      r <= D, singular values of H that are kept.
        condition: the largest of these over the smallest; an estimate where all are kept.
        ridge:     what was added to the diagonal of H^T H.
    """

    factors: tuple[Triangular | Spectral, ...]
    rank: int
    condition: float
    ridge: float

    def whitened(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of Q = H R^-1 [C, r] from rows of H [C, D]; orthonormal columns without a ridge."""
        for factor in self.factors:
            rows = factor.divide(rows)
        return rows

    def vectors(self, whitened: torch.Tensor) -> torch.Tensor:
        """Rows of S_raw = Q R^-T [C, D] from rows of Q [C, r]."""
        for factor in reversed(self.factors):
            whitened = factor.divide_transposed(whitened)
        return whitened

    def restored(self, columns: torch.Tensor) -> torch.Tensor:
        """R^T x [D, n] of x [r, n]."""
        for factor in reversed(self.factors):
            columns = factor.transposed_times(columns)
        return columns

    def report(self) -> dict:
        """Figures for a run's report."""
        return {
            "rank": self.rank,
            "condition": self.condition,
            "ridge": self.ridge,
            "passes": len(self.factors),
            "cut_off": isinstance(self.factors[0], Spectral),
        }


@dataclass(frozen=True, eq=False)
class Triangular:
    """R, upper triangular [D, D]."""

    upper: torch.Tensor

    def divide(self, rows: torch.Tensor) -> torch.Tensor:
        """x R^-1."""
        return torch.linalg.solve_triangular(self.upper, rows, upper=True, left=False)

    def divide_transposed(self, rows: torch.Tensor) -> torch.Tensor:
        """x R^-T."""
        return torch.linalg.solve_triangular(self.upper.T, rows, upper=False, left=False)

    def transposed_times(self, columns: torch.Tensor) -> torch.Tensor:
        """R^T x."""
        return self.upper.T @ columns


@dataclass(frozen=True, eq=False)
class Spectral:
    """R = diag(values) V^T of the directions that are kept: vectors V [D, r], values [r]."""

    vectors: torch.Tensor
    values: torch.Tensor

    def divide(self, rows: torch.Tensor) -> torch.Tensor:
        """x R^+ = x V / values."""
        return (rows @ self.vectors).div_(self.values)

    def divide_transposed(self, rows: torch.Tensor) -> torch.Tensor:
        """x R^+T = x / values V^T."""
        return (rows / self.values) @ self.vectors.T

    def transposed_times(self, columns: torch.Tensor) -> torch.Tensor:
        """R^T x = V values x."""
        return self.vectors @ (self.values[:, None] * columns)


def semantic_basis(
    head: HeadRows, name: str, *, ridge: float = 0.0, chunk: int, show: bool = False
) -> SemanticBasis:
    """Factor a head, in one pass over its rows or in two.

    Args:
        name:  what the progress bar calls it.
        ridge: added to the diagonal of H^T H, in units of its mean; S_raw is then
            H (H^T H + ridge I)^-1, and there is no second pass.
        chunk: rows looked at at once.
    Raises:
        InputError: a head whose rows are all zero.
        NonFiniteError: NaN or Inf in one of the rows.
    """
    gram = torch.zeros(head.width, head.width, dtype=torch.float64, device=head.stream.device)
    for span in spans(len(head), chunk, f"{name}: Gram matrix", show):
        rows = head(*span)
        gram.addmm_(rows.T, rows)
    added = ridge * float(gram.diagonal().mean())
    gram.diagonal().add_(added)
    first, rank, condition = factored(gram)
    if rank == 0:
        raise InputError(
            f"{head.stream.checkpoint.name}: {head.stream.head_name} is all zero; choose a model "
            "that was trained, or download the checkpoint again"
        )
    del gram
    basis = SemanticBasis((first,), rank, condition, added)
    if ridge or condition <= REFINE_ABOVE:
        return basis
    gram = torch.zeros(rank, rank, dtype=torch.float64, device=head.stream.device)
    for span in spans(len(head), chunk, f"{name}: refinement", show):
        rows = basis.whitened(head(*span))
        gram.addmm_(rows.T, rows)
    second = torch.linalg.cholesky(gram, upper=True)
    return SemanticBasis((first, Triangular(second)), rank, condition, added)


def factored(gram: torch.Tensor) -> tuple[Triangular | Spectral, int, float]:
    """(R of R^T R = gram [D, D] float64, rank kept, condition number of R)."""
    upper, failed = torch.linalg.cholesky_ex(gram, upper=True)
    if not failed:
        condition = _condition(upper)
        if condition <= CUT_ABOVE:
            return Triangular(upper), len(gram), condition
    del upper
    values, vectors = torch.linalg.eigh(gram)
    keep = values > values[-1] / CUT_ABOVE**2
    values = values[keep].sqrt()
    rank = len(values)
    condition = float(values[-1] / values[0]) if rank else 0.0
    return Spectral(vectors[:, keep], values), rank, condition


def _condition(upper: torch.Tensor) -> float:
    """Largest over smallest singular value of R, by power iteration on both sides."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(upper), 1, generator=generator, dtype=torch.float64).to(upper.device)
    solve = torch.linalg.solve_triangular

    def largest(apply) -> float:
        vector, norm = start, start.norm()
        for _ in range(_ITERATIONS):
            vector = apply(vector / norm)
            norm = vector.norm()
        return float(norm) ** 0.5

    there = largest(lambda v: upper.T @ (upper @ v))
    back = largest(lambda v: solve(upper, solve(upper.T, v, upper=False), upper=True))
    return there * back


def spans(count: int, chunk: int, what: str, show: bool) -> Iterator[tuple[int, int]]:
    """(start, stop) of the chunks of so many tokens, under a progress bar; a line elsewhere."""
    bar = tqdm(
        total=count,
        desc=what,
        unit="tok",
        leave=False,
        disable=None if show else True,  # None: where stderr is no terminal
    )
    with bar:
        for start in range(0, count, chunk):
            stop = min(start + chunk, count)
            yield start, stop
            bar.update(stop - start)
    if show and bar.disable:
        log.info("%s, %d tokens", what, count)


def _final_gain(stream: StreamedModel) -> torch.Tensor | None:
    """The final norm's gain, float32 [D] on the stream's device; None where there is none."""
    path = stream.anatomy.final_norm
    if path is None:
        return None
    module = stream.model.get_submodule(path)
    names = [f"{path}.{name}" for name, _ in module.named_parameters()]
    try:
        norm = read_norm(module, path)
    except InputError as error:
        raise InputError(
            f"{path} ({type(module).__name__}) is neither LayerNorm nor RMSNorm; its gain cannot "
            "be folded into the head, pass fold_norm=False"
        ) from error
    with stream.resident(stream.fetch(names)):
        gain = norm.gain(module)
    if gain is not None and not torch.isfinite(gain).all():
        raise _damaged(stream, f"{path}.weight")
    return gain


def _damaged(stream: StreamedModel, where: str) -> NonFiniteError:
    return NonFiniteError(
        f"{stream.checkpoint.name}: {where} holds NaN or Inf; the checkpoint is damaged, download "
        "or convert it again"
    )
