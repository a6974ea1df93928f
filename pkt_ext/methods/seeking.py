# SPDX-License-Identifier: Apache-2.0
"""Seeking: cut the most sensitive windows out of a teacher, as the start of a student's LoRA.

Source: Zhong et al., "Seeking Neural Nuggets", ICLR 2024 (arXiv 2310.11451) and its released
scripts. With S the per-sample sensitivities summed over samples (S1, S2; attribution/sensitivity):

    S3  block score s_l = sum of S over every parameter of block l
    S4  K = the L_s blocks of highest score, in their order      (methods/pairing)
    S5  (i, j) = argmax of the sum of S over student-shaped windows, W = W_t[i:i+n', j:j+m']
    S6  W = U diag(sigma) Vh,  B0 = U_r diag(sigma_r),  A0 = Vh_r
    S7  student weight = (W_s - eta B0 A0) + eta B A,  eta = alpha / r: W_s itself at step 0

Where paper and scripts differ the scripts win: the paper's formula subtracts the whole window,
which would change the function at step 0; S7 subtracts the product only.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pkt_ext import artifact
from pkt_ext.attribution.sensitivity import PassReport, stream_sensitivity
from pkt_ext.data import PROMPT_FORMATS
from pkt_ext.errors import InputError, NonFiniteError, ResourceError
from pkt_ext.lora import Factor, residual_model, write_adapter
from pkt_ext.methods.seeking_inputs import Job, prepare, run_record, share_out, state
from pkt_ext.methods.windows import Clock, Cutter
from pkt_ext.settings import DTYPES, check_choices
from pkt_ext.streaming.budget import format_bytes, parse_bytes
from pkt_ext.streaming.meter import merge_reports
from pkt_ext.streaming.needs import Prediction
from pkt_ext.streaming.progress import Progress
from pkt_ext.streaming.ranks import ALONE, World, by_length, join

log = logging.getLogger(__name__)

EXPORTS = ("residual-model",)


@dataclass(frozen=True)
class SeekingConfig:
    """How to extract. The defaults are the published ones."""

    rank: int = 16  # LoRA rank r of every matrix
    alpha: float = 16.0  # LoRA alpha; the product is scaled by alpha / rank
    dropout: float = 0.05  # LoRA dropout written into the adapter's configuration
    max_length: int = 2048  # tokens kept of a seed row
    prompt_format: str = "auto"  # auto, published, chat or plain: see data.encode
    attention: bool = True  # extract q, k, v, o
    mlp: bool = True  # extract gate, up, down
    embeddings: bool = True  # extract the embedding and the head
    vocabulary: str = "identical"  # or "shared": over the tokens that both vocabularies have
    dtype: str | None = None  # of the teacher's pass; None: the checkpoint's. Scores are float32
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: cuda where there is one
    micro_batch: int = 4  # seed rows a forward takes at once; the scores do not depend on it
    budget: str | None = None  # memory of the device, as 8GiB; None: most of what is free
    nonfinite: str = "error"  # or "skip-sample": leave out a row that gives NaN or infinity
    svd: str = "converged"  # converged, fast (fixed passes) or exact: see ops.truncated_svd
    seed: int = 0  # of the SVD's random start
    export: str | None = None  # "residual-model": also write W_s - eta B0 A0 beside the output
    teacher_revision: str | None = None  # branch, tag or commit of a hub id
    student_revision: str | None = None  # likewise

    def __post_init__(self):
        if self.budget is not None:
            parse_bytes(self.budget)
        for name, least in (("rank", 1), ("micro_batch", 1), ("max_length", 2)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; give at least {least}")
        if not 0 < self.alpha < math.inf:
            raise InputError(f"alpha is {self.alpha}; give a positive number")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}; give 0 <= dropout < 1")
        check_choices(
            self,
            vocabulary=("identical", "shared"),
            dtype=(None, *DTYPES),
            svd=("converged", "fast", "exact"),
            nonfinite=("error", "skip-sample"),
            export=(None, *EXPORTS),
            prompt_format=PROMPT_FORMATS,
        )


def extract(
    teacher,
    student,
    data,
    out: str | os.PathLike,
    config: SeekingConfig | None = None,
    *,
    tokenizer=None,
    overwrite: bool = False,
    resume: bool = True,
    progress: bool = True,
) -> dict:
    """Extract a Seeking start for `student` from `teacher` and publish it as the folder `out`.

    The folder is of kind `init`: `start/` (B0, A0 in PEFT's format) and `delta/` (the same with A
    negated), to be trained through `pkt_ext.lora.attach` or `pkt finetune`. It is no adapter for
    the unmodified student.

    What is finished is kept in `<out>.progress` until the output is published: an interrupted run,
    repeated, goes on from its last finished block and ends with the same bytes. (Not where the
    teacher is a model in memory.)

    Under torchrun or `accelerate launch` the processes share the samples and the cutting. Each has
    to call this, with the same arguments; the first one writes.

    Args:
        teacher, student: a folder, a hub id or a loaded PreTrainedModel.
        data: a JSON-lines file of seed rows, or the rows; see `data.read_rows`.
        out: the folder to make.
        tokenizer: of teacher and student alike, where loaded models come without theirs.
        overwrite: replace a complete output of an earlier run.
        resume: go on from the progress of an interrupted run; False: delete it.
        progress: show progress bars.
    Returns:
        What report.json holds.
    Raises:
        InputError: whatever about the inputs cannot work, a budget that is too small, the progress
            of another run.
        OutputBusyError, ResourceError: see `artifact.publish`.
    """
    config = config or SeekingConfig()
    out = Path(out).expanduser().resolve()
    with join() as world, world.together():
        report = _extract(
            teacher, student, data, out, config, tokenizer, overwrite, resume, progress, world
        )
        return world.gather(report)[0]


def _extract(
    teacher, student, data, out: Path, config, tokenizer, overwrite, resume, progress, world: World
) -> dict:
    """`extract` as one of the processes; only the first one's report is complete."""
    place, residual = (out.parent / f"{out.name}{s}" for s in (".progress", "-residual-model"))
    if config.export and residual.exists() and not overwrite and not place.exists():
        raise InputError(f"{residual} exists; choose another --out, or pass --overwrite")
    clock, report = Clock(), {}
    with clock("prepare"):
        job = prepare(teacher, student, data, config, tokenizer, world)
    run = run_record(job, data, config)

    def export() -> None:
        if config.export and world.is_main and (overwrite or not artifact.is_published(residual)):
            residual_model(
                student,
                out,
                residual,
                revision=config.student_revision,
                tokenizer=tokenizer,
                overwrite=overwrite,
                progress=progress,
            )

    if resume and not overwrite:
        finished = artifact.finished(out, place, run) if world.is_main else None
        if finished := world.gather(finished)[0]:
            export()
            if world.is_main:
                shutil.rmtree(place)
            return finished
    kept: Progress | None = None
    try:
        published = artifact.publish(
            out,
            kind="init",
            run=run,
            report=report,
            card=_card(job.student.name, job.teacher.name, config),
            overwrite=overwrite,
            planned_bytes=2 * job.plan.adapter_bytes(config.rank),
        )
        with world.together(), published if world.is_main else nullcontext() as staging:
            for entry in job.plan.skipped:
                log.warning("skipped %s: %s", entry["matrix"], entry["reason"])
            if job.encoded.dropped:
                log.warning(job.encoded.left_out())
            if job.teacher.folder is not None:
                kept = _open_progress(place, job, config, run, resume, world)
            cutter, passed, predicted = _cut(job, config, clock, kept, progress, world)
            if world.is_main:
                with clock("write"):
                    factors, windows = cutter.result()
                    _write_start(staging, factors, job, config)
                report.update(_report(job, cutter, windows, passed, clock))
                report.update(_costs(config, passed, predicted))
                if config.export:
                    report["residual_model"] = str(residual)
    except BaseException as error:
        # a checkpoint with NaN has to change, and its progress would not fit the new one
        keep = kept is not None and kept.found and not isinstance(error, NonFiniteError)
        if keep:
            error.add_note(
                f"finished blocks are kept in {place}: the same command goes on from there"
            )
        # what a signal or a fault has interrupted does not wait for the others
        _leave(None if keep else kept, world, wait=hasattr(error, "reported_by"))
        raise
    export()
    _leave(kept, world, wait=True)  # last: until then a repeated command knows its own output
    return report


def _open_progress(
    place: Path, job: Job, config: SeekingConfig, run: dict, resume: bool, world: World
) -> Progress:
    """What an interrupted run has left; of several processes' each has its own folder."""
    belongs = state(job, config, run) | {"processes": world.size}
    if world.is_main:
        kept = Progress(place, belongs, resume=resume)
    world.gather()  # the first one may have deleted the others'
    if not world.is_main:
        kept = Progress(place / f"rank-{world.rank}", belongs, resume=resume)
    return kept


def _cut(
    job: Job,
    config: SeekingConfig,
    clock: Clock,
    kept: Progress | None,
    show: bool,
    world: World = ALONE,
):
    """S1 to S6: (the cutter, what the pass cost, what it was predicted to take)."""
    known = kept.state if kept is not None else {}
    skipped = list(known.get("skipped", ()))
    if skipped != (agreed := world.gather(skipped)[0]):  # killed while starting again
        skipped = agreed
        kept.restart()
    while True:
        samples = [s for s in job.encoded.samples if s.id not in {e["id"] for e in skipped}]
        share = world.share(samples)
        predicted = share_out(
            job.model,
            job.plan,
            share,
            config,
            tokens=None if job.tokens is None else len(job.tokens[0]),
            known=known.get("allotment"),
        )
        allotment = predicted.allotment
        if kept is not None:
            kept.remember(
                skipped=skipped,
                allotment={"micro_batch": allotment.micro_batch, "head_rows": allotment.head_rows},
            )
            if not kept.found:
                _check_space(kept.folder, predicted.spilled)
        cutter = Cutter(
            job.plan, job.tokens, clock, config.rank, config.svd, config.seed, kept, world
        )
        outer = job.plan.outer and not cutter.restore_outer()
        try:
            with world.together():
                passed = stream_sensitivity(
                    job.model,
                    share,
                    allotment=allotment,
                    on_block=cutter.block,
                    on_restored=cutter.restore,
                    on_outer=cutter.outer if outer else None,
                    tokens=None if job.tokens is None else job.tokens[0],
                    progress=kept,
                    world=world,
                    show=show and world.is_main,
                )
            break
        except NonFiniteError as error:
            enough = len(samples) > world.size
            if config.nonfinite != "skip-sample" or error.sample is None or not enough:
                raise
            log.warning("left out: %s", error)
            skipped.append({"id": error.sample, "reason": str(error)})
            if kept is not None:
                _restart(kept, world)
    if outer:
        cutter.finish_outer()
    reducing = clock.seconds["windows"] + clock.seconds["factors"]
    clock.seconds["sensitivity"] = max(0.0, passed.seconds - reducing)
    clock.peak_bytes["sensitivity"] = passed.peak_bytes
    if world.size > 1:
        passed = merge_reports(world.gather(passed), [s.id for s in by_length(samples)])
    return cutter, replace(passed, skipped=tuple(skipped)), predicted


def _check_space(place: Path, spilled: int) -> None:
    """Before the pass rather than in its middle: the activations are on the disk all at once."""
    if spilled > (free := shutil.disk_usage(place).free):
        raise ResourceError(
            f"{place}: {format_bytes(spilled)} of activations are to be written, "
            f"{format_bytes(free)} of the disk are free; free some, or give --out on a larger disk"
        )


def _restart(kept: Progress, world: World) -> None:
    """Forget all processes' steps; the first one deletes the others' folders with its own."""
    world.gather()
    if world.is_main:
        kept.restart()
    world.gather()
    if not world.is_main:
        kept.restart()


def _leave(unneeded: Progress | None, world: World, *, wait: bool) -> None:
    """Delete progress that nobody needs; the first process's, which holds the others', last."""
    if unneeded is not None and not world.is_main:
        unneeded.remove()
        with suppress(OSError):  # not empty: the first one's, on the same machine
            unneeded.folder.parent.rmdir()
    if wait:
        world.part()
    if unneeded is not None and world.is_main:
        unneeded.remove()


def _write_start(staging: Path, factors: dict[str, Factor], job: Job, config: SeekingConfig):
    negated = {module: factor.negated() for module, factor in factors.items()}
    for folder, content in (("start", factors), ("delta", negated)):
        write_adapter(
            staging / folder,
            content,
            alpha_over_rank=config.alpha / config.rank,
            dropout=config.dropout,
            base_model=job.student.name,
            fan_in_fan_out=any(p.transposed for p in job.plan.student.projections[0]),
            init=True,
        )


def _report(job: Job, cutter: Cutter, windows: dict, passed: PassReport, clock: Clock) -> dict:
    encoded = job.encoded
    return {
        "blocks": cutter.strongest.ordered(),
        "block_scores": [cutter.totals[i] for i in range(len(job.plan.teacher.blocks))],
        "windows": windows,
        "skipped": job.plan.skipped,
        "samples": len(encoded.samples),
        "dropped": [{"id": row, "reason": reason} for row, reason in encoded.dropped],
        "truncated": encoded.truncated,
        "losses": passed.losses,
        "example": encoded.example,
        "dtype": str(job.model.dtype).removeprefix("torch."),
        "device": str(job.model.device),
        "quantisation": asdict(quantised) if (quantised := job.teacher.quantisation) else None,
        "seconds": dict(clock.seconds),
        "pass_seconds": passed.stages,  # of "sensitivity"; windows and factors are in "reduce"
        "waits": passed.waits,  # of the pass's seconds: for the disk, the link, and computing
        "bottleneck": max(passed.waits, key=passed.waits.get),
        "bytes_read": passed.bytes_read,
        "spilled_bytes": passed.spilled_bytes,
        "nonfinite_samples": list(passed.skipped),
        "processes": list(passed.processes),  # where several shared the samples
        # "sensitivity": of the device, the others: of the host
        "peak_bytes": dict(clock.peak_bytes),
    }


def _costs(config: SeekingConfig, passed: PassReport, predicted: Prediction) -> dict:
    return {
        "budget": config.budget and parse_bytes(config.budget),
        "memory": {
            "peak_bytes": passed.peak_bytes,
            "predicted_bytes": predicted.peak,
            **asdict(predicted.allotment),
        },
    }


def _card(student: str, teacher: str, config: SeekingConfig) -> str:
    name = artifact.model_name(student)
    body = f"""
The start of a fine-tune of `{name}`: low-rank factors cut from `{artifact.model_name(teacher)}`.

**This is not an adapter for the unmodified student.** Train it with `pkt finetune`, with
`pkt_ext.lora.attach`, or with PEFT alone:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

student = AutoModelForCausalLM.from_pretrained("{name}", dtype="float32")
residual = PeftModel.from_pretrained(student, "delta").merge_and_unload()
model = PeftModel.from_pretrained(residual, "start", is_trainable=True)
```

Before the first step this model's logits are the student's.
"""
    return artifact.model_card(
        title=f"Seeking start for {name}",
        kind="init",
        base_model=student,
        recipe=asdict(config),
        body=body,
    )
