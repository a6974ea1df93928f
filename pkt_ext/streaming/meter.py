# SPDX-License-Identifier: Apache-2.0
"""What a pass costs: seconds by stage, what it waited for, bytes read, peak bytes."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

_INTERVAL = 0.02  # seconds between two looks at the memory of the process


@dataclass(frozen=True)
class PassReport:
    """What a pass did and cost."""

    seconds: float  # wall time in all
    stages: dict[str, float]  # seconds by stage, disjoint: "load", "reduce" are not in the others
    waits: dict[str, float]  # seconds of wall time by what they went into: disk, link, compute
    bytes_read: int  # of weights as stored, each time they were brought in
    peak_bytes: int  # CUDA: the allocator's peak; CPU: anonymous and shared resident memory
    samples: tuple[str, ...]
    losses: dict[str, float]  # sample id -> mean cross-entropy over its target tokens, in nats
    skipped: tuple[dict, ...] = ()  # {"id", "reason"} of samples left out as not finite
    spilled_bytes: int = 0  # of activations written to disk
    processes: tuple[dict, ...] = ()  # what each cost, where several shared the samples


def merge_reports(reports: Sequence[PassReport], samples: Sequence[str]) -> PassReport:
    """What several processes' passes over shares of `samples` cost together.

    Bytes are added up, the peak is the largest, the times are the first one's.
    """
    losses = {sample: loss for report in reports for sample, loss in report.losses.items()}
    each = [
        {
            "samples": len(report.samples),
            "seconds": report.seconds,
            "bytes_read": report.bytes_read,
            "peak_bytes": report.peak_bytes,
        }
        for report in reports
    ]
    return replace(
        reports[0],
        bytes_read=sum(report.bytes_read for report in reports),
        spilled_bytes=sum(report.spilled_bytes for report in reports),
        peak_bytes=max(report.peak_bytes for report in reports),
        samples=tuple(samples),
        losses={sample: losses[sample] for sample in samples},
        processes=tuple(each),
    )


class PeakMemory:
    """The most memory this process holds while the context is open, looked at fifty times a second.

    On a CPU anonymous and shared resident memory, on CUDA the allocator's peak.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._peak = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._thread = threading.Thread(target=self._watch, name="pkt-memory", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def bytes(self) -> int:
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        self._peak = max(self._peak, resident_bytes())
        return self._peak

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._peak = max(self._peak, resident_bytes())


class Meter:
    """Books wall time to the innermost stage that is open, and waiting to what was waited for."""

    def __init__(self, device: torch.device):
        self.device = device
        self.memory = PeakMemory(device)
        self.waits = {"disk": 0.0, "link": 0.0}
        self.bytes_read = 0
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Book the time inside to `name`."""
        self._book()
        self._open.append(name)
        try:
            yield
        finally:
            if self.device.type == "cuda" and len(self._open) == 1:
                torch.cuda.synchronize(self.device)
            self._book()
            self._open.pop()

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by stage so far."""
        self._book()
        return dict(self._seconds)

    @property
    def seconds(self) -> float:
        """Seconds in all stages so far."""
        return sum(self.stages.values())

    def _book(self) -> None:
        now = time.perf_counter()
        if self._open:
            stage = self._open[-1]
            self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._since
        self._since = now


def resident_bytes() -> int:
    """Anonymous and shared memory this process has in RAM; file mappings are page cache."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes, elsewhere KiB
        return peak if sys.platform == "darwin" else peak * 1024
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return sum(int(fields[k].split()[0]) * 1024 for k in ("RssAnon", "RssShmem"))
