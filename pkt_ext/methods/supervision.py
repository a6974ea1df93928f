# SPDX-License-Identifier: Apache-2.0
"""The passes over the teacher: which of its blocks matter, and what the student is steered by.

Each is one streamed pass within the budget; its result is kept for a resumed run.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from pkt_ext.attribution.layers import block_attribution
from pkt_ext.methods.semalign_inputs import Job
from pkt_ext.methods.semantic_map import SemanticMap
from pkt_ext.methods.similarity import cka_matrix
from pkt_ext.methods.targets import PIECE, Phase, Places, layer_paths, make_targets, watched
from pkt_ext.streaming.batches import Batch, Sample
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import fit, parse_bytes
from pkt_ext.streaming.meter import PassReport
from pkt_ext.streaming.needs import Prediction
from pkt_ext.streaming.passes import Pass, Visitor
from pkt_ext.streaming.progress import Progress
from pkt_ext.streaming.rows import RowFile

OBSERVED = 512  # positions at which blocks are compared by CKA, at most
DEBIASED = 4  # positions at least for a CKA that does not grow with the width


@dataclass(frozen=True)
class Supervision:
    """What training needs of the teacher, in files."""

    layers: list[RowFile]  # mapped vectors, by phase
    layer_places: Places  # which: of the rows to train on
    output: RowFile  # the teacher's head inputs
    output_places: Places  # of the rows to train on, then those held out
    seen: dict[int, RowFile]  # teacher block -> its rows [n, D_t] at the held-out positions
    passes: dict[str, dict]  # what they cost


class Observer:
    """Keeps what blocks give at the first positions of some samples, a file for each block.

    Args:
        samples, positions: whose rows; int64 [m] each.
        folder, name: the files are `<name>-<block>.activations`.
        width:     D.
        blocks:    which; None: all.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        positions: Sequence[torch.Tensor],
        folder: Path,
        name: str,
        width: int,
        blocks: set[int] | None = None,
    ):
        left, some = OBSERVED, []
        for each in positions:
            some.append(each[:left])
            left -= len(some[-1])
        self.places = Places.of(samples, some)
        self.files: dict[int, RowFile] = {}
        self._folder, self._name, self._width, self._blocks = folder, name, width, blocks

    def file(self, block: int) -> RowFile:
        """Of one block, whether it is there or not."""
        path = self._folder / f"{self._name}-{block:04}.activations"
        return RowFile(path, (self.places.total, self._width), torch.float32)

    def take(self, block: int, batch: Batch, hidden: torch.Tensor) -> None:
        """Of one micro-batch [B, T, D]; samples that are not looked at are passed over."""
        if self._blocks is not None and block not in self._blocks:
            return
        if block not in self.files:
            self.files[block] = self.file(block).create()
        for first, rows in self.places.rows(batch, hidden):
            self.files[block].write(first, rows)


class _Watcher(Visitor):
    """Shows an observer every block."""

    def __init__(self, observer: Observer, interface: str):
        self._observer, self._interface = observer, interface

    @contextmanager
    def forward(self, index: int, block: nn.Module, batch: Batch) -> Iterator[None]:
        """Around one micro-batch's forward."""
        with watched(block, self._interface) as seen:
            yield
        self._observer.take(index, batch, seen[0])


@dataclass(frozen=True)
class Reading:
    """One of the passes."""

    stream: StreamedModel
    samples: list[Sample]
    backward: bool = False
    width: int = 0  # D_s, where the teacher's rows are mapped


def readings(job: Job, config) -> dict[str, Reading]:
    """All passes that a run makes, by name, in their order."""
    teacher, student = job.streams
    sides = [part for part in (job.rows, job.held) if part is not None]
    found, width = {}, 0
    if not config.baseline:
        samples = drawn(job.rows.teacher, config.attribution_rows, config.seed)
        found["attribution"] = Reading(teacher, samples, backward=True)
        if config.pairing_meant == "similarity":
            rows = job.held or job.rows
            found["compare teacher"] = Reading(teacher, rows.teacher)
            found["compare student"] = Reading(student, rows.student)
        width = student.anatomy.hidden_size
    every = [sample for part in sides for sample in part.teacher]
    found["targets"] = Reading(teacher, every, width=width)
    return found


def attribute(job: Job, config, kept: Progress, show: bool) -> torch.Tensor:
    """Gradient x activation of every teacher block, float64 [L_t]."""
    if line := kept.find("attribution"):
        return torch.tensor(line["scores"], dtype=torch.float64)
    reading = readings(job, config)["attribution"]
    predicted = _fit(reading, config, kept, "attribution")
    passed: list[PassReport] = []
    scores = block_attribution(
        reading.stream,
        reading.samples,
        interface=config.attribution_meant,
        allotment=predicted.allotment,
        show=show,
        on_report=passed.append,
    )
    kept.record("attribution", scores=scores.tolist(), cost=_cost(passed[0], predicted))
    return scores


def compare_blocks(job: Job, config, kept: Progress, show: bool) -> torch.Tensor:
    """CKA of every student block with every teacher block, float64 [L_s, L_t], on the CPU.

    On the held-out rows; without any, on those to train on.
    """
    if line := kept.find("similarity"):
        return torch.tensor(line["matrix"], dtype=torch.float64)
    rows = job.held or job.rows
    files, costs = [], {}
    for which, who in enumerate(("teacher", "student")):
        name = f"compare {who}"
        reading = readings(job, config)[name]
        stream, samples = reading.stream, reading.samples
        positions = [pair[which] for pair in rows.positions]
        width = stream.anatomy.hidden_size
        observer = Observer(samples, positions, kept.folder, f"block-{who}", width)
        predicted = _fit(reading, config, kept, name)
        batches = stream.batches(samples, predicted.allotment.micro_batch)
        visitor = _Watcher(observer, config.interface_meant)
        with Pass(stream, batches, visitor, allotment=predicted.allotment, show=show) as run:
            run.forward()
            costs[name] = _cost(run.report(), predicted)
        files.append([observer.files[block] for block in range(len(stream.block_names))])
    theirs, ours = files
    matrix = cka_matrix(
        [file.read() for file in ours],
        [file.read() for file in theirs],
        debiased=ours[0].shape[0] >= DEBIASED,
    )
    kept.record("similarity", matrix=matrix.tolist(), costs=costs)
    for file in (*theirs, *ours):
        file.remove()
    return matrix


def supervise(
    job: Job,
    config,
    phases: Sequence[Phase],
    carried: SemanticMap | None,
    kept: Progress,
    show: bool,
) -> Supervision:
    """One forward of the teacher over all rows."""
    sides = [part for part in (job.rows, job.held) if part is not None]
    reading = readings(job, config)["targets"]
    stream, samples = reading.stream, reading.samples
    layer_places = Places.of(job.rows.teacher, [pair[0] for pair in job.layer_positions])
    positions = [pair[0] for part in sides for pair in part.positions]
    output_places = Places.of(samples, positions)
    used = {source.block for phase in phases for source in phase.sources}
    theirs, ours = (anatomy.hidden_size for anatomy in job.anatomies)
    observer = None
    if job.held and used:
        held = [pair[0] for pair in job.held.positions]
        observer = Observer(job.held.teacher, held, kept.folder, "seen", theirs, used)
    layers = [
        RowFile(path, (layer_places.total, ours), stream.dtype)
        for path in layer_paths(kept.folder, phases)
    ]
    output = RowFile(
        kept.folder / "output.activations", (output_places.total, theirs), stream.dtype
    )
    seen = {} if observer is None else {block: observer.file(block) for block in sorted(used)}
    files = [*layers, output, *seen.values()]
    line = kept.find("targets")
    if line is not None and line["checksums"] != [file.checksum() for file in files]:
        kept.drop_from("targets")  # damaged: made again, and all that was learned from them
        line = None
    if line is None:
        predicted = _fit(reading, config, kept, "targets")
        spent = make_targets(
            stream,
            samples,
            phases=phases,
            layers=(layers, layer_places),
            output=(output, output_places),
            mapped=carried and (lambda rows: carried.apply(rows, config.normalise)),
            interface=config.interface_meant,
            allotment=predicted.allotment,
            observe=observer and observer.take,
            show=show,
        )
        line = {"cost": _cost(spent, predicted)}
        kept.record("targets", checksums=[file.checksum() for file in files], **line)
    passes = {}
    if (found := kept.find("attribution")) is not None:
        passes["attribution"] = found["cost"]
    if (found := kept.find("similarity")) is not None:
        passes |= found["costs"]
    return Supervision(
        layers, layer_places, output, output_places, seen, passes | {"targets": line["cost"]}
    )


def drawn(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """So many of the samples, in their order."""
    if count >= len(samples):
        return list(samples)
    chosen = sorted(random.Random(seed).sample(range(len(samples)), count))
    return [samples[i] for i in chosen]


def target_bytes(reading: Reading, config) -> dict[str, int]:
    """Phase -> bytes beside a forward pass, as `needs.ForwardNeeds` wants them."""
    theirs, lengths = (
        reading.stream.anatomy.hidden_size,
        [len(s.input_ids) for s in reading.samples],
    )
    # what is seen at the interface, in float32 and by the samples' rows, and these mapped
    seen = 4 * config.micro_batch * max(lengths) * (3 * theirs + reading.width)
    return {
        "forward": 4 * theirs * reading.width + seen,
        "output": 4 * 4 * min(PIECE, sum(lengths) * theirs),
    }


def share_out(
    reading: Reading,
    config,
    budget: int | None,
    *,
    device: torch.device | None = None,
    known: dict | None = None,
) -> Prediction:
    """How a pass shares out its memory, and what it is predicted to take.

    Args:
        budget, device: see `budget.fit`.
        known: of an interrupted run, what touches the rounding.
    Raises:
        InputError: the budget is too small; names the smallest that works.
    """
    return fit(
        reading.stream,
        reading.samples,
        budget,
        micro_batch=config.micro_batch,
        extra={} if reading.backward else target_bytes(reading, config),
        outer=False,
        scored=False,
        durable=False,
        backward=reading.backward,
        fixed=known,
        device=device,
    )


def _fit(reading: Reading, config, kept: Progress, name: str) -> Prediction:
    """`share_out`; a resumed run keeps what touches the rounding."""
    name = f"allotment {name}"
    budget = config.budget and parse_bytes(config.budget)
    predicted = share_out(reading, config, budget, known=kept.state.get(name))
    allotment = predicted.allotment
    rounding = {"micro_batch": allotment.micro_batch, "head_rows": allotment.head_rows}
    kept.remember(**{name: rounding})
    return predicted


def _cost(spent: PassReport, predicted: Prediction) -> dict:
    return {
        "peak_bytes": spent.peak_bytes,
        "predicted_bytes": predicted.peak,
        "seconds": spent.seconds,
        "waits": spent.waits,
        "bytes_read": spent.bytes_read,
        **asdict(predicted.allotment),
    }
