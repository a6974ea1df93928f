# SPDX-License-Identifier: Apache-2.0
"""Whether a SemAlign run fits into its budget and onto the disk, before any of it runs."""

from __future__ import annotations

from pathlib import Path

import torch

from pkt_ext.methods.semalign_inputs import Job
from pkt_ext.methods.semalign_needs import (
    SteeringNeeds,
    matrix_bytes,
    phase_count,
    trained_numbers,
)
from pkt_ext.methods.semantic_map import CHUNK_BYTES, map_bytes
from pkt_ext.methods.students import dtype_in_memory
from pkt_ext.methods.supervision import OBSERVED, readings, share_out
from pkt_ext.streaming.budget import parse_bytes, refuse_too_little
from pkt_ext.streaming.meter import resident_bytes
from pkt_ext.streaming.needs import CONTEXT, SLACK

_PLENTY = 2**60  # bytes: a budget that nothing exceeds
_CHUNKS = [CHUNK_BYTES >> n for n in range(7)]  # of the map, from 32 MiB on
_VERBS = {  # of the passes
    "attribution": "attribute",
    "compare teacher": "compare the teacher's blocks",
    "compare student": "compare the student's blocks",
    "targets": "make the targets",
}
_INSTEAD = "lower --max-length, --micro-batch or --batch for less"


def training_bytes(job: Job, config) -> int | None:
    """The most memory that the training is predicted to take; None without a budget.

    Raises:
        InputError: a budget that it does not fit into, or the map, or one of the passes before it;
            names the smallest that works for all of them.
    """
    if config.budget is None:
        return None
    needs = SteeringNeeds(job, config)
    refuse_what_is_too_little(parse_bytes(config.budget), least_bytes(job, config, needs), needs)
    return needs.peak


def least_bytes(
    job: Job, config, needs: SteeringNeeds, device: torch.device | None = None
) -> dict[str, int]:
    """Stage -> bytes that it takes at least; `device` where that is not the job's."""
    stages, on_cpu = {}, (device or job.streams[0].device).type == "cpu"
    beside = 0  # what the map has left, and has loaded
    if not config.baseline:
        stages["build the map"] = map_needs(job, config, _CHUNKS[-1], device)
        beside = matrix_bytes(job) + (SLACK if on_cpu else 0)
    for name, reading in readings(job, config).items():
        stages[_VERBS[name]] = share_out(reading, config, _PLENTY, device=device).least + beside
    return stages | {"train": needs.peak}


def refuse_what_is_too_little(limit: int, stages: dict[str, int], needs: SteeringNeeds) -> None:
    """Refuse a budget that some stage's least bytes exceed.

    Raises:
        InputError: names the smallest budget that works, and what needs it.
    """
    most = max(needs.phases.values(), key=lambda parts: sum(parts.values()))
    refuse_too_little(limit, stages, {"train": most}, _INSTEAD)


# --- the map --------------------------------------------------------------------------------------


def map_needs(job: Job, config, chunk: int, device: torch.device | None = None) -> int:
    """Bytes that building the map takes in all, looking at so many bytes of the heads at once."""
    on_cpu = (device or job.streams[0].device).type == "cpu"
    process = resident_bytes() if on_cpu else CONTEXT
    return process + map_bytes(*job.streams, variant=config.map_meant, chunk_bytes=chunk)


def map_chunk(job: Job, config, device: torch.device | None = None) -> int:
    """Bytes of the heads to look at at once: the most that fit the budget."""
    if config.budget is None:
        return CHUNK_BYTES
    limit = parse_bytes(config.budget)
    fitting = (chunk for chunk in _CHUNKS if map_needs(job, config, chunk, device) <= limit)
    return next(fitting, _CHUNKS[-1])


# --- disk -----------------------------------------------------------------------------------------


def disk_bytes(job: Job, config) -> dict[str, int]:
    """What a run writes at most: the output, and by kind the progress beside it."""
    (theirs, ours), (teacher, student) = (a.hidden_size for a in job.anatomies), job.streams
    phases, blocks = phase_count(student, config), len(teacher.block_names)
    rows = sum(len(own) for _, own in job.layer_positions)
    held = sum(len(own) for _, own in job.held.positions) if job.held else 0
    outputs = sum(len(own) for _, own in job.rows.positions) + held
    trained = trained_numbers(student, config)
    learned = sorted(trained, reverse=True)[: len(trained) if config.baseline else phases]
    between = config.schedule_meant == "pairs" and config.interpolate
    between = between and blocks % len(student.block_names) != 0
    steered = 0 if config.baseline else phases
    used = min(blocks, steered * (1 + between))
    seen = 4 * min(held, OBSERVED)
    compared = 0
    if config.pairing_meant == "similarity" and not config.baseline:
        looked = min(held or outputs, OBSERVED)
        compared = 4 * looked * (blocks * theirs + len(student.block_names) * ours)
    size = teacher.dtype.itemsize
    tokens = sum(len(sample.input_ids) for sample in job.rows.student)
    whole, names = config.train == "block", [n for n, _ in student.model.named_parameters()]
    dtype = dtype_in_memory(student)
    return {
        "output": student.checkpoint.bytes_of(names) if whole else 4 * sum(learned),
        # where a phase looks between two blocks, the lower one's rows wait for the upper's
        "targets": steered * rows * (size * ours + 4 * theirs * between) + size * outputs * theirs,
        "observed": seen * (used * theirs + steered * ours) + compared,
        # what a block is given, and the next one
        "prefix": 0 if config.baseline else 2 * tokens * dtype.itemsize * ours,
        "learned": sum(learned) * (dtype.itemsize if whole else 4),
    }


def planned_bytes(job: Job, config, place: Path) -> int:
    """What is still to be written, beside the output too.

    Args:
        place: the folder of the progress, whose files count as written.
    """
    planned = disk_bytes(job, config)
    output = planned.pop("output")
    kinds = ("*.activations", "*.safetensors", "*.tmp")
    there = sum(file.stat().st_size for kind in kinds for file in place.glob(kind))
    return output + max(0, sum(planned.values()) - there)
