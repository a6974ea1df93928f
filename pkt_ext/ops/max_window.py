# SPDX-License-Identifier: Apache-2.0
"""The contiguous window of a score matrix with the largest sum."""

from typing import NamedTuple

import torch

from pkt_ext.ops import _backend

_GRID = 65535  # matrices a launch: CUDA's limit on a grid's second and third dimension


class MaxWindow(NamedTuple):
    """Where the best window starts and what it sums to; each of the score's leading shape."""

    row: torch.Tensor  # int64
    col: torch.Tensor  # int64
    total: torch.Tensor  # float64


def max_window(score: torch.Tensor, height: int, width: int) -> MaxWindow:
    """Find the height x width window of largest sum in each score matrix.

    Sums are float64, accumulated in a fixed order (equal bits on any thread count), with an error
    of at most (rows + cols) * 2^-53 of the sum of the matrix's magnitudes. Among windows of equal
    sum the first in row-major order wins; sums that float64 holds exactly (whole numbers, or values
    within 2^29 of each other) tie exactly. A matrix with a NaN or an infinity gives row = col = -1
    and total = NaN. Nothing is copied to the host.

    Args:
        score:  [..., N, D] float32, float64, float16 or bfloat16, any strides.
        height: rows of the window, 1 to N.
        width:  columns of the window, 1 to D.
    Raises:
        ValueError: the window does not fit, or score has fewer than two dimensions.
        TypeError:  a dtype not listed above.
    Source: Zhong et al., ICLR 2024 (arXiv 2310.11451), extraction; METHODS S5.
    """
    if score.ndim < 2:
        raise ValueError(f"score: expected at least 2 dimensions, got shape {list(score.shape)}")
    if score.ndim == 2:
        return MaxWindow(*(part[0] for part in _search(score[None], height, width)))
    try:
        flat = score.view(-1, *score.shape[-2:])
    except RuntimeError:  # leading strides that no single stride describes: one index at a time
        parts = [max_window(part, height, width) for part in score]
        return MaxWindow(*(torch.stack(column) for column in zip(*parts, strict=True)))
    return MaxWindow(*(part.view(score.shape[:-2]) for part in _search(flat, height, width)))


def _search(score: torch.Tensor, height: int, width: int) -> MaxWindow:
    """`max_window` for [B, N, D]."""
    count = len(score)
    found = MaxWindow(
        torch.empty(count, dtype=torch.int64, device=score.device),
        torch.empty(count, dtype=torch.int64, device=score.device),
        torch.empty(count, dtype=torch.float64, device=score.device),
    )
    parts = zip(score.split(_GRID), *(column.split(_GRID) for column in found), strict=True)
    with _backend.device_of(score) as launch:
        for part, *places in parts:
            size = _backend._C.max_window_workspace(part, height, width)
            workspace = torch.empty(size, dtype=torch.float64, device=score.device)
            _backend._C.max_window(part, height, width, *places, workspace, **launch)
    return found


def workspace_bytes(shape: tuple[int, int], height: int, width: int, device: torch.device) -> int:
    """Bytes that `max_window` works in for one float32 score [N, D]."""
    score = torch.empty(1, *shape)  # looked at for its shape only: never touched, so never there
    values = _backend._C.max_window_workspace(score, height, width)
    return 8 * values * (2 if device.type == "cuda" else 1)  # a GPU cuts it into twice the chunks


def max_window_reference(score: torch.Tensor, height: int, width: int) -> MaxWindow:
    """Plain torch: float64 running sums down, then right (the sliding difference)."""
    values = score.double()
    rows, cols = values.shape[-2:]
    if not (1 <= height <= rows and 1 <= width <= cols):
        raise ValueError(f"a window of {height} x {width} does not fit {rows} x {cols}")
    for size, dim in ((height, -2), (width, -1)):
        steps = values.shape[dim] - size
        first = values.narrow(dim, 0, size).sum(dim, keepdim=True)
        change = values.narrow(dim, size, steps) - values.narrow(dim, 0, steps)
        values = torch.cat([first, first + change.cumsum(dim)], dim)
    total = values.flatten(-2).amax(-1)
    first = (values.flatten(-2) == total[..., None]).byte().argmax(-1)
    finite = score.isfinite().flatten(-2).all(-1)
    return MaxWindow(
        torch.where(finite, first // values.shape[-1], -1),
        torch.where(finite, first % values.shape[-1], -1),
        torch.where(finite, total, torch.nan),
    )
