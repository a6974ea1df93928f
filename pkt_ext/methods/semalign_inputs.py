# SPDX-License-Identifier: Apache-2.0
"""What a SemAlign run needs, checked before anything is written or a weight is read.

`config` is a `semalign_config.SemAlignConfig` throughout.
"""

from __future__ import annotations

import math
import os
import random
from dataclasses import asdict, dataclass, replace

import torch

from pkt_ext import artifact
from pkt_ext.data import Row, encode, read_rows
from pkt_ext.errors import InputError
from pkt_ext.methods.seeking_inputs import longest_row
from pkt_ext.methods.semantic_map import check_shared
from pkt_ext.methods.students import check_gradients
from pkt_ext.methods.two_models import TwoModels, open_both
from pkt_ext.methods.vocabulary import SharedVocabulary, shared_vocabulary
from pkt_ext.paired_data import PairedRows, Positions, encode_pairs
from pkt_ext.settings import trainer_device
from pkt_ext.streaming.batches import Sample, digest, with_distinct_ids
from pkt_ext.streaming.blocks import StreamedModel

HELD_OUT = 64  # rows at most, where none are given for that


@dataclass(frozen=True)
class Job(TwoModels):
    """Everything checked; nothing is written and no weight is read yet. Pairs: teacher, student."""

    shared: SharedVocabulary
    rows: PairedRows  # to train on
    layer_positions: list[Positions]  # of these, where the layer loss looks
    held: PairedRows | None  # to look at
    unrelated: list[Sample]  # of the student, every token is predicted
    dropped: list[tuple[str, str]]


def prepare(models, tokenizers, data, holdout, unrelated, config) -> Job:
    checkpoints = open_both(models, (config.teacher_revision, config.student_revision))
    streams = pair(checkpoints, config, trainer_device(config.device))
    tokenizers = [t or s.checkpoint.tokenizer() for t, s in zip(tokenizers, streams, strict=True)]
    shared = shared_vocabulary(*tokenizers, *(s.anatomy.vocab_size for s in streams))
    if not config.baseline:
        check_shared(shared, max(s.anatomy.hidden_size for s in streams))
    length = min(longest_row(stream, config) for stream in streams)

    def read(rows: list[Row]) -> PairedRows:
        return encode_pairs(
            rows,
            *tokenizers,
            shared.identical,
            max_length=length,
            prompt_format=config.prompt_format,
            train_on_inputs=config.train_on_inputs,
        )

    found = read(read_rows(data))
    dropped = list(found.dropped)
    if holdout is None:
        found, held = _split(found, config)
    else:
        held = _read_held_out(holdout, read)
        dropped += held.dropped
        found, held = _distinct(found, held)
    others = []
    if unrelated is not None:
        others, without = _unrelated(unrelated, tokenizers[1], length, config.prompt_format)
        dropped += without
    for stream, name in zip(streams, ("teacher", "student"), strict=True):
        for part in (found, held):
            if part is not None:
                _check(stream, getattr(part, name), name)
    _check(streams[1], others, "student")
    places = layer_positions(found, shared, config)
    return Job(streams, shared, found, places, held, others, dropped)


def pair(
    checkpoints, config, device: torch.device, target: torch.device | None = None
) -> tuple[StreamedModel, StreamedModel]:
    """Both models on `device`.

    Args:
        target: the device that they will be on, where that is another one.
    Raises:
        InputError: models that cannot be streamed, or a student that cannot be trained.
    """
    teacher, student = (
        StreamedModel(
            checkpoint,
            dtype=getattr(torch, config.dtype) if config.dtype else checkpoint.dtype,
            device=device,
        )
        for checkpoint in checkpoints
    )
    check_gradients(student, target or device)
    for stream in (teacher, student):
        if stream.head.bias is not None:
            raise InputError(
                f"{stream.checkpoint.name}: its head has a bias, which no semantic basis knows of; "
                "choose another model"
            )
    if config.train == "lora":
        _check_modules(student, config)
    elif student.checkpoint.quantisation:
        raise InputError(
            f"{student.checkpoint.name}: its weights are quantised, and cannot be trained "
            "themselves; use --train lora"
        )
    return teacher, student


def _check_modules(student: StreamedModel, config) -> None:
    """Every block has to have something to train, whichever it will be.

    Raises:
        InputError: one has none of the chosen modules.
    """
    for path, projections in zip(student.anatomy.blocks, student.anatomy.projections, strict=True):
        roles = [projection.role for projection in projections]
        if not set(roles) & set(config.roles):
            raise InputError(
                f"modules is {config.modules!r}, but {path} of {student.checkpoint.name} has "
                f"{','.join(dict.fromkeys(roles))}; give some of these"
            )


def _check(stream: StreamedModel, samples: list[Sample], who: str) -> None:
    try:
        stream.check(samples)
    except InputError as error:
        raise InputError(f"{who}: {error}") from error


def _read_held_out(source, read) -> PairedRows:
    """Rows to look at only; an error says that they are meant."""
    rows = read_rows(source)
    try:
        return read(rows)
    except InputError as error:
        raise InputError(f"rows to hold out: {error}") from error


def _split(rows: PairedRows, config) -> tuple[PairedRows, PairedRows | None]:
    """(rows to train on, rows to look at), drawn by the seed, each in its order.

    Of the rows that are left: one that was dropped cannot be what is looked at.
    """
    total = len(rows.student)
    drawn = set(random.Random(config.seed).sample(range(total), held_out(total, config)))
    if not drawn:
        return rows, None
    return _some(rows, set(range(total)) - drawn), _some(rows, drawn)


def _some(rows: PairedRows, chosen: set[int]) -> PairedRows:
    """These of the rows, in their order."""
    names = {rows.student[index].id for index in chosen}
    teacher, student, positions = (
        [each[index] for index in sorted(chosen)]
        for each in (rows.teacher, rows.student, rows.positions)
    )
    truncated = [name for name in rows.truncated if name in names]
    return PairedRows(teacher, student, positions, [], truncated, rows.example)


def held_out(rows: int, config) -> int:
    """How many of so many rows are only looked at."""
    return min(math.ceil(config.hold_out * rows), HELD_OUT, rows - 1)


def _distinct(rows: PairedRows, held: PairedRows) -> tuple[PairedRows, PairedRows]:
    """With ids that occur once in both together."""
    count = len(rows.teacher)
    theirs = with_distinct_ids([*rows.teacher, *held.teacher])
    ours = with_distinct_ids([*rows.student, *held.student])
    return (
        replace(rows, teacher=theirs[:count], student=ours[:count]),
        replace(held, teacher=theirs[count:], student=ours[count:]),
    )


def layer_positions(rows: PairedRows, shared: SharedVocabulary, config) -> list[Positions]:
    """Where a layer loss looks; of all positions only those can be that both models have."""
    if config.positions == "all" and not shared.identical:
        raise InputError(
            "positions is all, but between two tokenizers only supervised positions are paired; "
            "leave positions out (--train-on-inputs supervises prompts too)"
        )
    if config.positions_meant == "supervised" or not shared.identical:
        return rows.positions
    # the first position is where models park a vector hundreds of times as long as the others
    # (attention sinks); beside it no relation among the others would count
    every = [torch.arange(1, len(sample.input_ids)) for sample in rows.student]
    return [(each, each) for each in every]


def _unrelated(source, tokenizer, length: int, form: str):
    """(the samples, every token of which is predicted; what was dropped)."""
    found = encode(read_rows(source), tokenizer, max_length=length, prompt_format=form)
    whole = [replace(sample, labels=sample.input_ids) for sample in found.samples]
    return with_distinct_ids(whole), found.dropped


def run_record(job: Job, data, holdout, unrelated, config) -> dict:
    models = (stream.checkpoint for stream in job.streams)
    inputs = {
        who: artifact.fingerprint(model.folder or model.name)
        for who, model in zip(("teacher", "student"), models, strict=True)
    }
    for name, source in (("data", data), ("holdout", holdout), ("unrelated", unrelated)):
        if isinstance(source, str | os.PathLike):
            inputs[name] = artifact.fingerprint(source)
    return {
        "paradigm": None if config.baseline else "activation",
        "method": "semalign",
        "config": asdict(config),
        "inputs": inputs,
    }


def state(job: Job, config, run: dict) -> dict:
    """What the progress of a run belongs to; neither a budget nor a cache changes a result."""
    sides = [part for part in (job.rows, job.held) if part is not None]
    samples = [sample for part in sides for sample in (*part.teacher, *part.student)]
    return {
        "config": asdict(replace(config, budget=None, map_cache="auto")),
        "inputs": run["inputs"],
        "samples": digest([*samples, *job.unrelated]),
        "dtypes": [str(stream.dtype) for stream in job.streams],
        "device": job.streams[0].device.type,
        "versions": artifact.versions(),
    }
