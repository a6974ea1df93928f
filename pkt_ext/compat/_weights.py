# SPDX-License-Identifier: Apache-2.0
"""Whether a model's weights are still what they were, edits through `.data` included."""

from __future__ import annotations

import torch
from torch import nn

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def state_of(model: nn.Module) -> tuple:
    """Equal for equal weights in the same places; reads every weight once.

    In-place operations show in a parameter's version, another tensor in its place. What is done
    through `.data` shows in neither: sums of the bits by row and by column tell it.
    """
    return tuple((p.data_ptr(), version(p), checksum(p)) for p in model.parameters())


def version(tensor: torch.Tensor) -> int:
    """How often it was written in place; 0 where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> int:
    """Of a tensor's bits, and where they stand."""
    if not tensor.numel():
        return 0
    rows = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.ndim > 1 else 1).contiguous()
    size = rows.element_size()
    if size == 2 and rows.shape[1] % 2 == 0:
        size = 4  # two at a time: sums of int32 are many times as fast
    words = rows.view(_WORDS[size])
    sums = [words.sum(axis, dtype=words.dtype) for axis in (0, 1)]  # they wrap around
    sums.append(rows.sum(1))  # flipped signs, an even number, are lost in the others
    return hash(tuple(part.cpu().view(torch.uint8).numpy().tobytes() for part in sums))
