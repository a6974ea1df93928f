# SPDX-License-Identifier: Apache-2.0
"""What a LaTen run needs, checked before anything is written or a weight is read."""

from __future__ import annotations

import os
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from pkt_ext import artifact
from pkt_ext.attribution.neurons import check_options
from pkt_ext.data import Encoded, encode, encode_targets, read_rows
from pkt_ext.errors import InputError
from pkt_ext.methods.matching import KIND
from pkt_ext.methods.seeking_inputs import longest_row
from pkt_ext.methods.students import check_gradients
from pkt_ext.methods.two_models import TwoModels, open_both
from pkt_ext.models.anatomy import Anatomy
from pkt_ext.settings import find_device
from pkt_ext.streaming.batches import Sample, digest, with_distinct_ids
from pkt_ext.streaming.blocks import StreamedModel


@dataclass(frozen=True)
class Job(TwoModels):
    """Everything checked; nothing is written and no weight is read yet. Pairs: teacher, student."""

    targets: tuple[list[Sample], list[Sample]]  # of the rows to locate by; the last is injected
    located: list[Sample]  # the same rows, but the last, as the student learns them
    align: list[Sample]
    holdout: list[Sample]
    dropped: list[tuple[str, str]]
    example: dict
    blocks: int
    counts: dict[str, int]  # neurons of a block, by "attention", "ffn"


def prepare(models, tokenizers, locate, align, holdout, config) -> Job:
    checkpoints = open_both(models, (config.teacher_revision, config.student_revision))
    streams, blocks, counts = pair(checkpoints, config, find_device(config.device))
    tokenizers = [t or s.checkpoint.tokenizer() for t, s in zip(tokenizers, streams, strict=True)]
    lengths = [
        {"max_length": longest_row(stream, config), "prompt_format": config.prompt_format}
        for stream in streams
    ]
    shuffle = random.Random(config.seed).shuffle
    by, over = (with_distinct_ids(read_rows(source)) for source in (locate, align))
    shuffle(by)
    shuffle(over)

    def learnable(rows) -> Encoded:
        found = encode(rows, tokenizers[1], stage="train", **lengths[1])
        if not config.train_on_inputs:
            return found
        return replace(found, samples=[replace(s, labels=s.input_ids) for s in found.samples])

    own, learned = learnable(by), learnable(over)
    held = [] if holdout is None else learnable(read_rows(holdout)).samples
    aims = _targets(by, tokenizers, lengths)
    known = [{s.id: s for s in found.samples} for found in (*aims, own)]
    names = [row.id for row in by if all(row.id in found for found in known)]
    steps = len(names) if config.steps is None else config.steps
    if not 1 <= steps <= len(names):
        raise InputError(
            f"{steps} steps need as many rows to locate by, and {len(names)} of {len(by)} have a "
            "target in both models; give more, or lower --steps"
        )
    if (config.inject_step or 0) > steps:
        raise InputError(f"inject_step is {config.inject_step}, of {steps} steps; lower it")
    last = _first_with_targets(over, tokenizers, lengths)
    targets = tuple(
        [found[name] for name in names[:steps]] + [one]
        for found, one in zip(known, last, strict=False)
    )
    dropped = dict.fromkeys(d for e in (*aims, own, learned) for d in e.dropped)
    return Job(
        streams,
        targets,
        [known[2][name] for name in names[:steps]],
        learned.samples,
        held,
        list(dropped),
        aims[0].example,
        blocks,
        counts,
    )


def pair(checkpoints, config, device: torch.device, target: torch.device | None = None):
    """(both models on `device`, blocks kept of each, neurons of a block by kind).

    Args:
        target: the device that they will be on, where that is another one.
    Raises:
        InputError: models that cannot be streamed, or do not go together.
    """
    streams = tuple(
        StreamedModel(
            checkpoint,
            dtype=getattr(torch, config.dtype) if config.dtype else checkpoint.dtype,
            device=device,
        )
        for checkpoint in checkpoints
    )
    check_gradients(streams[1], target or device)
    smaller = min(len(stream.block_names) for stream in streams)
    if (blocks := config.blocks or smaller) > smaller:
        raise InputError(f"blocks is {blocks}; one of the models has {smaller}, give at most those")
    counts = _counts(*(stream.anatomy for stream in streams), config)
    for stream in streams:
        kept = counts["attention"], counts["ffn"]
        check_options(stream, blocks, kept, config.mode, config.compat)
    return streams, blocks, counts


def _counts(theirs: Anatomy, ours: Anatomy, config) -> dict[str, int]:
    """L4: neurons kept of a block, the same in both models."""
    kinds = {KIND[name] for name in config.types}
    found = {}
    for kind in ("attention", "ffn"):
        there, here = (
            a.heads * a.head_dim if kind == "attention" else a.intermediate_size
            for a in (theirs, ours)
        )
        count = int(config.rate * here)
        if kind in kinds and not 1 <= count <= there:
            raise InputError(
                f"a rate of {config.rate} is {count} of the student's {here} {kind} neurons of a "
                f"block, the teacher has {there}; {'raise' if count < 1 else 'lower'} --rate"
            )
        found[kind] = count if kind in kinds else 0
    return found


def _targets(rows, tokenizers, lengths: list[dict]) -> list[Encoded]:
    """By model; each reads the rows with its own tokenizer."""
    return [
        encode_targets(rows, tokenizer, **length)
        for tokenizer, length in zip(tokenizers, lengths, strict=True)
    ]


def _first_with_targets(rows, tokenizers, lengths: list[dict]) -> list[Sample]:
    """L9: the row to locate by for the injection, for each model; `rows` are shuffled."""
    for row in rows:
        try:
            return [found.samples[0] for found in _targets([row], tokenizers, lengths)]
        except InputError:
            continue
    raise InputError("no row to align by has a target in both models; give rows with answers")


def located_bytes(job: Job) -> int:
    """Of the neurons of every row in both models: numbers and scores."""
    neurons = len(job.targets[0]) * job.blocks * sum(job.counts.values())
    return 2 * neurons * (8 + 4)


def disk_bytes(job: Job, config) -> dict[str, int]:
    """What a run writes: the parts of its output, and the progress beside that."""
    theirs, ours = (anatomy.hidden_size for anatomy in job.anatomies)
    network = 4 * len(config.types) * theirs * (theirs + ours)
    steps = len(job.located)
    return {
        "delta": sum(4 * job.blocks * job.counts[KIND[name]] * (ours + 2) for name in config.types),
        "hypernetwork": network,
        "checkpoints": network * steps * config.keep_checkpoints,
        # a checkpoint of every step; the optimiser's state is twice as large, kept twice
        "progress": network * (steps + 2 * 2) + located_bytes(job),
    }


def planned_bytes(job: Job, config, place: Path) -> int:
    """What is still to be written, beside the output too.

    Args:
        place: the folder of the progress, whose files count as written.
    """
    planned = disk_bytes(job, config)
    progress = planned.pop("progress")
    there = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    return sum(planned.values()) + max(0, progress - there)


def run_record(job: Job, locate, align, holdout, config) -> dict:
    models = (stream.checkpoint for stream in job.streams)
    inputs = {
        who: artifact.fingerprint(model.folder or model.name)
        for who, model in zip(("teacher", "student"), models, strict=True)
    }
    for name, source in (("locate", locate), ("align", align), ("holdout", holdout)):
        if isinstance(source, str | os.PathLike):
            inputs[name] = artifact.fingerprint(source)
    return {
        "paradigm": "prepkt",
        "method": "laten",
        "config": asdict(config),
        "inputs": inputs,
    }


def state(job: Job, config, run: dict) -> dict:
    """What the progress of a run belongs to; a budget changes no result."""
    return {
        "config": asdict(replace(config, budget=None)),
        "inputs": run["inputs"],
        "samples": digest(
            [*job.targets[0], *job.targets[1], *job.located, *job.align, *job.holdout]
        ),
        "dtypes": [str(stream.dtype) for stream in job.streams],
        "device": job.streams[0].device.type,
        "versions": artifact.versions(),
    }
