# SPDX-License-Identifier: Apache-2.0
"""Contests of the alignment losses (K5): rows of logits, and through both models' heads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import kl_div

from pkt_ext.bench.contest import Contest, Contestant, Verdict, Work, input_sets
from pkt_ext.bench.data import Source
from pkt_ext.ops import head_kl, head_kl_reference, kl_rows_, kl_rows_reference
from pkt_ext.ops._workers import spans

_LOGITS = 2.5  # standard deviation of a model's logits, about what trained ones have
_APART = 0.5  # of the student's from the teacher's
_CHECKED = 24  # rows that are compared with float64


@dataclass(frozen=True)
class KlRows:
    """kl_rows_ of [rows, vocab] float32 logits to targets: losses and gradient."""

    name: str
    rows: int
    vocab: int

    op = "kl_rows_"
    dtype = torch.float32

    @property
    def shape(self) -> str:
        """The problem in words."""
        return f"{self.rows} x {self.vocab}, losses and gradient"

    def arithmetic(self, device_type: str) -> torch.dtype:
        """What is computed in."""
        return self.dtype

    def work(self) -> Work:
        """Both logits read, the gradient written; no products."""
        return Work(0.0, 12.0 * self.rows * self.vocab)

    def contest(self, device: torch.device) -> Contest:
        """Make the inputs and name the contestants."""

        def make(seed):
            source = Source(seed, device)
            targets = source.normal(self.rows, self.vocab).mul_(_LOGITS)
            given = source.normal(self.rows, self.vocab).mul_(_APART).add_(targets)
            return given.clone(), targets, given

        sets = input_sets(make, device)
        truth = _truth(kl_rows_reference, sets[0][2], sets[0][1])

        def check(found: tuple[torch.Tensor, torch.Tensor]) -> Verdict:
            return _verdict(found, truth, 1e-4)

        def reset() -> None:
            for logits, _, given in sets:
                logits.copy_(given)

        def ours(logits, targets, _):
            return kl_rows_(logits, targets), logits

        work = self.work()
        contestants = [
            Contestant("ours", "ours", ours, check, work),
            Contestant("kl_div and autograd", "published", by_autograd, check, work),
            Contestant("kl_div of log_softmax, both", "torch", by_autograd_of_logs, check, work),
            Contestant("closed form, in place", "torch", in_place, check, work),
            Contestant("copy of as many bytes", "light", _copy, work=work),
        ]
        return Contest(sets, contestants, reset)


@dataclass(frozen=True)
class HeadKl:
    """head_kl of a student and a teacher [vocab, width] each: losses, gradient by the states."""

    name: str
    rows: int
    width: int
    teacher_width: int
    vocab: int
    dtype: torch.dtype = torch.float32

    op = "head_kl"

    @property
    def shape(self) -> str:
        """The problem in words."""
        return f"{self.rows} x {self.width} and {self.teacher_width} x {self.vocab}"

    def arithmetic(self, device_type: str) -> torch.dtype:
        """What products are computed in: a GPU multiplies 16-bit heads as they are."""
        return self.dtype if device_type == "cuda" else torch.float32

    def work(self) -> Work:
        """Three products; heads and states read, the gradient written."""
        flops = 2.0 * self.rows * self.vocab * (2 * self.width + self.teacher_width)
        weights = (self.vocab + self.rows) * (self.width + self.teacher_width)
        return Work(flops, weights * self.dtype.itemsize + 4.0 * self.rows * self.width)

    def contest(self, device: torch.device) -> Contest:
        """Make the inputs and name the contestants."""

        def make(seed):
            source = Source(seed, device)
            sides = []
            for width in (self.width, self.teacher_width):
                head = source.normal(self.vocab, width).mul_(_LOGITS / math.sqrt(width))
                sides += [source.normal(self.rows, width), head]
            states, *constants = (tensor.to(self.dtype) for tensor in sides)
            return states.requires_grad_(), *constants

        sets = input_sets(make, device)
        states, head, teacher_states, teacher_head = sets[0]
        part = slice(0, min(_CHECKED, self.rows))
        truth = _through(
            head_kl_reference,
            states[part].double(),
            head.double(),
            teacher_states[part].double(),
            teacher_head.double(),
        )
        allowed = 1e-4 if self.arithmetic(device.type) == torch.float32 else 2e-2

        def check(found: tuple[torch.Tensor, torch.Tensor]) -> Verdict:
            return _verdict(found, truth, allowed)

        work = self.work()
        contestants = [
            Contestant("ours", "ours", lambda *o: _through(head_kl, *o), check, work),
            Contestant(
                "all logits, kl_div and autograd",
                "published",
                lambda *o: _through(_dense_kl, *o),
                check,
                work,
                arithmetic=torch.float32,
            ),
            Contestant(
                "chunks, closed form in place",
                "torch",
                lambda *o: _chunked(*o, in_place),
                check,
                work,
            ),
            Contestant(
                "three plain products, in chunks",
                "light",
                lambda *o: _chunked(*o, _nothing),
                work=work,
            ),
        ]
        return Contest(sets, contestants)


def by_autograd(logits, targets, *_) -> tuple[torch.Tensor, torch.Tensor]:
    """The usual way: torch's divergence of log-probabilities to probabilities, and backward."""
    logits = logits.detach().requires_grad_()
    losses = kl_div(logits.log_softmax(-1), targets.softmax(-1), reduction="none").sum(-1)
    losses.sum().backward()
    return losses.detach(), logits.grad


def by_autograd_of_logs(logits, targets, *_) -> tuple[torch.Tensor, torch.Tensor]:
    """As the usual way, spared a logarithm."""
    logits = logits.detach().requires_grad_()
    log_probs = targets.log_softmax(-1)
    losses = kl_div(logits.log_softmax(-1), log_probs, reduction="none", log_target=True).sum(-1)
    losses.sum().backward()
    return losses.detach(), logits.grad


def in_place(logits, targets, *_) -> tuple[torch.Tensor, torch.Tensor]:
    """Torch at its best: the gradient's closed form, in the logits' memory and that of two more."""
    log_p = targets.log_softmax(-1)
    torch.log_softmax(logits, -1, out=logits)
    probs = log_p.exp()
    log_p.sub_(logits)
    losses = torch.linalg.vecdot(probs, log_p)
    return losses, logits.exp_().sub_(probs)


def _nothing(logits, *_) -> tuple[torch.Tensor, torch.Tensor]:
    return logits[:, 0], logits


def _copy(logits, targets, _) -> None:
    """Twelve bytes an element moved: a copy, and half of another."""
    logits.copy_(targets)
    half = len(logits) // 2
    logits[:half].copy_(targets[half : 2 * half])


def _dense_kl(states, head, teacher_states, teacher_head) -> torch.Tensor:
    logits = states.float() @ head.float().T
    targets = teacher_states.float() @ teacher_head.float().T
    return kl_div(logits.log_softmax(-1), targets.softmax(-1), reduction="none").sum(-1)


def _chunked(
    states, head, teacher_states, teacher_head, compare
) -> tuple[torch.Tensor, torch.Tensor]:
    """The three products, in chunks of rows that memory is reused for."""
    if not head.is_cuda:
        head, teacher_head = head.float(), teacher_head.float()
    size = min(len(states), max(1, (256 << 20) // (8 * len(head))))
    spaces = [head.new_empty(size, len(head), dtype=torch.float32) for _ in range(2)]
    losses = head.new_empty(len(states), dtype=torch.float32)
    gradient = head.new_empty(states.shape, dtype=torch.float32)
    with torch.no_grad():
        for part in spans(len(states), size):
            count = len(losses[part])
            logits = _mm(states[part], head.T, spaces[0][:count])
            targets = _mm(teacher_states[part], teacher_head.T, spaces[1][:count])
            losses[part], slopes = compare(logits, targets)
            gradient[part] = _mm(slopes, head, None)
    return losses, gradient


def _mm(rows: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """A product with a head, float32: a GPU multiplies 16-bit heads as they are."""
    if matrix.dtype != torch.float32:
        return torch.mm(rows.to(matrix.dtype), matrix, out_dtype=torch.float32)
    return torch.mm(rows.float(), matrix, out=out)


def _through(loss, states, *constants) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and their gradient by the states."""
    losses = loss(states, *constants)
    return losses.detach(), torch.autograd.grad(losses.sum(), states)[0]


def _truth(reference, logits, targets) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and gradient of the first rows in float64."""
    rows = slice(0, min(_CHECKED, len(logits)))
    logits = logits[rows].double().requires_grad_()
    return _through(reference, logits, targets[rows].double())


def _verdict(found, truth, allowed: float) -> Verdict:
    """The larger of the losses' error and the gradient's, beside the largest value of either."""
    errors = [
        float((mine[: len(right)].double() - right).abs().max() / right.abs().max())
        for mine, right in zip(found, truth, strict=True)
    ]
    return Verdict(max(errors), allowed)
