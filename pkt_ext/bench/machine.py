# SPDX-License-Identifier: Apache-2.0
"""What a measurement was made on and with: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

from pkt_ext.build_info import info


def describe(device: torch.device) -> dict[str, dict]:
    """{"machine": ..., "versions": ...}: names and values, and the git commit in a checkout."""
    machine = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": None,
    }
    facts = info()
    versions = {name: facts[name] for name in ("pkt_ext", "python", "torch", "SIMD used")}
    versions |= {"platform": facts["platform"], "cuda": torch.version.cuda, "commit": _commit()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        machine |= {"gpu": card.name, "gpu_memory_bytes": card.total_memory}
        versions |= {
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "kernels on CUDA": facts["kernels on CUDA"],
            "CUDA architectures": facts["CUDA architectures"],
        }
    return {"machine": machine, "versions": versions}


class Neighbours:
    """How much of the CPUs other processes took since this was made: they widen every spread."""

    def __init__(self):
        self._start = self._read()

    def share(self) -> float | None:
        """Between 0 and 1; None where the system does not tell."""
        if self._start is None:
            return None
        total, busy, own = (now - then for now, then in zip(self._read(), self._start, strict=True))
        return min(1.0, max(0.0, busy - own) / total) if total else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds so far: of all CPUs, of those not idle (stolen ones too), of this process."""
        path = Path("/proc/stat")
        if not path.exists():
            return None
        ticks = [int(text) for text in path.read_text().split("\n")[0].split()[1:9]]
        idle = ticks[3] + ticks[4]
        hertz, own = os.sysconf("SC_CLK_TCK"), os.times()
        return sum(ticks) / hertz, (sum(ticks) - idle) / hertz, sum(own[:4])


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree this package is imported from, "+" if files were changed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return commit and commit + "+" * bool(changed)


def _output(*command: str) -> str | None:
    """A program's first line of output; None where it is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().split("\n")[0] or None
