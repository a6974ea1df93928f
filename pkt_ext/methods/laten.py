# SPDX-License-Identifier: Apache-2.0
"""LaTen: locate a teacher's knowledge neurons, align them with the student's, inject them.

Source: Tan et al., "Neural Incompatibility", ACL 2025 (arXiv 2505.14436) and its released scripts.

    locate   the neurons that speak for each row's answer, in teacher and student   (L1 to L4)
    align    one step of a hypernetwork a located row, through the frozen student   (L5 to L8)
    inject   one more row's neurons, translated, as changes of the student's weights     (L9)

Where the scripts go wrong (docs/laten.md lists it) this does what they mean: the lens divides by
the final norm's own scale, attention neurons count every source position, the first answer token is
learned from too, the penalty is float32, and what is written really changes the student.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from pkt_ext import artifact
from pkt_ext.attribution.neurons import BlockNeurons, Located
from pkt_ext.data import PROMPT_FORMATS
from pkt_ext.delta import delta_card, to_adapter, write_delta
from pkt_ext.errors import InputError
from pkt_ext.heap import give_back_freed_memory
from pkt_ext.methods.alignment import (
    Alignment,
    AlignmentConfig,
    EarlyStop,
    StepReport,
    draw_rows,
)
from pkt_ext.methods.hypernetwork import REGULARISER, TYPES, Hypernetwork
from pkt_ext.methods.laten_budget import alignment_bytes
from pkt_ext.methods.laten_inputs import Job, planned_bytes, prepare, run_record, state
from pkt_ext.methods.locating import at_random, locate_in
from pkt_ext.methods.matching import Match, match_neurons
from pkt_ext.methods.students import in_memory
from pkt_ext.methods.two_models import publishing
from pkt_ext.methods.windows import Clock
from pkt_ext.ops.neuron_score import MODES
from pkt_ext.settings import DTYPES, check_choices, refuse_processes
from pkt_ext.streaming.budget import parse_bytes
from pkt_ext.streaming.meter import PeakMemory
from pkt_ext.streaming.progress import Progress

log = logging.getLogger(__name__)

EXPORTS = ("adapter",)


@dataclass(frozen=True)
class LatenConfig:
    """How to locate, align and inject. The defaults are the published ones."""

    rate: float = 0.1  # share of the student's neurons of a block that are replaced
    modules: str = "up,down,v,o"  # what moves; the Qwen port left v out
    blocks: int | None = None  # kept in both models; None: as many as the smaller has
    mode: str = "top"  # how neurons are scored: top, all or first-order
    compat: str | None = None  # "published": blocks and neurons as the released scripts rank them
    neurons: str = "located"  # or "random": the baseline
    steps: int | None = None  # optimiser steps; None: one for each row to locate by
    rows: int = 16  # rows of a step: the located one and others
    learning_rate: float = 3e-5
    schedule: str = "onecycle"  # or constant, which is what the first published code did
    cycle_momentum: bool = True  # the schedule also moves AdamW's first beta, as published
    beta1: float = 0.9  # AdamW's; cycle_momentum overrides it
    beta2: float = 0.95
    weight_decay: float = 0.05
    regulariser: float = REGULARISER  # weight of the mean square of what is injected
    reduction: str = "sum"  # over the rows of a step: sum or mean
    patience: int | None = None  # steps without a better held-out loss after which to stop
    inject_step: int | None = None  # step to inject; None: the best held out, else the last
    keep_checkpoints: bool = False  # leave the hypernetwork of every step in the output
    max_length: int = 1024  # tokens of a row
    train_on_inputs: bool = False  # the loss is taken on prompts too
    prompt_format: str = "auto"  # auto, published, chat or plain: see data.encode
    dtype: str | None = None  # of the passes and of the student; None: the checkpoints'
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: cuda where there is one
    micro_batch: int = 4  # rows a pass takes at once; aligning takes them one at a time
    budget: str | None = None  # memory of the device for the passes; None: most of what is free
    gradient_checkpointing: bool = True  # recompute the student's blocks in the backward
    seed: int = 42
    export: str | None = None  # "adapter": also write a PEFT adapter beside the output
    teacher_revision: str | None = None  # branch, tag or commit of a hub id
    student_revision: str | None = None  # likewise

    def __post_init__(self):
        if self.budget is not None:
            parse_bytes(self.budget)
        if not 0 < self.rate <= 1:
            raise InputError(f"rate is {self.rate}; give a share above 0, up to 1")
        for name, least in (
            ("rows", 1),
            ("micro_batch", 1),
            ("max_length", 2),
            ("steps", 1),
            ("blocks", 1),
            ("patience", 1),
            ("inject_step", 1),
        ):
            if (value := getattr(self, name)) is not None and value < least:
                raise InputError(f"{name} is {value}; give at least {least}")
        if not self.types or not set(self.types) <= set(TYPES):
            raise InputError(f"modules is {self.modules!r}; give some of {','.join(TYPES)}")
        check_choices(
            self,
            mode=MODES,
            compat=(None, "published"),
            neurons=("located", "random"),
            dtype=(None, *DTYPES),
            export=(None, *EXPORTS),
            prompt_format=PROMPT_FORMATS,
        )
        self.alignment(1)  # checks its own

    @property
    def types(self) -> tuple[str, ...]:
        """`modules`, taken apart."""
        return tuple(name.strip() for name in self.modules.split(",") if name.strip())

    def alignment(self, steps: int) -> AlignmentConfig:
        """The part of it that is the training's."""
        shared = ("learning_rate", "schedule", "cycle_momentum", "weight_decay", "regulariser")
        return AlignmentConfig(
            steps=steps,
            betas=(self.beta1, self.beta2),
            reduction=self.reduction,
            gradient_checkpointing=self.gradient_checkpointing,
            **{name: getattr(self, name) for name in shared},
        )


def align(
    teacher,
    student,
    locate,
    align,
    out: str | os.PathLike,
    config: LatenConfig | None = None,
    *,
    holdout=None,
    teacher_tokenizer=None,
    student_tokenizer=None,
    overwrite: bool = False,
    resume: bool = True,
    progress: bool = True,
) -> dict:
    """Transfer by LaTen and publish the student's changes as the folder `out` (kind `delta`).

    `pkt merge` adds them to the student; `delta.safetensors` holds rows and columns, float32.
    Each model reads the rows with its own tokenizer: only ranks of neurons are matched, so the
    vocabularies may differ. What is finished is kept in `<out>.progress`: an interrupted run,
    repeated, goes on from its last step. (Not where a model in memory is given.)

    Args:
        teacher, student: a folder, a hub id or a loaded PreTrainedModel. The teacher streams; the
            student streams while it is located in, and is in memory while it is aligned: one that
            was loaded already in its own dtype.
        locate: rows to locate by, a JSON-lines file or the rows; see `data.read_rows`. A step is
            taken for each, in an order drawn by the seed.
        align:  rows that the student's loss is taken on; by one of them it is located at the end.
        out: the folder to make.
        holdout: rows to choose the step by.
        teacher_tokenizer, student_tokenizer: where loaded models come without theirs.
        overwrite: replace a complete output of an earlier run.
        resume: go on from the progress of an interrupted run; False: delete it.
        progress: show progress bars.
    Returns:
        What report.json holds: `blocks`, `neurons`, `losses`, ... (docs/laten.md).
    Raises:
        InputError: whatever about the inputs cannot work; a budget that is too small.
        NonFiniteError: NaN or infinity in weights, activations or the training.
        OutputBusyError, ResourceError: see `artifact.publish`.
    """
    refuse_processes("pkt laten", "start it without a launcher")
    config = config or LatenConfig()
    if config.patience is not None and holdout is None:
        raise InputError("patience needs rows to hold out: give --holdout")
    out = Path(out).expanduser().resolve()
    place, adapter = (out.parent / f"{out.name}{end}" for end in (".progress", "-adapter"))
    if config.export and adapter.exists() and not overwrite and not place.exists():
        raise InputError(f"{adapter} exists; choose another --out, or pass --overwrite")
    clock, report = Clock(), {}
    with clock("prepare"):
        job = prepare(
            (teacher, student),
            (teacher_tokenizer, student_tokenizer),
            locate,
            align,
            holdout,
            config,
        )
    run = run_record(job, locate, align, holdout, config)

    def export() -> None:
        if config.export and (overwrite or not artifact.is_published(adapter)):
            to_adapter(out, student, adapter, revision=config.student_revision, overwrite=overwrite)

    if resume and not overwrite and (finished := artifact.finished(out, place, run)):
        export()
        shutil.rmtree(place)
        return finished
    with clock("prepare"):
        report["align_predicted_bytes"] = alignment_bytes(job, config)
    with publishing(
        job,
        out,
        place,
        state(job, config, run),
        resume=resume,
        kind="delta",
        run=run,
        report=report,
        card=delta_card(job.student.name, asdict(config)),
        overwrite=overwrite,
        planned_bytes=planned_bytes(job, config, place),
    ) as (staging, kept):
        if job.dropped:
            log.warning("%d rows left out; report.json names them", len(job.dropped))
        _transfer(job, student, config, clock, kept, staging, report, progress)
    export()
    kept.remove()
    return report


def _transfer(job: Job, student, config, clock, kept, staging, report: dict, show: bool) -> None:
    """L1 to L9: fills the staging folder and the report."""
    found, passes = [], {}
    for which, who in enumerate(("teacher", "student")):
        with clock(f"locate {who}"):
            located, passes[who] = locate_in(job, which, config, kept, show)
        if config.neurons == "random":
            located = at_random(located, job.anatomies[which], config.seed + which)
        found.append(located)

    def match(row: int):
        return match_neurons(
            job.streams[0].checkpoint,
            job.anatomies[0],
            found[0][row],
            found[1][row],
            types=config.types,
        )

    theirs, ours = job.anatomies
    _tidy(job)
    network = Hypernetwork(
        theirs.hidden_size, ours.hidden_size, types=config.types, seed=config.seed
    )
    with (
        clock("align"),
        in_memory(student, job.streams[1], config.student_revision) as model,
        PeakMemory(job.streams[1].device) as memory,
    ):
        training = Alignment(model, network, config.alignment(len(job.located)), anatomy=ours)
        steps, held = _train(training, job, config, kept, match, show)
        chosen = config.inject_step or _best(held) or len(steps)
        training.load_step(kept, chosen)
        deltas = training.deltas(match(-1))
        peak = memory.bytes
    with clock("write"):
        write_delta(staging, deltas, ours)
        network.save(staging / "hypernetwork.safetensors")
        if config.keep_checkpoints:
            (staging / "checkpoints").mkdir()
            for number in range(1, len(steps) + 1):
                name = f"hypernetwork-{number:04}.safetensors"
                shutil.copyfile(kept.folder / name, staging / "checkpoints" / name)
    report.update(_report(job, found, steps, held, chosen, deltas, config))
    report.update(passes=passes, seconds=dict(clock.seconds), align_peak_bytes=peak)


def _tidy(job: Job) -> None:
    """Small tensors leave pieces of free memory behind, tens of MiB of them."""
    if job.streams[1].device.type == "cpu":
        give_back_freed_memory()


def _train(
    training: Alignment,
    job: Job,
    config: LatenConfig,
    kept: Progress,
    match: Callable[[int], Match],
    show: bool,
) -> tuple[list[StepReport], list[float]]:
    """L8: a step for each located row; (what each saw, the held-out loss behind each)."""
    steps, held = training.resume(kept), []
    stop = EarlyStop(config.patience) if config.patience else None
    last = match(-1) if job.holdout else None

    def enough() -> bool:
        """Look at the held-out rows behind the latest step; whether to stop."""
        number = len(held) + 1
        if (line := kept.find(f"held-{number:04}")) is None:
            losses = training.losses(job.holdout, last)
            line = {"loss": sum(losses) / len(losses)}
            kept.record(f"held-{number:04}", **line)
        held.append(line["loss"])
        done = stop is not None and stop.update(number, held[-1])
        return done and number >= (config.inject_step or 0)

    stopped = any([enough() for _ in steps]) if job.holdout else False
    bar = tqdm(
        total=len(job.located), initial=len(steps), desc="align", leave=False,
        disable=None if show else True,
    )  # fmt: skip
    with bar:
        for number in range(len(steps), len(job.located)):
            if stopped:
                log.info("stopped: no better held-out loss for %d steps", config.patience)
                break
            rows = draw_rows(job.located[number], job.align, number, config.rows)
            step = training.step(match(number), rows)
            _tidy(job)
            steps.append(step)
            training.save(kept, step)
            text = f"loss {step.edited:.4f}, un-edited {step.unedited:.4f}"
            if job.holdout:
                stopped = enough()
                text += f", held out {held[-1]:.4f}"
            bar.set_postfix_str(text, refresh=False)
            bar.update()
            if show and bar.disable:
                log.info("align: step %d of %d, %s", step.step, len(job.located), text)
    return steps, held


def _best(held: list[float]) -> int | None:
    """The first step with the lowest held-out loss, from 1; None without rows held out."""
    return 1 + held.index(min(held)) if held else None


def _report(job: Job, found, steps, held, chosen: int, deltas, config: LatenConfig) -> dict:
    who = ("teacher", "student")
    aims = [located[-1] for located in found]
    return {
        "blocks": {
            name: {"attention": list(aim.attention_blocks), "ffn": list(aim.ffn_blocks)}
            for name, aim in zip(who, aims, strict=True)
        },
        "neurons": {name: aim.summary() for name, aim in zip(who, aims, strict=True)},
        "counts": job.counts,
        "overlap": {
            **{name: _between_rows(located) for name, located in zip(who, found, strict=True)},
            "teacher and student": _between_models(*aims),
        },
        "losses": [step.edited for step in steps],
        "unedited_losses": [step.unedited for step in steps],
        "held_out_losses": held,
        "steps": [asdict(step) for step in steps],
        "injected_step": chosen,
        "injected_row": aims[0].sample,
        "located_rows": [sample.id for sample in job.located],
        "delta_norms": {
            f"{block}.{role}": float(values.norm()) for (block, role), (_, values) in deltas.items()
        },
        "samples": len(job.align),
        "dropped": [{"id": row, "reason": reason} for row, reason in job.dropped],
        "example": job.example,
        "dtypes": [str(stream.dtype).removeprefix("torch.") for stream in job.streams],
        "device": str(job.streams[0].device),
        "budget": config.budget and parse_bytes(config.budget),
    }


def _between_rows(found: list[Located]) -> dict[str, float | None]:
    """Share of neurons that two rows in turn have in common, in the blocks that both keep."""
    return {
        kind: _mean(
            share
            for one, two in zip(found, found[1:], strict=False)
            for share in _shares(getattr(one, kind), getattr(two, kind))
        )
        for kind in ("attention", "ffn")
    }


def _between_models(theirs: Located, ours: Located) -> dict[str, float | None]:
    """The same of teacher and student, by number: for models of one shape, as one's descendants."""
    return {
        kind: _mean(_shares(getattr(theirs, kind), getattr(ours, kind)))
        for kind in ("attention", "ffn")
    }


def _shares(one: tuple[BlockNeurons, ...], two: tuple[BlockNeurons, ...]) -> Iterator[float]:
    others = {each.block: set(each.indices.tolist()) for each in two}
    for each in one:
        if each.block in others and len(each.indices):
            yield len(others[each.block].intersection(each.indices.tolist())) / len(each.indices)


def _mean(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None
