# SPDX-License-Identifier: Apache-2.0
"""What plans of all methods share: devices, rows to plan for, how models and figures are shown."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from pkt_ext.errors import InputError
from pkt_ext.settings import find_device
from pkt_ext.streaming.batches import Sample
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import format_bytes

FORMAT = 1  # of the documents
WIDTH = 12  # of a column of ingredients


def devices(config) -> tuple[torch.device, torch.device]:
    """(where the models are looked at, what is planned for).

    Raises:
        InputError: a device that is not here, without a budget.
    """
    try:
        device = find_device(config.device)
        return device, device
    except InputError:
        if not config.device.startswith("cuda"):
            raise
    if config.budget is None:
        raise InputError(
            f"there is no device {config.device!r} here whose memory could be looked up; say how "
            "much it has: --budget 8GiB"
        )
    return torch.device("cpu"), torch.device("cuda")


def worst_rows(count: int, length: int, vocabulary: int) -> list[Sample]:
    """Rows of which every token is predicted and, as far as there are enough, no two are equal."""
    tokens = (torch.arange(count * length) % vocabulary).view(count, length)
    return [Sample(str(number), ids, ids) for number, ids in enumerate(tokens)]


def describe(model: StreamedModel) -> dict:
    """A model, as the document says it."""
    checkpoint = model.checkpoint
    names = [*model.outer_names, *(n for names in model.block_names for n in names)]
    quantised = checkpoint.quantisation
    return {
        "name": checkpoint.name,
        "type": checkpoint.config.model_type,
        "blocks": len(model.block_names),
        "parameters": sum(torch.Size(checkpoint.shape(name)).numel() for name in names),
        "stored_bytes": checkpoint.bytes_of(names),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantisation": asdict(quantised) if quantised else None,
        "to_download": checkpoint.to_download,
    }


def stage_of(phases: dict[str, dict[str, int]], read_bytes: int, flops: int) -> dict:
    """A stage of these phases; `parts` are those of the largest."""
    largest = max(phases.values(), key=lambda parts: sum(parts.values()))
    return {
        "bytes": sum(largest.values()),
        "parts": largest,
        "phases": {
            name: {"bytes": sum(parts.values()), "parts": parts} for name, parts in phases.items()
        },
        "read_bytes": read_bytes,
        "flops": flops,
    }


# --- text -----------------------------------------------------------------------------------------


def model_line(who: str, facts: dict) -> str:
    stored = f"{format_bytes(facts['stored_bytes'])} stored"
    if quantised := facts["quantisation"]:
        stored += f" as {quantised['type']}"
    if facts["to_download"]:
        stored += f", {format_bytes(facts['to_download'])} of it to be downloaded"
    return (
        f"{who}  {facts['name']}: {facts['type']}, {facts['blocks']} blocks, "
        f"{figure(facts['parameters'])} parameters, {stored}"
        + (f", computed in {facts['dtype']}" if who == "teacher" else "")
    )


def table(document: dict, columns: Mapping[str, Sequence[str]]) -> list[str]:
    """The stages of a document, line by line.

    Args:
        columns: heading -> ingredients.
    """
    lines = [
        f"  {'':17}{'memory':>9}"
        + "".join(f"{name:>{WIDTH}}" for name in columns)
        + f"{'read':>10}{'FLOP':>8}"
    ]
    for stage, facts in document["stages"].items():
        cells = [sum(facts["parts"].get(n, 0) for n in names) for names in columns.values()]
        lines.append(
            f"  {stage:17}{format_bytes(facts['bytes']):>9}"
            + "".join(f"{format_bytes(cell) if cell else '-':>{WIDTH}}" for cell in cells)
            + f"{format_bytes(facts['read_bytes']) if facts['read_bytes'] else '-':>10}"
            + f"{figure(facts['flops']):>8}"
        )
    lines.append(
        f"  {'in all':{26 + WIDTH * len(columns)}}{format_bytes(document['read_bytes']):>10}"
        f"{figure(document['flops']):>8}"
    )
    return lines


def pass_line(what: str, stage: dict, head: str = "") -> str:
    """How a pass shares out its memory: a stage with `allotment` and what was found with it."""
    shared, spilled = stage["allotment"], stage["spilled_bytes"]
    mapped = "mapped from the files, which is page cache"
    return (
        f"{what}: {in_rows(shared['micro_batch'])} at a time; the blocks are "
        f"{mapped if stage['blocks_mapped'] else 'streamed once'}, "
        f"{'the next one' if shared['ahead'] else 'nothing'} read ahead{head}; "
        + (f"{format_bytes(spilled)} of activations in files" if spilled else "no files")
    )


def in_rows(number: int) -> str:
    return f"{number} row" if number == 1 else f"{number} rows"


def wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, 98, initial_indent="  ", subsequent_indent="  ")


def figure(value: float) -> str:
    """950 M, 13.0 G, 2.1 P"""
    if not value:
        return "-"
    units = ["", "K", "M", "G", "T", "P"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        del units[0]
    unit = units[0]
    return f"{value:.0f} {unit}" if value >= 99.5 or not unit else f"{value:.1f} {unit}"


def duration(seconds: float | None) -> str:
    """0.4 s, 12 s, 3.1 min, 2.4 h, 1.2 d"""
    if seconds is None:
        return "-"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
