# SPDX-License-Identifier: Apache-2.0
"""SemAlign: steer a student towards a teacher's hidden states, carried over by the vocabulary.

Source: Gu et al., "Beyond Neural Incompatibility" (arXiv 2510.24208); equations A1 to A10 of
METHODS. `cosine` is its first version, `fisher` (ACL Findings 2026) and `geometry` (the second
version on arXiv) are reconstructed from abstracts (docs/semalign.md).

    map      both heads' semantic bases, and the matrix between them            (A1, A5, A6)
    attribute  gradient x activation of every teacher block
    pair     teacher blocks to student blocks                                   (A2 to A4)
    targets  one forward of the teacher: mapped vectors and head inputs, kept in files
    train    phase by phase one block of the student; the teacher is gone by then
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from pkt_ext import artifact
from pkt_ext.adapter import stores_transposed, write_adapter
from pkt_ext.artifact import model_card
from pkt_ext.heap import give_back_freed_memory
from pkt_ext.lora import adapter_card
from pkt_ext.merge import write_trained
from pkt_ext.methods import layer_maps
from pkt_ext.methods.semalign_budget import (
    map_chunk,
    map_needs,
    planned_bytes,
    training_bytes,
)
from pkt_ext.methods.semalign_config import SemAlignConfig
from pkt_ext.methods.semalign_inputs import Job, prepare, run_record, state
from pkt_ext.methods.semantic_map import SemanticMap, build_map
from pkt_ext.methods.steering import Steering
from pkt_ext.methods.students import in_memory
from pkt_ext.methods.supervision import attribute, compare_blocks, supervise
from pkt_ext.methods.targets import Phase, Source
from pkt_ext.methods.two_models import publishing
from pkt_ext.methods.windows import Clock
from pkt_ext.settings import refuse_processes
from pkt_ext.streaming.budget import parse_bytes
from pkt_ext.streaming.meter import PeakMemory
from pkt_ext.streaming.progress import Progress

log = logging.getLogger(__name__)

__all__ = ["SemAlignConfig", "align"]


def align(
    teacher,
    student,
    data,
    out: str | os.PathLike,
    config: SemAlignConfig | None = None,
    *,
    holdout=None,
    unrelated=None,
    teacher_tokenizer=None,
    student_tokenizer=None,
    overwrite: bool = False,
    resume: bool = True,
    progress: bool = True,
) -> dict:
    """Steer the student by the teacher and publish what it learned as the folder `out`.

    With `train="lora"` that is an ordinary adapter (kind `adapter`), else the whole model (kind
    `model`). The teacher streams and is gone before the student comes. What is finished is kept in
    `<out>.progress`: an interrupted run, repeated, goes on behind its last phase. (Not where a
    model in memory is given.)

    Args:
        teacher, student: a folder, a hub id or a loaded PreTrainedModel, of any two families.
            Models with different tokenizers meet where they have read the same text.
        data: rows, a JSON-lines file or the rows; see `data.read_rows`.
        out: the folder to make.
        holdout: rows to look at only; None: some of `data` are held out.
        unrelated: rows whose perplexity is looked at, before and after.
        teacher_tokenizer, student_tokenizer: where loaded models come without theirs.
        overwrite: replace a complete output of an earlier run.
        resume: go on from the progress of an interrupted run; False: delete it.
        progress: show progress bars.
    Returns:
        What report.json holds: `pairs`, `attribution`, `losses`, ... (docs/semalign.md).
    Raises:
        InputError: whatever about the inputs cannot work; a budget that is too small.
        NonFiniteError: NaN or infinity in weights, activations or the training.
        OutputBusyError, ResourceError: see `artifact.publish`.
    """
    refuse_processes("pkt semalign", "start it without a launcher")
    config = config or SemAlignConfig()
    out = Path(out).expanduser().resolve()
    place = out.parent / f"{out.name}.progress"
    clock, report = Clock(), {"warnings": []}
    with clock("prepare"):
        models, tokenizers = (teacher, student), (teacher_tokenizer, student_tokenizer)
        job = prepare(models, tokenizers, data, holdout, unrelated, config)
    run = run_record(job, data, holdout, unrelated, config)
    if resume and not overwrite and (finished := artifact.finished(out, place, run)):
        shutil.rmtree(place)
        return finished
    with clock("prepare"):
        report["train_predicted_bytes"] = training_bytes(job, config)
    with publishing(
        job,
        out,
        place,
        state(job, config, run),
        resume=resume,
        kind="adapter" if config.train == "lora" else "model",
        run=run,
        report=report,
        card=None,
        overwrite=overwrite,
        planned_bytes=planned_bytes(job, config, place),
    ) as (staging, kept):
        if job.dropped:
            log.warning("%d rows left out; report.json names them", len(job.dropped))
        _transfer(job, student, config, clock, kept, staging, report, progress)
    kept.remove()
    return report


def _transfer(job: Job, student, config, clock, kept, staging, report: dict, show: bool) -> None:
    """All stages: fills the staging folder and the report."""
    carried, scores, passes = None, None, {}
    if not config.baseline:
        with clock("map"):
            carried, passes["map"] = _map(job, config, kept, show)
        with clock("attribution"):
            scores = attribute(job, config, kept, show)
    with clock("pair"):
        similarity = None
        if config.pairing_meant == "similarity" and not config.baseline:
            similarity = compare_blocks(job, config, kept, show)
        phases = phases_of(job, config, scores, similarity)
    with clock("targets"):
        supervision = supervise(job, config, phases, carried, kept, show)
    if job.streams[1].device.type == "cpu":
        give_back_freed_memory()
    with (
        clock("train"),
        in_memory(student, job.streams[1], config.student_revision) as model,
        PeakMemory(job.streams[1].device) as memory,
        Steering(model, job, config, phases, supervision, kept) as steering,
    ):
        before = steering.look()
        losses = steering.train(show)
        after = steering.look()
        peak = memory.bytes
        with clock("write"):
            _write(staging, model, steering, job, config, report)
    report.update(_report(job, config, phases, carried, scores, passes | supervision.passes))
    report.update(losses=losses, before=before, after=after)
    report.update(seconds=dict(clock.seconds), train_peak_bytes=peak)


def _map(job: Job, config, kept: Progress, show: bool) -> tuple[SemanticMap, dict]:
    """(the map, what it cost); a resumed run keeps what touches the rounding."""
    chunk = map_chunk(job, config)
    chunk = min(chunk, kept.state.get("map chunk", chunk))
    kept.remember(**{"map chunk": chunk})
    predicted = map_needs(job, config, chunk)
    with PeakMemory(job.streams[0].device) as memory:
        carried = build_map(
            *job.streams,
            job.shared,
            variant=config.map_meant,
            fold_norm=config.fold_norm,
            cache=_cache(config),
            show=show,
            chunk_bytes=chunk,
        )
    cost = {"peak_bytes": memory.bytes, "predicted_bytes": predicted, "chunk_bytes": chunk}
    return carried.to(job.streams[0].device), cost


def phases_of(job: Job, config, scores, similarity) -> list[Phase]:
    """The phases of the training, in their order.

    Args:
        scores:     [L_t], the attribution; None for baselines.
        similarity: [L_s, L_t], for the pairing by similarity.
    """
    theirs, ours = (len(stream.block_names) for stream in job.streams)
    if config.baseline:
        return [Phase(None)]
    if config.schedule_meant == "pairs":
        chosen = layer_maps.critical(scores, min(config.critical, theirs))
        pairs = layer_maps.published_pairs(chosen, theirs, ours)
        if not config.interpolate or theirs % ours == 0:
            return [Phase(p.student, (Source(p.teacher),)) for p in pairs]
        between = layer_maps.interpolation(theirs, ours)
        return [Phase(p.student, _between(between[p.student])) for p in pairs]
    if config.pairing_meant == "published":
        sources = layer_maps.published_map(theirs, ours)
    elif config.pairing_meant == "attribution":
        sources = layer_maps.by_attribution(scores, ours)
    else:
        sources = layer_maps.order_preserving(similarity)
    return [Phase(block, (Source(source),)) for block, source in enumerate(sources)]


def _between(depth: layer_maps.Between) -> tuple[Source, ...]:
    """A4: one block where the depth is that block's own."""
    found = Source(depth.lower, 1 - depth.share), Source(depth.upper, depth.share)
    return tuple(source for source in found if source.weight > 0)


def _cache(config) -> Path | None:
    if config.map_cache == "none":
        return None
    if config.map_cache != "auto":
        return Path(config.map_cache)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "pkt_ext" / "maps"


def _write(staging: Path, model, steering: Steering, job: Job, config, report) -> None:
    """What the student has learned: an adapter, or a model."""
    from pkt_ext.attached import ordinary_factors

    name, recipe = job.student.name, asdict(config)
    if steering.adapted is None:
        write_trained(staging, job.student, steering.trained_weights(), report)
        card = model_card(
            title="Student steered by SemAlign",
            kind="model",
            base_model=name,
            recipe=recipe,
            body="A complete model, loaded by `AutoModelForCausalLM.from_pretrained`.",
            peft=False,
        )
    else:
        factors, scales, dropout = ordinary_factors(steering.adapted)
        write_adapter(
            staging,
            factors,
            alpha_over_rank=scales,
            dropout=dropout,
            base_model=name,
            fan_in_fan_out=stores_transposed(model),
        )
        card = adapter_card(name, recipe)
    (staging / "README.md").write_text(card, encoding="utf-8")


def _report(
    job: Job,
    config,
    phases: list[Phase],
    carried: SemanticMap | None,
    scores,
    passes: dict[str, dict],
) -> dict:
    sides = [part for part in (job.rows, job.held) if part is not None]
    return {
        "objective": config.objective,
        "resolved": config.resolved()
        | ({} if job.shared.identical else {"positions": "supervised"}),
        "shared_tokens": len(job.shared.student),
        "map": None if carried is None else carried.report,
        "attribution": None if scores is None else [float(score) for score in scores],
        "pairs": [
            {"student": phase.block, "teacher": [asdict(source) for source in phase.sources]}
            for phase in phases
            if phase.block is not None
        ],
        "budget": config.budget and parse_bytes(config.budget),
        "passes": passes,
        "rows": {
            "trained": len(job.rows.student),
            "held_out": len(job.held.student) if job.held else 0,
            "unrelated": len(job.unrelated),
        },
        "positions": sum(len(ours) for part in sides for _, ours in part.positions),
        "dropped": [{"id": row, "reason": reason} for row, reason in job.dropped],
        "truncated": [name for part in sides for name in part.truncated],
        "example": job.rows.example,
    }
