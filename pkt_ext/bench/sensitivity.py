# SPDX-License-Identifier: Apache-2.0
"""Contests of the sensitivity ops, elementwise (K1a) and sample by sample (K1b)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch

from pkt_ext.bench.contest import Contest, Contestant, Verdict, Work, input_sets
from pkt_ext.bench.data import Source
from pkt_ext.ops import (
    SensitivitySums,
    _backend,
    accumulate_sensitivity_,
    accumulate_sensitivity_reference_,
    linear_sensitivity_,
    linear_sensitivity_reference_,
)

_WGMMA = 3  # the variant that is not chosen by itself: csrc/sensitivity/sensitivity.h
_SAMPLE = 256  # rows, and columns, of a large matrix that are compared with float64
# What torch may be off by: it rounds the gradient, or the product with it, to the operands' type.
_ROUNDED = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Elementwise:
    """accumulate_sensitivity_ on one weight [rows, cols] and its gradient."""

    name: str
    rows: int
    cols: int
    dtype: torch.dtype = torch.float32
    sums: bool = False  # only the score's row and column sums are wanted

    op = "accumulate_sensitivity_"

    @property
    def shape(self) -> str:
        """The problem in words."""
        return f"{self.rows}x{self.cols}{', sums only' * self.sums}"

    def arithmetic(self, device_type: str) -> torch.dtype:
        """What the ceiling of matrix products is taken in."""
        return self.dtype

    def work(self) -> Work:
        """Weight and gradient read, the float32 score read and written; a product and a sum."""
        count = self.rows * self.cols
        return Work(2.0 * count, count * (2.0 * self.dtype.itemsize + 8.0 * (not self.sums)))

    def contest(self, device: torch.device) -> Contest:
        """Make the inputs and name the contestants."""

        def make(seed):
            source = Source(seed, device)
            weight = source.weight(self.rows, self.cols).to(self.dtype)
            grad = source.output_gradients(self.rows, self.cols, self.dtype)
            return torch.zeros(self.rows, self.cols, device=device), weight, grad

        sets = input_sets(make, device)
        score, weight, grad = sets[0]

        def truth(rows, cols):
            part = weight[rows][:, cols]
            found = torch.zeros(part.shape, dtype=torch.float64, device=device)
            accumulate_sensitivity_reference_(found, part, grad[rows][:, cols])
            return found

        def ours(score, weight, grad):
            if not self.sums:
                return accumulate_sensitivity_(score, weight, grad)
            sums = _zero_sums(score)
            accumulate_sensitivity_(None, weight, grad, sums=sums)
            return sums.rows, sums.cols

        def eager(score, weight, grad):
            found = (weight * grad).abs()
            return _sum(found) if self.sums else score.add_(found)

        def magnitudes(score, weight, grad):
            if self.sums:
                return _sum(weight.abs().mul_(grad.abs()))
            return score.addcmul_(weight.abs(), grad.abs())

        work, check, rounded = self.work(), _checker(score, truth), _ROUNDED[self.dtype]
        half = torch.empty(int(work.bytes) // 2, dtype=torch.uint8, device=device)
        other = torch.empty_like(half).fill_(1)
        contestants = [
            Contestant("ours", "ours", ours, check(1e-6), work),
            Contestant("published: |w g| in memory", "published", eager, check(rounded), work),
            Contestant("magnitudes multiplied", "torch", magnitudes, check(rounded), work),
            Contestant("copy of as many bytes", "light", lambda *_: half.copy_(other), work=work),
        ]
        if device.type == "cuda" and find_spec("triton"):
            call, judge = torch.compile(eager), check(rounded)
            entry = Contestant("torch.compile", "torch", call, judge, work, compiles=True)
            contestants.insert(3, entry)
        return Contest(sets, contestants, score.zero_)


@dataclass(frozen=True)
class Linear:
    """linear_sensitivity_ on a weight [rows, cols], samples of `lengths` tokens."""

    name: str
    rows: int
    cols: int
    lengths: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    sums: bool = False  # only the score's row and column sums are wanted

    op = "linear_sensitivity_"

    @property
    def shape(self) -> str:
        """The problem in words."""
        few = sorted(set(self.lengths))
        tokens = str(few[0]) if len(few) == 1 else f"{few[0]} to {few[-1]}"
        samples = f"{len(self.lengths)} samples of {tokens} tokens"
        return f"{self.rows}x{self.cols}, {samples}{', sums only' * self.sums}"

    def arithmetic(self, device_type: str) -> torch.dtype:
        """What products are computed in: on a GPU float32 is split into bfloat16."""
        split = device_type == "cuda" and self.dtype == torch.float32
        return torch.bfloat16 if split else self.dtype

    def work(self, device_type: str = "cpu") -> Work:
        """A multiply-add per weight and token, three where the arithmetic is split; every operand
        and the score moved once."""
        tokens, count = sum(self.lengths), self.rows * self.cols
        size = self.dtype.itemsize
        moved = tokens * (self.rows + self.cols) * size + count * (size + 8.0 * (not self.sums))
        products = 1 if self.arithmetic(device_type) == self.dtype else 3
        return Work(2.0 * tokens * count * products, moved)

    def contest(self, device: torch.device) -> Contest:
        """Make the inputs and name the contestants."""
        tokens, samples = sum(self.lengths), len(self.lengths)
        bounds = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        spans = list(zip(bounds, bounds[1:], strict=False))
        segments = torch.tensor(bounds, device=device)

        def make(seed):
            source = Source(seed, device)
            weight = source.weight(self.rows, self.cols).to(self.dtype)
            inputs = source.activations(tokens, self.cols).to(self.dtype)
            grads = source.output_gradients(tokens, self.rows, self.dtype)
            return torch.zeros(self.rows, self.cols, device=device), weight, inputs, grads

        sets = input_sets(make, device)
        score, weight, inputs, grads = sets[0]

        def truth(rows, cols):
            part = weight[rows][:, cols]
            found = torch.zeros(part.shape, dtype=torch.float64, device=device)
            linear_sensitivity_reference_(found, part, inputs[:, cols], grads[:, rows], segments)
            return found

        def start(score):
            return torch.zeros_like(score) if self.sums else score

        def finish(score):
            return _sum(score) if self.sums else None

        def ours(score, weight, inputs, grads):
            if not self.sums:
                return linear_sensitivity_(score, weight, inputs, grads, segments)
            sums = _zero_sums(score)
            linear_sensitivity_(None, weight, inputs, grads, segments, sums=sums)
            return sums.rows, sums.cols

        def published(score, weight, inputs, grads):
            score = start(score)
            for first, last in spans:
                score += (weight * (grads[first:last].T @ inputs[first:last])).abs()
            return finish(score)

        def late(score, weight, inputs, grads):
            score, total = start(score), torch.zeros_like(score)
            for first, last in spans:
                total += (grads[first:last].T @ inputs[first:last]).abs_()
            return finish(score.addcmul_(weight.abs(), total))

        def at_once(score, weight, gradients):
            total = gradients.abs_().sum(0, dtype=torch.float32)
            return finish(start(score).addcmul_(weight.abs(), total))

        def batched(score, weight, inputs, grads):
            shape = (samples, tokens // samples, -1)
            gradients = torch.bmm(grads.view(shape).mT, inputs.view(shape))
            return at_once(score, weight, gradients)

        def grouped(score, weight, inputs, grads):
            ends = segments[1:].int()
            gradients = torch.nn.functional.grouped_mm(grads.T, inputs, offs=ends)
            return at_once(score, weight, gradients)

        def elementwise(score, weight, inputs, grads):
            score = start(score)
            for first, last in spans:
                accumulate_sensitivity_(score, weight, grads[first:last].T @ inputs[first:last])
            return finish(score)

        ways = [("published: loop over samples", "published", published)]
        ways += [("loop, |weight| multiplied once", "torch", late)]
        if len(set(self.lengths)) == 1:
            ways += [("one bmm", "torch", batched)]
        if device.type == "cuda" and self.dtype == torch.bfloat16:  # all it takes
            ways += [("one grouped_mm", "torch", grouped)]
        ways += [("loop, elementwise kernel", "other", elementwise)]
        work, check, rounded = self.work(device.type), _checker(score, truth), _ROUNDED[self.dtype]
        split = self.arithmetic(device.type) != self.dtype
        # torch's ways compute one product, in the operands' dtype
        plain = replace(work, flops=2.0 * tokens * self.rows * self.cols)

        def product(score, weight, inputs, grads):
            return torch.mm(grads.T, inputs)

        if split:
            halves = [t.bfloat16().repeat(3, 1) for t in (grads, inputs)]

            def product(*_):
                return torch.mm(halves[0].T, halves[1])

        contestants = [
            Contestant("ours", "ours", ours, check(1e-3 if split else 1e-4), work),
            *(
                Contestant(name, role, call, check(rounded), plain, arithmetic=self.dtype)
                for name, role, call in ways
            ),
            Contestant("torch.mm of as many FLOPs", "light", product, work=work),
        ]
        if self.dtype.itemsize == 2 and _has_wgmma(device):

            def wgmma(score, weight, inputs, grads):  # as ours, but for the kernel
                sums = _zero_sums(score) if self.sums else None
                operands = None if self.sums else score, weight, inputs, grads, segments, sums
                with _backend.device_of(weight) as launch:
                    _backend._C.linear_sensitivity(
                        *operands, _bytes_on(device), **launch, variant=_WGMMA
                    )
                return (sums.rows, sums.cols) if sums else None

            contestants.insert(1, Contestant("ours, wgmma", "other", wgmma, check(1e-4), work))
        return Contest(sets, contestants, score.zero_)


def _has_wgmma(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _bytes_on(device: torch.device) -> Callable[[int], torch.Tensor]:
    return lambda size: torch.empty(size, dtype=torch.uint8, device=device)


def _zero_sums(score: torch.Tensor) -> SensitivitySums:
    return SensitivitySums.zeros(score.shape, device=score.device, rows=True, cols=True)


def _sum(score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return score.sum(1, dtype=torch.float64), score.sum(0, dtype=torch.float64)


def _checker(score: torch.Tensor, truth: Callable) -> Callable[[float], Callable]:
    """checker(allowed) -> a contestant's check: `score`, or the sums it returned, against
    truth(rows, cols) on all rows and columns of a small matrix, on random ones of a large one."""

    def checker(allowed: float):
        def check(output) -> Verdict:
            rows, cols = (_sample(count, score.device) for count in score.shape)
            across, down = truth(rows, slice(None)), truth(slice(None), cols)
            if isinstance(output, tuple):
                pairs = (output[0][rows], across.sum(1)), (output[1][cols], down.sum(0))
            else:
                pairs = (score[rows], across), (score[:, cols], down)
            return Verdict(max(_apart(*pair) for pair in pairs), allowed)

        return check

    return checker


def _sample(count: int, device: torch.device) -> torch.Tensor:
    """Which of `count` rows to compare: all of a few, else the first, the last and random ones."""
    if count <= _SAMPLE:
        return torch.arange(count, device=device)
    places = torch.randperm(count, generator=torch.Generator().manual_seed(1))[: _SAMPLE - 2]
    return torch.cat([places, torch.tensor([0, count - 1])]).to(device)


def _apart(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest error, relative to the element or to a typical one where that is larger."""
    return float(((found - truth).abs() / (truth + truth.median())).max())
