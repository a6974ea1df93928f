# SPDX-License-Identifier: Apache-2.0
"""What a SemAlign run will take: the map, the passes over both models, the training, the output.

Which blocks the schedule of pairs trains depends on the attribution: the plan is for those that
take most, and as many as there can be. Operations of the map are counted at most. Times are not
estimated.
"""

from __future__ import annotations

import torch

from pkt_ext.methods.seeking_inputs import longest_row
from pkt_ext.methods.semalign_budget import (
    disk_bytes,
    least_bytes,
    map_chunk,
    map_needs,
    refuse_what_is_too_little,
)
from pkt_ext.methods.semalign_config import SemAlignConfig
from pkt_ext.methods.semalign_inputs import Job, held_out, layer_positions, pair
from pkt_ext.methods.semalign_needs import SteeringNeeds, phase_count
from pkt_ext.methods.semantic_map import map_bytes
from pkt_ext.methods.supervision import Reading, readings, share_out
from pkt_ext.methods.vocabulary import SharedVocabulary
from pkt_ext.paired_data import PairedRows
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
from pkt_ext.streaming.budget import available_bytes, format_bytes, parse_bytes, smallest_that_works
from pkt_ext.streaming.checkpoint import Checkpoint

_HEAD_READS = 4  # at most: to look for a map that is kept, twice for a basis, to join both
_HEAD_PRODUCTS = 9  # [m, D] with [D, D] or a triangle of it, of one head, at most


def plan(teacher, student, config: SemAlignConfig, *, samples: int) -> dict:
    """See `pkt_ext.plan.plan`."""
    here, target = devices(config)
    checkpoints = [
        Checkpoint.open(teacher, revision=config.teacher_revision, headers_only=True),
        Checkpoint.open(student, revision=config.student_revision, headers_only=True),
    ]
    job = _worst_job(pair(checkpoints, config, here, target), config, samples)
    limit = parse_bytes(config.budget) if config.budget else available_bytes(target)
    needs = SteeringNeeds(job, config, target)
    least = least_bytes(job, config, needs, target)
    refuse_what_is_too_little(limit, least, needs)
    stages = {} if config.baseline else {"map": _map(job, config, target)}
    for name, reading in readings(job, config).items():
        stages[name] = _reading(job, reading, config, limit, target)
    stages["train"] = _training(job, config, needs)
    ours = job.streams[1]
    names = [name for name, _ in ours.model.named_parameters()]
    merged = sum(torch.Size(job.student.shape(n)).numel() for n in names)
    disk = disk_bytes(job, config)
    if config.train == "lora":
        disk["merged"] = merged * job.student.dtype.itemsize
    return {
        "format": FORMAT,
        "method": "semalign",
        "objective": config.objective,
        "resolved": config.resolved(),
        "teacher": describe(job.streams[0]),
        "student": describe(ours),
        "device": str(target),
        "budget": limit,
        "samples": samples,
        "held_out": len(job.held.student) if job.held else 0,
        "longest": max(len(row.input_ids) for row in job.rows.student),
        "shared_tokens": len(job.shared),
        "phases": phase_count(ours, config),
        "steps": needs.steps(),
        "train": config.train,
        "predicted_bytes": max(stage["bytes"] for stage in stages.values()),
        "smallest_budget": parse_bytes(smallest_that_works(max(least.values()))),
        "stages": stages,
        "read_bytes": sum(stage["read_bytes"] for stage in stages.values()),
        "flops": sum(stage["flops"] for stage in stages.values()),
        "disk": disk,
    }


def _worst_job(streams, config: SemAlignConfig, samples: int) -> Job:
    """Rows of the most tokens, supervised all along; every token of the smaller head is shared."""
    length = min(longest_row(stream, config) for stream in streams)
    tokens = min(stream.anatomy.vocab_size for stream in streams)
    held = held_out(samples, config)
    ids = torch.arange(tokens)
    shared = SharedVocabulary(ids, ids, identical=True)

    def rows(first: int, end: int) -> PairedRows | None:
        some = every[first:end]
        where = torch.arange(length - 1)
        return PairedRows(some, some, [(where, where)] * len(some), [], [], {}) if some else None

    every = worst_rows(samples, length, tokens)
    trained = rows(0, samples - held)
    return Job(
        streams=streams,
        shared=shared,
        rows=trained,
        layer_positions=layer_positions(trained, shared, config),
        held=rows(samples - held, samples),
        unrelated=[],
        dropped=[],
    )


def _map(job: Job, config: SemAlignConfig, device: torch.device) -> dict:
    chunk = map_chunk(job, config, device)
    size = map_bytes(*job.streams, variant=config.map_meant, chunk_bytes=chunk)
    process = map_needs(job, config, chunk, device) - size
    theirs, ours = (anatomy.hidden_size for anatomy in job.anatomies)
    rows = len(job.shared)
    products = _HEAD_PRODUCTS * (theirs**2 + ours**2) + 2 * ours * theirs
    if config.map_meant == "least-squares":
        products += 2 * ours**2
    read = sum(
        _HEAD_READS * stream.checkpoint.bytes_of([stream.head_name]) * rows
        // stream.anatomy.vocab_size
        for stream in job.streams
    )  # fmt: skip
    parts = {"process": process, "working memory": size}
    return stage_of({"build": parts}, read, rows * products) | {"chunk_bytes": chunk}


def _reading(job: Job, reading: Reading, config: SemAlignConfig, limit: int, device) -> dict:
    predicted = share_out(reading, config, limit, device=device)
    flops = sum(predicted.flops.values())
    if reading.width:  # every phase maps the rows of its source, at most of two
        rows = sum(len(own) for _, own in job.layer_positions)
        mapped = 2 * rows * reading.width * reading.stream.anatomy.hidden_size
        flops += mapped * phase_count(job.streams[1], config)
    return stage_of(predicted.phases, sum(predicted.read.values()), flops) | {
        "allotment": vars(predicted.allotment),
        "blocks_mapped": not predicted.phases["forward"]["weights"],
        "spilled_bytes": predicted.spilled,
    }


def _training(job: Job, config: SemAlignConfig, needs: SteeringNeeds) -> dict:
    """All phases; the student is read once, and the teacher's head."""
    flops = needs.flops()
    look = flops.pop("look")
    count = phase_count(job.streams[1], config)
    most = sum(sorted(flops.values(), reverse=True)[:count])
    names = [name for name, _ in job.streams[1].model.named_parameters()]
    teacher = job.streams[0]
    read = job.student.bytes_of(names) + teacher.checkpoint.bytes_of([teacher.head_name])
    return stage_of(needs.phases, read, most + look) | {"phase_flops": flops, "look_flops": look}


# --- text -----------------------------------------------------------------------------------------

_COLUMNS = {  # of the table of stages: heading -> ingredients
    "process": ("process",),
    "weights": ("weights", "heads"),
    "activations": ("activations", "rows"),
    "trained": ("trained", "optimizer"),
    "work": ("arguments", "working memory", "scores", "map"),
}


def text(document: dict) -> str:
    """The document of a plan as a table."""
    limit, held = format_bytes(document["budget"]), document["held_out"]
    disk = {name: format_bytes(size) for name, size in document["disk"].items()}
    beside = sum(document["disk"][n] for n in ("targets", "observed", "prefix", "learned"))
    lines = [
        f"semalign ({document['objective']}), {in_rows(document['samples'])} of up to "
        f"{document['longest']} tokens, {limit} of memory ({document['device']})",
        *(model_line(who, document[who]) for who in ("teacher", "student")),
        "",
        f"pkt semalign: {format_bytes(document['predicted_bytes'])} at most; the smallest "
        f"--budget that works is {format_bytes(document['smallest_budget'])}",
        *wrapped(f"{_schedule(document)}; {in_rows(held)} held out"),
        *_how(document),
        "",
        *table(document, _COLUMNS),
        *_phases(document),
        *wrapped(
            f"FLOP of the map at most, for {document['shared_tokens']} shared tokens: the "
            "tokenizers are not looked at; times are not estimated for this method"
        ),
        "",
        f"disk: output {disk['output']}, with {format_bytes(beside)} beside it until it is "
        f"complete: targets {disk['targets']},",
        f"  a block's input {disk['prefix']}, trained parameters {disk['learned']}, rows to "
        f"compare {disk['observed']}",
    ]
    if "merged" in disk:
        lines.append(f"  merged model {disk['merged']}")
    return "\n".join(lines)


def _schedule(document: dict) -> str:
    phases, steps = document["phases"], document["steps"]
    what = "LoRA on a block" if document["train"] == "lora" else "a block itself"
    if document["objective"] in ("finetune", "distillation"):
        every = "LoRA on every block" if document["train"] == "lora" else "every block itself"
        return f"one phase of {steps} steps, {every}"
    if document["resolved"]["schedule"] == "frontier":
        return f"{phases} phases of {steps} steps, one for each block: {what}"
    return (
        f"at most {phases} phases of {steps} steps, {what}; which blocks are critical is not known "
        "before the attribution"
    )


def _how(document: dict) -> list[str]:
    """How the passes share out their memory, and the map."""
    lines, stages = [], document["stages"]
    if "map" in stages:
        lines += wrapped(
            f"map: {format_bytes(stages['map']['chunk_bytes'])} of the heads at a time"
        )
    for name, stage in stages.items():
        if "allotment" in stage:
            lines += wrapped(pass_line(name, stage))
    return lines


def _phases(document: dict) -> list[str]:
    """What trains the first and the last block, where there are several."""
    phases = document["stages"]["train"]["phases"]
    blocks = [name for name in phases if name.startswith("block ")]
    if len(blocks) < 2:
        return []
    first, last = (f"{format_bytes(phases[name]['bytes'])}" for name in (blocks[0], blocks[-1]))
    said = f"train: {first} in {blocks[0]}, {last} in {blocks[-1]}"
    if "look" in phases:
        said += f", {format_bytes(phases['look']['bytes'])} to look at held-out rows"
    return wrapped(said)
