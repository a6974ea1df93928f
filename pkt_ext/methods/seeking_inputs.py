# SPDX-License-Identifier: Apache-2.0
"""What an extraction needs, checked before anything is written or a weight is read.

`config` is a `seeking.SeekingConfig` throughout.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from pkt_ext import artifact
from pkt_ext.data import Encoded, encode, match_vocabularies, read_rows
from pkt_ext.errors import InputError
from pkt_ext.methods.pairing import ATTENTION, MLP, Plan, pair_parts
from pkt_ext.methods.workspace import reduction_bytes
from pkt_ext.models.anatomy import describe
from pkt_ext.streaming.batches import Sample, digest, with_distinct_ids
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import fit, parse_bytes
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.needs import Prediction
from pkt_ext.streaming.ranks import ALONE, World


@dataclass(frozen=True)
class Job:
    """Everything an extraction needs, checked; nothing is written and no weight is read yet."""

    teacher: Checkpoint
    student: Checkpoint
    model: StreamedModel
    plan: Plan
    tokens: tuple[torch.Tensor, torch.Tensor] | None  # int64 (teacher ids, student ids); None: all
    encoded: Encoded


def prepare(teacher, student, data, config, tokenizer, world: World = ALONE) -> Job:
    teacher = Checkpoint.open(teacher, revision=config.teacher_revision)
    student = Checkpoint.open(student, revision=config.student_revision)
    model, plan = pair(teacher, student, config, world.device(config.device))
    speaks, tokens = tokenizer or teacher.tokenizer(), None
    if plan.outer:
        tokens = shared_tokens(plan, speaks, tokenizer or student.tokenizer(), config)
    plan.check_rank(config.rank, None if tokens is None else len(tokens[0]))
    encoded = encode_rows(data, speaks, model, config)
    return Job(teacher, student, model, plan, tokens, encoded)


def pair(
    teacher: Checkpoint, student: Checkpoint, config, device: torch.device
) -> tuple[StreamedModel, Plan]:
    """The teacher on `device`, and which part of it feeds which of the student's.

    Raises:
        InputError: models that cannot be streamed, or do not go together.
    """
    dtype = getattr(torch, config.dtype) if config.dtype else teacher.dtype
    model = StreamedModel(teacher, dtype=dtype, device=device)
    plan = pair_parts(
        model.anatomy,
        describe(student.skeleton(torch.float32)),
        roles=ATTENTION * config.attention + MLP * config.mlp,
        embeddings=config.embeddings,
    )
    return model, plan


def longest_row(model: StreamedModel, config) -> int:
    """Tokens that are kept of a row."""
    if model.anatomy.position_embedding:  # learned positions end somewhere
        return min(config.max_length, model.checkpoint.config.max_position_embeddings)
    return config.max_length


def encode_rows(data, tokenizer, model: StreamedModel, config) -> Encoded:
    """Seed rows as the teacher is given them; see `data.encode`."""
    encoded = encode(
        read_rows(data),
        tokenizer,
        max_length=longest_row(model, config),
        prompt_format=config.prompt_format,
    )
    return replace(encoded, samples=with_distinct_ids(encoded.samples))


def share_out(
    model: StreamedModel,
    plan: Plan,
    samples: Sequence[Sample],
    config,
    *,
    tokens: int | None = None,
    known: dict | None = None,
    device: torch.device | None = None,
) -> Prediction:
    """How an extraction shares out its memory, and what it is predicted to take.

    Args:
        tokens: vocabulary rows of embedding and head that are cut; None: all.
        known:  of an interrupted run, what touches the rounding.
        device: where that is not the model's; see `budget.fit`.
    Raises:
        InputError: the budget is too small; names the smallest that works.
    """
    return fit(
        model,
        samples,
        config.budget and parse_bytes(config.budget),
        micro_batch=config.micro_batch,
        extra=reduction_bytes(plan, model, config.rank, config.svd, tokens, device),
        outer=bool(plan.outer),
        durable=model.checkpoint.folder is not None,
        fixed=known,
        device=device,
    )


def state(job: Job, config, run: dict) -> dict:
    """What the progress of a run belongs to; a budget changes no result."""
    return {
        "config": asdict(replace(config, budget=None)),
        "inputs": run["inputs"],
        "samples": digest(job.encoded.samples),
        "dtype": str(job.model.dtype),
        "device": job.model.device.type,
        "versions": artifact.versions(),
    }


def run_record(job: Job, data, config) -> dict:
    rows = {"rows": len(job.encoded.samples) + len(job.encoded.dropped)}
    return {
        "paradigm": "postpkt",
        "method": "seeking",
        "config": asdict(config),
        "inputs": {
            "teacher": artifact.fingerprint(job.teacher.folder or job.teacher.name),
            "student": artifact.fingerprint(job.student.folder or job.student.name),
            "data": artifact.fingerprint(data) if isinstance(data, str | os.PathLike) else rows,
        },
    }


def shared_tokens(plan: Plan, teacher, student, config):
    """(teacher ids, student ids) of the tokens both have; None where the vocabularies agree.

    Args:
        teacher, student: their tokenizers; None where only sizes are known: all that could be
            shared are.
    Raises:
        InputError: they differ and shared ones are not asked for, or there are none.
    """
    pairs = match_vocabularies(teacher, student) if teacher and student else None
    sizes = plan.teacher.vocab_size, plan.student.vocab_size
    if pairs is None and sizes[0] == sizes[1]:
        return None
    if config.vocabulary != "shared":
        raise InputError(
            f"the vocabularies of teacher ({sizes[0]} rows) and student ({sizes[1]} rows) differ; "
            "pass --vocabulary shared to use the tokens both have, or --no-embeddings"
        )
    ids = [(i, i) for i in range(min(sizes))] if pairs is None else pairs
    kept = [(t, s) for t, s in ids if t < sizes[0] and s < sizes[1]]
    if not kept:
        raise InputError("teacher and student have no token in common; pass --no-embeddings")
    return tuple(torch.tensor(column) for column in zip(*kept, strict=True))
