# SPDX-License-Identifier: Apache-2.0
"""A run as a document (what --json holds) and as text."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from pkt_ext.bench.ceilings import binding
from pkt_ext.bench.contest import Match
from pkt_ext.errors import InputError

FORMAT = 1  # of the JSON document; a reader refuses others


def case_entry(stem: str, case, device_type: str, match: Match, ceilings: dict) -> dict:
    """A case's part of the document; each of ours with its ratios to the others.

    A ratio is the other's median time over ours: `published`, `torch` (the fastest composition of
    torch operations), `light` (the plain product or copy).
    """
    arithmetic = str(case.arithmetic(device_type)).removeprefix("torch.")
    entries = []
    for result in match.results():
        entry = dataclasses.asdict(result)
        if result.seconds and result.flops is not None:
            dtype = result.arithmetic or arithmetic
            least, bound = binding(result.flops, result.bytes, ceilings, dtype)
            entry |= {"of_ceiling": least / result.quantiles["0.5"], "bound": bound}
        entries.append(entry)
    medians = {}
    for entry in entries:
        if entry["seconds"]:
            medians.setdefault(entry["role"], []).append(entry["quantiles"]["0.5"])
    for entry in entries:
        if entry["role"] == "ours" and entry["seconds"]:
            entry["ratios"] = {
                role: min(medians[role]) / entry["quantiles"]["0.5"]
                for role in ("published", "torch", "light")
                if role in medians
            }
    return {
        "stem": stem,
        "op": case.op,
        "name": case.name,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "arithmetic": arithmetic,
        "input_sets": match.sets,
        "contestants": entries,
    }


def write(path: Path, document: dict) -> None:
    """Write the document as JSON, complete or not at all."""
    staged = path.with_name(f".{path.name}.tmp")
    try:
        with open(staged, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def read(path: Path) -> dict:
    """A document that `write` made.

    Raises:
        InputError: no such file, not JSON, or not of a run of `pkt bench`.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    try:
        whole = document["format"] == FORMAT and all(
            isinstance(document[part], dict) for part in ("machine", "versions", "settings")
        )
        disturbed(document)
        for case in [document, *document["cases"]]:
            entries = case["contestants"] if case is not document else case["ceilings"].values()
            for entry in entries:
                whole &= not entry["seconds"] or entry["quantiles"]["0.5"] > 0
                spread(entry["quantiles"], entry["seconds"])
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise InputError(f"{path} is not what `pkt bench --json` of this version writes")
    return document


# --- text -----------------------------------------------------------------------------------------


def header(document: dict) -> str:
    """Machine and versions."""
    machine, versions = document["machine"], document["versions"]
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    lines = [f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {memory}"]
    if machine["gpu"]:
        lines.append(f"{machine['gpu']}, {machine['gpu_memory_bytes'] / 2**30:.0f} GiB")
    named = {name: value for name, value in versions.items() if value and name != "platform"}
    lines.append(", ".join(f"{name} {value}" for name, value in named.items()))
    return "\n".join(lines)


def ceiling_text(ceilings: dict) -> str:
    """The two ceilings, the second in each dtype."""
    lines = []
    for name, ceiling in ceilings.items():
        job = "copy" if name == "copy" else f"matmul {name}"
        spread = _spread(ceiling["quantiles"], ceiling["seconds"])
        lines.append(f"ceiling, {job}: {rate(ceiling['per_second'], ceiling['unit'])} ({spread})")
    return "\n".join(lines)


def case_text(case: dict) -> str:
    """One case: a line a contestant, and what ours is relative to them."""
    lines = [f"\n{case['op']}  {case['name']}: {case['shape']}, {case['dtype']}"]
    lines.append(f"  counted: {_counted(case)}")
    lines.append(
        f"  {'':34} {'median':>9}  {'10 to 90 %':<22} {'samples':>7} {'of ceiling':>12} "
        f"{'peak memory':>11}"
    )
    for entry in case["contestants"]:
        if entry["failed"]:
            lines.append(f"  {entry['name']:34} {entry['failed']}")
            continue
        share = f"{entry['of_ceiling']:.0%} {entry['bound']}" if "bound" in entry else ""
        repeats = f"x{entry['repeats']}" if entry["repeats"] > 1 else ""
        lines.append(
            f"  {entry['name']:34} {seconds(entry['quantiles']['0.5']):>9}  "
            f"{_spread(entry['quantiles'], entry['seconds']):<22} "
            f"{str(len(entry['seconds'])) + repeats:>7} {share:>12} {size(entry['peak_bytes']):>11}"
        )
        notes = "; ".join(filter(None, (entry["part"], entry["note"])))
        if notes:
            lines.append(f"      {notes}")
    for entry in case["contestants"]:
        if "ratios" in entry:
            lines.append(f"  {entry['name']}: {_ratios(entry, case)}")
    return "\n".join(lines)


def _counted(case: dict) -> str:
    """What the job needs at least; of several modes, each."""
    counts = []
    for entry in case["contestants"]:
        if entry["role"] == "ours":
            flops = _scaled(entry["flops"] / 1e6, 1000, ["MFLOP", "GFLOP", "TFLOP"])
            counts.append((f"{flops}, {size(int(entry['bytes']))}", entry["name"]))
    if len(counts) == 1:
        return f"{counts[0][0]} at least"
    return "; ".join(f"{count} ({name})" for count, name in counts)


def _ratios(entry: dict, case: dict) -> str:
    """Side by side, in words."""
    ratios, parts = entry["ratios"], []
    if "published" in ratios:
        parts.append(f"{times(ratios['published'])} as fast as published")
    if "torch" in ratios:
        parts.append(f"{times(ratios['torch'])} as fast as the best torch")
    if "light" in ratios:
        light = next(e["name"] for e in case["contestants"] if e["role"] == "light")
        parts.append(f"{times(1 / ratios['light'])} the time of {light}")
    return ", ".join(parts)


def summary(document: dict) -> str:
    """A table: one line for each of ours."""
    lines = [
        f"\n{'ours against ...':46} {'median':>8} {'10 to 90 %':>11} {'of ceiling':>12} "
        f"{'published':>9} {'torch':>7} {'light':>7} {'peak':>8}"
    ]
    op = None
    for case in document["cases"]:
        if case["op"] != op:
            op = case["op"]
            lines.append(op)
        for entry in case["contestants"]:
            if "ratios" not in entry:
                continue
            mode = entry["name"].removeprefix("ours")
            ratios = [
                times(entry["ratios"][role]) if role in entry["ratios"] else "-"
                for role in ("published", "torch", "light")
            ]
            share = f"{entry['of_ceiling']:.0%} {entry['bound']}" if "bound" in entry else "-"
            lines.append(
                f"  {case['name'] + mode:44} {seconds(entry['quantiles']['0.5']):>8} "
                f"{_relative(entry):>11} {share:>12} {ratios[0]:>9} {ratios[1]:>7} {ratios[2]:>7} "
                f"{size(entry['peak_bytes']):>8}"
            )
    lines.append(
        "published, torch, light: how many times longer (below 1: shorter) the published way, the "
        "best\ncomposition of torch operations and the plain product or copy of the same size take"
    )
    lines.append(f"{document['elapsed']:.0f} s in all{disturbed(document)}")
    return "\n".join(lines)


def disturbed(document: dict) -> str:
    """A warning if other processes took more than a twentieth of the CPUs."""
    share = document["others_share"]
    if share is None or share < 0.05:
        return ""
    return f"; other processes took {share:.0%} of the CPUs meanwhile, expect wide spreads"


def spread(quantiles: dict, samples: list[float]) -> tuple[float, float] | None:
    """Where another run's median is to be expected; None for a single sample.

    The 10 % and 90 % quantiles; the extremes of fewer than five samples.
    """
    if len(samples) < 2:
        return None
    low, high = ("0.1", "0.9") if len(samples) >= 5 else ("0", "1")
    return quantiles[low], quantiles[high]


def _spread(quantiles: dict, samples: list[float]) -> str:
    found = spread(quantiles, samples)
    return f"{seconds(found[0])} to {seconds(found[1])}" if found else "one sample"


def _relative(entry: dict) -> str:
    """The spread, relative to the median: -4% +12%"""
    found, median = spread(entry["quantiles"], entry["seconds"]), entry["quantiles"]["0.5"]
    return " ".join(f"{bound / median - 1:+.0%}" for bound in found) if found else "one sample"


def _scaled(value: float, step: int, units: list[str]) -> str:
    """Three digits and a unit."""
    place = 0
    while abs(value) >= step * 0.9995 and place < len(units) - 1:
        value, place = value / step, place + 1
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {units[place]}"


def seconds(value: float) -> str:
    """26.9 ms"""
    return _scaled(value * 1e6, 1000, ["us", "ms", "s"])


def size(value: int | None) -> str:
    """5.28 MB"""
    return (
        "-"
        if value is None
        else "0"
        if value == 0
        else _scaled(value, 1000, ["B", "kB", "MB", "GB"])
    )


def rate(per_second: float, unit: str) -> str:
    """18.2 GB/s, 90.1 GFLOP/s"""
    name = "B/s" if unit == "bytes" else "FLOP/s"
    return _scaled(per_second / 1e6, 1000, [f"M{name}", f"G{name}", f"T{name}", f"P{name}"])


def times(ratio: float) -> str:
    """1283x, 12.3x, 0.91x, 0.012x"""
    digits = 0 if ratio >= 20 else 1 if ratio >= 1.95 else 2 if ratio >= 0.095 else 3
    return f"{ratio:.{digits}f}x"
