# SPDX-License-Identifier: Apache-2.0
"""A run of `pkt bench`: ceilings, then case after case, then what was asked to be written."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from pkt_ext import _C
from pkt_ext.bench import cases, ceilings, contest, machine, report, roofline
from pkt_ext.errors import InputError
from pkt_ext.settings import find_device

log = logging.getLogger(__name__)

_LAPS = {"small": 1, "default": 2, "full": 2}
# seconds a case may take in a lap, making and verifying included; and all together
_EACH = {"small": 0.2, "default": 6.0, "full": 20.0}
_ALL = {"small": 30.0, "default": 125.0, "full": 3600.0}


def run(
    stems: list[str],
    *,
    device: str = "auto",
    size: str = "default",
    json: Path | None = None,
    plot: Path | None = None,
    progress: bool = True,
    tell: Callable[[str], None] = print,
) -> dict:
    """Measure this machine, then every case of `stems` (none: of all); the run as a document.

    Args:
        stems:  of kernels, as in pkt_ext.ops.
        device: auto, cpu, cuda or cuda:1.
        size:   small (seconds, tiny shapes), default (under three minutes on two cores) or full.
        json:   file to write the document to, after every case.
        plot:   PNG file for the roofline.
        progress: show a bar on a terminal, log lines elsewhere.
        tell:   takes the text of each part as it is known.
    Raises:
        InputError: an unknown stem or size, a device that is not there or that nothing was built
            for, a file that cannot be written.
        VerificationError: a result of ours is wrong.
    """
    where = find_device(device)
    selected = cases.select(stems, where.type, size)
    for path in filter(None, (json, plot)):
        _check_writable(path)
    if plot is not None:
        roofline.figure_class()
    if where.type == "cuda":
        if not hasattr(_C, "cuda_versions"):
            raise InputError(
                "pkt_ext was built without CUDA kernels; rebuild with nvcc on PATH and "
                "PKT_EXT_CUDA=1, or use --device cpu"
            )
        where = torch.device("cuda", where.index or 0)
        torch.cuda.set_device(where)
    start = time.perf_counter()
    document = {"format": report.FORMAT, **machine.describe(where)}
    document["settings"] = {"device": where.type, "size": size}
    document |= {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    neighbours = machine.Neighbours()
    dtypes = ceilings.dtypes([case for _, case in selected], where.type)
    limits = ceilings.match(where, dtypes)
    tell(report.header(document))
    document |= {"complete": False, "cases": []}
    entries = {}
    matches = [contest.Match(partial(case.contest, where), where) for _, case in selected]
    plan = [(lap, number) for lap in range(_LAPS[size]) for number in range(len(selected))]
    bar = tqdm(total=len(plan), unit="case", disable=None if progress else True, leave=False)
    with bar:
        for done, (lap, number) in enumerate(plan):
            (stem, case), match = selected[number], matches[number]
            if number == 0:
                limits.lap(min(3.0, 5 * _EACH[size]))
                document["ceilings"] = ceilings.read(limits)
                tell(report.ceiling_text(document["ceilings"]))
            spent = time.perf_counter() - start
            if progress and bar.disable:
                guess = f", about {spent / done * (len(plan) - done):.0f} s left" if done else ""
                text = "%s %s: case %d of %d, lap %d of %d%s"
                place = number + 1, len(selected), lap + 1, _LAPS[size]
                log.info(text, case.op, case.name, *place, guess)
            if lap == 0 or spent < _ALL[size]:  # a second lap is a luxury
                # a second one shares what the first left: else early cases starve the late ones
                least = _EACH[size] / 2 if lap == 0 else 0.0
                share = max(least, (_ALL[size] - spent) / (len(plan) - done))
                _lap(match, case, min(share, _EACH[size]))
            last = lap == _LAPS[size] - 1
            limit = document["ceilings"]
            entries[number] = report.case_entry(stem, case, where.type, match, limit)
            if last:
                tell(report.case_text(entries[number]))
            document |= {"cases": list(entries.values()), "complete": done + 1 == len(plan)}
            document["elapsed"] = time.perf_counter() - start
            document["others_share"] = neighbours.share()
            if json is not None:  # an interrupted run keeps what it measured
                report.write(json, document)
            bar.update()
    tell(report.summary(document))
    if plot is not None:
        roofline.plot(document, plot)
    return document


def _lap(match: contest.Match, case, seconds: float) -> None:
    try:
        match.lap(seconds)
    except contest.VerificationError as error:
        raise contest.VerificationError(f"{case.op} {case.name}: {error}") from error


def _check_writable(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{path}: not a file in an existing folder; name another")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path.parent}: not writable; name another folder")
