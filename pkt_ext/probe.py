# SPDX-License-Identifier: Apache-2.0
"""One block of a model at work for a moment: how fast this machine brings it in, computes and cuts.

What runs is what a pass runs: the block's own code, the scoring, the windows and factors. Its
weights are the checkpoint's where they are here, else random ones.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from pkt_ext.attribution.sensitivity import BlockScorer
from pkt_ext.errors import InputError
from pkt_ext.methods.pairing import Plan
from pkt_ext.methods.windows import Clock, Cutter
from pkt_ext.streaming.batches import ALIGNMENT, Batch
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import available_bytes
from pkt_ext.streaming.footprint import measure, record

_SECONDS = 2.0  # of a timed run, at most, unless its fewest tokens take longer
_RUNS = 2  # of which the quicker counts: something else may be at work
_TRIAL, _FEWEST = ALIGNMENT, 4 * ALIGNMENT  # tokens of the run before it, and of itself at least


@dataclass(frozen=True)
class Pace:
    """Time of a block's work on one sample: some at once, some for each operation."""

    fixed: float  # seconds: going through the weights, whatever the number of tokens
    flops: float  # operations a second, of what grows with the tokens

    def seconds(self, samples: int, flops: float) -> float:
        """Of one block with these samples and operations."""
        return self.fixed * samples + flops / self.flops


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second."""

    shape: tuple[int, int]  # (B, T) that was timed: fewer tokens where all would take too long
    forward: Pace  # without graph
    backward: Pace  # forward with graph, backward and, of a teacher, scoring
    read: float | None  # bytes as stored, made ready for use; None: not here
    window: float | None = None  # elements of a score that are searched; None: not tried
    factor: float | None = None  # elements of a window that are factored


def probe(
    stream: StreamedModel,
    shape: tuple[int, int],
    plan: Plan | None = None,
    *,
    rank: int = 1,
    mode: str = "converged",
    seed: int = 0,
) -> Rates | None:
    """Time the first block with a micro-batch of at most (B, T) tokens; takes some seconds.

    Args:
        plan: score the block, as a teacher's, and cut its largest matrix.
        rank, mode, seed: see `methods.windows.Cutter`.
    Returns:
        None where the memory that is free now would not do.
    Raises:
        NonFiniteError: weights that are NaN or infinite.
    """
    whole = measure(stream, shape)[0]
    if whole.backward + whole.weights + 8 * whole.parameters > available_bytes(stream.device):
        return None
    clock, cutter, scorer = Clock(), None, None
    if plan is not None and plan.cuts and mode != "exact":  # the full SVD can take minutes
        role = max(plan.cuts, key=lambda role: torch.Size(plan.cuts[role][1].shape).numel())
        one = replace(plan, cuts={role: plan.cuts[role]}, outer=())
        cutter = Cutter(one, None, clock, rank, mode, seed)
    weights, read = _weights(stream)
    with stream.resident(weights):
        if plan is not None:
            scorer = BlockScorer(stream, cutter.block if cutter else lambda scores: None)
            scorer.loaded(0, stream.blocks[0], 1.0)
        trial = 1, min(_TRIAL, shape[1])
        _run(stream, trial, scorer)
        few = _quickest(stream, trial, scorer)
        chosen = _affordable(shape, int(_SECONDS * trial[1] / sum(few)))
        many = _quickest(stream, chosen, scorer)
        if scorer is not None:
            scorer.finished(0, stream.blocks[0])
    scored = plan is not None
    few_flops, many_flops = (_flops(stream, tried, scored) for tried in (trial, chosen))
    forward = _pace(few[0], many[0], few_flops[0], many_flops[0], chosen[0])
    # its products are no faster than the forward's, whatever disturbed one of the runs
    backward = _pace(few[1], many[1], few_flops[1], many_flops[1], chosen[0], forward.flops)
    rates = Rates(chosen, forward, backward, read)
    if cutter is None:
        return rates
    mine, theirs = one.cuts[role]
    return replace(
        rates,
        window=torch.Size(mine.shape).numel() / clock.seconds["windows"],
        factor=torch.Size(theirs.shape).numel() / clock.seconds["factors"],
    )


def _weights(stream: StreamedModel) -> tuple[dict[str, torch.Tensor], float | None]:
    """The first block's parameters, and the stored bytes a second at which they came."""
    names, checkpoint = stream.block_names[0], stream.checkpoint
    if not checkpoint.to_download:
        start = _now(stream.device)
        try:
            tensors = stream.fetch(names)
            checkpoint.populate(tensors)
            return tensors, checkpoint.bytes_of(names) / (_now(stream.device) - start)
        except InputError:  # quantised, and the library that decodes is not installed
            pass
    like = {"dtype": stream.dtype, "device": stream.device}
    return {
        name: torch.empty(meta.shape, **like).uniform_(-0.03, 0.03)
        for name, meta in stream.parameters(names).items()
    }, None


def _flops(stream: StreamedModel, shape: tuple[int, int], scored: bool) -> tuple[int, int]:
    """Operations of what `_run` times."""
    found = measure(stream, shape, scored=scored)[0]
    backward = found.forward_flops + found.backward_flops + found.scoring_flops
    return found.forward_flops, backward


def _pace(
    few: float,
    many: float,
    few_flops: int,
    many_flops: int,
    samples: int,
    most: float = math.inf,
) -> Pace:
    """From the seconds of one sample of few tokens and of `samples` of more.

        few = fixed + few_flops / rate,  many = samples * fixed + many_flops / rate

    Args:
        most: operations a second, at most; then `many` alone counts.
    """
    growth = many_flops - samples * few_flops
    if growth > 0 and many > samples * few:
        rate = min(most, growth / (many - samples * few))
        if (fixed := (many - many_flops / rate) / samples) > 0:
            return Pace(fixed, rate)
    return Pace(0.0, many_flops / many)


def _affordable(shape: tuple[int, int], tokens: int) -> tuple[int, int]:
    """As much of a micro-batch as `tokens` are, or one row of the fewest: rows go first."""
    size, length = shape
    while size > 1 and size * length > tokens:
        size = -(-size // 2)
    while length > _FEWEST and size * length > tokens:
        length = max(_FEWEST, length // 2)
    return size, length


def _quickest(stream: StreamedModel, shape, scorer) -> tuple[float, float]:
    return tuple(map(min, *(_run(stream, shape, scorer) for _ in range(_RUNS))))


def _run(
    stream: StreamedModel, shape: tuple[int, int], scorer: BlockScorer | None
) -> tuple[float, float]:
    """Seconds of a forward, and of forward with graph, backward and scoring."""
    block, device = stream.blocks[0], stream.device
    args, kwargs = record(stream, shape).calls[0]
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    batch = Batch(ids, ids, (shape[1],) * shape[0], tuple(map(str, range(shape[0]))))
    width = stream.embedding.embedding_dim
    hidden = torch.randn(*shape, width, device=device).to(stream.dtype)
    gradient = 0.01 * torch.randn_like(hidden)  # float16 has to hold what comes of it
    start = _now(device)
    with torch.no_grad():
        block(hidden, *args, **kwargs)
    middle = _now(device)
    scoring = nullcontext() if scorer is None else scorer.backward(0, block, batch)
    with scoring, torch.enable_grad():
        output = block(hidden.requires_grad_(), *args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        torch.autograd.backward(output, gradient)
    return middle - start, _now(device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
