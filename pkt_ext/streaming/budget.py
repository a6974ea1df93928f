# SPDX-License-Identifier: Apache-2.0
"""What fits into a budget of device memory, and what a pass therefore keeps, reads ahead or spills.

On a CPU the budget is of the process's anonymous and shared resident memory, interpreter included:
weights that are mapped from the checkpoint are page cache and cost nothing. On CUDA it is of the
allocator's peak and the context.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pkt_ext.errors import InputError
from pkt_ext.heap import give_back_freed_memory
from pkt_ext.settings import launched_as
from pkt_ext.streaming.batches import Sample
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.meter import resident_bytes
from pkt_ext.streaming.needs import ForwardNeeds, Needs, Prediction

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}i": 2 ** (10 * power) for power, unit in enumerate("KMGT", 1)}


def parse_bytes(text: str | int) -> int:
    """A number of bytes: 8GiB, 512MiB, 6.5GB, 4G or plain bytes.

    Raises:
        InputError: none of these, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*((?:[KMGT]i?)?)B?\s*", str(text), re.IGNORECASE)
    unit = match and (match[2][:1].upper() + match[2][1:].lower())
    if not match or unit not in _UNITS or not (count := int(float(match[1]) * _UNITS[unit])):
        raise InputError(f"{text!r} is no amount of memory; write it as 8GiB, 512MiB or 6.5GB")
    return count


@dataclass(frozen=True)
class Allotment:
    """How a pass shares out its memory. Only `micro_batch` and `head_rows` touch the rounding."""

    micro_batch: int  # samples run at once
    ahead: bool = True  # the next part is read while one is at work
    resident: int = 0  # the last blocks, kept from the forward for the backward
    activation_bytes: int = 0  # boundary activations kept on the device; the rest is spilled
    host_bytes: int = 0  # of the rest, kept in pinned host memory (CUDA); what remains is on disk
    head_rows: int | None = None  # vocabulary rows of the head at a time; None: all


_SHARE = {"cpu": 0.8, "cuda": 0.9}  # of the free memory, where no budget is given
_FILLED = {"cpu": 1.0, "cuda": 0.95}  # of a budget: CUDA's allocator has gaps (not measured yet)
_CGROUPS = (  # a container's folder, the files that name its limit and what it uses; v2, v1
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
_STEP = 4 * 2**20  # bytes to which the share of activations is found


def fit(
    stream: StreamedModel,
    samples: Sequence[Sample],
    budget: int | None,
    *,
    micro_batch: int,
    extra: Mapping[str, int] | None = None,
    outer: bool = True,
    durable: bool = True,
    backward: bool = True,
    scored: bool = True,
    fixed: Mapping[str, int | None] | None = None,
    device: torch.device | None = None,
) -> Prediction:
    """The allotment that makes the most of a budget, and what it is predicted to take.

    What comes first gets the memory: reading ahead, the whole head at once, the micro-batch asked
    for, activations on the device (on a CPU they are in files anyway, and those in the page cache,
    which costs nothing), resident blocks. No weight is read. Freed memory goes back to
    the system from here on (see `heap`).

    Args:
        samples:     what will be run; only lengths, targets and distinct tokens matter.
        budget:      bytes; None: most of what is free.
        micro_batch: samples run at once, at most.
        extra:       phase -> bytes that the caller's own work takes at its largest; of a pass that
                     goes forward alone see `needs.ForwardNeeds`.
        outer:       embedding and head will be scored.
        durable:     activations are written to disk whether or not they are kept.
        backward:    False: the pass goes forward alone.
        scored:      the blocks' parameters will be scored on the way back.
        fixed:       {"micro_batch", "head_rows"} of an interrupted run, which are not to change.
        device:      to fit into, where that is not the model's: one that need not be here, for a
                     model on the CPU and with a budget given.
    Raises:
        InputError: the budget is too small; names the smallest that works.
    """
    if stream.device.type == "cpu":
        give_back_freed_memory()
    device = device or stream.device
    needs = (Needs if backward else ForwardNeeds)(
        stream,
        samples,
        dict(extra or {}),
        outer=outer,
        durable=durable,
        scored=scored,
        device=device,
    )
    limit = available_bytes(device) if budget is None else budget
    sizes, heads = _sizes(micro_batch), needs.head_sizes()
    if fixed is not None:
        sizes, heads = [fixed["micro_batch"]], [fixed["head_rows"]]

    smallest = min(
        (needs.predict(Allotment(sizes[0], ahead=False, head_rows=rows)) for rows in heads),
        key=lambda prediction: prediction.peak,
    )
    if smallest.peak > limit:
        raise InputError(
            f"{format_bytes(limit)} of memory is too little: the smallest --budget that works is "
            f"{smallest_that_works(smallest.peak)} ({_largest_parts(smallest)}); lower "
            "--max-length for less"
        )
    best, room = smallest, limit * _FILLED[device.type]

    def try_(**changes) -> bool:
        nonlocal best
        candidate = needs.predict(replace(best.allotment, **changes))
        if fits := candidate.peak <= room:
            best = candidate
        return fits

    try_(ahead=True)
    for rows in heads:
        if try_(head_rows=rows):
            break
    for size in reversed(sizes[1:]):
        if try_(micro_batch=size):
            break
    if device.type == "cuda" or not durable:
        if device.type == "cuda":
            best = replace(best, allotment=replace(best.allotment, host_bytes=_host_bytes()))
        low, high = 0, needs.boundary_bytes(best.allotment.micro_batch)
        if not try_(activation_bytes=high):
            while high - low > _STEP:
                middle = (low + high) // 2
                low, high = (middle, high) if try_(activation_bytes=middle) else (low, middle)
    for count in range(len(stream.block_names) if backward else 0, 0, -1):
        if try_(resident=count):
            break
    return replace(best, least=smallest.peak)


def available_bytes(device: torch.device) -> int:
    """Most of the memory that is free on a device, or that a container is allowed."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _SHARE["cuda"])
    return resident_bytes() + int(_free_host_bytes() * _SHARE["cpu"])


def format_bytes(count: int) -> str:
    """Bytes as people say them, rounded up: 640 MiB, 7.3 GiB."""
    if count < 2**30:
        return f"{-(-count // 2**20)} MiB"
    return f"{-(-count * 10 // 2**30) / 10:.1f} GiB"


def smallest_that_works(peak: int) -> str:
    """A budget to give where `peak` bytes are predicted: the next run may find some MiB more."""
    return format_bytes(peak + 8 * 2**20)


def refuse_too_little(
    limit: int, stages: Mapping[str, int], parts: Mapping[str, Mapping[str, int]], instead: str
) -> None:
    """Refuse a budget that one of a run's stages does not fit into.

    Args:
        stages:  stage, as "align" -> bytes that it takes at least.
        parts:   of some of them, ingredient -> bytes.
        instead: what else the user can do.
    Raises:
        InputError: names the smallest budget that works for all, and what needs it.
    """
    stage = max(stages, key=stages.get)
    if stages[stage] <= limit:
        return
    why = f"to {stage}"
    if stage in parts:
        why += f": {_largest(parts[stage])}"
    raise InputError(
        f"{format_bytes(limit)} of memory is too little: the smallest --budget that works is "
        f"{smallest_that_works(stages[stage])} ({why}); {instead}"
    )


def _free_host_bytes() -> int:
    """Of the machine's free memory what is this process's; others of the same job have as much."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    for folder, most, used in _CGROUPS:
        try:
            limit = int(Path(folder, most).read_text())  # "max": no limit
            taken = int(Path(folder, used).read_text()) - _page_cache(Path(folder, "memory.stat"))
            free = min(free, limit - taken)
        except (OSError, ValueError):
            continue
    return max(0, free) // launched_as().local_size


def _page_cache(stat: Path) -> int:
    """Bytes of files that count as used in a container, and give way like free memory.

    After one pass over a checkpoint that may be nearly all of what the container is allowed.
    """
    found = dict(line.split() for line in stat.read_text().splitlines())
    names = ("inactive_file", "active_file")  # "total_": of a version 1 group and those inside
    return sum(int(found.get(f"total_{name}", found.get(name, 0))) for name in names)


def _host_bytes() -> int:
    """Pinned memory for activations: it cannot be swapped, so much is left to others."""
    return _free_host_bytes() // 2


def _sizes(most: int) -> list[int]:
    """Micro-batches to choose from, ascending: 1, 2, 3, 4, 6, 8, 12, ... and `most`."""
    steps = {n << k for n in (1, 3) for k in range(most.bit_length())}
    return sorted({n for n in steps if n < most} | {most})


def _largest_parts(prediction: Prediction) -> str:
    phase = max(prediction.peaks, key=prediction.peaks.get)
    return f"{phase}: {_largest(prediction.phases[phase])}"


def _largest(parts: Mapping[str, int]) -> str:
    """The three largest ingredients."""
    most = sorted(parts.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in most)
