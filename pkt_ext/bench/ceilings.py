# SPDX-License-Identifier: Apache-2.0
"""This machine's ceilings: the bandwidth of a large copy, the rate of a large matrix product."""

from __future__ import annotations

import torch

from pkt_ext.bench.contest import Contest, Contestant, Match, Work, cache_bytes
from pkt_ext.bench.data import Source


def dtypes(selected: list, device_type: str) -> set[torch.dtype]:
    """What the cases' products are computed in; on a GPU also float32, their rivals'."""
    found = {case.arithmetic(device_type) for case in selected}
    return found | {torch.float32} if device_type == "cuda" else found


def match(device: torch.device, dtypes: set[torch.dtype]) -> Match:
    """The match of a copy and of a matrix product in each dtype.

    The copy is eight times the last-level cache or more, read and written bytes counted; products
    are square, on random data (zeros run faster).
    """
    return Match(lambda: _contest(device, dtypes), device)


def _contest(device: torch.device, dtypes: set[torch.dtype]) -> Contest:
    on_gpu = device.type == "cuda"
    source = Source(0, device)
    count = max(8 * cache_bytes(device), 1 << 30 if on_gpu else 1 << 28) // 4
    target, origin = torch.empty(count, device=device), source.normal(count)
    contestants = [
        Contestant("copy", "light", lambda: target.copy_(origin), work=Work(0.0, 8.0 * count))
    ]
    side = 8192 if on_gpu else 2048
    for dtype in sorted(dtypes, key=str):
        a, b = (source.normal(side, side).to(dtype) for _ in range(2))
        name = str(dtype).removeprefix("torch.")
        work = Work(2.0 * side**3, 3.0 * side * side * dtype.itemsize)
        call = _product(a, b, torch.empty_like(a))
        contestants.append(Contestant(name, "light", call, work=work))
    return Contest([()], contestants)


def read(match: Match) -> dict[str, dict]:
    """Medians and quantiles of all laps so far.

    Returns:
        "copy" and the dtypes' names -> unit ("bytes" or "flops"), per_second, and the samples.
    """
    found = {}
    for result in match.results():
        unit = "bytes" if result.name == "copy" else "flops"
        found[result.name] = {
            "unit": unit,
            "per_second": getattr(result, unit) / result.quantiles["0.5"],
            "seconds": result.seconds,
            "quantiles": result.quantiles,
        }
    return found


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor):
    return lambda: torch.mm(a, b, out=out)


def binding(flops: float, bytes: float, ceilings: dict, dtype: str) -> tuple[float, str]:
    """(the least seconds the ceilings allow, which one binds): "copy" or "matmul"."""
    moved = bytes / ceilings["copy"]["per_second"]
    computed = flops / ceilings[dtype]["per_second"]
    return (computed, "matmul") if computed > moved else (moved, "copy")
