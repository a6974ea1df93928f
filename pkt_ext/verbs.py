# SPDX-License-Identifier: Apache-2.0
"""The verbs of `pkt` with their options as mappings, and recipes, which run several of them."""

from __future__ import annotations

import json
from contextlib import contextmanager, suppress
from pathlib import Path

import typer

from pkt_ext.console import progress, say
from pkt_ext.errors import InputError, OutputBusyError
from pkt_ext.settings import (
    DTYPES,
    build_config,
    check_keys,
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
    from pkt_ext.methods.seeking import SeekingConfig
    from pkt_ext.plan import plan as make_plan
    from pkt_ext.plan import text

    names = {"batch": "batch", "load_in_4bit": "load_in_4bit", "train_dtype": "dtype"}
    names["gradient_checkpointing"] = "gradient_checkpointing"
    training = {names[key]: settings.pop(key) for key in list(settings) if key in names}
    found = make_plan(
        teacher,
        student,
        build_config(SeekingConfig, settings),
        build_config(FinetuneConfig, training),
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

    name, overwrite = _check_dtype(settings.get("dtype")), take_flag(settings, "overwrite")
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


def _check_dtype(name: str | None) -> str | None:
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


# stage of a recipe -> (verb, folder below --out)
STAGES = {
    "extract": (seeking, "init"),
    "finetune": (finetune, "adapter"),
    "merge": (merge, "model"),
}


def transfer(recipe: dict, overwrite: bool = False) -> None:
    """`pkt transfer` with its recipe as a mapping."""
    refuse_processes("pkt transfer", "start pkt seeking alone with the launcher")
    from pkt_ext import artifact

    method = recipe.pop("method", "seeking")
    if method != "seeking":
        raise InputError(f"method is {method!r}; known is seeking")
    recipe = {key: value for key, value in recipe.items() if value is not None or key in STAGES}
    teacher, student, out = take(recipe, "teacher", "student", "out")
    wanted = [stage for stage in STAGES if stage in recipe]
    if wanted != list(STAGES)[: len(wanted)] or not wanted:
        raise InputError(
            f"the recipe has the stages {', '.join(wanted) or 'none'}; each needs those before it "
            f"({', '.join(STAGES)})"
        )
    settings = {stage: _stage_settings(stage, recipe[stage]) for stage in wanted}
    files = {stage: s["data"] for stage, s in settings.items() if "data" in s}
    state = {"recipe": {"teacher": teacher, "student": student, **settings}}
    state["data"] = {stage: artifact.fingerprint(path) for stage, path in files.items()}
    with _recorded(Path(out), state, overwrite):
        _run_stages(wanted, settings, teacher, student, out, overwrite)


def _run_stages(wanted, settings, teacher, student, out, overwrite) -> None:
    from pkt_ext import artifact

    for stage in wanted:
        verb, folder = STAGES[stage]
        place = Path(out) / folder
        if artifact.is_published(place) and not overwrite:
            artifact.read(place)
            typer.echo(f"{place}: kept from an earlier run")
            continue
        paths = {"student": student, "out": place, "overwrite": overwrite}
        if stage == "extract":
            paths["teacher"] = teacher
        else:
            previous = STAGES[wanted[wanted.index(stage) - 1]][1]
            paths["adapter"] = Path(out) / previous
        verb(settings[stage] | paths)


def _stage_settings(stage: str, content) -> dict:
    """A stage's options, checked now: what would stop a later stage stops before the first."""
    if stage == "merge":
        settings = check_keys(content or {}, {"dtype", "student_revision"}, stage)
        _check_dtype(settings.get("dtype"))
        return settings
    if stage == "extract":
        from pkt_ext.methods.seeking import SeekingConfig as Config
    else:
        from pkt_ext.finetune import FinetuneConfig as Config
    settings = check_keys(content or {}, field_names(Config) | {"data"}, stage)
    build_config(Config, {key: value for key, value in settings.items() if key != "data"})
    if settings.get("data") is None:
        raise InputError(f"{stage}: data is missing; name a JSON-lines file")
    if not Path(settings["data"]).is_file():
        raise InputError(f"{stage}: no such data file: {settings['data']}")
    return settings


@contextmanager
def _recorded(out: Path, state: dict, overwrite: bool):
    """Remember the recipe in `out`; finished stages of another one are not to be mixed with it.

    A run that fails before its first stage is finished takes `out` with it.
    """
    from pkt_ext import artifact

    def started() -> bool:
        return any(artifact.is_published(out / folder) for _, folder in STAGES.values())

    path, made = out / "recipe.json", not out.exists()
    state = json.loads(json.dumps(state, default=str))
    try:
        same = path.is_file() and json.loads(path.read_bytes()) == state
        if path.is_file() and not same and not overwrite and started():
            raise InputError(
                f"{out} holds the stages of another recipe; choose another --out, or --overwrite"
            )
        out.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(".recipe.json.tmp")
        artifact.write_json(staged, state)
        staged.replace(path)
    except (NotADirectoryError, FileNotFoundError, FileExistsError, json.JSONDecodeError) as error:
        raise InputError(f"cannot use {path}: {error}; choose another --out") from error
    try:
        yield
    except BaseException as error:
        # a busy output is another run's, and so is its recipe
        if not started() and not isinstance(error, OutputBusyError):
            path.unlink(missing_ok=True)
            if made:
                with suppress(OSError):  # it holds something else
                    out.rmdir()
        raise
