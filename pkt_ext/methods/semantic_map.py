# SPDX-License-Identifier: Apache-2.0
"""From the teacher's hidden space to the student's, by way of the tokens both know.

S_T [D_t, m] and S_S [D_s, m] hold the semantic bases of m shared tokens, unit columns, column i the
same token in both. A teacher's state is taken apart and put together again:

    a = S_T^T h / |h|    in R^m, cosines                                                      (A5)
    h~ = S_S a           in R^(D_s)                                                           (A6)

which is one matrix M = S_S S_T^T in R^(D_s x D_t) (variant "frames"). It scales by how crowded the
tokens are in each direction; "least-squares", (S_S S_S^T)^-1 S_S S_T^T, gives the student's vector
whose own coefficients are closest to a, and is the identity where student and teacher are one.

With Q and R of the student's head (see semantic_bases) and N the inverse lengths of its S_raw's
rows, S_S^T = N Q R^-T, so (S_S S_S^T)^-1 S_S = R^T (Q^T N^2 Q)^-1 (N Q)^T: the head's condition
number is not squared.

Source: METHODS 4.3; SemAlign (arXiv 2510.24208, v1).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pkt_ext.errors import InputError
from pkt_ext.methods import map_cache
from pkt_ext.methods.semantic_bases import (
    HeadRows,
    SemanticBasis,
    factored,
    semantic_basis,
    spans,
)
from pkt_ext.methods.vocabulary import SharedVocabulary
from pkt_ext.streaming.blocks import StreamedModel

log = logging.getLogger(__name__)

VARIANTS = ("frames", "least-squares")
CHUNK_BYTES = 2**25  # of the wider head's rows in float64, looked at at once
_COPIES = 6  # of such a chunk: read, in float64, through each factor, scaled
_LIBRARIES = 2**26  # what BLAS and LAPACK keep for themselves


@dataclass(frozen=True, eq=False)
class SemanticMap:
    """M, and how it came about.

    Attributes:
        matrix: float32 [D_s, D_t].
        report: variant, tokens, for each model the rank kept, condition number, ridge; seconds.
    """

    matrix: torch.Tensor
    report: dict

    def to(self, device: torch.device | str) -> SemanticMap:
        """The same map with its matrix there."""
        return replace(self, matrix=self.matrix.to(device))

    def apply(self, states: torch.Tensor, normalise: bool) -> torch.Tensor:
        """The student's vectors for the teacher's states, in float32.

        Args:
            states:    [..., D_t]. On another device than the matrix, that is copied there each
                time: see `to`.
            normalise: divide each state by its length first, as (A5) does; zeros stay zeros.
        Returns:
            float32 [..., D_s].
        """
        states = states.float()
        if normalise:
            states = unit(states)
        return states @ self.matrix.to(states.device).T


def check_shared(shared: SharedVocabulary, widest: int) -> None:
    """Whether there are tokens enough for a map.

    Args:
        widest: the larger of both hidden sizes.
    Raises:
        InputError: there are fewer.
    """
    if len(shared) < widest:
        raise InputError(
            f"the tokenizers share {len(shared)} tokens, but hidden size {widest} takes as many at "
            "least; choose a pair of models whose vocabularies overlap"
        )


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows [..., D] by their lengths; what is zero stays zero."""
    return rows * _inverse_lengths(rows)


def build_map(
    teacher: StreamedModel,
    student: StreamedModel,
    shared: SharedVocabulary,
    *,
    variant: str = "frames",
    fold_norm: bool = True,
    ridge: float = 0.0,
    cache: Path | None = None,
    show: bool = True,
    chunk_bytes: int = CHUNK_BYTES,
) -> SemanticMap:
    """Stream both heads, two or three times each, and keep one matrix.

    Args:
        shared:    the tokens to go by, from `shared_vocabulary`.
        variant:   one of `VARIANTS`.
        fold_norm: multiply the heads by their final norms' gains: for states of the residual
            stream, which these gains have not scaled.
        ridge:     see `semantic_basis`; 0 is (A1) as it stands.
        cache:     a folder in which maps are kept, by the content that they come from.
        chunk_bytes: of float64 head rows looked at at once; changes the result by its rounding.
    Returns:
        the map, its matrix on the CPU.

    Raises:
        InputError: an unknown variant, a negative ridge, or fewer shared tokens than a hidden size.
        NonFiniteError: a head or a final norm that holds NaN or Inf.
    """
    start = time.perf_counter()
    if variant not in VARIANTS:
        raise InputError(f"map variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    if not 0 <= ridge < float("inf"):
        raise InputError(f"ridge {ridge}: give 0 or a small positive number, such as 1e-6")
    heads = [
        HeadRows(stream, ids, fold_norm=fold_norm)
        for stream, ids in ((teacher, shared.teacher), (student, shared.student))
    ]
    check_shared(shared, widest := max(head.width for head in heads))
    options = {"variant": variant, "fold_norm": fold_norm, "ridge": ridge}
    chunk = max(1, chunk_bytes // (8 * widest))
    key = None
    if cache is not None:
        key = map_cache.content_key(heads, options, chunk, show)
        if found := map_cache.find(Path(cache), key, (heads[1].width, heads[0].width)):
            matrix, report = found
            return SemanticMap(matrix, report | {"cached": True})
    bases = [
        semantic_basis(head, name, ridge=ridge, chunk=chunk, show=show)
        for head, name in zip(heads, ("teacher", "student"), strict=True)
    ]
    matrix = _joined(heads, bases, variant, chunk, show)
    report = {
        **options,
        "tokens": len(shared),
        "same_ids": shared.identical,
        "teacher": bases[0].report(),
        "student": bases[1].report(),
        "seconds": time.perf_counter() - start,
    }
    if cache is not None:
        map_cache.keep(Path(cache), key, matrix, report)
    return SemanticMap(matrix, report | {"cached": False})


def _joined(
    heads: list[HeadRows], bases: list[SemanticBasis], variant: str, chunk: int, show: bool
) -> torch.Tensor:
    """M [D_s, D_t], summed over the tokens in float64, as float32 on the CPU."""
    theirs, ours = heads
    device = ours.stream.device
    least_squares = variant == "least-squares"
    rows = bases[1].rank if least_squares else ours.width
    sums = torch.zeros(rows, theirs.width, dtype=torch.float64, device=device)
    if least_squares:
        weighted = torch.zeros(rows, rows, dtype=torch.float64, device=device)  # Q^T N^2 Q
    for span in spans(len(ours), chunk, "semantic map", show):
        target = unit(bases[0].vectors(bases[0].whitened(theirs(*span)))).to(device)
        whitened = bases[1].whitened(ours(*span))
        own = bases[1].vectors(whitened)
        if least_squares:
            own = whitened.mul_(_inverse_lengths(own))  # N Q
            weighted.addmm_(own.T, own)
        else:
            own.mul_(_inverse_lengths(own))
        sums.addmm_(own.T, target)
    if not least_squares:
        return sums.float().cpu()
    factor, *_ = factored(weighted)
    matrix = torch.empty(ours.width, theirs.width)
    for start in range(0, theirs.width, chunk):
        columns = sums[:, start : start + chunk]
        solved = factor.divide_transposed(factor.divide(columns.T)).T
        matrix[:, start : start + chunk] = bases[1].restored(solved)
    return matrix


def _inverse_lengths(rows: torch.Tensor) -> torch.Tensor:
    """1 / |row| [..., 1]; 0 where a row is zero."""
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return torch.where(lengths > 0, lengths.reciprocal(), 0.0)


def map_bytes(
    teacher: StreamedModel,
    student: StreamedModel,
    *,
    variant: str = "frames",
    chunk_bytes: int = CHUNK_BYTES,
) -> int:
    """The most memory that `build_map` takes, whatever the vocabulary, the models' own apart.

    The headers of their checkpoints are enough. In float64, a basis is two matrices [D, D] at the
    most; its making takes four: a Gram matrix, and what its eigen-decomposition has beside it.
    """
    d_t, d_s = (stream.checkpoint.shape(stream.head_name)[1] for stream in (teacher, student))
    square_t, square_s, oblong = 8 * d_t * d_t, 8 * d_s * d_s, 8 * d_s * d_t
    chunks = _COPIES * chunk_bytes
    making = chunks + max(4 * square_t, 2 * square_t + 4 * square_s)
    both = 2 * square_t + 2 * square_s + oblong  # the bases and the sum
    joining, closing = both + chunks, both + oblong // 2  # the result beside it, in float32
    if variant == "least-squares":
        joining += square_s
        closing += max(4 * square_s, 2 * square_s + chunks)
    return max(making, joining, closing) + _LIBRARIES
