# SPDX-License-Identifier: Apache-2.0
"""Bytes that cutting windows and factoring them takes, for a budget: see methods/windows."""

from __future__ import annotations

import torch

from pkt_ext.methods.pairing import Plan
from pkt_ext.models.anatomy import Projection
from pkt_ext.ops.low_rank import workspace_bytes
from pkt_ext.ops.max_window import workspace_bytes as window_bytes
from pkt_ext.streaming.blocks import StreamedModel

_SLAB = 4096  # rows that windows.Cutter._factor looks at for NaN at once


def reduction_bytes(
    plan: Plan,
    stream: StreamedModel,
    rank: int,
    mode: str,
    tokens: int | None = None,
    device: torch.device | None = None,
) -> dict[str, int]:
    """Phase of a pass -> bytes that its reduction takes at the largest matrix.

    Args:
        stream: the teacher.
        rank, mode: of `ops.lora_factors`.
        tokens: vocabulary rows of embedding and head that are cut; None: all.
        device: where that is not the teacher's; see `budget.fit`.
    """
    dtype, device = stream.dtype, device or stream.device
    found = {"write": 3 * plan.adapter_bytes(rank)}
    cuts = [
        _cut(mine, theirs.shape, rank, mode, dtype, device) for mine, theirs in plan.cuts.values()
    ]
    found["reduce"] = max(cuts, default=0)
    if plan.outer:
        rows = plan.student.vocab_size if tokens is None else tokens
        window = rows, plan.student.hidden_size
        table = 0 if tokens is None else rows * plan.student.hidden_size * dtype.itemsize
        if not stream.checkpoint.is_mapped(stream.head_name, dtype, device):
            table += plan.teacher.vocab_size * plan.teacher.hidden_size * dtype.itemsize
        found["outer"] = table + _factors(window, rank, mode, dtype, device)
    return found


def _cut(mine: Projection, window, rank: int, mode: str, dtype, device) -> int:
    """One matrix: its window is searched for, then factored."""
    whole = mine.rows.count if mine.rows is not None else mine.shape[0]
    elements = whole * mine.shape[1]
    copied = 0
    if mine.rows is not None and mine.rows.groups > 1:  # interleaved rows are picked out
        copied = elements * (4 + dtype.itemsize)
    search = window_bytes((whole, mine.shape[1]), *window, device)
    if mine.rows is not None and device.type == "cpu":  # summed in float64, by way of a copy
        search = max(search, elements * 8)
    return copied + max(search, _factors(window, rank, mode, dtype, device))


def _factors(window: tuple[int, int], rank: int, mode: str, dtype: torch.dtype, device) -> int:
    rows, cols = window
    check = min(rows, _SLAB) * cols * (dtype.itemsize + 2)  # |w|, and two masks
    return max(check, workspace_bytes(window, rank, mode=mode, dtype=dtype, device=device))
