# SPDX-License-Identifier: Apache-2.0
"""The roofline plot: each op's FLOPs per byte against what it achieves, under both ceilings."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

from pkt_ext.errors import InputError

# where a point's number stands, in turn: neighbours in the list are often neighbours in the plot
_AROUND = (4, -8), (-8, 4), (4, 4), (-8, -10)


def figure_class():
    """matplotlib's Figure.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "--plot needs matplotlib: pip install 'pkt_ext[report]', or leave --plot out"
        ) from error
    return Figure


def plot(document: dict, path: Path) -> None:
    """Write the run's roofline to a PNG file, complete or not at all."""
    figure = figure_class()(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    points = [
        (f"{case['name']}{entry['name'].removeprefix('ours')}", case["op"], entry)
        for case in document["cases"]
        for entry in case["contestants"]
        if entry["role"] == "ours" and entry["seconds"]
    ]
    intensities = [entry["flops"] / entry["bytes"] for _, _, entry in points]
    span = [min(intensities, default=1.0) / 4, max(intensities, default=1.0) * 4]
    bandwidth = document["ceilings"]["copy"]["per_second"]
    for name, ceiling in document["ceilings"].items():
        if name != "copy":
            top, ridge = ceiling["per_second"], ceiling["per_second"] / bandwidth
            span[1] = max(span[1], 4 * ridge)
            (line,) = axes.plot([ridge, span[1]], [top, top], label=f"matmul, {name}")
            axes.plot([span[0], ridge], [span[0] * bandwidth, top], color=line.get_color(), lw=0.8)
    markers = dict(zip(sorted({op for _, op, _ in points}), cycle("osD^vP*"), strict=False))
    for number, (name, op, entry) in enumerate(points, 1):
        place = entry["flops"] / entry["bytes"], entry["flops"] / entry["quantiles"]["0.5"]
        axes.plot(*place, markers[op], color="black", markersize=4)
        away = _AROUND[number % len(_AROUND)]
        axes.annotate(str(number), place, xytext=away, textcoords="offset points", fontsize=8)
        axes.plot([], [], " ", label=f"{number}  {op}  {name}")
    axes.set_xlabel("FLOPs per byte moved")
    axes.set_ylabel("FLOPs per second")
    machine = document["machine"]
    axes.set_title(f"{machine['gpu'] or machine['cpu']}: slopes are the copy bandwidth")
    figure.legend(loc="outside right upper", fontsize=7, handlelength=1.2)
    staged = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(staged, format="png", dpi=150)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
