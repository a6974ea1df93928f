# SPDX-License-Identifier: Apache-2.0
"""What plans of all methods share: devices, rows to plan for, how models and figures are shown."""

from __future__ import annotations

import textwrap
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
