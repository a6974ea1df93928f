# SPDX-License-Identifier: Apache-2.0
"""Whether a LaTen run fits into its budget: both passes and the alignment, before any of them."""

from __future__ import annotations

import torch

from pkt_ext.methods.alignment_needs import AlignmentNeeds
from pkt_ext.methods.laten_inputs import Job
from pkt_ext.methods.locating import share_out
from pkt_ext.streaming.budget import parse_bytes, refuse_too_little

_PLENTY = 2**60  # bytes: a budget that nothing exceeds


def alignment_bytes(job: Job, config) -> int | None:
    """The most memory that the alignment is predicted to take; None without a budget.

    Raises:
        InputError: a budget that it does not fit into, or one of the passes before it; names the
            smallest that works for all of them.
    """
    if config.budget is None:
        return None
    needs = AlignmentNeeds(job, config)
    refuse_what_is_too_little(parse_bytes(config.budget), least_bytes(job, config, needs), needs)
    return needs.peak


def least_bytes(
    job: Job, config, needs: AlignmentNeeds, device: torch.device | None = None
) -> dict[str, int]:
    """Stage -> bytes that it takes at least; `device` where that is not the job's."""
    stages = {"align": needs.peak}
    for which, who in enumerate(("teacher", "student")):
        found = share_out(
            job.streams[which], job.targets[which], job.counts, _PLENTY, config.micro_batch, device
        )
        stages[f"locate in the {who}"] = found.least
    return stages


def refuse_what_is_too_little(limit: int, stages: dict[str, int], needs: AlignmentNeeds) -> None:
    """Refuse a budget that some stage's least bytes exceed.

    Args:
        stages: stage -> bytes that it takes at least.
    Raises:
        InputError: names the smallest budget that works, and what needs it.
    """
    most = max(needs.phases.values(), key=lambda parts: sum(parts.values()))
    refuse_too_little(limit, stages, {"align": most}, "lower --max-length or --rate for less")
