# SPDX-License-Identifier: Apache-2.0
"""From the last block's hidden states to the loss and back, without [N, T, V] logits.

Only rows that predict a target are looked at, a chunk of rows at a time, and where the head does
not fit, a chunk of its vocabulary rows at a time. Let x be a row, z = x W^T, c = cap tanh(z / cap)
(or z), y the target and n the sample's number of targets:

    loss = (logsumexp(c) - c_y) / n,     dloss/dz_v = (exp(c_v - lse) - [v = y]) / n * dc/dz

Chunks of the vocabulary carry the logsumexp as a running maximum and sum; the gradient then takes a
second sweep. For the head's own gradient the head's inputs and the rows' logsumexp are kept: with
them, any set of vocabulary rows has its output gradients recomputed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from pkt_ext.errors import InputError, NonFiniteError
from pkt_ext.streaming.batches import Batch
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.reader import Part
from pkt_ext.streaming.store import ActivationStore

LOGITS = {"cpu": 2**23, "cuda": 2**26}  # logits computed at once
_AGREE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # with the model's own


@dataclass(eq=False)
class _Rows:
    """What is kept of one micro-batch's M target rows."""

    targets: torch.Tensor  # int64 [M]
    weights: torch.Tensor  # fp32 [M], 1 / n of the row's sample
    segments: torch.Tensor  # int64 [B + 1], row offsets of the samples
    largest: torch.Tensor  # fp32 [M], of the logits seen so far
    sums: torch.Tensor  # fp32 [M], of exp(logit - largest)
    scored: torch.Tensor  # fp32 [M], the target's logit

    @property
    def lse(self) -> torch.Tensor:
        return self.largest + self.sums.log()


class Readout:
    """Final norm, head and loss.

    Args:
        stream:    the model.
        store:     keeps the head's inputs where `keep_rows`, or where the head comes in chunks.
        keep_rows: whether `head_gradients` will be asked for.
        head_rows: vocabulary rows of the head brought in at once; None: all.
    Attributes:
        losses: sample id -> mean cross-entropy over its targets, in nats.
        scale:  a power of two by which every gradient that leaves this class is multiplied.
    """

    def __init__(
        self,
        stream: StreamedModel,
        store: ActivationStore,
        *,
        keep_rows: bool,
        head_rows: int | None = None,
    ):
        self.stream, self.store, self.keep_rows = stream, store, keep_rows
        vocab = stream.anatomy.vocab_size
        self.head_rows = min(head_rows or vocab, vocab)
        self.losses: dict[str, float] = {}
        self.scale = 1.0
        self._cap = stream.anatomy.logit_softcap
        self._rows: dict[int, _Rows] = {}
        path = stream.anatomy.final_norm
        self._norm = stream.model.get_submodule(path) if path else nn.Identity()
        self._norm_names = {n: f"{path}.{n}" for n, _ in self._norm.named_parameters()}
        self._checked = False
        self.small_names = tuple(n for n in stream.last_names if n != stream.head_name)

    def parts(self) -> Iterator[Part]:
        """The parts of the head in the order in which `backward` takes them."""
        parts = head_parts(self.stream, self.head_rows)
        yield from parts if len(parts) == 1 else parts * 2

    def backward(
        self,
        batches: list[Batch],
        hidden: Callable[[int], torch.Tensor],
        resident: Callable[..., AbstractContextManager],
        last_gradients: Callable[[str, dict[str, torch.Tensor]], None],
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Loss of every sample, and its gradient by the last hidden states, scaled.

        Args:
            hidden:         micro-batch number -> [B, T, D], out of the last block.
            resident:       brings a part of the model in.
            last_gradients: given each sample's id and {name: gradient} of the final norm, not
                            scaled, fp32.
        Yields:
            (micro-batch number, the hidden states, the gradient by them, [B, T, D] in their dtype
            and zero in rows without a target).
        Raises:
            NonFiniteError: a loss that is not finite.
            InputError: logits that the model itself computes otherwise.
        """
        parts = list(self.parts())
        with resident(Part(self.small_names), trainable=True):
            if len(parts) == 1:
                with resident(parts[0]):
                    for number, batch in enumerate(batches):
                        inputs = self._inputs(number, batch, hidden(number))
                        through = self._sweep(number, inputs, 0, gradients=True)
                        self._book_losses(number, batch)
                        yield self._through_norm(
                            number, batch, hidden(number), through, last_gradients
                        )
                return
            for number, batch in enumerate(batches):
                self._inputs(number, batch, hidden(number))
            for place, part in enumerate(parts):
                gradients = place >= len(parts) // 2
                first = part.rows.start
                if gradients and first == 0:
                    for number, batch in enumerate(batches):
                        self._book_losses(number, batch)
                with resident(part):
                    for number in self._rows:
                        self._sweep_part(number, first, gradients)
            for number, batch in enumerate(batches):
                through = self.store.get("readout-gradient", number).to(self.stream.dtype)
                yield self._through_norm(number, batch, hidden(number), through, last_gradients)
            self.store.drop("readout-gradient")

    def head_gradients(
        self, weight: torch.Tensor, ids: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Gradient of the loss by the outputs of some of the head's rows, by micro-batch; scaled.

        Args:
            weight: [K, D], these rows of the head.
            ids:    int64 [K], their tokens.
        Yields:
            (micro-batch number, inputs [M, D], output gradients [M, K] in the same dtype,
            segments int64 [B + 1]): rows segments[n]:segments[n + 1] belong to sample n.
        """
        column = torch.full((self.stream.anatomy.vocab_size,), -1, device=ids.device)
        column[ids] = torch.arange(len(ids), device=ids.device)
        for number, rows in self._rows.items():
            inputs = self.store.get("readout", number)
            logits = self._logits(inputs, weight)
            every = slice(0, len(inputs))
            gradient = self._output_gradient(logits, rows, every, column[rows.targets])
            yield number, inputs, gradient.to(inputs.dtype), rows.segments

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` needs, but for the losses and the store's tensors."""
        return {f"{number}.{k}": v for number, r in self._rows.items() for k, v in vars(r).items()}

    def restore(self, state: dict[str, torch.Tensor], losses: dict[str, float]) -> None:
        """Take up what an interrupted run had found."""
        found: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in state.items():
            number, _, name = key.partition(".")
            found.setdefault(int(number), {})[name] = value.to(self.stream.device)
        self._rows = {number: _Rows(**values) for number, values in sorted(found.items())}
        self.losses = dict(losses)

    @torch.no_grad()
    def _inputs(self, number: int, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """The head's inputs [M, D] of one micro-batch; its rows are noted."""
        places = [batch.targets(index) for index in range(len(batch.ids))]
        counts = [len(targets) for _, targets in places]
        inputs = torch.cat(
            [self._norm(hidden[index, positions]) for index, (positions, _) in enumerate(places)]
        )
        targets = torch.cat([targets for _, targets in places])
        device = hidden.device
        weights = torch.tensor([1.0 / n for n in counts for _ in range(n)], device=device)
        segments = torch.tensor([0, *counts], device=device).cumsum(0)
        nothing = torch.zeros(len(targets), device=device)
        self._rows[number] = _Rows(
            targets, weights, segments, nothing - torch.inf, nothing, nothing.clone()
        )
        if self.keep_rows or self.head_rows < self.stream.anatomy.vocab_size:
            self.store.put("readout", number, inputs, passing=not self.keep_rows)
        if not self._checked:
            self._last = hidden[0, places[0][0]][-1:], inputs[counts[0] - 1 : counts[0]]
        return inputs

    def _sweep_part(self, number: int, first: int, gradients: bool) -> None:
        inputs = self.store.get("readout", number)
        through = self._sweep(number, inputs, first, gradients=gradients)
        if through is None:
            return
        if first:
            through += self.store.get("readout-gradient", number)
        self.store.put("readout-gradient", number, through, passing=True)

    @torch.no_grad()
    def _sweep(
        self, number: int, inputs: torch.Tensor, first: int, *, gradients: bool
    ) -> torch.Tensor | None:
        """Look at the resident rows of the head, `first` and on, for one micro-batch.

        Where they are the whole head, or in the sweep without gradients, the logsumexp takes them
        in. With gradients: their share of the gradient by `inputs`, [M, D]; fp32 of a part.
        """
        weight, rows = self.stream.head.weight, self._rows[number]
        whole = len(weight) == self.stream.anatomy.vocab_size
        if not self._checked:
            self._checked = True
            hidden, row = self._last
            check_logits(self.stream, hidden, self._logits(row, weight))
        size = max(1, LOGITS.get(inputs.device.type, 2**26) // len(weight))
        found = []
        for start in range(0, len(inputs), size):
            some = slice(start, min(start + size, len(inputs)))
            logits = self._logits(inputs[some], weight)
            column = rows.targets[some] - first
            column = torch.where((column >= 0) & (column < len(weight)), column, -1)
            if whole or not gradients:
                add_logits(logits, rows, some, column)
            if gradients:
                gradient = self._output_gradient(logits, rows, some, column).to(inputs.dtype)
                found.append(gradient @ weight)
        if not gradients:
            return None
        through = torch.cat(found)
        return through if whole else through.float()

    def _output_gradient(
        self, logits: torch.Tensor, rows: _Rows, some: slice, column: torch.Tensor
    ) -> torch.Tensor:
        """dloss/dz times the scale of logits [m, K], fp32; `column`: targets among them, or -1."""
        gradient = torch.exp(logits - rows.lse[some, None])
        present = (column >= 0).nonzero().squeeze(1)
        gradient[present, column[present]] -= 1.0
        gradient *= (rows.weights[some] * self.scale)[:, None]
        if self._cap:
            gradient *= 1.0 - (logits / self._cap).square()
        return gradient

    def _logits(self, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return soft_capped((inputs @ weight.T).float(), self._cap)

    def _through_norm(
        self,
        number: int,
        batch: Batch,
        hidden: torch.Tensor,
        through: torch.Tensor,
        last_gradients: Callable[[str, dict[str, torch.Tensor]], None],
    ) -> tuple[int, torch.Tensor, torch.Tensor]:
        """What `backward` yields, from the gradient by the head's inputs [M, D]."""
        gradient = torch.zeros_like(hidden)
        parameters = dict(self._norm.named_parameters())
        bounds = self._rows[number].segments.tolist()
        for index, sample in enumerate(batch.ids):
            positions, _ = batch.targets(index)
            rows = hidden[index, positions].requires_grad_()
            with torch.enable_grad():
                inputs = self._norm(rows)
            own = through[bounds[index] : bounds[index + 1]]
            grads = torch.autograd.grad(inputs, [rows, *parameters.values()], own)
            gradient[index, positions] = grads[0]
            if parameters:
                names = self._norm_names.values()
                found = (g.float() / self.scale for g in grads[1:])
                last_gradients(sample, dict(zip(names, found, strict=True)))
        return number, hidden, gradient

    def _book_losses(self, number: int, batch: Batch) -> None:
        rows = self._rows[number]
        each = (rows.lse - rows.scored) * rows.weights
        bounds = rows.segments.tolist()
        for index, sample in enumerate(batch.ids):
            value = float(each[bounds[index] : bounds[index + 1]].sum())
            if value - value != 0:
                raise self._not_finite(sample, value)
            self.losses[sample] = value

    def _not_finite(self, sample: str, value: float) -> NonFiniteError:
        error = self.stream.not_finite(sample, "the head", self.stream.last_names, "logits")
        if error.sample is None:
            return error
        return NonFiniteError(
            f"sample {sample!r}: the loss is {value} in {self.stream.dtype}; use dtype float32 or "
            "bfloat16, or leave the sample out (pkt seeking --nonfinite skip-sample)",
            sample,
        )


def head_parts(stream: StreamedModel, rows: int | None) -> list[Part]:
    """The head, whole or so many vocabulary rows at a time."""
    vocab, names = stream.anatomy.vocab_size, (stream.head_name,)
    if rows is None or rows >= vocab:
        return [Part(names)]
    return [Part(names, slice(n, min(n + rows, vocab))) for n in range(0, vocab, rows)]


class LogSums(Protocol):
    """Running sums over a vocabulary whose rows come in parts, for M rows of logits, fp32 [M]."""

    largest: torch.Tensor  # of the logits seen so far
    sums: torch.Tensor  # of exp(logit - largest)
    scored: torch.Tensor  # the target's logit


def add_logits(logits: torch.Tensor, rows: LogSums, some: slice, column: torch.Tensor) -> None:
    """Take further logits [m, K] of `some` rows into their sums; `column`: targets among them.

    Args:
        column: int64 [m], -1 where the target is not among these K tokens.
    """
    before = rows.largest[some]
    largest = torch.maximum(before, logits.amax(1))
    sums = torch.exp(logits - largest[:, None]).sum(1)
    rows.sums[some] = rows.sums[some] * torch.exp(before - largest) + sums
    rows.largest[some] = largest
    here = column >= 0
    chosen = logits.gather(1, column.clamp(min=0)[:, None]).squeeze(1)
    rows.scored[some] = torch.where(here, chosen, rows.scored[some])


def soft_capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """What the model makes of its head's products."""
    return torch.tanh(logits / cap) * cap if cap else logits


def check_logits(stream: StreamedModel, hidden: torch.Tensor, ours: torch.Tensor) -> None:
    """Compare logits with the model's own, its blocks standing still; final norm, head resident.

    A model that scales or bends its logits in a way unknown here would be scored wrongly.

    Args:
        hidden: [1, D], out of the last block.
        ours:   [1, K], of the resident rows of the head.
    Raises:
        InputError: they differ.
    """
    model = stream.model
    width = stream.embedding.embedding_dim
    embeds = torch.zeros(1, 1, width, dtype=hidden.dtype, device=hidden.device)
    with torch.no_grad(), stream.replaced_blocks(lambda *_: hidden[None]):
        theirs = model(inputs_embeds=embeds, use_cache=False).logits[0].float()
    worst = (ours - theirs).abs().max()
    if worst > _AGREE.get(hidden.dtype, 1e-4) * theirs.abs().max():  # NaN is the loss's to name
        raise InputError(
            f"{type(model).__name__} computes its logits in a way that is not supported "
            f"(off by {float(worst):.3g}): check logit scaling in its config.json"
        )
