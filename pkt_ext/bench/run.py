# SPDX-License-Identifier: Apache-2.0
"""A run of `pkt bench`: ceilings, then case after case, then what was asked to be written."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from pkt_ext import _C
from pkt_ext.bench import cases, ceilings, contest, machine, report, roofline
from pkt_ext.errors import InputError
from pkt_ext.settings import find_device

log = logging.getLogger(__name__)

# seconds a case may take, verification included; and all of them together, set-up included
_EACH = {"small": 0.2, "default": 12.0, "full": 30.0}
_ALL = {"small": 30.0, "default": 140.0, "full": 3600.0}


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
        json:   file to write the document to.
        plot:   PNG file for the roofline.
        progress: show a bar on a terminal, log lines elsewhere.
        tell:   takes the text of each part as it is known.
    Raises:
        InputError: an unknown stem or size, a device that is not there or that nothing was built
            for, a file that cannot be written.
        VerificationError: a result is wrong.
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
    dtypes = {case.arithmetic(where.type) for _, case in selected}
    document["ceilings"] = ceilings.measure(where, dtypes, min(4.0, 5 * _EACH[size]))
    tell(report.header(document))
    document["cases"] = []
    bar = tqdm(total=len(selected), unit="case", disable=None if progress else True, leave=False)
    with bar:
        for number, (stem, case) in enumerate(selected):
            spent = time.perf_counter() - start
            left = spent / number * (len(selected) - number) if number else None
            guess = f", about {left:.0f} s left" if left else ""
            if progress and bar.disable:
                text = "%s %s: case %d of %d%s"
                log.info(text, case.op, case.name, number + 1, len(selected), guess)
            share = (_ALL[size] - spent) / (len(selected) - number)
            entry = _measure(stem, case, where, min(share, _EACH[size]), document["ceilings"])
            document["cases"].append(entry)
            tell(report.case_text(entry))
            bar.update()
    document["elapsed"] = time.perf_counter() - start
    document["others_share"] = neighbours.share()
    tell(report.summary(document))
    if json is not None:
        report.write(json, document)
    if plot is not None:
        roofline.plot(document, plot)
    return document


def _measure(stem: str, case, device: torch.device, seconds: float, limits: dict) -> dict:
    start = time.perf_counter()
    made = case.contest(device)
    seconds = max(min(1.0, seconds), seconds - (time.perf_counter() - start))
    try:
        results = contest.hold(made, device, seconds)
    except contest.VerificationError as error:
        raise contest.VerificationError(f"{case.op} {case.name}: {error}") from error
    return report.case_entry(stem, case, device.type, len(made.sets), results, limits)


def _check_writable(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{path}: not a file in an existing folder; name another")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path.parent}: not writable; name another folder")
