# SPDX-License-Identifier: Apache-2.0
"""Recipes: the stages of a transfer, each a verb with its options, run one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import typer

from pkt_ext import verbs
from pkt_ext.errors import InputError, OutputBusyError
from pkt_ext.settings import build_config, check_keys, field_names, refuse_processes, take


@dataclass(frozen=True)
class Stage:
    """A verb as part of a recipe."""

    verb: Callable[[dict], None]
    folder: str  # below --out
    files: tuple[str, ...] = ()  # options that name data files it cannot do without
    optional: tuple[str, ...] = ()  # and those that it can


_MERGE = Stage(verbs.merge, "model")
# method -> its stages in their order; each but the first takes the folder of the one before it
METHODS: dict[str, dict[str, Stage]] = {
    "seeking": {
        "extract": Stage(verbs.seeking, "init", ("data",)),
        "finetune": Stage(verbs.finetune, "adapter", ("data",)),
        "merge": _MERGE,
    },
    "laten": {
        "align": Stage(verbs.laten, "delta", ("locate", "align"), ("holdout",)),
        "merge": _MERGE,
    },
    "semalign": {
        "steer": Stage(verbs.semalign, "adapter", ("data",), ("holdout", "unrelated")),
        "merge": _MERGE,
    },
}
STAGES = {name for stages in METHODS.values() for name in stages}


def transfer(recipe: dict, overwrite: bool = False) -> None:
    """`pkt transfer` with its recipe as a mapping."""
    refuse_processes("pkt transfer", "start pkt seeking alone with the launcher")
    from pkt_ext import artifact

    method = recipe.pop("method", "seeking")
    if method not in METHODS:
        raise InputError(f"method is {method!r}; known is {', '.join(METHODS)}")
    stages = METHODS[method]
    recipe = {key: value for key, value in recipe.items() if value is not None or key in stages}
    teacher, student, out = take(recipe, "teacher", "student", "out")
    check_keys(recipe, set(stages), f"a recipe of {method}")
    wanted = [stage for stage in stages if stage in recipe]
    if wanted != list(stages)[: len(wanted)] or not wanted:
        raise InputError(
            f"the recipe has the stages {', '.join(wanted) or 'none'}; each needs those before it "
            f"({', '.join(stages)})"
        )
    settings = {name: _stage_settings(name, stages[name], recipe[name]) for name in wanted}
    if "merge" in settings and settings.get("steer", {}).get("train") == "block":
        raise InputError(
            "steer: with train: block it leaves a complete model, no adapter to merge; leave merge "
            "out"
        )
    state = {
        "recipe": {"method": method, "teacher": teacher, "student": student, **settings},
        "data": {
            name: {file: artifact.fingerprint(settings[name][file]) for file in files}
            for name in wanted
            if (files := _files(stages[name], settings[name]))
        },
    }
    folders = [stage.folder for stage in stages.values()]
    with _recorded(Path(out), state, overwrite, folders):
        previous = None
        for name in wanted:
            place = Path(out) / stages[name].folder
            if artifact.is_published(place) and not overwrite:
                artifact.read(place)
                typer.echo(f"{place}: kept from an earlier run")
            else:
                paths = {"student": student, "out": place, "overwrite": overwrite}
                paths |= {"adapter": previous} if previous else {"teacher": teacher}
                stages[name].verb(settings[name] | paths)
            previous = place


def _files(stage: Stage, settings: dict) -> list[str]:
    """The options given that name data files."""
    return [name for name in stage.files + stage.optional if settings.get(name) is not None]


def _stage_settings(name: str, stage: Stage, content) -> dict:
    """A stage's options, checked now: what would stop a later stage stops before the first."""
    if name == "merge":
        settings = check_keys(content or {}, {"dtype", "student_revision"}, name)
        verbs.check_dtype(settings.get("dtype"))
        return settings
    if name == "extract":
        from pkt_ext.methods.seeking import SeekingConfig as Config
    elif name == "align":
        from pkt_ext.methods.laten import LatenConfig as Config
    elif name == "steer":
        from pkt_ext.methods.semalign import SemAlignConfig as Config
    else:
        from pkt_ext.finetune import FinetuneConfig as Config
    paths = stage.files + stage.optional
    settings = check_keys(content or {}, field_names(Config) | set(paths), name)
    build_config(Config, {key: value for key, value in settings.items() if key not in paths})
    for file in stage.files:
        if settings.get(file) is None:
            raise InputError(f"{name}: {file} is missing; name a JSON-lines file")
    for file in _files(stage, settings):
        if not Path(settings[file]).is_file():
            raise InputError(f"{name}: no such data file: {settings[file]}")
    return settings


@contextmanager
def _recorded(out: Path, state: dict, overwrite: bool, folders: list[str]):
    """Remember the recipe in `out`; finished stages of another one are not to be mixed with it.

    A run that fails before its first stage is finished takes `out` with it.
    """
    from pkt_ext import artifact

    def started() -> bool:
        return any(artifact.is_published(out / folder) for folder in folders)

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
