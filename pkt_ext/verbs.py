# SPDX-License-Identifier: Apache-2.0
"""The verbs of `pkt` with their options as mappings."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from pkt_ext.console import progress, say
from pkt_ext.errors import InputError
from pkt_ext.settings import (
    DTYPES,
    build_config,
    field_names,
    refuse_processes,
    take,
    take_flag,
)


def seeking(settings: dict) -> None:
    """`pkt seeking` with its options as a mapping."""
    teacher, student, data, out = take(settings, "teacher", "student", "data", "out")
    overwrite = take_flag(settings, "overwrite")
    resume = take_flag(settings, "resume", True)
    from pkt_ext.methods.seeking import SeekingConfig, extract

    report = extract(
        teacher,
        student,
        data,
        out,
        build_config(SeekingConfig, settings),
        overwrite=overwrite,
        resume=resume,
        progress=progress(),
    )
    blocks = ", ".join(map(str, report["blocks"]))
    seconds = sum(report["seconds"].values())
    peak = report["memory"]["peak_bytes"] / 2**30
    say(
        f"{out}: {len(report['windows'])} windows from teacher blocks {blocks}, {seconds:.1f} s, "
        f"at most {peak:.2f} GiB, bound by {report['bottleneck']}"
    )


def laten(settings: dict) -> None:
    """`pkt laten` with its options as a mapping."""
    names = ("teacher", "student", "locate", "align", "out")
    teacher, student, locate, align, out = take(settings, *names)
    holdout = settings.pop("holdout", None)
    overwrite, resume = take_flag(settings, "overwrite"), take_flag(settings, "resume", True)
    from pkt_ext.methods import laten as method

    report = method.align(
        teacher,
        student,
        locate,
        align,
        out,
        build_config(method.LatenConfig, settings),
        holdout=None if holdout is None else str(holdout),
        overwrite=overwrite,
        resume=resume,
        progress=progress(),
    )
    step = report["injected_step"]
    say(
        f"{out}: {len(report['delta_norms'])} matrices changed as step {step} of "
        f"{len(report['steps'])} has it, loss {report['losses'][step - 1]:.4f} before it where the "
        f"student's own is {report['unedited_losses'][step - 1]:.4f}, "
        f"{sum(report['seconds'].values()):.1f} s"
    )


def semalign(settings: dict) -> None:
    """`pkt semalign` with its options as a mapping."""
    teacher, student, data, out = take(settings, "teacher", "student", "data", "out")
    paths = {
        name: None if (given := settings.pop(name, None)) is None else str(given)
        for name in ("holdout", "unrelated")
    }
    overwrite, resume = take_flag(settings, "overwrite"), take_flag(settings, "resume", True)
    from pkt_ext.methods import semalign as method

    report = method.align(
        teacher,
        student,
        data,
        out,
        build_config(method.SemAlignConfig, settings),
        **paths,
        overwrite=overwrite,
        resume=resume,
        progress=progress(),
    )
    before, after = report["before"], report["after"]
    moved = "no rows were held out to look at"
    if after["kl"] is not None:
        moved = (
            f"KL to the teacher on held-out rows {before['kl']:.4f} before, {after['kl']:.4f} "
            f"after, agreement {before['agreement']:.1%} and {after['agreement']:.1%}"
        )
    phases = len(report["losses"])
    say(
        f"{out}: {phases} {'phase' if phases == 1 else 'phases'}; {moved}; "
        f"{sum(report['seconds'].values()):.1f} s"
    )


def finetune(settings: dict) -> None:
    """`pkt finetune` with its options as a mapping."""
    student, data, out = take(settings, "student", "data", "out")
    adapter, overwrite = settings.pop("adapter", None), take_flag(settings, "overwrite")
    from pkt_ext.finetune import FinetuneConfig
    from pkt_ext.finetune import finetune as run_finetune

    report = run_finetune(
        student,
        None if adapter is None else str(adapter),
        data,
        out,
        build_config(FinetuneConfig, settings),
        overwrite=overwrite,
        progress=progress(),
    )
    first, last = report["losses"][0], report["losses"][-1]
    typer.echo(
        f"{out}: adapter for the unmodified student, {report['steps']} steps, loss {first:.3f} to "
        f"{last:.3f}, {report['seconds']['train']:.1f} s"
    )


def plan(settings: dict) -> None:
    """`pkt plan` with its options as a mapping."""
    teacher, student = take(settings, "teacher", "student")
    as_json, timed = take_flag(settings, "json"), take_flag(settings, "probe", True)
    method, data = settings.pop("method", "seeking"), settings.pop("data", None)
    samples = settings.pop("samples", 32)
    if not isinstance(samples, int) or isinstance(samples, bool):
        raise InputError(f"samples is {samples!r}; expected a whole number")
    from pkt_ext.finetune import FinetuneConfig
    from pkt_ext.plan import config_of, text
    from pkt_ext.plan import plan as make_plan

    training = None
    if method == "seeking":
        names = {"batch": "batch", "load_in_4bit": "load_in_4bit", "train_dtype": "dtype"}
        names["gradient_checkpointing"] = "gradient_checkpointing"
        given = {names[key]: settings.pop(key) for key in list(settings) if key in names}
        training = build_config(FinetuneConfig, given)
    if foreign := settings.keys() - field_names(config_of(method)):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(foreign))
        raise InputError(f"{flags}: no option of pkt plan --method {method}; leave it out")
    found = make_plan(
        teacher,
        student,
        build_config(config_of(method), settings),
        training,
        method=method,
        samples=samples,
        data=data,
        timed=timed,
    )
    typer.echo(json.dumps(found, indent=1) if as_json else text(found))


def merge(settings: dict) -> None:
    """`pkt merge` with its options as a mapping."""
    refuse_processes("pkt merge", "start it without a launcher")
    student, adapter, out = take(settings, "student", "adapter", "out")
    import torch

    from pkt_ext import lora

    name, overwrite = check_dtype(settings.get("dtype")), take_flag(settings, "overwrite")
    report = lora.merge(
        student,
        adapter,
        out,
        getattr(torch, name) if name else None,
        revision=settings.get("student_revision"),
        overwrite=overwrite,
        progress=progress(),
    )
    typer.echo(
        f"{out}: {len(report['modules'])} matrices changed, {report['survived']:.1%} of the "
        f"delta survived rounding to {report['dtype']}"
    )


def check_dtype(name: str | None) -> str | None:
    if name not in (None, *DTYPES):
        raise InputError(f"dtype is {name!r}; choose one of {', '.join(DTYPES)}")
    return name


def bench(stems: list[str], device: str, size: str, json: Path | None, plot: Path | None) -> None:
    """`pkt bench`."""
    from tqdm import tqdm

    from pkt_ext.bench.run import run

    # tqdm's write keeps a terminal's bar below the text
    run(stems, device=device, size=size, json=json, plot=plot, progress=progress(), tell=tqdm.write)


def compare(old: Path, new: Path, unused: dict) -> None:
    """`pkt bench --compare`; `unused` are options that go with a run only."""
    from pkt_ext.bench import report
    from pkt_ext.bench.compare import compare as compare_documents

    for name, value in unused.items():
        if value:
            raise InputError(f"--compare measures nothing: leave {name} out")
    typer.echo(compare_documents(report.read(old), report.read(new)))
