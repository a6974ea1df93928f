# SPDX-License-Identifier: Apache-2.0
"""What an aligned student is trained on: losses for a block, losses for the output, and their sum.

Letters: M supervised rows (positions whose next token carries loss) of B sequences, D_s and D_t the
hidden sizes of student and teacher, V vocabulary. h, h~: the student's states at an interface and
the teacher's, mapped into the student's space. Whatever the states' dtype, and in autocast too,
losses are computed and summed up in float32 (products with a head take the head's dtype in and give
float32); a gradient comes back in the states' dtype.

Heads and norms are the frozen ones of the models at hand: losses refer to them and never train,
save or copy them. They have to be where the states are.

Source: SemAlign, arXiv 2510.24208, v1: A7 and A8. FisherAlignment (A9; ACL Findings 2026) and
RelationGeometry (A10; v2 on arXiv) are our reconstructions: of both only abstracts are known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from pkt_ext import ops
from pkt_ext.errors import InputError, NonFiniteError


class AlignmentLoss(nn.Module):
    """Base of the losses. Calling one gives the mean of `each`, a scalar; 0 with a graph of none.

    Subclasses define `_each`, and say in `target` what their targets are: "layer", mapped teacher
    states at a block; "output", the teacher's states as its head is given them; "labels", the next
    tokens. Those for a block say in `interface` which states of the student are compared: "output",
    what comes out of the block, or "contribution", what it adds to the residual stream.
    """

    target: str
    interface: str

    def forward(
        self,
        states: torch.Tensor,
        targets: torch.Tensor,
        segments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The mean of `each`, float32 (float64 for such states)."""
        each = self.each(states, targets, segments)
        return each.sum() / max(1, len(each))

    def each(
        self,
        states: torch.Tensor,
        targets: torch.Tensor,
        segments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One loss for every row, or for every sequence where `count` says so.

        Args:
            states:   [M, D_s] of the student, float32, bfloat16 or float16.
            targets:  see the class; never given a gradient.
            segments: int64 [B + 1]: rows segments[b] to segments[b + 1] are sequence b; None: all
                rows are one.
        Returns:
            float32 [N], with a graph to `states` alone.
        Raises:
            ValueError: shapes or devices that do not fit.
        """
        with torch.autocast(states.device.type, enabled=False):
            return self._each(states, targets.detach(), segments)

    def count(self, targets: torch.Tensor, segments: torch.Tensor) -> int:
        """How many losses `each` will give for these targets."""
        return len(targets)


class CosineSteering(AlignmentLoss):
    """1 - cos(h, h~) of a block's contributions, over rows (A7).

    targets [M, D_s]. Their length does not matter; a row of zeros, on either side, has loss 1 and
    no gradient.
    """

    target, interface = "layer", "contribution"

    def _each(self, states, targets, segments):
        return ops.cosine_loss(states, targets)


class FisherAlignment(AlignmentLoss):
    """A Fisher-weighted quadratic between what two states predict through the student's lens (A9).

        1/2 (sum_v p_v D_v^2 - (sum_v p_v D_v)^2),    D = z - z~,    p = softmax(z~ / tau)

    z and z~ are the logits of the block's output and of the mapped teacher state, both read through
    the student's own final norm and head. It is KL(p || softmax(z)) to second order at tau = 1, and
    zero where D is constant. Reconstructed from an abstract that names "a Fisher-weighted quadratic
    surrogate on target-space aligned logits"; the lens's norm, which makes the length of h~
    irrelevant, and tau are our choices.

    Args:
        norm: the student's final norm; None: it has none.
        head: [V, D_s], the head's weight.
        temperature: tau.
        cap: of the student's logits (Gemma 2), else None.
        chunk_bytes: of logits at a time; None: what `ops.head_fisher` takes.
    """

    target, interface = "layer", "output"

    def __init__(
        self,
        norm: nn.Module | None,
        head: torch.Tensor,
        *,
        temperature: float = 1.0,
        cap: float | None = None,
        chunk_bytes: int | None = None,
    ):
        super().__init__()
        self._frozen = (norm, head)  # in a tuple, so that they are not registered
        self.temperature, self.cap = _positive(temperature), cap
        self.chunk_bytes = chunk_bytes

    def _each(self, states, targets, segments):
        _, head = self._frozen
        return ops.head_fisher(
            self._normed(states).to(head.dtype),
            self._normed(targets).to(head.dtype),
            head.detach(),
            temperature=self.temperature,
            cap=self.cap,
            chunk_bytes=self.chunk_bytes,
        )

    def _normed(self, states: torch.Tensor) -> torch.Tensor:
        norm, _ = self._frozen
        states = _widened(states)
        if norm is None:
            return states
        weights = {n: p.detach().to(states.dtype) for n, p in norm.named_parameters()}
        return functional_call(norm, weights, (states,))


class RelationGeometry(AlignmentLoss):
    """1 - <G, G~> / (|G| |G~|) of a block's contributions, over sequences (A10).

    G = R_c R_c^T relates a sequence's rows to one another, R_c being its contributions [T, D_s]
    less their mean; G~ likewise. That is 1 - linear CKA over tokens: 0 where R~ = c R Q with an
    orthogonal Q, so targets may have any width. Reconstructed from an abstract that names "centered
    token-token relation geometry" of residual contributions.

    targets [M, D]. Sequences with fewer than 3 rows, or whose rows do not differ, are left out.
    """

    target, interface = "layer", "contribution"

    def _each(self, states, targets, segments):
        found = [
            relation_distance(states[start:end], targets[start:end])
            for start, end in _spans(states, segments)
            if end - start >= _LEAST_ROWS
        ]
        if not found:
            return _widened(states[:0].sum(1))
        losses, kept = zip(*found, strict=True)
        return torch.stack(losses)[torch.stack(kept)]

    def count(self, targets, segments):
        """Sequences with 3 rows or more whose targets differ."""
        spans = [(start, end) for start, end in _spans(targets, segments)]
        return sum(
            bool(_centred(targets[start:end])[1])
            for start, end in spans
            if end - start >= _LEAST_ROWS
        )


_LEAST_ROWS = 3  # centred, two rows have one Gram matrix whatever they are


def relation_distance(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(A10 of two matrices of rows [T, D] and [T, D'], whether their rows differ at all).

    Both in float32 (float64 for such rows). Where both widths are below T the Gram matrices are not
    made: <G, G~> = |R_c^T R~_c|^2.
    """
    one, varies = _centred(one)
    other, other_varies = _centred(other)
    if max(one.shape[1], other.shape[1]) < len(one):
        inner = (one.T @ other).square().sum()
        norms = [torch.linalg.vector_norm(rows.T @ rows) for rows in (one, other)]
    else:
        grams = [rows @ rows.T for rows in (one, other)]
        inner = (grams[0] * grams[1]).sum()
        norms = [torch.linalg.vector_norm(gram) for gram in grams]
    kept = varies & other_varies
    return 1 - inner / torch.where(kept, norms[0] * norms[1], 1.0), kept


def _centred(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows less their mean, of norm 1; whether they differ by more than rounding)."""
    rows = _widened(rows)
    centred = rows - rows.mean(0)
    size = torch.linalg.vector_norm(centred.detach())
    rounding = 4 * torch.finfo(rows.dtype).eps * torch.linalg.vector_norm(rows.detach())
    varies = ~(size <= rounding)  # NaN is not left out
    return centred / torch.where(varies, size, 1.0), varies  # A10 does not depend on the scale


class _LabelLoss(AlignmentLoss):
    """A loss of the student's logits and the next tokens; see CosineOutput."""

    target = "labels"

    def __init__(
        self, head: torch.Tensor, *, cap: float | None = None, chunk_bytes: int | None = None
    ):
        super().__init__()
        self._frozen = (head,)
        self.cap, self.chunk_bytes = cap, chunk_bytes

    def _each(self, states, targets, segments):
        (head,) = self._frozen
        return self._through_head(
            states.to(head.dtype),
            head.detach(),
            targets,
            cap=self.cap,
            chunk_bytes=self.chunk_bytes,
        )


class CosineOutput(_LabelLoss):
    """1 - cos(z, onehot(y)) of the student's logits z, over rows (A8), the published output loss.

    Beware: this is no surrogate of a cross-entropy. It is least where all other logits are zero,
    not where they are small; it changes when a constant is added to all logits, softmax does not;
    and its gradients are small (a typical row of 32k logits has a cosine of about 0.05).
    OutputDistillation and CrossEntropyOutput are the alternatives.

    targets: int64 [M], the next tokens.

    Args:
        head: [V, D_s], the head's weight.
        cap: of the student's logits (Gemma 2), else None.
        chunk_bytes: of logits at a time; None: what `ops` takes.
    """

    _through_head = staticmethod(ops.head_cosine_onehot)


class CrossEntropyOutput(_LabelLoss):
    """-log softmax(z)_y of the student's logits z, over rows: plain fine-tuning.

    targets: int64 [M], the next tokens. Arguments: see CosineOutput.
    """

    _through_head = staticmethod(ops.head_cross_entropy)


class OutputDistillation(AlignmentLoss):
    """tau^2 KL(softmax(z_t / tau) || softmax(z / tau)) from teacher to student, over rows.

    targets [M, D_t]: what the teacher's head is given, behind its final norm. Row i of both heads
    must be the same token: for different vocabularies give the rows that they share.

    Args:
        head: [V, D_s], the student's head, or the rows of it that are shared.
        teacher_head: [V, D_t], the same tokens' rows of the teacher's.
        temperature: tau.
        cap, teacher_cap: of the logits (Gemma 2), else None.
        chunk_bytes: of logits at a time; None: what `ops.head_kl` takes.
    Raises:
        InputError: heads of different vocabularies.
    """

    target = "output"

    def __init__(
        self,
        head: torch.Tensor,
        teacher_head: torch.Tensor,
        *,
        temperature: float = 1.0,
        cap: float | None = None,
        teacher_cap: float | None = None,
        chunk_bytes: int | None = None,
    ):
        super().__init__()
        if len(head) != len(teacher_head):
            raise InputError(
                f"the student's head has {len(head)} rows, the teacher's {len(teacher_head)}; "
                "give the rows of the tokens that they share"
            )
        self._frozen = (head, teacher_head)
        self.temperature, self.cap, self.teacher_cap = _positive(temperature), cap, teacher_cap
        self.chunk_bytes = chunk_bytes

    def _each(self, states, targets, segments):
        head, teacher_head = self._frozen
        return ops.head_kl(
            states.to(head.dtype),
            head.detach(),
            targets.to(teacher_head.dtype),
            teacher_head.detach(),
            temperature=self.temperature,
            cap=self.cap,
            teacher_cap=self.teacher_cap,
            chunk_bytes=self.chunk_bytes,
        )


class Counts(NamedTuple):
    """How many losses an optimiser step takes the mean of."""

    layer: int
    output: int


class Objective(nn.Module):
    """layer_loss + beta output_loss, either of which may be None.

    Raises:
        InputError: neither, losses for something else, or a beta that is negative or not finite.
    """

    def __init__(
        self,
        layer_loss: AlignmentLoss | None = None,
        output_loss: AlignmentLoss | None = None,
        beta: float = 1.0,
    ):
        super().__init__()
        if layer_loss is None and output_loss is None:
            raise InputError("an objective needs a layer loss, an output loss, or both")
        if layer_loss is not None and layer_loss.target != "layer":
            raise InputError(f"{type(layer_loss).__name__} is no layer loss")
        if output_loss is not None and output_loss.target == "layer":
            raise InputError(f"{type(output_loss).__name__} is no output loss")
        if not 0 <= beta < math.inf:
            raise InputError(f"beta is {beta}; give 0 or more")
        self.layer_loss, self.output_loss, self.beta = layer_loss, output_loss, beta

    def counts(self, batch: Mapping[str, torch.Tensor | None]) -> Counts:
        """Of `layer`, `output`, `labels`, `segments`, `layer_segments` of a collated batch."""
        return Counts(
            *(
                0 if loss is None else loss.count(_given(batch, loss), _segments(batch, loss))
                for loss in (self.layer_loss, self.output_loss)
            )
        )

    def forward(
        self,
        batch: Mapping[str, torch.Tensor | None],
        *,
        before: torch.Tensor | None = None,
        after: torch.Tensor | None = None,
        outputs: torch.Tensor | None = None,
        counts: Counts | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of some rows, and its parts.

        Args:
            batch:   `segments` int64 [B + 1] and what the losses compare with: `layer` [M', D_s],
                `output` [M, D_t], `labels` int64 [M]; `layer_segments` where the layer loss looks
                at other rows.
            before, after: [M', D_s], what the block is given and what comes out of it: for a layer
                loss.
            outputs: [M, D_s], what the head is given: for an output loss.
            counts:  of the whole optimiser step that these rows are a part of; None: they are all.
        Returns:
            (loss, float32 scalar; `layer_loss` and `output_loss`, those there are, detached).
        Raises:
            InputError: targets that a loss needs and the batch has not.
            NonFiniteError: a loss that is NaN or infinite; says which.
        """
        parts = self.losses(batch, before=before, after=after, outputs=outputs, counts=counts)
        for name, loss in parts.items():
            if not torch.isfinite(loss):
                raise NonFiniteError(
                    f"the {name.replace('_', ' ')} ({type(getattr(self, name)).__name__}) is "
                    f"{loss.item()}; lower --learning-rate, or check the student's weights, its "
                    "--dtype and the teacher's states"
                )
        return self.total(parts), {name: loss.detach() for name, loss in parts.items()}

    def losses(
        self,
        batch: Mapping[str, torch.Tensor | None],
        *,
        before: torch.Tensor | None = None,
        after: torch.Tensor | None = None,
        outputs: torch.Tensor | None = None,
        counts: Counts | None = None,
    ) -> dict[str, torch.Tensor]:
        """`layer_loss` and `output_loss`, those there are, finite or not; see `forward`."""
        parts = {}
        if self.layer_loss is not None:
            states = after
            if self.layer_loss.interface == "contribution":
                states = _widened(after) - _widened(before)  # of half-precision states, exactly
            parts["layer_loss"] = self._part(
                self.layer_loss, states, batch, counts and counts.layer
            )
        if self.output_loss is not None:
            parts["output_loss"] = self._part(
                self.output_loss, outputs, batch, counts and counts.output
            )
        return parts

    def total(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What `losses` come to."""
        weights = {"layer_loss": 1.0, "output_loss": self.beta}
        return sum(weights[name] * loss for name, loss in parts.items())

    def _part(self, loss: AlignmentLoss, states, batch, count: int | None) -> torch.Tensor:
        each = loss.each(states, _given(batch, loss), _segments(batch, loss))
        return each.sum() / max(1, len(each) if count is None else count)


def _given(batch: Mapping, loss: AlignmentLoss) -> torch.Tensor:
    targets = batch.get(loss.target)
    if targets is None:
        raise InputError(f"{type(loss).__name__} needs {loss.target!r} in every item of the data")
    return targets


def _segments(batch: Mapping, loss: AlignmentLoss) -> torch.Tensor:
    name = "layer_segments" if loss.target == "layer" and "layer_segments" in batch else "segments"
    return batch[name]


def _spans(rows: torch.Tensor, segments: torch.Tensor | None) -> list[tuple[int, int]]:
    ends = [0, len(rows)] if segments is None else segments.tolist()
    return list(zip(ends, ends[1:], strict=False))


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _positive(temperature: float) -> float:
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature is {temperature}; give a positive number")
    return temperature
