# SPDX-License-Identifier: Apache-2.0
"""Products with a frozen head [V, D], float32 results, in memory that a budget bounds.

A float32 head is multiplied as it is; on a GPU so is a 16-bit one by rows of its own dtype, the
result in float32. Any other pairing brings the head to float32, a piece of the vocabulary at a
time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pkt_ext.ops._workers import spans

_PIECE_SHARE = 8  # a piece of the head takes at most this part of the budget
_ALIGNED = 4  # float32 values: rows of logits start at multiples of 16 bytes


class HeadProducts:
    """Logits of hidden states, and the way back. Autocast and gradients are the caller's to stop.

    Args:
        head:   [V, D] float32, float16 or bfloat16, any strides.
        dtype:  of the rows of hidden states.
        budget: bytes, of which pieces of the head take a part.
        device: what the memory is wanted for, where the head is not there: "cpu" or "cuda".
    """

    def __init__(
        self, head: torch.Tensor, dtype: torch.dtype, budget: int, device: str | None = None
    ):
        self.head = head
        dense = 1 in head.stride()  # a product would copy any other
        on_gpu = (device or head.device.type) == "cuda"
        self._native = dense and on_gpu and dtype == head.dtype != torch.float32
        self._piece = None
        if not self._native and (head.dtype != torch.float32 or not dense):
            fitting = budget // _PIECE_SHARE // max(1, 4 * head.shape[1])
            size = max(1, min(len(head), fitting)), head.shape[1]
            self._piece = head.new_empty(size, dtype=torch.float32)

    @property
    def fixed_bytes(self) -> int:
        """Memory whatever the number of rows."""
        return 0 if self._piece is None else self._piece.nbytes

    @property
    def row_bytes(self) -> int:
        """Memory for every row: its logits, where rounded also their gradient, and its state."""
        vocab, width = self.head.shape
        return (6 if self._native else 4) * (vocab + _ALIGNED) + 8 * width

    def buffer(self, rows: int) -> torch.Tensor | None:
        """What `logits` fills, float32 [rows, V]; None where torch allocates them."""
        if self._native:
            return None
        vocab = len(self.head)
        padded = -(-vocab // _ALIGNED) * _ALIGNED
        return self.head.new_empty(rows, padded, dtype=torch.float32)[:, :vocab]

    def logits(self, states: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
        """states head^T, float32 [M, V], in the buffer's first rows."""
        if self._native:
            return torch.mm(states, self.head.T, out_dtype=torch.float32)
        states, out = states.float(), buffer[: len(states)]
        if self._piece is None:
            return torch.mm(states, self.head.T, out=out)
        for part, piece in self._pieces():
            torch.mm(states, piece.T, out=out[:, part])
        return out

    def back(self, gradient: torch.Tensor, out: torch.Tensor) -> None:
        """out = gradient head, float32 [M, D]; the gradient's memory may be used for it."""
        if self._native:
            rounded, scale = rounded_rows(gradient, self.head.dtype)
            out.copy_(torch.mm(rounded, self.head, out_dtype=torch.float32))
            if scale is not None:
                out.div_(scale)
        elif self._piece is None:
            torch.mm(gradient, self.head, out=out)
        else:
            out.zero_()
            for part, piece in self._pieces():
                out.addmm_(gradient[:, part], piece)

    def _pieces(self):
        for part in spans(len(self.head), len(self._piece)):
            rows = self.head[part]
            yield part, self._piece[: len(rows)].copy_(rows)


def chunk_rows(products: Sequence[HeadProducts], count: int, budget: int) -> int:
    """Rows at a time of `count` that go through all of these within the budget, at least one."""
    left = budget - sum(one.fixed_bytes for one in products)
    most = max(1, left // sum(one.row_bytes for one in products))
    chunks = max(1, -(-count // most))
    return -(-count // chunks)  # equal chunks: a short one is multiplied at a lower rate


def rounded_rows(
    gradient: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows of float32 [M, V] in a 16-bit dtype, and what they were multiplied with, [M, 1].

    float16 rows are scaled by a power of two, in place, so that the largest value is near 2^14:
    gradients are often below what float16 holds. A NaN stays within its row.
    """
    if dtype != torch.float16 or gradient.numel() == 0:
        return gradient.to(dtype), None
    low, high = gradient.aminmax(dim=1, keepdim=True)
    exponent = torch.frexp(torch.maximum(high, -low)).exponent.clamp(-100, 100)
    scale = torch.ldexp(torch.ones_like(high), 14 - exponent)
    return gradient.mul_(scale).to(dtype), scale
