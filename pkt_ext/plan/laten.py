# SPDX-License-Identifier: Apache-2.0
"""What a LaTen run will take: a pass over each model to locate by, the alignment, the output.

Operations of locating are counted at most: as if every block were kept by some row, and no two rows
shared a neuron. Times are not estimated.
"""

from __future__ import annotations

import torch

from pkt_ext.attribution.flows import ROLES, projection_of
from pkt_ext.errors import InputError
from pkt_ext.methods.alignment_needs import AlignmentNeeds
from pkt_ext.methods.laten import LatenConfig
from pkt_ext.methods.laten_budget import least_bytes, refuse_what_is_too_little
from pkt_ext.methods.laten_inputs import Job, disk_bytes, pair
from pkt_ext.methods.locating import share_out
from pkt_ext.methods.seeking_inputs import longest_row
from pkt_ext.models.injection import ROW_ROLES
from pkt_ext.plan.common import (
    FORMAT,
    describe,
    devices,
    in_rows,
    model_line,
    pass_line,
    stage_of,
    table,
    worst_rows,
    wrapped,
)
from pkt_ext.streaming.batches import IGNORED, Sample
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import available_bytes, format_bytes, parse_bytes, smallest_that_works
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.needs import Prediction


def plan(teacher, student, config: LatenConfig, *, samples: int) -> dict:
    """See `pkt_ext.plan.plan`."""
    here, target = devices(config)
    checkpoints = [
        Checkpoint.open(teacher, revision=config.teacher_revision, headers_only=True),
        Checkpoint.open(student, revision=config.student_revision, headers_only=True),
    ]
    job = _worst_job(*pair(checkpoints, config, here, target), config, samples)
    limit = parse_bytes(config.budget) if config.budget else available_bytes(target)
    needs = AlignmentNeeds(job, config, target)
    least = least_bytes(job, config, needs, target)
    refuse_what_is_too_little(limit, least, needs)
    phases = dict(needs.phases)
    write = {"write": phases.pop("write")}
    stages = {
        **{
            f"locate ({who})": _locating(job, which, config, limit, target)
            for which, who in enumerate(("teacher", "student"))
        },
        "align": stage_of(phases, _aligned_bytes(job, config), needs.flops()),
        "write": stage_of(write, 0, 0),
    }
    ours = job.streams[1]
    names = [name for name, _ in ours.model.named_parameters()]
    merged = sum(torch.Size(job.student.shape(n)).numel() for n in names)
    return {
        "format": FORMAT,
        "method": "laten",
        "teacher": describe(job.streams[0]),
        "student": describe(ours),
        "device": str(target),
        "budget": limit,
        "samples": len(job.located),
        "rows": len(job.align) + 1,
        "longest": max(len(row.input_ids) for row in job.located),
        "neurons": {"blocks": job.blocks, **job.counts},
        "predicted_bytes": max(stage["bytes"] for stage in stages.values()),
        "smallest_budget": parse_bytes(smallest_that_works(max(least.values()))),
        "stages": stages,
        "read_bytes": sum(stage["read_bytes"] for stage in stages.values()),
        "flops": sum(stage["flops"] for stage in stages.values()),
        "disk": disk_bytes(job, config) | {"merged": merged * job.student.dtype.itemsize},
    }


def _worst_job(streams, blocks: int, counts: dict, config: LatenConfig, samples: int) -> Job:
    """Rows of the most tokens, each to be located by at its end and learned from all along."""
    steps = samples if config.steps is None else config.steps
    if steps > samples:
        raise InputError(f"{steps} steps need as many rows to locate by; raise --samples")
    lengths = [longest_row(stream, config) for stream in streams]
    targets = tuple(
        [_with_one_target(row) for row in worst_rows(steps + 1, length, stream.anatomy.vocab_size)]
        for stream, length in zip(streams, lengths, strict=True)
    )
    learned = worst_rows(steps + config.rows - 1, lengths[1], streams[1].anatomy.vocab_size)
    return Job(
        streams=streams,
        targets=targets,
        located=learned[:steps],
        align=learned[steps:],
        holdout=[],
        dropped=[],
        example={},
        blocks=blocks,
        counts=counts,
    )


def _with_one_target(row: Sample) -> Sample:
    labels = torch.full_like(row.labels, IGNORED)
    labels[-1] = row.labels[-1]
    return Sample(row.id, row.input_ids, labels)


# --- locating -------------------------------------------------------------------------------------


def _locating(job: Job, which: int, config: LatenConfig, limit: int, device) -> dict:
    stream, targets = job.streams[which], job.targets[which]
    predicted = share_out(stream, targets, job.counts, limit, config.micro_batch, device)
    samples, anatomy = len(targets), stream.anatomy
    product = 2 * anatomy.vocab_size * anatomy.hidden_size  # of one vector and the head
    gains = product * samples * (1 + 4 * len(anatomy.blocks))  # before and after every half
    flops = predicted.flops["forward"] + gains + product * _scored(job, which, config)
    read = sum(predicted.read.values()) + _located_bytes(job, stream, config, predicted)
    return stage_of(predicted.phases, read, flops) | {
        "allotment": vars(predicted.allotment),
        "blocks_mapped": not predicted.phases["forward"]["weights"],
        "spilled_bytes": predicted.spilled,
    }


def _scored(job: Job, which: int, config: LatenConfig) -> int:
    """Vectors that the head is multiplied with for the neurons of all rows, at most."""
    stream, samples, found = job.streams[which], len(job.targets[which]), 0
    for kind, role in zip(("attention", "ffn"), ROLES, strict=True):
        if not (wanted := job.counts[kind]):
            continue
        width = projection_of(stream, 0, role).shape[1]
        thin = 3 * samples * job.blocks  # p, its mean and the target's row, for each row's blocks
        if config.compat:
            found += samples * job.blocks * width
        elif config.mode == "first-order":
            found += thin
        elif config.mode == "all" or stream.anatomy.logit_softcap:
            found += thin + len(stream.block_names) * width
        else:  # about those that are kept are evaluated
            each = min(samples * wanted * job.blocks, len(stream.block_names) * width)
            found += thin + each
    return found


def _located_bytes(
    job: Job, stream: StreamedModel, config: LatenConfig, predicted: Prediction
) -> int:
    """Read after the pass: the head, and the projections whose columns are neurons."""
    checkpoint, anatomy = stream.checkpoint, stream.anatomy
    parts = predicted.allotment.head_rows is not None and not config.compat
    names = [stream.head_name] * (2 if parts else 1)
    for kind, role in zip(("attention", "ffn"), ROLES, strict=True):
        if job.counts[kind]:
            names += [
                f"{path}.{projection_of(stream, block, role).module}.weight"
                for block, path in enumerate(anatomy.blocks)
            ]
    return sum(checkpoint.bytes_of([name]) for name in names)


# --- aligning -------------------------------------------------------------------------------------


def _aligned_bytes(job: Job, config: LatenConfig) -> int:
    """The student once, and for every step and the injection the teacher's neurons.

    What lies across a matrix as it is stored costs all of it.
    """
    theirs, checkpoint = job.streams[0], job.streams[0].checkpoint
    found = 0
    for name in config.types:
        part = projection_of(theirs, 0, name)
        kind = "ffn" if name in ("up", "down") else "attention"
        stored = checkpoint.bytes_of([f"{theirs.anatomy.blocks[0]}.{part.module}.weight"])
        if (name in ROW_ROLES) != part.transposed:
            rows = part.shape[0] if name in ROW_ROLES else part.shape[1]
            stored = stored * job.counts[kind] // rows
        found += job.blocks * stored
    ours = job.streams[1]
    names = [*ours.outer_names, *(n for names in ours.block_names for n in names)]
    return job.student.bytes_of(names) + (len(job.located) + 1) * found


# --- text -----------------------------------------------------------------------------------------

_COLUMNS = {  # of the table of stages: heading -> ingredients
    "process": ("process",),
    "weights": ("weights",),
    "activations": ("activations",),
    "alignment": ("hypernetwork", "neurons"),
    "work": ("arguments", "working memory"),
}


def text(document: dict) -> str:
    """The document of a plan as a table."""
    limit = format_bytes(document["budget"])
    lines = [
        f"laten, {in_rows(document['samples'])} to locate by, {document['rows']} a step, of up to "
        f"{document['longest']} tokens, {limit} of memory ({document['device']})",
        *(model_line(who, document[who]) for who in ("teacher", "student")),
        "",
        f"pkt laten: {format_bytes(document['predicted_bytes'])} at most; the smallest --budget "
        f"that works is {format_bytes(document['smallest_budget'])}",
        *_how(document),
        "",
        *table(document, _COLUMNS),
    ]
    lines += wrapped("FLOP of locating at most; times are not estimated for this method")
    disk = {name: format_bytes(size) for name, size in document["disk"].items()}
    kept = f", every step's {disk['checkpoints']}" if document["disk"]["checkpoints"] else ""
    lines += [
        "",
        f"disk: delta {disk['delta']}, hypernetwork {disk['hypernetwork']}{kept}, with "
        f"{disk['progress']} beside it until it is complete",
        f"  merged model {disk['merged']}",
    ]
    return "\n".join(lines)


def _how(document: dict) -> list[str]:
    """What is located, and how the passes share out their memory."""
    neurons, lines = document["neurons"], []
    lines += wrapped(
        f"{neurons['attention']} attention and {neurons['ffn']} FFN neurons in each of "
        f"{neurons['blocks']} blocks"
    )
    for who in ("teacher", "student"):
        stage = document["stages"][f"locate ({who})"]
        rows = stage["allotment"]["head_rows"]
        head = "; the head " + ("whole" if rows is None else f"in parts of {rows} rows")
        lines += wrapped(pass_line(who, stage, head))
    return lines
