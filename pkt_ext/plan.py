# SPDX-License-Identifier: Apache-2.0
"""What a transfer will take, before it runs: memory, traffic, operations and time, by phase.

Configuration and safetensors headers are enough. The predictions are those by which the runs
themselves share out their memory; times are estimates from one block at work (see `probe`).
"""

from __future__ import annotations

import logging
import textwrap
from contextlib import suppress
from dataclasses import asdict, replace

import torch

from pkt_ext.errors import InputError, PktError
from pkt_ext.finetune import FinetuneConfig, micro_batches, training_dtype
from pkt_ext.methods.pairing import Plan
from pkt_ext.methods.seeking import SeekingConfig
from pkt_ext.methods.seeking_inputs import (
    encode_rows,
    longest_row,
    pair,
    share_out,
    shared_tokens,
)
from pkt_ext.probe import Rates, probe
from pkt_ext.settings import find_device, refuse_processes
from pkt_ext.streaming.batches import Sample
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import available_bytes, format_bytes, parse_bytes, smallest_that_works
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.needs import Prediction
from pkt_ext.training_needs import TrainingNeeds, needs_of

log = logging.getLogger(__name__)

FORMAT = 1  # of the document
METHODS = ("seeking",)


def plan(
    teacher,
    student,
    config: SeekingConfig | None = None,
    training: FinetuneConfig | None = None,
    *,
    method: str = "seeking",
    samples: int = 32,
    data=None,
    timed: bool = True,
) -> dict:
    """What extraction and training will take; of a Hub id only headers are fetched.

    Args:
        teacher, student: folders, hub ids or loaded models.
        config:   of the extraction; its budget and device are those of the training too. A device
                  that is not here needs a budget.
        training: of the training; what `config` has too is taken from there, except for dtype.
        samples:  rows of `config.max_length` tokens, each of which is predicted: the worst case.
        data:     plan for these rows instead (needs the teacher's tokenizer).
        timed:    run one block for a moment, for the times; without it nothing but headers is read.
    Returns:
        The document that `pkt plan --json` prints; `text` makes a table of it.
    Raises:
        InputError: models that do not go together; a budget too small for the extraction.
    """
    refuse_processes("pkt plan", "start it without a launcher")
    if method not in METHODS:
        raise InputError(f"method is {method!r}; known is {', '.join(METHODS)}")
    if samples < 1:
        raise InputError(f"samples is {samples}; give at least 1")
    config, training = config or SeekingConfig(), training or FinetuneConfig()
    here, target = _devices(config)
    teacher = Checkpoint.open(teacher, revision=config.teacher_revision, headers_only=True)
    student = Checkpoint.open(student, revision=config.student_revision, headers_only=True)
    model, parts = pair(teacher, student, config, here)
    speaks, rows = None, None
    if data is None:
        rows = _worst_rows(samples, longest_row(model, config), model.anatomy.vocab_size)
    else:
        speaks = teacher.tokenizer(), student.tokenizer()
        rows = encode_rows(data, speaks[0], model, config).samples
    tokens = shared_tokens(parts, *(speaks or (None, None)), config) if parts.outer else None
    count = None if tokens is None else len(tokens[0])
    parts.check_rank(config.rank, count)
    if speaks is None:  # a run has them in memory
        for checkpoint in (teacher, student):
            with suppress(InputError):
                speaks = checkpoint.to_download or checkpoint.tokenizer()
    predicted = share_out(model, parts, rows, config, tokens=count, device=target)
    training = replace(
        training,
        budget=config.budget,
        device=target.type,
        max_length=config.max_length,
        dropout=config.dropout,
    )
    needs = _training_needs(student, parts, config.rank, training)
    timed = timed and here == target
    rates = _rates(model, predicted, parts, config) if timed else None
    limit = parse_bytes(config.budget) if config.budget else available_bytes(target)
    found = {
        "format": FORMAT,
        "method": method,
        "teacher": _describe(model),
        "student": _describe(StreamedModel(student, dtype=student.dtype)),
        "device": str(target),
        "budget": limit,
        "samples": len(rows),
        "longest": max(len(row.input_ids) for row in rows),
        "extract": _extraction(model, parts, predicted, len(rows), rates),
        "finetune": _training(needs, training, limit),
        "rates": asdict(rates) if rates else None,
        "disk": _disk(student, parts, config, predicted),
    }
    if timed and found["finetune"]["fits"]:
        _time_training(found["finetune"], student, needs, training, here)
    return found


def _devices(config: SeekingConfig) -> tuple[torch.device, torch.device]:
    """(where the models are looked at, what is planned for)."""
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


def _worst_rows(count: int, length: int, vocabulary: int) -> list[Sample]:
    """Rows of which every token is predicted and, as far as there are enough, no two are equal."""
    tokens = (torch.arange(count * length) % vocabulary).view(count, length)
    return [Sample(str(number), ids, ids) for number, ids in enumerate(tokens)]


def _training_needs(
    student: Checkpoint, parts: Plan, rank: int, config: FinetuneConfig
) -> TrainingNeeds:
    length = config.max_length
    if parts.student.position_embedding:
        length = min(length, student.config.max_position_embeddings)
    return needs_of(
        student,
        config,
        training_dtype(config, config.device),
        config.device,
        length=length,
        ranks=parts.ranks(rank),
        frozen=True,
        dropout=config.dropout,
    )


def _describe(model: StreamedModel) -> dict:
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


def _disk(
    student: Checkpoint, parts: Plan, config: SeekingConfig, predicted: Prediction
) -> dict[str, int]:
    adapter = parts.adapter_bytes(config.rank)
    names = [name for name, _ in student.skeleton(student.dtype).named_parameters()]
    kept = adapter * len(parts.teacher.blocks) // len(parts.student.blocks)  # of every block cut
    return {
        "start": 2 * adapter,  # B0, A0 and their negative
        "progress": predicted.spilled + kept,  # beside the start, until it is complete
        "adapter": 2 * adapter,  # of twice the rank
        "merged": sum(torch.Size(student.shape(n)).numel() for n in names) * student.dtype.itemsize,
    }


# --- the extraction -------------------------------------------------------------------------------


def _rates(
    model: StreamedModel, predicted: Prediction, parts: Plan, config: SeekingConfig
) -> Rates | None:
    try:
        return probe(
            model, predicted.shape, parts, rank=config.rank, mode=config.svd, seed=config.seed
        )
    except PktError as error:
        log.warning("no times: %s", error)
        return None


def _extraction(
    model: StreamedModel, parts: Plan, predicted: Prediction, samples: int, rates: Rates | None
) -> dict:
    mapped = predicted.allotment.resident > 0 and not predicted.phases["forward"]["weights"]
    read = dict(predicted.read)
    if mapped and read["forward"] > available_bytes(model.device):
        read["backward"] = read["forward"]  # the page cache cannot hold what it has seen
    predicted = replace(predicted, read=read)
    seconds = _seconds(parts, predicted, samples, rates) if rates else {}
    count = len(model.block_names)
    return {
        "predicted_bytes": predicted.peak,
        "smallest_budget": parse_bytes(smallest_that_works(predicted.least)),
        "allotment": asdict(predicted.allotment),
        "blocks_resident": min(predicted.allotment.resident, count),
        "blocks_mapped": mapped,
        "blocks_streamed": count - min(predicted.allotment.resident, count),
        "phases": {
            phase: {
                "bytes": predicted.peaks[phase],
                "parts": ingredients,
                "read_bytes": predicted.read.get(phase, 0),
                "flops": predicted.flops.get(phase, 0),
                "seconds": seconds.get(phase),
            }
            for phase, ingredients in predicted.phases.items()
        },
        "spilled_bytes": predicted.spilled,
        "written_bytes": predicted.written,
        "read_bytes": sum(predicted.read.values()),
        "flops": sum(predicted.flops.values()),
        "seconds": sum(seconds.values()) if seconds else None,
    }


def _seconds(parts: Plan, predicted: Prediction, samples: int, rates: Rates) -> dict[str, float]:
    """Phase -> seconds: computing and reading at once where blocks are read ahead, else in turn."""
    found, blocks = {}, len(parts.teacher.blocks)
    for phase, flops in predicted.flops.items():
        pace = rates.backward if phase == "backward" else rates.forward
        passes = samples * blocks if phase in ("forward", "backward") else 0
        computing = pace.seconds(passes, flops)
        reading = predicted.read[phase] / rates.read if rates.read else 0.0
        together = predicted.allotment.ahead and phase != "outer"
        found[phase] = max(computing, reading) if together else computing + reading
    if rates.window is None:
        return found
    searched = sum(torch.Size(mine.shape).numel() for mine, _ in parts.cuts.values())
    factored = sum(torch.Size(theirs.shape).numel() for _, theirs in parts.cuts.values())
    each = searched / rates.window + factored / rates.factor
    found["reduce"] = each * blocks  # as if every block were cut
    if parts.outer:
        tables = 2 * parts.student.vocab_size * parts.student.hidden_size
        found["outer"] += tables / rates.factor
    return found


# --- the training ---------------------------------------------------------------------------------


def _training(needs: TrainingNeeds, config: FinetuneConfig, limit: int) -> dict:
    size = needs.largest(micro_batches(config, config.device), limit)
    return {
        "fits": size is not None,
        "predicted_bytes": needs.peak(size or 1),
        "smallest_budget": parse_bytes(smallest_that_works(needs.peak(1))),
        "batch": config.batch,
        "micro_batch": size,
        "dtype": str(needs.plan.dtype).removeprefix("torch."),
        "parts": needs.predict(size or 1),
        "trainable_parameters": needs.adapter_parameters,
        "step_flops": needs.flops_per_row * config.batch,
        "step_seconds": None,
    }


def _time_training(
    found: dict, student: Checkpoint, needs: TrainingNeeds, config: FinetuneConfig, device
) -> None:
    """Add the time of a step, at the rate of one of the student's blocks."""
    model = StreamedModel(student, dtype=needs.plan.dtype, device=device)
    try:
        rates = probe(model, (found["micro_batch"], needs.plan.length))
    except PktError as error:
        log.warning("no time of a step: %s", error)
        return
    if rates is not None:
        found["step_seconds"] = found["step_flops"] / rates.backward.flops


# --- text -----------------------------------------------------------------------------------------

_WIDTH = 12
_COLUMNS = {  # of the table of phases: heading -> ingredients
    "process": ("process",),
    "weights": ("weights",),
    "activations": ("activations",),
    "scores": ("scores",),
    "work": ("arguments", "working memory"),
}


def text(document: dict) -> str:
    """The document as a table."""
    extract, limit = document["extract"], format_bytes(document["budget"])
    lines = [
        f"{document['method']}, {_rows(document['samples'])} of up to {document['longest']} "
        f"tokens, {limit} of memory ({document['device']})",
        *(_model_line(who, document[who]) for who in ("teacher", "student")),
        "",
        f"extract (pkt seeking): {format_bytes(extract['predicted_bytes'])} at most; the smallest "
        f"--budget that works is {format_bytes(extract['smallest_budget'])}",
        *_how(extract),
        "",
        f"  {'':9}{'memory':>9}"
        + "".join(f"{name:>{_WIDTH}}" for name in _COLUMNS)
        + f"{'read':>10}{'FLOP':>8}{'time':>8}",
    ]
    for phase, facts in extract["phases"].items():
        cells = [sum(facts["parts"].get(n, 0) for n in names) for names in _COLUMNS.values()]
        lines.append(
            f"  {phase:9}{format_bytes(facts['bytes']):>9}"
            + "".join(f"{format_bytes(cell) if cell else '-':>{_WIDTH}}" for cell in cells)
            + f"{format_bytes(facts['read_bytes']) if facts['read_bytes'] else '-':>10}"
            + f"{_count(facts['flops']):>8}{_duration(facts['seconds']):>8}"
        )
    lines.append(
        f"  {'in all':{18 + _WIDTH * len(_COLUMNS)}}{format_bytes(extract['read_bytes']):>10}"
        f"{_count(extract['flops']):>8}{_duration(extract['seconds']):>8}"
    )
    lines += [*_estimate(document), "", *_training_lines(document["finetune"], limit), ""]
    disk = {name: format_bytes(size) for name, size in document["disk"].items()}
    lines.append(
        f"disk: start {disk['start']}, with {disk['progress']} beside it until it is complete"
    )
    lines.append(f"  adapter {disk['adapter']}, merged model {disk['merged']}")
    return "\n".join(lines)


def _model_line(who: str, facts: dict) -> str:
    stored = f"{format_bytes(facts['stored_bytes'])} stored"
    if quantised := facts["quantisation"]:
        stored += f" as {quantised['type']}"
    if facts["to_download"]:
        stored += f", {format_bytes(facts['to_download'])} of it to be downloaded"
    return (
        f"{who}  {facts['name']}: {facts['type']}, {facts['blocks']} blocks, "
        f"{_count(facts['parameters'])} parameters, {stored}"
        + (f", computed in {facts['dtype']}" if who == "teacher" else "")
    )


def _how(extract: dict) -> list[str]:
    """What is resident, streamed and spilled."""
    allotment = extract["allotment"]
    head, spilled = allotment["head_rows"], extract["spilled_bytes"]
    if extract["blocks_mapped"]:
        blocks = "the blocks are mapped from the files, which is page cache, "
    else:
        blocks = (
            f"{extract['blocks_streamed']} blocks streamed twice, {extract['blocks_resident']} "
            "once (they stay for the backward), "
        )
    return _wrapped(
        f"{_rows(allotment['micro_batch'])} at a time; {blocks}"
        + ("the next one read ahead; " if allotment["ahead"] else "nothing read ahead; ")
        + f"the head {'whole' if head is None else f'in parts of {head} rows'}; "
        + (f"{format_bytes(spilled)} of activations in files" if spilled else "no files")
    )


def _estimate(document: dict) -> list[str]:
    rates = document["rates"]
    if rates is None:
        return []
    size, length = rates["shape"]
    line = (
        f"times are estimates, from one block with {size} x {length} tokens on this machine as it "
        "is now: "
        f"{_count(rates['forward']['flops'])}FLOP/s forward, "
        f"{_count(rates['backward']['flops'])}FLOP/s backward; "
    )
    if rates["read"]:
        speed = format_bytes(int(rates["read"]))
        line += f"weights at the rate the files give now, {speed}/s (more, while they are cached)"
    else:
        line += "reading the weights not counted"
    if rates["window"] is None:
        line += "; cutting and factoring not counted"
    return _wrapped(line)


def _training_lines(training: dict, limit: str) -> list[str]:
    smallest = format_bytes(training["smallest_budget"])
    predicted = format_bytes(training["predicted_bytes"])
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in training["parts"].items())
    if not training["fits"]:
        return [
            f"finetune (pkt finetune): does not fit into {limit}; the smallest --budget that works "
            f"is {smallest}",
            *_wrapped(f"one row at a time, {training['dtype']}: {parts}"),
        ]
    step = f"a step is {_count(training['step_flops'])}FLOP"
    if training["step_seconds"]:
        step += f", about {_duration(training['step_seconds'])}"
    return [
        f"finetune (pkt finetune): {predicted} at most; the smallest --budget that works is "
        f"{smallest}",
        *_wrapped(
            f"{_rows(training['micro_batch'])} at a time of a batch of {training['batch']}, "
            f"{training['dtype']}: {parts}; {step}"
        ),
    ]


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, 98, initial_indent="  ", subsequent_indent="  ")


def _count(value: float) -> str:
    """950 M, 13.0 G, 2.1 P"""
    if not value:
        return "-"
    units = ["", "K", "M", "G", "T", "P"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        del units[0]
    unit = units[0]
    return f"{value:.0f} {unit}" if value >= 99.5 or not unit else f"{value:.1f} {unit}"


def _duration(seconds: float | None) -> str:
    """0.4 s, 12 s, 3.1 min, 2.4 h, 1.2 d"""
    if seconds is None:
        return "-"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
