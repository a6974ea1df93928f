# SPDX-License-Identifier: Apache-2.0
"""Sensitivity |weight * gradient|: elementwise, and per sample for a linear layer's weight.

Beside or instead of the score its sums are formed: by row, by column, by block, in all. A NaN or an
infinity in an operand makes the scores it touches non-finite (infinity times zero gives NaN), and
they stay so, as do the sums they are part of; `SensitivitySums.nonfinite` tells. Nothing else is
checked on the way and nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pkt_ext.ops import _backend

SUM_BLOCK = 64


@dataclass(frozen=True, eq=False)
class SensitivitySums:
    """Sums of scores, over all the calls that were given them.

    A contribution is the float32 value that one call adds to one score. Contributions are added in
    float64, in an order that depends on the shapes alone: equal bits on any thread count and in
    every run. Their sum differs from that of the score by the float32 rounding of the latter's
    additions only.
    """

    rows: torch.Tensor | None  # float64 [R]: over the columns of the score, seen as [R, C]
    cols: torch.Tensor | None  # float64 [C]
    blocks: torch.Tensor | None  # float64 [ceil(R / 64), ceil(C / 64)]: 64 x 64 elements each
    total: torch.Tensor  # float64 []
    nonfinite: torch.Tensor  # int32 []: 1 once a contribution or a score was NaN or infinite, or 0

    @classmethod
    def zeros(
        cls,
        shape: tuple[int, ...],
        *,
        device: torch.device | str,
        rows: bool = False,
        cols: bool = False,
        blocks: bool = False,
    ) -> SensitivitySums:
        """Sums, all zero, for scores of this shape; only those asked for cost anything.

        Args:
            shape: [..., C]; R is the product of what precedes C. A vector is one row.
        """
        height, width = _matrix_shape(shape)

        def zeros(wanted: bool, *size: int) -> torch.Tensor | None:
            return torch.zeros(size, dtype=torch.float64, device=device) if wanted else None

        return cls(
            zeros(rows, height),
            zeros(cols, width),
            zeros(blocks, -(-height // SUM_BLOCK), -(-width // SUM_BLOCK)),
            zeros(True),
            torch.zeros((), dtype=torch.int32, device=device),
        )

    def scale_(self, factor: float) -> None:
        """Multiply every sum by `factor`, a power of two (then exact but for overflow)."""
        for sums in (self.rows, self.cols, self.blocks, self.total):
            if sums is not None:
                sums.mul_(factor)

    def add_reference(self, contributions: torch.Tensor, score: torch.Tensor | None = None) -> None:
        """Plain torch: add the sums of contributions [..., C]; `score` is checked for NaN too."""
        values = contributions.double().reshape(_matrix_shape(contributions.shape))
        if self.rows is not None:
            self.rows.add_(values.sum(1))
        if self.cols is not None:
            self.cols.add_(values.sum(0))
        if self.blocks is not None:
            index = [torch.arange(n, device=values.device) // SUM_BLOCK for n in values.shape]
            strips = torch.zeros_like(values[:, : self.blocks.shape[1]])
            strips.index_add_(1, index[1], values)
            self.blocks.index_add_(0, index[0], strips)
        self.total.add_(values.sum())
        checked = values if score is None else torch.stack([values.sum(), score.double().sum()])
        self.nonfinite.logical_or_(~checked.isfinite().all())


def accumulate_sensitivity_(
    score: torch.Tensor | None,
    weight: torch.Tensor,
    grad: torch.Tensor,
    *,
    sums: SensitivitySums | None = None,
) -> None:
    """Add |weight * grad| to score, and to sums.

    Product and addition are float32: a call is off by at most 2^-24 of the product and 2^-24 of the
    new score, and has equal bits on any thread count and in every run. A NaN or infinity in an
    operand is one in the score (infinity times zero is NaN).

    Args:
        score:  [...] float32, contiguous; written in place. None: only the sums are formed, nothing
                of the score's size is written.
        weight: score's shape; float32, float16 or bfloat16, any strides.
        grad:   score's shape; float32, float16 or bfloat16, any strides.
        sums:   added to; on score's device.
    Raises:
        ValueError: shapes or devices differ, score is not contiguous, neither score nor sums.
        TypeError:  a dtype not listed above.
    Source: Zhong et al., ICLR 2024 (arXiv 2310.11451), sensitivity; METHODS S1.
    """
    _check_outputs(score, sums)
    if score is None:
        if grad.shape != weight.shape:
            expected, got = list(weight.shape), list(grad.shape)
            raise ValueError(f"grad: expected weight's shape {expected}, got {got}")
    else:
        for name, tensor in (("weight", weight), ("grad", grad)):
            if tensor.shape != score.shape:
                expected, got = list(score.shape), list(tensor.shape)
                raise ValueError(f"{name}: expected score's shape {expected}, got {got}")
        if not score.is_contiguous():
            raise ValueError(f"score: expected a contiguous tensor, got strides {score.stride()}")
        score = score.view(_matrix_shape(score.shape))
    # copies an operand whose leading strides no single stride describes
    operands = (score, *(t.reshape(_matrix_shape(t.shape)) for t in (weight, grad)), sums)
    with _backend.device_of(weight) as launch:
        _backend._C.accumulate_sensitivity(*operands, _workspace_on(weight.device), **launch)


def accumulate_sensitivity_reference_(
    score: torch.Tensor | None,
    weight: torch.Tensor,
    grad: torch.Tensor,
    *,
    sums: SensitivitySums | None = None,
) -> None:
    """Plain torch, in score's dtype (float64 for the truth, and where there is no score)."""
    dtype = torch.float64 if score is None else score.dtype
    contributions = (weight.to(dtype) * grad.to(dtype)).abs()
    if score is not None:
        score += contributions
    if sums is not None:
        sums.add_reference(contributions, score)


def linear_sensitivity_(
    score: torch.Tensor | None,
    weight: torch.Tensor,
    inputs: torch.Tensor,
    grad_outputs: torch.Tensor,
    segments: torch.Tensor,
    *,
    sums: SensitivitySums | None = None,
) -> None:
    """Add |weight| * sum_n |grad_outputs[n]^T inputs[n]| to score: sensitivity, sample by sample.

    [n] are the rows (tokens) of sample n. The gradient of a sample exists in registers only; it and
    the sum over samples are float32, added in ascending order, |weight| is applied once. A weight
    stored [D_in, D_out] (GPT-2's Conv1D) is passed as its transpose, or inputs and grad_outputs
    change places. What else adds to a sample's gradient (the other use of a tied weight) is further
    rows of the sample.

    A contribution is off by at most 2^-24 (T + N + 8) |weight| sum |grad_outputs| |inputs|, to the
    first order, T being the rows of the longest sample. On a GPU with tensor cores float32 operands
    are taken as sums of two bfloat16: 2^-15 is added to that factor (commonly 2^-20). On a CPU
    with AVX512_BF16 bfloat16 operands, and sums of theirs, below 2^-126 count as zero. Equal bits
    on any thread count and in every run, other last bits when the batch is cut otherwise. A NaN or
    infinity in a row of a sample, or in the weight, is one in the scores it touches (infinity times
    zero is NaN). As |weight| is applied once, an infinite weight gives infinity where one sample's
    gradient is exactly zero and another's is not, the sample-by-sample reference NaN; either sets
    sums.nonfinite.

    Args:
        score:        [D_out, D_in] float32, contiguous; written in place. None: only the sums are
                      formed, nothing of the score's size is written.
        weight:       [D_out, D_in] float32, float16 or bfloat16, any strides.
        inputs:       [M, D_in] float32, float16 or bfloat16, any strides.
        grad_outputs: [M, D_out], the dtype of inputs, any strides: the loss's gradient with respect
                      to inputs @ weight^T, each sample's loss by itself.
        segments:     [N + 1] int64, ascending within [0, M]: sample n has the rows from segments[n]
                      to segments[n + 1], possibly none; rows outside all segments do not count. On
                      the CPU or on score's device. Those on a GPU are not validated, which would
                      wait for it, but clamped; those on the CPU are copied to score's device.
        sums:         added to; on score's device.
    Raises:
        ValueError: shapes or devices differ, score is not contiguous, segments are not ascending,
            neither score nor sums.
        TypeError:  a dtype not listed above.
    Source: Zhong et al., ICLR 2024 (arXiv 2310.11451), sensitivity; METHODS S1 and S2.
    """
    _check_outputs(score, sums)
    if segments.is_cpu:
        _check_segments(segments, len(inputs))
    if segments.is_cpu and weight.is_cuda:
        segments = segments.to(weight.device)
    operands = (score, weight, inputs, grad_outputs, segments, sums)
    with _backend.device_of(weight) as launch:
        _backend._C.linear_sensitivity(*operands, _workspace_on(weight.device), **launch)


def linear_sensitivity_reference_(
    score: torch.Tensor | None,
    weight: torch.Tensor,
    inputs: torch.Tensor,
    grad_outputs: torch.Tensor,
    segments: torch.Tensor,
    *,
    sums: SensitivitySums | None = None,
) -> None:
    """Plain torch, one sample after the other, in score's dtype (float64 without a score)."""
    dtype = torch.float64 if score is None else score.dtype
    weight, inputs, grad_outputs = (t.to(dtype) for t in (weight, inputs, grad_outputs))
    bounds = segments.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        contributions = (weight * (grad_outputs[start:end].T @ inputs[start:end])).abs()
        if score is not None:
            score += contributions
        if sums is not None:
            sums.add_reference(contributions, score)


def _workspace_on(device: torch.device) -> Callable[[int], torch.Tensor]:
    """What the binding calls with the bytes it needs: it reads the operands once, not twice."""
    return lambda size: torch.empty(size, dtype=torch.uint8, device=device)


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """[..., C] -> (R, C)"""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def _check_outputs(score: torch.Tensor | None, sums: SensitivitySums | None) -> None:
    if score is None and sums is None:
        raise ValueError("score and sums: both are None, there is nothing to add to")


def _check_segments(segments: torch.Tensor, rows: int) -> None:
    if segments.dtype != torch.int64:
        raise TypeError(f"segments: expected dtype int64, got {segments.dtype}")
    if segments.ndim != 1 or len(segments) == 0:
        raise ValueError(f"segments: expected shape [N + 1], got {list(segments.shape)}")
    before = 0
    for place, offset in enumerate(segments.tolist()):
        if not before <= offset <= rows:
            raise ValueError(
                f"segments: expected ascending row offsets within [0, {rows}], "
                f"got {offset} after {before} at index {place}"
            )
        before = offset
