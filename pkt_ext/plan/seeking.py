# SPDX-License-Identifier: Apache-2.0
"""What a Seeking transfer will take: the extraction and the training after it.

Times are estimates from one block at work (see `probe`).
"""

from __future__ import annotations

import logging
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
from pkt_ext.plan.common import (
    FORMAT,
    WIDTH,
    describe,
    devices,
    duration,
    figure,
    in_rows,
    model_line,
    worst_rows,
    wrapped,
)
from pkt_ext.probe import Rates, probe
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import available_bytes, format_bytes, parse_bytes, smallest_that_works
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.needs import Prediction
from pkt_ext.training_needs import TrainingNeeds, needs_of

log = logging.getLogger(__name__)


def plan(
    teacher,
    student,
    config: SeekingConfig,
    training: FinetuneConfig,
    *,
    samples: int,
    data,
    timed: bool,
) -> dict:
    """See `pkt_ext.plan.plan`."""
    here, target = devices(config)
    teacher = Checkpoint.open(teacher, revision=config.teacher_revision, headers_only=True)
    student = Checkpoint.open(student, revision=config.student_revision, headers_only=True)
    model, parts = pair(teacher, student, config, here)
    speaks, rows = None, None
    if data is None:
        rows = worst_rows(samples, longest_row(model, config), model.anatomy.vocab_size)
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
        "method": "seeking",
        "teacher": describe(model),
        "student": describe(StreamedModel(student, dtype=student.dtype)),
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

_COLUMNS = {  # of the table of phases: heading -> ingredients
    "process": ("process",),
    "weights": ("weights",),
    "activations": ("activations",),
    "scores": ("scores",),
    "work": ("arguments", "working memory"),
}


def text(document: dict) -> str:
    """The document of a plan as a table."""
    extract, limit = document["extract"], format_bytes(document["budget"])
    lines = [
        f"{document['method']}, {in_rows(document['samples'])} of up to {document['longest']} "
        f"tokens, {limit} of memory ({document['device']})",
        *(model_line(who, document[who]) for who in ("teacher", "student")),
        "",
        f"extract (pkt seeking): {format_bytes(extract['predicted_bytes'])} at most; the smallest "
        f"--budget that works is {format_bytes(extract['smallest_budget'])}",
        *_how(extract),
        "",
        f"  {'':9}{'memory':>9}"
        + "".join(f"{name:>{WIDTH}}" for name in _COLUMNS)
        + f"{'read':>10}{'FLOP':>8}{'time':>8}",
    ]
    for phase, facts in extract["phases"].items():
        cells = [sum(facts["parts"].get(n, 0) for n in names) for names in _COLUMNS.values()]
        lines.append(
            f"  {phase:9}{format_bytes(facts['bytes']):>9}"
            + "".join(f"{format_bytes(cell) if cell else '-':>{WIDTH}}" for cell in cells)
            + f"{format_bytes(facts['read_bytes']) if facts['read_bytes'] else '-':>10}"
            + f"{figure(facts['flops']):>8}{duration(facts['seconds']):>8}"
        )
    lines.append(
        f"  {'in all':{18 + WIDTH * len(_COLUMNS)}}{format_bytes(extract['read_bytes']):>10}"
        f"{figure(extract['flops']):>8}{duration(extract['seconds']):>8}"
    )
    lines += [*_estimate(document), "", *_training_lines(document["finetune"], limit), ""]
    disk = {name: format_bytes(size) for name, size in document["disk"].items()}
    lines.append(
        f"disk: start {disk['start']}, with {disk['progress']} beside it until it is complete"
    )
    lines.append(f"  adapter {disk['adapter']}, merged model {disk['merged']}")
    return "\n".join(lines)


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
    return wrapped(
        f"{in_rows(allotment['micro_batch'])} at a time; {blocks}"
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
        f"{figure(rates['forward']['flops'])}FLOP/s forward, "
        f"{figure(rates['backward']['flops'])}FLOP/s backward; "
    )
    if rates["read"]:
        speed = format_bytes(int(rates["read"]))
        line += f"weights at the rate the files give now, {speed}/s (more, while they are cached)"
    else:
        line += "reading the weights not counted"
    if rates["window"] is None:
        line += "; cutting and factoring not counted"
    return wrapped(line)


def _training_lines(training: dict, limit: str) -> list[str]:
    smallest = format_bytes(training["smallest_budget"])
    predicted = format_bytes(training["predicted_bytes"])
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in training["parts"].items())
    if not training["fits"]:
        return [
            f"finetune (pkt finetune): does not fit into {limit}; the smallest --budget that works "
            f"is {smallest}",
            *wrapped(f"one row at a time, {training['dtype']}: {parts}"),
        ]
    step = f"a step is {figure(training['step_flops'])}FLOP"
    if training["step_seconds"]:
        step += f", about {duration(training['step_seconds'])}"
    return [
        f"finetune (pkt finetune): {predicted} at most; the smallest --budget that works is "
        f"{smallest}",
        *wrapped(
            f"{in_rows(training['micro_batch'])} at a time of a batch of {training['batch']}, "
            f"{training['dtype']}: {parts}; {step}"
        ),
    ]
