# SPDX-License-Identifier: Apache-2.0
"""What moved between two runs, beyond their noise."""

from __future__ import annotations

from pkt_ext.bench import report

_ALIKE = 0.03  # changes below this share are not worth a line, however quiet both runs were
_FEW = 0.10  # what fewer than five samples may be off by on either side of their extremes
_SINGLE = 0.25  # and one sample alone


def compare(old: dict, new: dict) -> str:
    """The differences of two documents in words; "nothing moved" is one."""
    lines = _conditions(old, new)
    before, after = _entries(old), _entries(new)
    moved = [
        (ratio, name, text)
        for name in before.keys() & after.keys()
        for ratio, text in [_change(before[name], after[name])]
        if text
    ]
    for _, name, text in sorted(moved, key=lambda row: (-max(row[0], 1 / row[0]), row[1])):
        lines.append(f"{name}: {text}")
    both = len(before.keys() & after.keys())
    if not moved:
        lines.append(f"nothing moved beyond the noise, of {both} timings")
    else:
        lines.append(f"{len(moved)} of {both} timings moved beyond the noise")
    for which, names in (
        ("old", before.keys() - after.keys()),
        ("new", after.keys() - before.keys()),
    ):
        if names:
            lines.append(f"only in the {which} run: {', '.join(sorted(names))}")
    return "\n".join(lines)


def _conditions(old: dict, new: dict) -> list[str]:
    """What differs between the runs besides kernels: machine, versions, settings, quiet."""
    lines = []
    for name, document in (("old", old), ("new", new)):
        if not document.get("complete", True):
            lines.append(f"{name} run was interrupted: some cases or samples are missing")
        if report.disturbed(document):
            lines.append(f"{name} run{report.disturbed(document)}".replace(";", ":"))
    for part in ("machine", "versions", "settings"):
        for key in sorted(old[part].keys() | new[part].keys()):
            was, now = old[part].get(key), new[part].get(key)
            if was != now:
                lines.append(f"{part} differ: {key} was {was}, is {now}")
    return lines


def _entries(document: dict) -> dict[str, dict]:
    """Every timing of a run by name, the ceilings among them."""
    found = {f"ceiling, {name}": entry for name, entry in document["ceilings"].items()}
    for case in document["cases"]:
        for entry in case["contestants"]:
            if entry["seconds"]:
                found[f"{case['op']} {case['name']}, {entry['name']}"] = entry
    return found


def _change(old: dict, new: dict) -> tuple[float, str]:
    """(time ratio, what to say of it); nothing where both runs' spreads overlap."""
    was, now = old["quantiles"]["0.5"], new["quantiles"]["0.5"]
    ratio = now / was
    (low, high), (lower, higher) = _noise(old), _noise(new)
    if lower <= high and low <= higher or abs(ratio - 1) < _ALIKE:
        return ratio, ""
    change = f"{report.times(ratio)} slower" if ratio > 1 else f"{report.times(1 / ratio)} faster"
    return ratio, f"{change}, {report.seconds(was)} before, {report.seconds(now)} now"


def _noise(entry: dict) -> tuple[float, float]:
    """The spread printed, widened where there are few samples to tell it from."""
    found = report.spread(entry["quantiles"], entry["seconds"])
    margin = 0.0 if len(entry["seconds"]) >= 5 else _FEW if found else _SINGLE
    low, high = found or (entry["quantiles"]["0.5"],) * 2
    return low * (1 - margin), high * (1 + margin)
