# SPDX-License-Identifier: Apache-2.0
"""What a streamed pass takes, phase by phase, before it runs: one source for `fit` and for plans.

A phase's peak is the sum of its ingredients at their largest, which on a CPU come on top of what
the process holds when the prediction is made. Blocks are measured (`footprint`); what the pass
makes around them is counted here, from the code of passes, store, readout and attribution.outer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from pkt_ext.streaming.batches import Sample
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.footprint import Footprint, measure, record
from pkt_ext.streaming.meter import resident_bytes
from pkt_ext.streaming.readout import LOGITS

if TYPE_CHECKING:
    from pkt_ext.streaming.budget import Allotment

SLACK = 32 * 2**20  # CPU: buffers of the matrix products and thread pools, measured
LIBRARY = 42 * 2**20  # CPU: bitsandbytes, where it is still to be imported
CONTEXT = 600 * 2**20  # CUDA: context and libraries' workspaces, outside of the allocator
OUTER_CHUNK = 2**23  # elements of the head that attribution.outer scores at once
_SCORE = 4  # bytes of a score
_SMALLEST_HEAD = 1024  # vocabulary rows: fewer save nothing beside the logits
_TEMPORARIES = 12  # bytes for each logit computed at once: three fp32
_CAPPED = 16  # the same where logits are soft-capped


@dataclass(frozen=True)
class Prediction:
    """What a pass will take, phase by phase.

    Attributes:
        allotment: how it shares out its memory.
        phases:    phase -> ingredient -> bytes; the phase's peak is their sum.
        shape:     (B, T) of the largest micro-batch.
        spilled:   bytes of activations that are on disk at once.
        written:   bytes of activations written to disk in all.
        read:      phase -> bytes of weights, as stored, that are brought in.
        flops:     phase -> operations, but for cutting and factoring.
        least:     peak bytes of the allotment that takes least.
    """

    allotment: Allotment
    phases: dict[str, dict[str, int]]
    shape: tuple[int, int]
    spilled: int
    written: int
    read: dict[str, int]
    flops: dict[str, int]
    least: int = 0

    @property
    def peaks(self) -> dict[str, int]:
        """Phase -> peak bytes."""
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak(self) -> int:
        """The largest of `peaks`."""
        return max(self.peaks.values())


@dataclass(frozen=True)
class _Work:
    """What the micro-batches of one size need to be known for."""

    shape: tuple[int, int]  # of the largest
    hidden: int  # bytes of the largest micro-batch's hidden states
    hidden_all: int  # of all of them, at one boundary
    rows: int  # target rows of the largest micro-batch
    rows_all: int
    most_targets: int  # of one sample
    footprints: list[Footprint]
    tokens: int  # of all micro-batches, with their padding
    arguments: int  # bytes of masks and rotary tables, kept
    recording: int  # bytes of making them


class Needs:
    """Bytes of a pass by phase, for any allotment; the arguments are those of `budget.fit`.

    For a device that is not here the model is on the CPU, where its blocks are measured.
    """

    def __init__(
        self,
        stream: StreamedModel,
        samples: Sequence[Sample],
        extra: Mapping[str, int],
        *,
        outer: bool,
        durable: bool,
        scored: bool = True,
        device: torch.device | None = None,
    ):
        self.stream, self.samples, self.extra = stream, samples, extra
        self.device = device or stream.device
        self.outer, self.durable, self.scored = outer, durable, scored
        self._work: dict[int, _Work] = {}
        self.itemsize = stream.dtype.itemsize
        self.width = stream.embedding.embedding_dim
        self.vocab = stream.anatomy.vocab_size
        self.tokens = len(torch.cat([sample.input_ids for sample in samples]).unique())
        self.blocks = [self._weights(names) for names in stream.block_names]
        head = stream.head_name
        self.small = self._weights(n for n in stream.last_names if n != head)
        self.first = self._weights(n for n in stream.first_names if n != stream.embedding_name)
        measured = self.work(1)  # what measuring loads is there from now on
        self.process = CONTEXT
        if self.device.type == "cpu":
            self.process = resident_bytes() + SLACK
            if stream.checkpoint.quantisation and "bitsandbytes" not in sys.modules:
                self.process += LIBRARY
        self.scores = [_SCORE * f.parameters if scored else 0 for f in measured.footprints]

    def head_sizes(self) -> list[int | None]:
        """Rows of the head at a time, the most first. Half as many are worth a try each."""
        sizes: list[int | None] = [None]
        rows = -(-self.vocab // 2)
        while rows > _SMALLEST_HEAD:
            sizes.append(rows)
            rows = -(-rows // 2)
        return sizes

    def boundary_bytes(self, micro_batch: int) -> int:
        """Of every activation that is alive at once, at most."""
        return max(self._alive(self.work(micro_batch), 1).values())

    def work(self, micro_batch: int) -> _Work:
        """Measured once for each size of micro-batch."""
        if micro_batch not in self._work:
            self._work[micro_batch] = self._measure(micro_batch)
        return self._work[micro_batch]

    def _measure(self, micro_batch: int) -> _Work:
        batches = self.stream.batches(self.samples, micro_batch)
        shapes = sorted({b.shape for b in batches}, key=lambda s: (-s[0] * s[1], -s[1]))
        outermost = [
            s for s in shapes if not any(o != s and o[0] >= s[0] and o[1] >= s[1] for o in shapes)
        ]
        found = [measure(self.stream, shape, scored=self.scored) for shape in outermost]
        footprints = [max(same, key=lambda f: f.backward) for same in zip(*found, strict=True)]
        recordings = [record(self.stream, shape) for shape in shapes]
        row = self.width * self.itemsize
        targets = [[len(b.targets(i)[1]) for i in range(len(b.ids))] for b in batches]
        return _Work(
            shape=shapes[0],
            hidden=max(size * length * row for size, length in shapes),
            hidden_all=sum(b.input_ids.numel() for b in batches) * row,
            rows=max(map(sum, targets)),
            rows_all=sum(map(sum, targets)),
            most_targets=max(map(max, targets)),
            footprints=footprints,
            tokens=sum(b.input_ids.numel() for b in batches),
            arguments=sum(r.kept for r in recordings),
            recording=max(r.peak for r in recordings),
        )

    def predict(self, allotment: Allotment) -> Prediction:
        """The peak of every phase."""
        work = self.work(allotment.micro_batch)
        alive = self._alive(work, allotment.head_rows)
        most = max(alive.values())
        kept = {phase: min(size, allotment.activation_bytes) for phase, size in alive.items()}
        # read back, or on their way to the disk behind the work
        spills = allotment.activation_bytes < most
        held = allotment.activation_bytes + allotment.host_bytes
        moving = work.hidden if spills else 0
        if self.durable and self.device.type == "cuda":
            moving = work.hidden
        weights = self._resident_weights(allotment)
        scores, graph = max(self.scores), [f.backward for f in work.footprints]
        phases = {
            "prepare": {},
            "record": {
                "weights": self.first + self.tokens * self.width * self.itemsize,
                "arguments": work.arguments,
                "activations": kept["record"] + moving,
                "working memory": work.recording,
            },
            "forward": {
                "weights": weights["forward"],
                "arguments": work.arguments,
                "activations": kept["forward"] + 2 * moving,
                "working memory": max(f.forward for f in work.footprints),
            },
            "tail": {
                "weights": weights["tail"],
                "arguments": work.arguments,
                "activations": kept["tail"] + 2 * moving,
                "working memory": self._tail(work, allotment.head_rows),
            },
            "backward": {
                "weights": weights["backward"],
                "arguments": work.arguments,
                "activations": kept["backward"] + 3 * moving,
                "scores": scores,
                "working memory": max(graph) + self._scaled(work),
            },
            "reduce": {
                "weights": weights["backward"],
                "arguments": work.arguments,
                "activations": kept["backward"] + moving,
                "scores": scores,
                "working memory": self.extra.get("reduce", 0),
            },
        }
        if self.outer:
            phases["outer"] = {
                "arguments": work.arguments,
                "activations": kept["outer"] + 2 * moving,
                "working memory": max(self._outer(work), self.extra.get("outer", 0)),
            }
        phases["write"] = {"working memory": self.extra.get("write", 0)}
        return Prediction(
            allotment,
            {name: {"process": self.process, **parts} for name, parts in phases.items()},
            work.shape,
            spilled=most if self.durable else max(0, most - held),
            written=self._written(work, held),
            read=self._read(allotment),
            flops=self._flops(work, allotment.head_rows),
        )

    def _weights(self, names: Iterable[str]) -> int:
        """Bytes that these parameters take on the device; a mapping of the file takes none."""
        checkpoint, stream = self.stream.checkpoint, self.stream
        return sum(
            prod(checkpoint.shape(name)) * self.itemsize
            for name in names
            if not checkpoint.is_mapped(name, stream.dtype, self.device)
        )

    def _read(self, allotment: Allotment) -> dict[str, int]:
        """Each block twice, but once where it stays; the head by parts twice."""
        stream, stored = self.stream, self.stream.checkpoint.bytes_of
        blocks = [stored(names) for names in stream.block_names]
        head, embedding = stored([stream.head_name]), stored([stream.embedding_name])
        first = stored(n for n in stream.first_names if n != stream.embedding_name)
        last = stored(n for n in stream.last_names if n != stream.head_name)
        rows = first + embedding * self.tokens // self.vocab
        stays = len(blocks) - min(allotment.resident, len(blocks))
        found = {
            "record": rows,
            "forward": sum(blocks),
            "tail": last + head * (1 if allotment.head_rows is None else 2),
            "backward": sum(blocks[:stays]),
        }
        if self.outer:  # scored, then factored
            found["outer"] = rows + head + (head + embedding if "outer" in self.extra else 0)
        return found

    def _flops(self, work: _Work, head_rows: int | None) -> dict[str, int]:
        """Every token at the price of one in the largest micro-batch, where attention is dearest.

        The products with the head are two, for logits and gradient; scoring takes two more, and a
        head in parts has its logits computed twice.
        """
        share = work.tokens / prod(work.shape)
        forward = sum(f.forward_flops for f in work.footprints)
        backward = sum(f.backward_flops + f.scoring_flops for f in work.footprints)
        product = 2 * work.rows_all * self.vocab * self.width
        found = {
            "forward": int(share * forward),
            "tail": product * (2 if head_rows is None else 3),
            "backward": int(share * (forward + backward)),
        }
        if self.outer:
            found["outer"] = 2 * product
        return found

    def _head(self, rows: int | None) -> int:
        if rows is None:
            return self._weights([self.stream.head_name])
        return rows * self.width * self.itemsize  # rows are copied even out of a mapping

    def _resident_weights(self, allotment: Allotment) -> dict[str, int]:
        """The most bytes of weights in each phase: what is at work, what is read ahead, what stays.

        See `Pass._order` for the order.
        """
        count = len(self.blocks)
        stays = count - min(allotment.resident, count)
        head = self._head(allotment.head_rows)
        most = {"forward": 0, "tail": 0, "backward": 0}

        def step(phase: str, kept: int, at_work: int, following: int) -> None:
            total = kept + at_work + (following if allotment.ahead else 0)
            most[phase] = max(most[phase], total)

        for index in range(count):
            following = self.blocks[index + 1] if index + 1 < count else self.small
            step("forward", sum(self.blocks[stays:index]), self.blocks[index], following)
        kept = sum(self.blocks[stays:])
        first = self.blocks[stays - 1] if stays else 0
        chunks = allotment.head_rows is not None
        step("tail", kept + self.small, head, max(first, head if chunks else 0))
        for index in reversed(range(count)):
            if index >= stays:
                step("backward", sum(self.blocks[stays : index + 1]), 0, first)
            else:
                step("backward", 0, self.blocks[index], self.blocks[index - 1] if index else 0)
        return most

    def _alive(self, work: _Work, head_rows: int | None) -> dict[str, int]:
        """Bytes of the activations that are alive at once, by phase; see `Pass._backward`."""
        hidden, count = work.hidden_all, len(self.blocks)
        inputs = work.rows_all * self.width * self.itemsize if self.outer else 0
        chunked = 0
        if head_rows is not None:
            inputs = work.rows_all * self.width * self.itemsize
            chunked = work.rows_all * self.width * 4
        gradients = 3 if self.durable else 2  # one boundary more, for an interrupted run
        tied = 0
        if self.outer and self.stream.anatomy.tied:
            tied = sum(len(s.input_ids) for s in self.samples) * self.width * 4
        return {
            "record": hidden,
            "forward": (count + 1) * hidden,
            "tail": (count + 2) * hidden + inputs + chunked,
            "backward": (count + gradients - (not self.durable)) * hidden + inputs,
            "outer": gradients * hidden + inputs + tied,
        }

    def _written(self, work: _Work, held: int) -> int:
        """Bytes written to disk in all, with `held` bytes kept in memory."""
        hidden, count = work.hidden_all, len(self.blocks)
        inputs = work.rows_all * self.width * self.itemsize if self.outer else 0
        if self.durable:  # all but the first hidden states, which can be made anew
            return max(0, hidden - held) + 2 * count * hidden + hidden + inputs
        return max(0, (count + 1) * hidden + inputs - held) + max(0, count * hidden - held)

    def _scaled(self, work: _Work) -> int:
        """float16 gradients are multiplied by a power of two, beside the stored ones."""
        return work.hidden if self.stream.dtype == torch.float16 else 0

    def _logits(self, rows: int, vocabulary: int) -> int:
        limit = LOGITS[self.device.type]
        count = min(rows, max(1, limit // vocabulary)) * vocabulary
        return count * (_CAPPED if self.stream.anatomy.logit_softcap else _TEMPORARIES)

    def _tail(self, work: _Work, head_rows: int | None) -> int:
        inputs = work.rows * self.width
        carried = 3 * inputs * (self.itemsize if head_rows is None else 4)
        norm = 4 * work.most_targets * self.width * 4  # of one sample, in fp32
        return work.hidden + carried + max(norm, self._logits(work.rows, head_rows or self.vocab))

    def _outer(self, work: _Work) -> int:
        """Embedding rows and one sample's gradients of them; then chunks of the head."""
        length = work.shape[1]
        table = self.first + self.tokens * self.width * self.itemsize
        sample = length * self.width * (4 * self.itemsize + 3 * 4)
        size = max(64, OUTER_CHUNK // max(work.shape[0] * length, self.width))
        chunk = min(size, self.vocab) * self.width * self.itemsize
        inputs = work.rows * self.width * self.itemsize
        if self.stream.anatomy.tied:  # rows of inputs and gradients are joined by the embedding's
            inputs = 3 * inputs + length * self.width * 4
        head = chunk + inputs + min(size, self.vocab) * work.rows * _TEMPORARIES
        return max(table + sample, head)


class ForwardNeeds(Needs):
    """Bytes of a pass that goes forward alone (`Pass.forward`).

    `extra` has the phases that follow, with all that they take but for masks and tables; "forward"
    in it is what the visitor holds on to.
    """

    def boundary_bytes(self, micro_batch: int) -> int:
        """Of the hidden states that are alive at once: into a block and out of it."""
        return 2 * self.work(micro_batch).hidden_all

    def predict(self, allotment: Allotment) -> Prediction:
        """The peak of every phase."""
        work, most = self.work(allotment.micro_batch), self.boundary_bytes(allotment.micro_batch)
        moving = work.hidden if allotment.activation_bytes < most else 0
        held = allotment.activation_bytes + allotment.host_bytes
        after = {phase: size for phase, size in self.extra.items() if phase != "forward"}
        phases = {
            "prepare": {},
            "record": {
                "weights": self.first + self.tokens * self.width * self.itemsize,
                "arguments": work.arguments,
                "activations": min(work.hidden_all, allotment.activation_bytes) + moving,
                "working memory": work.recording,
            },
            "forward": {
                "weights": self._resident_weights(allotment)["forward"],
                "arguments": work.arguments,
                "activations": min(most, allotment.activation_bytes) + 2 * moving,
                "working memory": max(f.forward for f in work.footprints)
                + self.extra.get("forward", 0),
            },
            **{
                phase: {"arguments": work.arguments, "working memory": size}
                for phase, size in after.items()
            },
        }
        read, flops = self._read(allotment), self._flops(work, None)
        return Prediction(
            allotment,
            {name: {"process": self.process, **parts} for name, parts in phases.items()},
            work.shape,
            spilled=max(0, most - held),
            written=max(0, work.hidden_all - held // 2) * (len(self.blocks) + 1),
            read={phase: read[phase] for phase in ("record", "forward")},
            flops={"forward": flops["forward"]},
        )
