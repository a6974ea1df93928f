# SPDX-License-Identifier: Apache-2.0
"""One case's contest: its contestants are verified, measured for memory, then timed in turn."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from pkt_ext.errors import PktError

# ours; the published code's way; a composition of torch operations; the speed of light (a plain
# matrix product or copy of the same size); anything else worth knowing
Role = Literal["ours", "published", "torch", "light", "other"]

_BATCH = 2e-3  # seconds a sample lasts at least: shorter calls are repeated within it
_LEAST, _MOST = 3, 40  # samples of a contestant
_SLOW = 1.0  # seconds of a call above which one sample will do, and its first call is one
_SETS = 16  # input sets at most; so many of the smallest still exceed a core's own caches


class VerificationError(PktError):
    """Our result is not the reference's. Exit code 1: it must not be timed."""


@dataclass(frozen=True)
class Work:
    """What a job needs at least, whoever does it."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Verdict:
    """How far a contestant's result is from float64's, and how far it may be."""

    error: float
    allowed: float
    note: str = ""  # what else a reader should know of its quality


class Estimate(NamedTuple):
    """What a contestant returns that does a part of the job only."""

    seconds: float  # of the whole job
    output: object  # of the part


@dataclass(frozen=True)
class Contestant:
    """One way to do the case's job.

    `call` takes an input set; `check` takes what it returned for the first one. Where `part` says
    what was really run, `call` times itself and returns an `Estimate`. One that `compiles` does so
    in a first call of its own, which is neither timed nor poisoned: that would compile it anew.
    """

    name: str
    role: Role
    call: Callable[..., object]
    check: Callable[[object], Verdict] | None = None  # None: nothing it computes could be wrong
    work: Work | None = None
    part: str = ""
    compiles: bool = False
    arithmetic: torch.dtype | None = None  # where its products are not computed in the case's


@dataclass
class Contest:
    """A case made ready: input sets, rotated so that no cache holds the next one, and who plays."""

    sets: list[tuple]
    contestants: list[Contestant]
    reset: Callable[[], None] = lambda: None  # puts results that accumulate to a known start


@dataclass(frozen=True)
class Result:
    """One contestant's figures. Seconds, FLOPs and bytes are those of the whole job."""

    name: str
    role: Role
    seconds: list[float]  # every sample, in order
    repeats: int  # calls a sample averages
    quantiles: dict[str, float]
    error: float | None
    allowed: float | None
    note: str
    part: str
    flops: float | None
    bytes: float | None
    peak_bytes: int | None  # of what was run: the part, where `part` names one
    failed: str  # why there are no samples
    arithmetic: str = ""  # of its products, where not the case's


def input_sets(make: Callable[[int], tuple], device: torch.device) -> list[tuple]:
    """`make(seed)` as often as it takes to exceed three times the last-level cache."""
    sets = [make(0)]
    size = sum(t.numel() * t.element_size() for t in sets[0] if isinstance(t, torch.Tensor))
    wanted = -(-3 * cache_bytes(device) // max(size, 1))
    return sets + [make(seed) for seed in range(1, min(_SETS, wanted))]


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory; 32 MiB where the machine does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [32 << 20]
    root = "/sys/devices/system/cpu/cpu0/cache"
    for index in os.listdir(root) if os.path.isdir(root) else ():
        path = f"{root}/{index}/size"
        if os.path.isfile(path):
            with open(path) as file:
                text = file.read().strip()
            unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
            sizes.append(int(text.rstrip("KM") or 0) * unit)
    return max(sizes)


# --- verification ---------------------------------------------------------------------------------


class _Poisoned(TorchFunctionMode):
    """Memory that torch hands out uninitialised starts as NaN or -1: what is not written shows."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.empty_like, torch.Tensor.new_empty) and out.is_contiguous():
            out.view(-1).view(torch.uint8).fill_(255)
        return out


@dataclass(frozen=True)
class _Trial:
    """What the first, verified call of a contestant showed."""

    verdict: Verdict | None
    peak_bytes: int | None
    seconds: float  # the call took, checks not included
    sample: float = 0.0  # what it says of the whole job
    failed: str = ""


def _try(contestant: Contestant, contest: Contest, device: torch.device) -> _Trial:
    contest.reset()
    held = []

    def call():
        start = time.perf_counter()  # here: the profiler's own start and end take longer than many
        output = contestant.call(*contest.sets[0])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        held.extend((time.perf_counter() - start, output))

    try:
        if contestant.compiles:
            contestant.call(*contest.sets[0])
            contest.reset()
        with nullcontext() if contestant.compiles else _Poisoned():
            peak = peak_bytes(call, device)
    except Exception as error:  # compilers and other libraries have their own kinds
        if contestant.role == "ours":
            raise
        short = isinstance(error, torch.OutOfMemoryError)
        reason = "out of memory" if short else f"fails: {error}".split("\n")[0][:90]
        return _Trial(None, None, 0.0, failed=reason)
    seconds, output = held
    sample = output.seconds if contestant.part else seconds
    if contestant.check is None:
        return _Trial(None, peak, seconds, sample)
    verdict = contestant.check(output.output if contestant.part else output)
    if verdict.error <= verdict.allowed:  # NaN fails
        return _Trial(verdict, peak, seconds, sample)
    wrong = f"off by {verdict.error:.3g} where {verdict.allowed:.3g} is allowed"
    if contestant.role == "ours":
        raise VerificationError(f"{contestant.name} is {wrong}; nothing was timed")
    return _Trial(verdict, peak, seconds, failed=f"wrong: {wrong}")


def verify(contest: Contest, device: torch.device) -> dict[str, _Trial]:
    """Run every contestant once, on poisoned outputs, and check what it returns.

    Raises:
        VerificationError: ours is off by more than it may be. Others' rows say so.
    """
    return {c.name: _try(c, contest, device) for c in contest.contestants}


# --- memory ---------------------------------------------------------------------------------------


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes of torch tensors alive at once during a call, beyond those alive before it.

    What torch's allocator handed out: results, workspaces, temporaries of torch's own operations;
    not what other libraries take from the system (BLAS packing buffers, numpy).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profile:
        call()
    events = profile.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    alive = peak = 0
    for _, change in changes:
        alive += change
        peak = max(peak, alive)
    return peak


# --- time -----------------------------------------------------------------------------------------


class _Clock:
    """Samples one contestant: some calls in a row, each on the next input set."""

    def __init__(self, contestant: Contestant, contest: Contest, device: torch.device, hint: float):
        self._call, self._part, self._sets = contestant.call, contestant.part, contest.sets
        self._device, self._next = device, 0
        self.repeats, self.cost = 1, hint
        if hint > _SLOW:
            return
        for _ in range(2):  # the second counts
            start = time.perf_counter()
            once = self.sample()
            self.cost = time.perf_counter() - start  # a part's, not of what it stands for
        if not self._part:
            self.repeats = max(1, min(100, int(_BATCH / once)))
            self.cost += (self.repeats - 1) * once

    def sample(self) -> float:
        """Seconds of one call."""
        if self._part:
            return self._call(*self._inputs()).seconds
        if self._device.type == "cuda":
            return self._sample_cuda()
        start = time.perf_counter()
        for _ in range(self.repeats):
            self._call(*self._inputs())
        return (time.perf_counter() - start) / self.repeats

    def _sample_cuda(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        torch.cuda._sleep(1_000_000)  # the queue fills meanwhile, so that launches leave no gaps
        start.record()
        for _ in range(self.repeats):
            self._call(*self._inputs())
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self.repeats

    def _inputs(self) -> tuple:
        self._next += 1
        return self._sets[self._next % len(self._sets)]


def _turns(costs: dict[str, float], seconds: float, have: dict[str, int]) -> dict[str, int]:
    """Samples of each contestant: what the cheap ones leave of `seconds` goes to the dear ones.

    However little is left, all get what they lack of `_LEAST` samples, slow ones of a single one.
    """
    turns = {}
    for place, name in enumerate(sorted(costs, key=costs.get)):
        share = max(0.0, seconds) / (len(costs) - place)
        least = (_LEAST if costs[name] <= _SLOW else 1) - have.get(name, 0)
        turns[name] = max(0, least, min(_MOST, int(share / costs[name])))
        seconds -= turns[name] * costs[name]
    return turns


def race(
    clocks: dict[str, _Clock], seconds: float, have: dict[str, int] | None = None
) -> dict[str, list[float]]:
    """Every contestant's samples, taken in turn (A B C A B C) within about `seconds` in all.

    Those with fewer samples than others play in rounds that are spread evenly. `have` counts the
    samples there are already.
    """
    turns = _turns({name: clock.cost for name, clock in clocks.items()}, seconds, have or {})
    rounds = max(turns.values(), default=0)
    samples = {name: [] for name in clocks}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for name, clock in clocks.items():
                if (number + 1) * turns[name] // rounds > number * turns[name] // rounds:
                    samples[name].append(clock.sample())
    finally:
        gc.enable()
    return samples


class Match:
    """A contest over several laps, its inputs made anew in each.

    Samples of one lap share its memory and its moment; what differs from lap to lap, as from run to
    run, belongs into the spread.
    """

    def __init__(self, make: Callable[[], Contest], device: torch.device):
        self.sets = 0  # input sets in rotation
        self._make, self._device = make, device
        self._contestants: list[Contestant] = []
        self._trials: dict[str, _Trial] = {}
        self._samples: dict[str, list[float]] = {}
        self._out: set[str] = set()  # who does not play
        self._repeats: dict[str, int] = {}

    def lap(self, seconds: float) -> None:
        """Take samples: about `seconds` in all, a third of them for the race at least.

        The first lap verifies everybody. A slow one's time for that call is its first sample; who
        took longer than all may for a lap does not play.

        Raises:
            VerificationError: see `verify`.
        """
        start = time.perf_counter()
        contest = self._make()
        if not self._trials:
            self._trials = verify(contest, self._device)
            self._contestants, self.sets = contest.contestants, len(contest.sets)
            self._samples = {
                name: [trial.sample]
                for name, trial in self._trials.items()
                if trial.seconds > _SLOW and not trial.failed
            }
            self._out = {
                name
                for name, trial in self._trials.items()
                if trial.failed or trial.seconds > max(seconds, _SLOW)
            }
        clocks = {
            c.name: _Clock(c, contest, self._device, self._trials[c.name].seconds)
            for c in contest.contestants
            if c.name not in self._out
        }
        have = {name: len(samples) for name, samples in self._samples.items()}
        found = race(clocks, max(seconds / 3, seconds - (time.perf_counter() - start)), have)
        for name, samples in found.items():
            self._samples.setdefault(name, []).extend(samples)
            self._repeats.setdefault(name, clocks[name].repeats)

    def results(self) -> list[Result]:
        """Every contestant's figures so far."""
        return [
            _result(
                c, self._trials[c.name], self._repeats.get(c.name, 1), self._samples.get(c.name, [])
            )
            for c in self._contestants
        ]


def hold(contest: Contest, device: torch.device, seconds: float) -> list[Result]:
    """One lap of a contest that is ready."""
    match = Match(lambda: contest, device)
    match.lap(seconds)
    return match.results()


def _result(contestant: Contestant, trial: _Trial, repeats: int, samples: list[float]) -> Result:
    verdict, work = trial.verdict, contestant.work
    return Result(
        name=contestant.name,
        role=contestant.role,
        seconds=list(samples),
        repeats=repeats,
        quantiles=quantiles(samples),
        error=verdict.error if verdict else None,
        allowed=verdict.allowed if verdict else None,
        note=verdict.note if verdict else "",
        part=contestant.part,
        flops=work.flops if work else None,
        bytes=work.bytes if work else None,
        peak_bytes=trial.peak_bytes,
        failed=trial.failed,
        arithmetic=str(contestant.arithmetic or "").removeprefix("torch."),
    )


def quantiles(samples: list[float]) -> dict[str, float]:
    """Least, 10 %, 25 %, median, 75 %, 90 %, largest; empty without samples."""
    import numpy

    places = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    values = numpy.quantile(samples, places).tolist() if samples else []
    return dict(zip((f"{place:g}" for place in places), values, strict=False))
