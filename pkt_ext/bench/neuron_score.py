# SPDX-License-Identifier: Apache-2.0
"""Contests of neuron_log_prob_gain (K4)."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from pkt_ext.bench.contest import Contest, Contestant, Estimate, Verdict, Work, input_sets
from pkt_ext.bench.data import Source
from pkt_ext.ops import (
    NeuronGains,
    _backend,
    _neuron_corrections,
    neuron_log_prob_gain,
    neuron_log_prob_gain_reference,
)
from pkt_ext.ops._workers import over_tiles

_CHUNK = 128  # neurons whose logits torch's ways have in memory at once
_TILE = 1024  # neurons, and tokens, of the plain product's tiles
_LOOPED = 256  # neurons that the published way is timed on
_CHECKED = 192  # neurons that are compared with float64
_LOGITS = 2.5  # standard deviation of the samples' logits, about what trained models have


@dataclass(frozen=True)
class Neurons:
    """neuron_log_prob_gain of a block's neurons before a head [vocab, width]."""

    name: str
    neurons: int
    width: int
    vocab: int
    samples: int = 1
    rate: float | None = None  # the best of each sample, as a share; None: all scores
    dtype: torch.dtype = torch.float32

    op = "neuron_log_prob_gain"

    @property
    def shape(self) -> str:
        """The problem in words."""
        wanted = "all scores" if self.rate is None else f"the best {self.best} of each"
        samples = f"{self.samples} sample{'s' * (self.samples > 1)}"
        return f"{self.neurons} x {self.width} x {self.vocab}, {samples}, {wanted}"

    @property
    def best(self) -> int:
        """Neurons that are wanted of a sample."""
        return max(1, int(self.neurons * (self.rate or 1.0)))

    def arithmetic(self, device_type: str) -> torch.dtype:
        """What products are computed in: a GPU multiplies a 16-bit head as it is."""
        return self.dtype if device_type == "cuda" else torch.float32

    def work(self, device_type: str = "cpu") -> Work:
        """A multiply-add per wanted neuron, weight of the head and part; head and neurons read."""
        split = device_type == "cuda" and self.dtype != torch.float32
        flops = 2.0 * self.best * self.width * self.vocab * (2 if split else 1)
        return Work(flops, (self.vocab + self.neurons) * self.width * self.dtype.itemsize)

    def contest(self, device: torch.device) -> Contest:
        """Make the inputs and name the contestants."""

        def make(seed):
            source = Source(seed, device)
            spread = source.normal(self.samples, self.neurons).exp_()
            contributions = source.normal(self.samples, self.neurons).mul_(spread)
            vectors = source.weight(self.width, self.neurons).to(self.dtype)
            head = source.normal(self.vocab, self.width).mul_(_LOGITS / math.sqrt(self.width))
            residual = source.normal(self.samples, self.width)
            scale = residual.square().mean(1).sqrt()
            targets = (residual @ head.T).argmax(1)  # the token that follows is a likely one
            return contributions, vectors, head.to(self.dtype), residual, scale, targets

        sets = input_sets(make, device)
        mode = {"mode": "all"} if self.rate is None else {"mode": "top", "k": self.best}

        def finish(scores: torch.Tensor) -> NeuronGains:
            if self.rate is None:
                return NeuronGains(scores, None, scores)
            return NeuronGains(*scores.topk(self.best, dim=1), scores)

        check, work = self._checker(sets[0]), self.work(device.type)
        single = {"work": self.work(), "arithmetic": torch.float32}
        contestants = [
            Contestant(
                "ours", "ours", lambda *o: neuron_log_prob_gain(*o, **mode), check(1e-5), work
            ),
            Contestant(
                "published: float16, a neuron a step",
                "published",
                lambda *o: published_scores(*o, count=min(_LOOPED, self.neurons)),
                self._checker(sets[0], _LOOPED)(0.05),
                work,
                part=f"{min(_LOOPED, self.neurons)} of {self.neurons} neurons",
            ),
            Contestant(
                "chunks, mm and logsumexp",
                "torch",
                lambda *o: finish(chunked_scores(*o)),
                check(1e-3),
                **single,
            ),
            Contestant(
                "plain product, nothing kept",
                "light",
                lambda *o: _product(*o, count=self.best),
                **single,
            ),
        ]
        if self._has_wgmma(device):
            entry = Contestant(
                "ours, wgmma", "other", lambda *o: _by_wgmma(*o, **mode), check(1e-5), work
            )
            contestants.insert(1, entry)
        if self.samples > 1:
            shared = Contestant(
                "chunks, one mm for all samples",
                "torch",
                lambda *o: finish(shared_scores(*o)),
                check(1e-3),
                **single,
            )
            contestants.insert(-1, shared)
        return Contest(sets, contestants)

    def _has_wgmma(self, device: torch.device) -> bool:
        if device.type != "cuda" or self.dtype == torch.float32:
            return False
        built = _backend._C.build_info()["cuda_architectures"].split(";")
        return "90a" in built and torch.cuda.get_device_capability(device) == (9, 0)

    def _checker(self, operands: tuple, first: int | None = None):
        """checker(allowed) -> a contestant's check against float64 on random neurons (the `first`
        ones): scores all of them, or the best and that no other neuron is better."""
        contributions, vectors, *rest = operands
        count = self.neurons if first is None else min(first, self.neurons)
        places = torch.randperm(count, generator=torch.Generator().manual_seed(1))[:_CHECKED]
        places = places.sort().values.to(contributions.device)
        truth = neuron_log_prob_gain_reference(contributions[:, places], vectors[:, places], *rest)

        def apart(found: torch.Tensor) -> float:
            return float((found - truth).abs().max() / truth.abs().max())

        def checker(allowed: float):
            def check(found) -> Verdict:
                if isinstance(found, torch.Tensor):
                    distinct = f"{len(found[0].unique())} distinct scores of {found.shape[1]}"
                    return Verdict(apart(found[:, places]), allowed, distinct)
                if found.indices is None:
                    return Verdict(apart(found.scores[:, places]), allowed)
                return Verdict(self._top_apart(found, places, truth), allowed, _effort(found))

            return check

        return checker

    def _top_apart(self, found: NeuronGains, places: torch.Tensor, truth: torch.Tensor) -> float:
        """How far a stated score is from its truth, or a neuron is from where it belongs."""
        worst = 0.0
        for scores, indices, right in zip(found.scores, found.indices, truth, strict=True):
            inside = torch.isin(places, indices)
            order = indices.argsort()
            stated = scores[order][torch.searchsorted(indices[order], places[inside])]
            errors = [(stated - right[inside]).abs(), right[~inside] - scores[-1]]
            worst = max([worst, *(float(e.max()) for e in errors if e.numel())])
        return worst / float(truth.abs().max())


def _effort(found: NeuronGains) -> str:
    if found.evaluations.ndim != 1:
        return ""
    return f"{float(found.evaluations.double().mean()):.0f} neurons a sample read the head"


def _by_wgmma(*operands, **mode) -> NeuronGains:
    """Ours with the kernel that is not chosen by itself."""
    _neuron_corrections.WGMMA = True
    try:
        return neuron_log_prob_gain(*operands, **mode)
    finally:
        _neuron_corrections.WGMMA = False


def published_scores(
    contributions, vectors, head, residual, scale, targets, *, count: int
) -> Estimate:
    """The released way on the first `count` neurons; the seconds are those of all.

    All logits of a chunk in float16, softmax, logarithm, then a Python step a neuron that reads one
    number and copies the sample's logits to the host. `scale` squared takes the place of the
    published standard deviation, so that the lens is the same.
    """
    start = time.perf_counter()
    head = head.half()
    variance = scale.square() - 1e-6
    found = []
    for m, x, one, target in zip(contributions, residual, variance, targets, strict=True):

        def lens(rows, one=one):
            return linear((rows * torch.rsqrt(one + 1e-6)).to(torch.float16), head)

        before = lens(x)
        logits = lens((m[:count] * vectors[:, :count].half()).T + x)
        increase = logits.softmax(-1)[:, target].log() - before.softmax(-1)[target].log()
        entries = [(str(i), value.item(), before.cpu()) for i, value in enumerate(increase)]
        found.append([round(value, 4) for _, value, _ in entries])
    seconds = time.perf_counter() - start
    whole = seconds * contributions.shape[1] / count
    return Estimate(whole, torch.tensor(found, device=contributions.device))


def chunked_scores(contributions, vectors, head, residual, scale, targets) -> torch.Tensor:
    """Torch at its best for one sample: neurons in chunks, float32 products, logsumexp."""
    head = head.float()
    found = torch.empty_like(contributions)
    for sample, (m, x) in enumerate(zip(contributions, residual, strict=True)):
        logits = linear(x / scale[sample], head)
        before = logits[targets[sample]] - logits.logsumexp(0)
        for start in range(0, len(m), _CHUNK):
            part = slice(start, start + _CHUNK)
            rows = torch.addcmul(x, m[part, None], vectors[:, part].T.float()) / scale[sample]
            logits = linear(rows, head)
            found[sample, part] = logits[:, targets[sample]] - logits.logsumexp(1) - before
    return found


def shared_scores(contributions, vectors, head, residual, scale, targets) -> torch.Tensor:
    """Torch at its best for several: logits are affine, so one product serves all samples."""
    head = head.float()
    found = torch.empty_like(contributions)
    strengths = contributions / scale[:, None]
    logits = linear(residual / scale[:, None], head)
    before = logits.logsumexp(1)
    for start in range(0, found.shape[1], _CHUNK):
        part = slice(start, start + _CHUNK)
        slopes = linear(vectors[:, part].T.float(), head)
        for sample, target in enumerate(targets):
            moved = torch.addcmul(logits[sample], strengths[sample, part, None], slopes)
            rise = strengths[sample, part] * slopes[:, target]
            found[sample, part] = rise - moved.logsumexp(1) + before[sample]
    return found


def _product(contributions, vectors, head, *_, count: int) -> None:
    """The multiply-adds alone, by tiles that stay in the caches on a CPU."""
    size = _TILE if head.device.type == "cpu" else 8 * _TILE
    neurons = vectors[:, :count].T.float()

    def tile(start: int, panel: torch.Tensor) -> None:
        rows = head[start : start + size].float()
        for first in range(0, count, size):
            some = neurons[first : first + size]
            torch.mm(some, rows.T, out=panel[: len(some) * len(rows)].view(len(some), len(rows)))

    def panel() -> torch.Tensor:
        return neurons.new_empty(min(size, count) * size)

    over_tiles(tile, range(0, len(head), size), panel, head.device)
