# SPDX-License-Identifier: Apache-2.0
"""What a student is steered towards: one streamed forward of the teacher, kept in files.

Of every phase a file of mapped vectors [M, D_s], and for the output the teacher's head inputs
[M', D_t] behind its final norm: a row for each position that the loss in question looks at, the
samples' rows one after the other. Where a phase looks at a depth between two blocks (METHODS A4)
the lower block's rows wait for the upper's in a file of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn

from pkt_ext.errors import NonFiniteError
from pkt_ext.streaming.batches import Batch, Sample
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import Allotment
from pkt_ext.streaming.meter import PassReport
from pkt_ext.streaming.passes import Pass, Visitor
from pkt_ext.streaming.reader import Part
from pkt_ext.streaming.rows import RowFile

INTERFACES = ("contribution", "output")
PIECE = 1 << 22  # elements of head inputs normed at a time


@dataclass(frozen=True)
class Source:
    """A teacher block, and its weight in what a student block is steered towards."""

    block: int
    weight: float = 1.0


@dataclass(frozen=True)
class Phase:
    """One phase of the training: the student block that is trained, and what it is steered by."""

    block: int | None  # None: every block, without a layer loss
    sources: tuple[Source, ...] = ()  # ascending


@dataclass(frozen=True)
class Places:
    """Which rows a file holds: of sample n those at positions[n], from first[n] on."""

    positions: dict[str, torch.Tensor]  # by sample id, int64 [m]
    first: dict[str, int]
    total: int

    @classmethod
    def of(cls, samples: Sequence[Sample], positions: Sequence[torch.Tensor]) -> Places:
        """Of samples and their positions, in this order."""
        ends = list(accumulate(len(each) for each in positions))
        names = [sample.id for sample in samples]
        firsts = [0, *ends[:-1]]
        where, starts = (dict(zip(names, each, strict=True)) for each in (positions, firsts))
        return cls(where, starts, ends[-1])

    def rows(self, batch: Batch, hidden: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, its rows [m, D]) of a batch's known samples; hidden states [B, T, D]."""
        for index, name in enumerate(batch.ids):
            if name not in self.first:
                continue
            yield self.first[name], hidden[index, self.positions[name].to(hidden.device)]


@contextmanager
def watched(
    block: nn.Module, interface: str, take: Callable[[torch.Tensor], None] | None = None
) -> Iterator[list[torch.Tensor]]:
    """What a block's forward gives at the interface: one [B, T, D] behind the context.

    Args:
        interface: "contribution", output less input, or "output"; float32 differences.
        take: is given it instead, at once.
    """
    seen: list[torch.Tensor] = []

    def look(module: nn.Module, args: tuple, output: object) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        found = hidden if interface == "output" else hidden.float() - args[0].float()
        (take or seen.append)(found)

    handle = block.register_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


class TargetVisitor(Visitor):
    """Maps what the phases' source blocks give, and keeps what the last block gives.

    Args:
        phases:    with their sources.
        layers:    a file for each phase, made, and the rows that each holds.
        output:    the file of the last block's rows, made, and which these are.
        mapped:    [m, D_t] float32 -> [m, D_s].
        interface: see `watched`.
        observe:   given (block, batch, what is seen at the interface [B, T, D_t]) of every block.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        layers: tuple[Sequence[RowFile], Places],
        output: tuple[RowFile, Places],
        mapped: Callable[[torch.Tensor], torch.Tensor] | None,
        interface: str,
        observe: Callable[[int, Batch, torch.Tensor], None] | None,
        last: int,
    ):
        self._phases, (self._layers, self._places) = phases, layers
        self._mapped, self._last = mapped, last
        self._output, self._output_places = output
        self._interface, self._observe = interface, observe
        self._used = {source.block for phase in phases for source in phase.sources}
        self._waiting: dict[int, RowFile] = {}  # by phase, what lower blocks gave

    @contextmanager
    def forward(self, index: int, block: nn.Module, batch: Batch) -> Iterator[None]:
        """Take what one micro-batch gives at one block."""
        with watched(block, self._interface) as at_interface, watched(block, "output") as output:
            yield
        if self._observe is not None:
            self._observe(index, batch, at_interface[0])
        if index in self._used:
            for first, rows in self._places.rows(batch, at_interface[0]):
                self._take(index, first, rows.float())
        if index == self._last:
            for first, rows in self._output_places.rows(batch, output[0]):
                self._output.write(first, rows)

    def _take(self, index: int, first: int, rows: torch.Tensor) -> None:
        """Rows of one sample at a block that some phases look at."""
        for number, phase in enumerate(self._phases):
            blocks = [source.block for source in phase.sources]
            if index not in blocks:
                continue
            place = blocks.index(index)
            found = phase.sources[place].weight * rows
            if place:
                found += self._waiting[number].read()[first : first + len(rows)].to(rows.device)
            if place + 1 < len(blocks):
                self._wait(number, rows.shape[1]).write(first, found)
            else:
                self._layers[number].write(first, self._representable(index, found))

    def _representable(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        """Mapped, in the files' dtype: float16 ends at 65504."""
        found = self._mapped(rows).to(self._layers[0].dtype)
        if not torch.isfinite(found).all():
            raise NonFiniteError(
                f"what the teacher's block {index} gives becomes NaN or Inf when it is mapped and "
                f"kept in {found.dtype}; use --dtype bfloat16 or float32"
            )
        return found

    def _wait(self, number: int, width: int) -> RowFile:
        if number not in self._waiting:
            path = self._layers[number].path.with_suffix(".tmp")
            shape = self._places.total, width
            self._waiting[number] = RowFile(path, shape, torch.float32).create()
        return self._waiting[number]

    def close(self) -> None:
        """Delete what waited."""
        for file in self._waiting.values():
            file.remove()


def make_targets(
    stream: StreamedModel,
    samples: Sequence[Sample],
    *,
    phases: Sequence[Phase],
    layers: tuple[Sequence[RowFile], Places],
    output: tuple[RowFile, Places],
    mapped: Callable[[torch.Tensor], torch.Tensor] | None,
    interface: str,
    allotment: Allotment,
    observe: Callable[[int, Batch, torch.Tensor], None] | None = None,
    show: bool = True,
) -> PassReport:
    """Fill the files of the phases and of the output by one forward of the teacher.

    Rows are mapped in float32 and rounded once. Arguments: see `TargetVisitor`.

    Raises:
        NonFiniteError: hidden states that are not finite, by block, sample and parameter; mapped
            rows that the files' dtype cannot hold.
        ResourceError, OSError: no space.
    """
    for file in (*layers[0], output[0]):
        file.create()
    last = len(stream.block_names) - 1
    visitor = TargetVisitor(phases, layers, output, mapped, interface, observe, last)
    batches = stream.batches(samples, allotment.micro_batch)
    with Pass(stream, batches, visitor, allotment=allotment, show=show) as run:
        norm = Part(run.readout.small_names)
        run.forward([norm])
        visitor.close()
        with run.meter.stage("output"), run.resident(norm):
            _normed(stream, output[0])
        return run.report()


def layer_paths(folder: Path, phases: Sequence[Phase]) -> list[Path]:
    """Where the phases' targets are kept."""
    return [folder / f"layer-{n:04}.activations" for n, phase in enumerate(phases) if phase.sources]


@torch.no_grad()
def _normed(stream: StreamedModel, rows: RowFile) -> None:
    """Put the final norm, which is resident, on the last block's rows; in place."""
    path = stream.anatomy.final_norm
    if path is None:
        return
    norm, held = stream.model.get_submodule(path), rows.read()
    step = max(1, PIECE // rows.shape[1])
    for first in range(0, rows.shape[0], step):
        piece = held[first : first + step].to(stream.device, copy=True)
        rows.write(first, norm(piece))
