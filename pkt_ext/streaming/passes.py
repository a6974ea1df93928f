# SPDX-License-Identifier: Apache-2.0
"""A forward and backward of a whole model with one block of weights resident at a time.

Layer-major: each block's weights are brought in once for the forward and once for the backward,
however many micro-batches there are (the last ones only once, where they fit beside the rest);
between blocks only the boundary activations live on. The model's own modules do all the computing.
What a block is called with (masks, rotary tables) is recorded from the model's own forward.

    record     embedding rows resident:  first hidden states, and every block's other arguments
    forward    block 0 .. L-1:           hidden states in, hidden states out, no graph
    tail       norm, head resident:      loss by rows, gradient of the last hidden states
    backward   block L-1 .. 0:           recompute with graph, gradient in, gradient out
    first      embedding rows resident:  gradients of the embedding, by sample (on demand)

The loss is the sum over samples of the sample's mean cross-entropy over its target tokens.

In float16 the gradients that cross a boundary carry a power of two, chosen anew at each so that the
largest is near 2^10; an overflow inside a block has the block run again with less. Scaling by
powers of two is exact, so it changes nothing but what would have been flushed to zero.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn

from pkt_ext.errors import InputError, NonFiniteError
from pkt_ext.models.recompute import Recomputation
from pkt_ext.streaming.bar import BlockBar
from pkt_ext.streaming.batches import Batch
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import Allotment
from pkt_ext.streaming.meter import Meter, PassReport
from pkt_ext.streaming.progress import Progress
from pkt_ext.streaming.ranks import ALONE, World
from pkt_ext.streaming.reader import Part, Reader
from pkt_ext.streaming.readout import Readout
from pkt_ext.streaming.store import ActivationStore

log = logging.getLogger(__name__)

_HEAD_SCALE = 12  # float16: log2 of the largest gradient of a logit
_LARGEST = (10, 4, -2, -8)  # float16: log2 of the largest gradient at a boundary, tried in turn


class Visitor:
    """What a pass does around each block. Every method may be left as it is."""

    def forward(self, index: int, block: nn.Module, batch: Batch) -> AbstractContextManager:
        """Around one micro-batch's forward, without graph."""
        return nullcontext()

    def loaded(self, index: int, block: nn.Module, scale: float) -> None:
        """In the backward, before a block's first micro-batch; its weights are resident.

        All gradients come multiplied by `scale`, a power of two. A block may be loaded again
        before it is finished: what was found of it before does not count.
        """

    def backward(self, index: int, block: nn.Module, batch: Batch) -> AbstractContextManager:
        """Around one micro-batch's forward with graph and its backward."""
        return nullcontext()

    def boundary(
        self, index: int, batch: Batch, hidden: torch.Tensor, gradient: torch.Tensor, scale: float
    ) -> None:
        """One micro-batch's hidden states that go into block `index`, and the gradient by them.

        In that block's backward; of those out of the last block, whose index is the number of
        blocks, in the tail. A block that is loaded again shows its own once more.

        Args:
            hidden, gradient: [B, T, D], not to be changed; the gradient multiplied by `scale`.
        """

    def crossing(
        self, index: int, batch: Batch, hidden: torch.Tensor, gradient: torch.Tensor, scale: float
    ) -> None:
        """The same that go into block `index`, and the gradient by what it makes of them.

        In that block's backward, before `boundary`; arguments as there.
        """

    def finished(self, index: int, block: nn.Module) -> None:
        """In the backward, after a block's last micro-batch; its weights are still resident."""

    def restored(self, index: int) -> None:
        """Instead of all the above for a block that an interrupted run has finished."""

    def last_gradients(self, sample: str, gradients: dict[str, torch.Tensor]) -> None:
        """In the tail: one sample's gradients of the parameters between last block and head."""


class Pass:
    """One pass over some batches; a context manager, which owns the activations.

    Args:
        stream:    the model.
        batches:   from `stream.batches`.
        visitor:   what to do on the way.
        allotment: how it shares out its memory; None: everything that was read or found stays.
        keep_rows: keep what `readout.head_gradients` needs.
        progress:  finished steps are recorded there and not done again; None: no trace is left.
        world:     the processes that pass over other samples at the same time, each by itself; what
                   all have finished is the progress.
        show:      show a bar over the blocks (on a terminal; log lines elsewhere).
    """

    def __init__(
        self,
        stream: StreamedModel,
        batches: list[Batch],
        visitor: Visitor | None = None,
        *,
        allotment: Allotment | None = None,
        keep_rows: bool = False,
        progress: Progress | None = None,
        world: World = ALONE,
        show: bool = True,
    ):
        self.world = world
        self.stream, self.batches = stream, batches
        self.visitor = visitor or Visitor()
        self.allotment = allotment or Allotment(
            len(batches[0].ids), resident=len(stream.block_names), activation_bytes=2**62
        )
        self.progress = progress
        self.store = ActivationStore(
            stream.device,
            self.allotment.activation_bytes,
            progress.folder if progress else None,
            host_limit=self.allotment.host_bytes,
            durable=progress is not None,
        )
        self.readout = Readout(
            stream, self.store, keep_rows=keep_rows, head_rows=self.allotment.head_rows
        )
        self.meter = Meter(stream.device)
        self.tokens = torch.cat([batch.input_ids.flatten() for batch in batches]).unique()
        self._reader = Reader(stream, self.meter, ahead=self.allotment.ahead)
        self._kept: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}  # resident blocks
        self._blocks = stream.blocks
        self._recompute = Recomputation()
        self._calls: list[list[tuple[tuple, dict]]] = []  # by micro-batch, by block
        self._pool: dict[tuple, list[torch.Tensor]] = {}
        self._scaled = stream.dtype == torch.float16
        self._exponents: dict[
            int, int
        ] = {}  # boundary -> log2 of what its stored gradients are multiplied by
        self._largest = 0.0  # of the gradients at the boundary last crossed
        self._target = 0  # which of _LARGEST
        self._bar = BlockBar(len(self._blocks), self.meter, show=show)

    def __enter__(self) -> Pass:
        self.meter.memory.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()
        self._reader.close()
        self.store.close()
        self.meter.memory.__exit__()

    def report(self) -> PassReport:
        """What the pass has cost so far."""
        waits = dict(self.meter.waits)
        return PassReport(
            seconds=self.meter.seconds,
            stages=self.meter.stages,
            waits=waits | {"compute": max(0.0, self.meter.seconds - sum(waits.values()))},
            bytes_read=self.meter.bytes_read,
            peak_bytes=self.meter.memory.bytes,
            samples=tuple(i for batch in self.batches for i in batch.ids),
            losses=dict(self.readout.losses),
            spilled_bytes=self.store.bytes_on_disk,
        )

    def run(self) -> None:
        """Record, forward, tail, backward.

        Raises:
            NonFiniteError: something is not finite; names block, sample, and parameter if one is to
                blame.
            ResourceError: no space for the activations.
        """
        last = len(self._blocks)
        with self.meter.stage("record"):
            self._record()
            done = self._restore()
        kept = set(self.stream.block_names[last - self._resident(done) :])
        self.plan(self._order(done, kept))
        with self.meter.stage("forward"):
            for index in range(done, last):
                self._forward(index, keep=self.stream.block_names[index] in kept)
        if done <= last:
            with self.meter.stage("tail"):
                self._tail()
        with self.meter.stage("backward"):
            for index in reversed(range(last - max(0, done - last - 1))):
                self._backward(index)

    def forward(self, then: Iterable[Part] = ()) -> None:
        """Instead of `run`: record and forward alone; the visitor takes what is wanted of them.

        One boundary's hidden states are kept at a time, and nothing for an interrupted run.

        Args:
            then: parts that `resident` will be asked for next, to be read ahead.

        Raises:
            NonFiniteError: hidden states that are not finite; names block, sample, and parameter if
                one is to blame.
            ResourceError: no space for the activations.
        """
        with self.meter.stage("record"):
            self._record()
        self.plan([*map(Part, self.stream.block_names), *then])
        for _ in self._blocks:
            self._bar.skip("backward")
        with self.meter.stage("forward"):
            for index in range(len(self._blocks)):
                self._forward(index, keep=False)
                self.store.drop(_hidden(index))
        self.store.drop(_hidden(len(self._blocks)))
        self._bar.close()

    def first_gradient(self, number: int) -> torch.Tensor:
        """After `run`: gradient [B, T, D] by a micro-batch's first hidden states; scaled."""
        return self.store.get(_gradient(0), number)

    def first_gradients(self) -> Iterator[tuple[int, int, dict[str, tuple[torch.Tensor, ...]]]]:
        """After `run`: the gradients of what makes the first hidden states, sample by sample.

        The model's own embedding code runs once more for each sample, with a graph that ends at the
        first block: scaled, offset and padding rows come out right whatever the formula.

        Yields:
            (micro-batch number, sample's row in it, {parameter name: (rows, gradient, weight)}):
            int64 [K] numbers of the rows that the sample reaches, fp32 [K, ...] gradient and
            [K, ...] weight of these rows.
        """
        stream = self.stream
        with stream.embedding_of(self.tokens, trainable=True):
            held = stream.parameters(stream.first_names)
            tables = [m for m in stream.model.modules() if isinstance(m, nn.Embedding)]
            for table in tables:
                table.sparse = True
            try:
                for number, batch in enumerate(self.batches):
                    gradient = self.first_gradient(number)
                    numbers = self._numbers(batch)
                    for row in range(len(batch.ids)):
                        real = (slice(row, row + 1), slice(batch.lengths[row]))
                        with torch.enable_grad():
                            hidden, _ = stream.record(numbers[real])
                        grads = torch.autograd.grad(
                            hidden, list(held.values()), gradient[real], allow_unused=True
                        )
                        found = zip(held, grads, strict=True)
                        yield (
                            number,
                            row,
                            {n: self._reached(n, held[n], g) for n, g in found if g is not None},
                        )
            finally:
                for table in tables:
                    table.sparse = False

    def plan(self, parts: Iterable[Part]) -> None:
        """The parts in the order in which `resident` will ask for them, to be read ahead."""
        self._reader.plan(parts)

    @contextmanager
    def resident(self, part: Part, *, trainable: bool = False) -> Iterator[None]:
        """Bring parameters in; they leave with the context. Waiting for them is booked as "load".

        Args:
            trainable: let them require grad.
        """
        with self.meter.stage("load"):
            tensors = self._kept.pop(part.names, None) or self._reader.take(part)
        with self.stream.resident(tensors, trainable=trainable):
            yield

    def _numbers(self, batch: Batch) -> torch.Tensor:
        """The batch's tokens as numbers of the rows that `embedding_of` brings in."""
        return torch.searchsorted(self.tokens, batch.input_ids)

    def _reached(self, name: str, parameter: torch.Tensor, gradient: torch.Tensor):
        """(rows, gradient, weight) of one sample; repeated rows added up, in fp32, unscaled."""
        weight = parameter.detach()
        unscale = 2.0 ** -self._exponents.get(0, 0)
        embedding = name == self.stream.embedding_name
        if not gradient.is_sparse:
            rows = self.tokens if embedding else torch.arange(len(weight), device=weight.device)
            return rows, gradient.float() * unscale, weight
        values = gradient._values().float() * unscale
        indices, shape = gradient._indices(), gradient.shape
        summed = torch.sparse_coo_tensor(indices, values, shape, check_invariants=False).coalesce()
        here = summed.indices()[0]
        return self.tokens[here] if embedding else here, summed.values(), weight[here]

    @torch.no_grad()
    def _record(self) -> None:
        with self.stream.embedding_of(self.tokens):
            for number, batch in enumerate(self.batches):
                hidden, calls = self.stream.record(self._numbers(batch))
                self._check(hidden, batch, "the embedding", self.stream.first_names, "values")
                self.store.put(_hidden(0), number, hidden, passing=True)
                self._calls.append([self._intern(call) for call in calls])

    def _intern(self, value):
        """`value` with equal tensors, and equal rows of a tensor, made one.

        Masks and rotary tables recur in every block, and, as the padding is on the right, for
        every sample.
        """
        if isinstance(value, torch.Tensor):
            if value.ndim and len(value) > 1 and (value == value[:1]).all():
                value = value[:1].clone().expand_as(value)
            same = self._pool.setdefault((value.shape, value.dtype), [])
            for known in same:
                if known is value or torch.equal(known, value):
                    return known
            same.append(value)
            return value
        if isinstance(value, dict):
            return {k: self._intern(v) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(self._intern(v) for v in value)
        return value

    def _order(self, done: int, kept: set[tuple[str, ...]]) -> Iterator[Part]:
        """What is brought in after the first `done` steps, one part after the other."""
        blocks, last = self.stream.block_names, len(self._blocks)
        yield from map(Part, blocks[done:last])
        if done <= last:
            yield Part(self.readout.small_names)
            yield from self.readout.parts()
        rest = reversed(blocks[: last - max(0, done - last - 1)])
        yield from (Part(names) for names in rest if names not in kept)

    def _resident(self, done: int) -> int:
        """How many blocks stay from the forward; an interrupted forward's are not there."""
        last = len(self._blocks)
        return min(self.allotment.resident, last - done) if done < last else 0

    @torch.no_grad()
    def _forward(self, index: int, *, keep: bool) -> None:
        block, names = self._blocks[index], self.stream.block_names[index]
        with self.resident(Part(names)):
            for number, batch in enumerate(self.batches):
                with self.visitor.forward(index, block, batch):
                    hidden = self._call(index, number, self.store.get(_hidden(index), number))
                where = self.stream.anatomy.blocks[index]
                self._check(hidden, batch, where, names, "hidden states")
                self.store.put(_hidden(index + 1), number, hidden)
            if keep:
                held = self.stream.parameters(names).items()
                self._kept[names] = {name: parameter.detach() for name, parameter in held}
        self._finish(f"forward {index}", [_hidden(index + 1)])
        self._bar.advance("forward", index)

    def _tail(self) -> None:
        last, largest = len(self._blocks), 0.0
        if self._scaled:  # of a logit's gradient nothing above 2^-36 of the largest is lost
            fewest = min(len(b.targets(i)[1]) for b in self.batches for i in range(len(b.ids)))
            self.readout.scale = 2.0 ** (_HEAD_SCALE + math.floor(math.log2(fewest)))
        gradients = self.readout.backward(
            self.batches,
            lambda number: self.store.get(_hidden(last), number),
            self.resident,
            self.visitor.last_gradients,
        )
        for number, hidden, gradient in gradients:
            batch, names = self.batches[number], self.stream.last_names
            self._check(gradient, batch, "the head", names, "gradients")
            self.visitor.boundary(last, batch, hidden, gradient, self.readout.scale)
            self.store.put(_gradient(last), number, gradient)
            largest = max(largest, self._size(gradient))
            del hidden, gradient  # before the next ones are made
        self._exponents[last] = round(math.log2(self.readout.scale))
        saved = {}
        if self.progress is not None:
            saved = {"rows": self.progress.save("readout", self.readout.state())}
        self._finish(
            "tail",
            [_gradient(last)] + ["readout"] * self.readout.keep_rows,
            saved=saved,
            losses=self.readout.losses,
            boundary=last,
            largest=largest,
        )
        self._largest = largest
        if self.progress is None:
            self.store.drop(_hidden(last))

    def _backward(self, index: int) -> None:
        names = self.stream.block_names[index]
        with self.resident(Part(names)):
            while True:
                try:
                    largest = self._backward_scaled(index)
                    break
                except NonFiniteError as error:
                    retry = self._scaled and error.sample is not None
                    if not retry or self._target == len(_LARGEST) - 1:
                        raise
                    self._target += 1
            with self.meter.stage("reduce"):
                self.visitor.finished(index, self._blocks[index])
        self._largest = largest
        self._finish(
            f"backward {index}",
            [_gradient(index)],
            boundary=index,
            largest=largest,
            target=self._target,
        )
        # one boundary more than the next block needs: other processes may be one block behind
        self.store.drop(_gradient(index + 2))
        self.store.drop(_hidden(index + 1))
        if self.progress is None:
            self.store.drop(_gradient(index + 1))
            self.store.drop(_hidden(index))
        self._bar.advance("backward", index)

    def _backward_scaled(self, index: int) -> float:
        """All micro-batches of one block; the largest gradient that leaves it."""
        block, shift, largest = self._blocks[index], 0, 0.0
        if self._scaled and self._largest:
            shift = _LARGEST[self._target] - math.floor(math.log2(self._largest))
        self._exponents[index] = self._exponents[index + 1] + shift
        self.visitor.loaded(index, block, 2.0 ** self._exponents[index])
        where, names = self.stream.anatomy.blocks[index], self.stream.block_names[index]
        for number, batch in enumerate(self.batches):
            hidden = self.store.get(_hidden(index), number).detach().requires_grad_()
            gradient = self.store.get(_gradient(index + 1), number)
            behind = 2.0 ** self._exponents[index + 1]
            self.visitor.crossing(index, batch, hidden.detach(), gradient, behind)
            with self.visitor.backward(index, block, batch), torch.enable_grad():
                call = partial(self._call, index, number, hidden)
                output = self._recompute(block, call)
                torch.autograd.backward(output, gradient * 2.0**shift if shift else gradient)
                del output
            self._check(hidden.grad, batch, where, names, "gradients")
            scale = 2.0 ** self._exponents[index]
            self.visitor.boundary(index, batch, hidden.detach(), hidden.grad, scale)
            self.store.put(_gradient(index), number, hidden.grad)
            largest = max(largest, self._size(hidden.grad))
        return largest

    def _size(self, gradient: torch.Tensor) -> float:
        return float(gradient.abs().max()) if self._scaled else 0.0

    def _call(self, index: int, number: int, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = self._calls[number][index]
        version = hidden._version
        output = self._blocks[index](hidden, *args, **kwargs)
        if hidden._version != version:  # the stored activations would be wrong from here on
            where = self.stream.anatomy.blocks[index]
            raise InputError(f"{where} overwrites its input in place; this model is not supported")
        return output[0] if isinstance(output, tuple) else output

    def _check(
        self, tensor: torch.Tensor, batch: Batch, where: str, names: Iterable[str], what: str
    ) -> None:
        """Refuse NaN and infinity in `tensor` [B, ...], by name."""
        if torch.isfinite(tensor).all():
            return
        finite = torch.isfinite(tensor).flatten(1).all(1)
        sample = batch.ids[int((~finite).nonzero()[0])]
        raise self.stream.not_finite(sample, where, names, what)

    # --- progress of an interrupted run -----------------------------------------------------------

    def _finish(self, step: str, groups: list[str], **facts) -> None:
        """Record a step; what the next one starts from is on disk."""
        if self.progress is not None:
            found = {group: self.store.entries(group) for group in groups}
            exponent = self._exponents.get(facts.get("boundary"))
            self.progress.record(step, groups=found, exponent=exponent, **facts)

    def _restore(self) -> int:
        """Take up what an interrupted run has finished; the number of steps to leave out."""
        if self.progress is None:
            return 0
        last = len(self._blocks)
        steps = [f"forward {i}" for i in range(last)] + ["tail"]
        steps += [f"backward {i}" for i in reversed(range(last))]
        lines = []
        for step in steps:
            if (line := self.progress.find(step)) is None:
                break
            lines.append(line)
        done = min(self.world.gather(len(lines)))
        if done < len(lines):
            self.progress.keep_until(steps[done - 1] if done else None)
            lines = lines[:done]
        groups = {k: v for line in lines for k, v in line["groups"].items()}
        if done <= last:
            needed = [_hidden(i) for i in range(1, done + 1)]
        else:
            at = 2 * last + 1 - done  # the boundary whose gradient is the latest
            needed = [_gradient(at)] + [_hidden(i) for i in range(1, at)]
            needed += ["readout"] * self.readout.keep_rows
        sound = all(self.store.restore(group, groups[group]) for group in needed)
        if not sound:
            log.warning("%s is damaged: starting afresh", self.progress.folder)
        if not all(self.world.gather(sound)):
            self.progress.keep(0)
            return 0
        if done > last:
            tail = lines[last]
            self.readout.restore(self.progress.load(tail["saved"]["rows"]), tail["losses"])
            self.readout.scale = 2.0 ** tail["exponent"]
            self._largest, self._target = lines[-1]["largest"], lines[-1].get("target", 0)
            self._exponents[lines[-1]["boundary"]] = lines[-1]["exponent"]
        for number, step in enumerate(steps[:done]):
            direction, _, index = step.partition(" ")
            if number != last:
                self._bar.skip(direction)
            if number > last:
                self.visitor.restored(int(index))
        if done:
            log.info("%s: %d of %d steps are there", self.progress.folder, done, len(steps))
        return done


def _hidden(index: int) -> str:
    """The group of the hidden states that go into block `index`."""
    return f"hidden-{index:04}"


def _gradient(index: int) -> str:
    """The group of the gradients by them."""
    return f"gradient-{index:04}"
