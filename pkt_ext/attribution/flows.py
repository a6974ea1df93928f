# SPDX-License-Identifier: Apache-2.0
"""What flows through every block at one position of each sample, gathered in one streamed forward.

A few vectors a block and sample: they stay on the host for as long as a pass lasts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from pkt_ext.errors import InputError
from pkt_ext.models.anatomy import Projection
from pkt_ext.models.capture import Flow, own_values, residual_flow
from pkt_ext.models.norms import Norm, read_norm
from pkt_ext.streaming.batches import Batch
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.passes import Visitor

ROLES = ("o", "down")  # by half of a block: the projection whose columns are its neurons


def projection_of(stream: StreamedModel, block: int, role: str) -> Projection:
    """One projection of a block."""
    return next(p for p in stream.anatomy.projections[block] if p.role == role)


class Flows(Visitor):
    """What flows at each sample's scored position, on the host; N samples in the order of `ids`.

    Halves of blocks are counted 2 * block + (0 attention, 1 FFN).

    Attributes:
        base, added: [2L, N, D], see `capture.Addition`.
        final:       [N, D], out of the last block.
        neurons:     by half, [N, K].
        scales:      fp32 [2L, N], what the norm behind the last projection divides by, or 1.
        norms:       by half, that norm's path and what it is, or None.
        targets:     int64 [N].

    Args:
        own_values: attention's neurons are what the position takes from itself alone.
    """

    def __init__(
        self,
        stream: StreamedModel,
        batches: Sequence[Batch],
        ids: list[str],
        *,
        own_values: bool,
    ):
        self.stream, self.ids, self._own_values = stream, ids, own_values
        self._row = {name: n for n, name in enumerate(ids)}
        self._positions: dict[str, int] = {}
        self.targets = torch.empty(len(ids), dtype=torch.int64)
        for batch in batches:
            for index, name in enumerate(batch.ids):
                positions, tokens = batch.targets(index)
                if len(tokens) != 1:
                    raise InputError(
                        f"sample {name!r} has {len(tokens)} targets; locating looks at one, see "
                        "pkt_ext.data.encode_targets"
                    )
                self._positions[name] = int(positions)
                self.targets[self._row[name]] = tokens[0]
        halves, width = 2 * len(stream.block_names), stream.anatomy.hidden_size
        shape = (halves, len(ids), width)
        self.base, self.added = (torch.empty(shape, dtype=stream.dtype) for _ in range(2))
        self.final = torch.empty(shape[1:], dtype=stream.dtype)
        self.neurons = [
            torch.empty(len(ids), projection_of(stream, block, role).shape[1], dtype=stream.dtype)
            for block in range(len(stream.block_names))
            for role in ROLES
        ]
        self.scales = torch.ones(shape[:2])
        self.norms: list[tuple[str, Norm] | None] = [None] * halves

    @contextmanager
    def forward(self, index: int, block: nn.Module, batch: Batch) -> Iterator[None]:
        """Keep the flow of one micro-batch through one block."""
        positions = torch.tensor([self._positions[name] for name in batch.ids])
        projections, found, own = self.stream.anatomy.projections[index], [], []
        arguments = block, projections, positions.to(self.stream.device)
        alone = own_values(*arguments, own.append) if self._own_values else nullcontext()
        with alone, residual_flow(*arguments, found.append):
            yield
        rows = [self._row[name] for name in batch.ids]
        self._keep(index, block, rows, *found)
        for values in own:
            self.neurons[2 * index][rows] = values.cpu()

    def _keep(self, index: int, block: nn.Module, rows: list[int], flow: Flow) -> None:
        self.final[rows] = flow.output.cpu()
        for half, addition in enumerate((flow.attention, flow.ffn), 2 * index):
            self.base[half, rows] = addition.base.cpu()
            self.added[half, rows] = addition.added.cpu()
            self.neurons[half][rows] = addition.neurons.cpu()
            if addition.norm is not None:
                path = f"{self.stream.anatomy.blocks[index]}.{addition.norm}"
                norm = read_norm(block.get_submodule(addition.norm), path)
                self.norms[half] = path, norm
                self.scales[half, rows] = norm.scale(addition.output.float()).cpu()
