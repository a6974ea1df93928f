# SPDX-License-Identifier: Apache-2.0
"""What a SemAlign training takes, before a weight is read: the stage with the student in memory.

A micro-batch goes through students of few blocks on fake tensors (see streaming.footprint), from
the block that is trained to the loss and back; further blocks add what the last of those added.
What surrounds that is counted here, from the code of `steering`, `alignment_trainer` and
`closeness`. A block's input is computed in less than its training takes, and has no phase here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pkt_ext.alignment_trainer import adapters_alone_random, supervised
from pkt_ext.heap import give_back_freed_memory
from pkt_ext.methods.closeness import Heads, closeness_bytes, first_rows
from pkt_ext.methods.semalign_inputs import Job
from pkt_ext.methods.steering import lora_ranks, objective_of
from pkt_ext.methods.students import bytes_in_memory, dtype_in_memory
from pkt_ext.models.anatomy import describe
from pkt_ext.models.frontier import activations
from pkt_ext.objectives import Objective, RelationGeometry, relation_distance
from pkt_ext.ops import head_bytes
from pkt_ext.streaming.batches import ALIGNMENT
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.footprint import Tracker, count_flops
from pkt_ext.streaming.meter import resident_bytes
from pkt_ext.streaming.needs import CONTEXT, SLACK
from pkt_ext.training_needs import (
    block_stride,
    fake_device,
    fill_with_fakes,
    on_meta,
    with_adapters,
)

_HEADS = {  # op -> which of its arguments are heads, one for each product
    "head_kl": (1, 3),
    "head_fisher": (2, 2),
    "head_cosine_onehot": (1,),
    "head_cross_entropy": (1,),
}
_ENDS = 2 * SLACK  # CPU: what the Trainer loads when it starts, beside the matrix products' buffers


@dataclass(frozen=True)
class _Run:
    """A micro-batch's forward, loss and backward; bytes are beyond weights, batch and heads."""

    logits: int  # at most while there are logits
    peak: int  # at most at any other time, gradients included
    flops: int


class SteeringNeeds:
    """Bytes and operations of the training.

    On a CPU freed memory goes back to the system from here on (see `heap`).

    Args:
        job:    no weight is read, nor is anything changed.
        config: the `SemAlignConfig`.
        device: where the student is to be, where that is not the job's; it need not be here.
    Attributes:
        phases: phase -> ingredient -> bytes; a phase's peak is their sum. "block 3" is the phase
            that trains this one; which blocks a schedule of pairs will train nobody knows yet.
    """

    def __init__(self, job: Job, config, device: torch.device | None = None):
        self.job, self.config = job, config
        self.device = (device or job.streams[1].device).type
        if self.device == "cpu":
            give_back_freed_memory()
        self.stream, self.anatomy = job.streams[1], job.anatomies[1]
        self.dtype, self.blocks = dtype_in_memory(job.streams[1]), len(job.anatomies[1].blocks)
        self._fakes = fake_device(self.device)
        lengths = [len(sample.input_ids) for sample in job.rows.student]
        self._length = max(lengths)
        # of every row, the most first: where the output loss looks, and where the layer loss does
        self._looks = [
            sorted((len(own) for _, own in positions), reverse=True)
            for positions in (job.rows.positions, job.layer_positions)
        ]
        stride = block_stride(self.stream.checkpoint.config)
        # blocks of students that run for the bytes, where the first may be like no other, and for
        # the operations
        self._sizes, self._counted_sizes = (
            [min(n * stride, self.blocks) for n in counts] for counts in ((2, 3), (1, 2))
        )
        self._heads = self._heads_on_meta()
        self._runs = [self._run(size) for size in self._sizes]
        looking = self._look()
        # what measuring has loaded is there from now on
        self.process = resident_bytes() + _ENDS if self.device == "cpu" else CONTEXT
        self.phases = self._phases(looking)

    @property
    def peak(self) -> int:
        """Bytes at most."""
        return max(sum(parts.values()) for parts in self.phases.values())

    def steps(self) -> int:
        """Optimiser steps of a phase."""
        steps = self.config.phase_steps(len(self.job.rows.student))
        return steps * self.config.phase_count(self.blocks) if self.config.baseline else steps

    def flops(self) -> dict[str, int]:
        """Phase -> operations of its steps, and of its input; "look": before and after."""
        config, sizes = self.config, self._counted_sizes
        forward = [self._forward_flops(size) for size in sizes]
        whole = self._extended(forward, self.blocks, sizes)
        one = whole - self._extended(forward, self.blocks - 1, sizes)
        training = [self._run(size, count=True).flops for size in sizes]
        rows = len(self.job.rows.student)
        row = 1 / min(config.micro_batch, rows)
        found, steps = {}, self.steps() * min(config.batch, rows)
        for phase, block in self._blocks().items():
            step = self._extended(training, self.blocks - block, sizes)
            before = one * rows * (block > 0)
            found[phase] = int(row * (steps * step + before))
        seen = len(self.job.held.student) if self.job.held else 0
        seen += len(self.job.unrelated)
        found["look"] = int(2 * row * seen * whole)
        return found

    # --- phases -----------------------------------------------------------------------------------

    def _blocks(self) -> dict[str, int]:
        """Phase -> the first block that runs in it."""
        if self.config.baseline:
            return {"all blocks": 0}
        return {f"block {block}": block for block in range(self.blocks)}

    def _phases(self, looking: int) -> dict[str, dict[str, int]]:
        trained, on_cpu = trained_numbers(self.stream, self.config), self.device == "cpu"
        always = {
            "process": self.process,
            "weights": bytes_in_memory(self.stream, self.device),
            "heads": self._head_copies(),
        }
        if not self.config.baseline:  # of which the report is still to tell
            always["map"] = matrix_bytes(self.job)
        found, largest = {}, 0
        for phase, block in self._blocks().items():
            now = sum(trained) if self.config.baseline else trained[block]
            largest = max(largest, now)
            found[phase] = {
                "trained": self._held(block, now),
                "optimizer": 8 * now,  # AdamW's two moments
                "rows": self._rows(block, self.config.batch + self.config.micro_batch),
                "activations": self._activations(self.blocks - block),
            }
        held = max(parts["trained"] for parts in found.values())
        # those of the last step are there while the next step's come
        fetched = max(self._rows(block, 2 * self.config.batch) for block in self._blocks().values())
        found["rows"] = {"trained": held, "optimizer": 8 * largest, "rows": fetched}
        if self.job.held is not None or self.job.unrelated:
            found["look"] = {"trained": held, "activations": looking}
        if on_cpu:  # as bytes of a file
            found["save"] = {"trained": held, "working memory": 2 * 4 * largest}
            if self.config.train == "lora":
                found["write"] = {"trained": held, "working memory": 2 * held}
        return {phase: always | parts for phase, parts in found.items()}

    def _held(self, block: int, now: int) -> int:
        """Bytes of what is trained, beside the student's weights: all LoRA, or blocks' copies."""
        counts, count = (
            trained_numbers(self.stream, self.config),
            phase_count(self.stream, self.config),
        )
        if self.config.train == "lora":
            if self.config.baseline:
                return 4 * now
            return 4 * sum(sorted(counts, reverse=True)[:count])
        if self.config.baseline:
            return 4 * now
        if self.config.schedule_meant == "frontier":
            earlier = counts[:block]
        else:
            earlier = sorted(counts[:block] or [0], reverse=True)[: count - 1]
        mapped = self._mapped()  # of a mapping a page that is written to is memory
        return 4 * now + (self.dtype.itemsize * sum(earlier) if mapped else 0)

    def _mapped(self) -> bool:
        checkpoint, name = self.stream.checkpoint, self.stream.block_names[0][0]
        return checkpoint.folder is not None and checkpoint.is_mapped(name, self.dtype, self.device)

    def _rows(self, block: int, count: int) -> int:
        """Bytes of so many collated rows, at most twice all, with the block's cached input."""
        theirs, ours = (a.hidden_size for a in self.job.anatomies)
        size, most = self.job.streams[0].dtype.itemsize, len(self.job.rows.student)
        count = min(count, 2 * most)
        outputs, layers = (sum(n[:count]) + sum(n[: max(0, count - most)]) for n in self._looks)
        found = outputs * (size * theirs + 2 * 8)  # and rows and labels
        if not self.config.baseline:
            found += layers * (size * ours + 8)
        token = 8 + (self.dtype.itemsize * ours if block else 0)
        return found + count * self._length * token

    def _activations(self, blocks: int) -> int:
        return max(
            self._extended([run.logits for run in self._runs], blocks, self._sizes),
            self._extended([run.peak for run in self._runs], blocks, self._sizes),
        )

    @staticmethod
    def _extended(values: Sequence[int], blocks: int, sizes: Sequence[int]) -> int:
        """A value for students of `sizes` blocks, for one of so many."""
        few, many = sizes
        if few == many or blocks <= few:
            return values[0]
        return int(values[0] + (values[1] - values[0]) * (blocks - few) / (many - few))

    # --- heads ------------------------------------------------------------------------------------

    def _heads_on_meta(self) -> Heads:
        """As `Heads.of` has them."""
        teacher, (theirs, ours) = self.job.streams[0], self.job.anatomies
        sizes = {"device": "meta"}
        own = torch.empty(ours.vocab_size, ours.hidden_size, dtype=self.dtype, **sizes)
        shared = len(self.job.shared)
        return Heads(
            own,
            torch.empty(shared, ours.hidden_size, dtype=self.dtype, **sizes),
            torch.empty(shared, theirs.hidden_size, dtype=teacher.dtype, **sizes),
            ours.logit_softcap,
            theirs.logit_softcap,
        )

    def _head_copies(self) -> int:
        """The teacher's; of the student's the rows that are shared, if they are not the first."""
        copied = not isinstance(first_rows(self.job.shared.student), slice)
        return self._heads.teacher.nbytes + (self._heads.student.nbytes if copied else 0)

    # --- on fake tensors --------------------------------------------------------------------------

    def _run(self, layers: int, count: bool = False) -> _Run:
        """Forward, loss and backward of a micro-batch, of the first block on.

        Args:
            count: operations, without bytes: the counter takes operations to pieces.
        """
        model, anatomy = self._student(layers)
        with FakeTensorMode():
            fill_with_fakes(model, self._fakes)
            adapters_alone_random(model)
            batch, heads = self._batch(), self._fake_heads(model, anatomy)
            norm = model.get_submodule(anatomy.final_norm) if anatomy.final_norm else None
            objective = objective_of(self.config, heads, norm, steered=not self.config.baseline)
            if isinstance(objective.layer_loss, RelationGeometry):
                counts = self._looks[1][: self.config.micro_batch]
                objective.layer_loss = _Geometry(counts, objective.layer_loss.interface)
            given = [*model.parameters(), *model.buffers(), *batch.values(), *vars(heads).values()]
            with _Watch(given, self.device) as watch:
                if self.config.batch > self.config.micro_batch:  # those of earlier micro-batches
                    for parameter in model.parameters():
                        if parameter.requires_grad:
                            parameter.grad = torch.empty_like(parameter)
                if count:
                    with count_flops() as flops:
                        self._loss(model, anatomy, batch, objective).backward()
                    return _Run(0, 0, flops.get_total_flops() + watch.flops)
                self._loss(model, anatomy, batch, objective).backward()
        return _Run(watch.logits, watch.peak, 0)

    def _loss(self, model, anatomy, batch: dict, objective: Objective) -> torch.Tensor:
        with self._autocast():
            found = activations(
                model,
                anatomy,
                batch["input_ids"],
                None if self.config.baseline else 0,
                outputs=objective.output_loss is not None,
                recompute=self.config.gradient_checkpointing,
            )
        return objective.total(objective.losses(batch, **supervised(found, batch)))

    def _look(self) -> int:
        """Peak bytes of a look at held-out rows: beside weights and heads."""
        samples = [*(self.job.held.student if self.job.held else ()), *self.job.unrelated]
        if not samples:
            return 0
        rows = min(self.config.micro_batch, len(samples))
        length = max(len(sample.input_ids) for sample in samples)
        tokens = rows * -(-length // ALIGNMENT) * ALIGNMENT
        peak = self._forward(self._sizes[0], rows, -(-length // ALIGNMENT) * ALIGNMENT)
        watched = 0 if self.config.baseline else 3 * 4 * tokens * self.anatomy.hidden_size
        heads, most = self._heads, max(len(sample.input_ids) for sample in samples)
        behind = self.dtype.itemsize * tokens * self.anatomy.hidden_size
        behind += max(
            closeness_bytes(heads, most, self.device),
            head_bytes(most, [heads.own], self.dtype, self.device),
        )
        return max(peak + watched, behind)

    def _forward(self, layers: int, rows: int, length: int) -> int:
        model, anatomy = self._student(layers)
        with FakeTensorMode():
            fill_with_fakes(model, self._fakes)
            model.eval()
            ids = torch.zeros(rows, self._fit(length), dtype=torch.int64, device=self._fakes)
            with Tracker([*model.parameters(), *model.buffers(), ids]) as watch, torch.no_grad():
                activations(model, anatomy, ids)
        return watch.peak

    def _forward_flops(self, layers: int) -> int:
        model, anatomy = self._student(layers)
        with FakeTensorMode():
            fill_with_fakes(model, self._fakes)
            ids = self._batch()["input_ids"]
            with count_flops() as flops, torch.no_grad():
                activations(model, anatomy, ids)
        return flops.get_total_flops()

    def _fit(self, length: int) -> int:
        if self.anatomy.position_embedding:
            return min(length, self.stream.checkpoint.config.max_position_embeddings)
        return length

    def _student(self, layers: int):
        """(a student of so many blocks on meta, its anatomy); the first block, or all, trained."""
        model = on_meta(self.stream.checkpoint.config, self.dtype, layers).eval()
        model.requires_grad_(False)
        anatomy = describe(model)
        lora = self.config.train == "lora"
        if lora:
            with_adapters(
                model, lora_ranks(anatomy, self.config, range(layers)), self.config.dropout
            )
        first = () if self.config.baseline else (f"{anatomy.blocks[0]}.",)
        starts = first or tuple(f"{path}." for path in anatomy.blocks)
        for name, parameter in model.named_parameters():
            chosen = name.startswith(starts) and (not lora or ".lora_" in name)
            parameter.requires_grad_(chosen)
            if chosen:
                parameter.data = parameter.data.float()
        return model, anatomy

    def _batch(self) -> dict:
        """A micro-batch as `alignment_trainer.collate` makes them; without values."""
        (theirs, ours), size = (a.hidden_size for a in self.job.anatomies), self.config.micro_batch
        rows, layer_rows = (sum(counts[:size]) for counts in self._looks)
        there, kind = {"device": self._fakes}, self.job.streams[0].dtype
        shape = min(size, len(self.job.rows.student)), self._length
        return {
            "input_ids": torch.zeros(shape, dtype=torch.int64, **there),
            "rows": torch.zeros(rows, dtype=torch.int64, **there),
            "labels": torch.zeros(rows, dtype=torch.int64, **there),
            "layer_rows": torch.zeros(layer_rows, dtype=torch.int64, **there),
            "layer": torch.empty(layer_rows, ours, dtype=kind, **there),
            "output": torch.empty(rows, theirs, dtype=kind, **there),
            "segments": None,
            "layer_segments": None,
        }

    def _fake_heads(self, model, anatomy) -> Heads:
        own = model.get_submodule(anatomy.head).weight
        student, teacher = (
            torch.empty(head.shape, dtype=head.dtype, device=self._fakes)
            for head in (self._heads.student, self._heads.teacher)
        )
        return Heads(own, student, teacher, self._heads.student_cap, self._heads.teacher_cap)

    def _autocast(self):
        half = self.dtype != torch.float32
        return torch.autocast(self._fakes, dtype=self.dtype if half else None, enabled=half)


def trained_numbers(stream: StreamedModel, config) -> list[int]:
    """How many numbers training a student's block trains, by block; headers are enough."""
    shape = stream.checkpoint.shape
    if config.train == "block":
        return [sum(prod(shape(name)) for name in names) for names in stream.block_names]
    found = []
    for block in range(len(stream.block_names)):
        ranks = lora_ranks(stream.anatomy, config, [block])
        found.append(sum(rank * sum(shape(f"{path}.weight")) for path, rank in ranks.items()))
    return found


def matrix_bytes(job: Job) -> int:
    """Of the map itself."""
    return 4 * prod(anatomy.hidden_size for anatomy in job.anatomies)


def phase_count(stream: StreamedModel, config) -> int:
    """Phases at most: pairs may be fewer than critical blocks."""
    return 1 if config.baseline else config.phase_count(len(stream.block_names))


class _Geometry(RelationGeometry):
    """Of rows without values no sequence is left out: which ones would be cannot be seen."""

    def __init__(self, rows: Sequence[int], interface: str):
        super().__init__()
        self._counts, self.interface = rows, interface

    def _each(self, states, targets, segments):
        pairs = zip(states.split(self._counts), targets.split(self._counts), strict=True)
        return torch.stack([relation_distance(*pair)[0] for pair in pairs])


class _Watch(Tracker):
    """A Tracker that knows what the ops with heads take inside, and how many operations that is."""

    def __init__(self, given, device: str):
        super().__init__(given)
        self.logits = self.flops = 0
        self._device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("pkt_ext::")
        if name in _HEADS and (heads := [args[i] for i in _HEADS[name]]):
            states = args[0]
            inside = head_bytes(len(states), heads, states.dtype, self._device)
            results = 4 * (states.numel() + len(states))
            self.logits = max(self.logits, self.live + inside + results)
            back = states.shape[1] * len(heads[0])
            self.flops += 2 * len(states) * (back + sum(head.numel() for head in heads))
        return super().__torch_dispatch__(func, types, args, kwargs)
