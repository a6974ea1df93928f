# SPDX-License-Identifier: Apache-2.0
"""Options from files: YAML read safely, unknown keys refused, values checked by type."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Iterable
from pathlib import Path

from pkt_ext.errors import InputError

DTYPES = ("float32", "float16", "bfloat16")  # that a model can be computed or written in


def read_yaml(path: Path, known: Iterable[str] | None = None) -> dict:
    """A mapping from a YAML file; dashes in its keys become underscores.

    Raises:
        InputError: unreadable, no mapping, or a key that is not among `known`.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is not YAML: {reason}") from error
    if content is None:
        return {}
    return check_keys(content, known, str(path))


def check_keys(content, known: Iterable[str] | None, where: str) -> dict:
    """`content` as a mapping of options, dashes as underscores.

    Raises:
        InputError: no mapping, or a key that is not among `known`.
    """
    if not isinstance(content, dict):
        raise InputError(f"{where} is a {type(content).__name__}; expected option: value lines")
    settings = {str(key).replace("-", "_"): value for key, value in content.items()}
    unknown = [] if known is None else [key for key in settings if key not in known]
    if unknown:
        choices = ", ".join(sorted(known))
        raise InputError(f"{where}: unknown option {unknown[0]!r}; known are {choices}")
    return settings


def take(settings: dict, *names: str) -> list:
    """Remove and return required options.

    Raises:
        InputError: one is missing.
    """
    for name in names:
        if settings.get(name) in (None, ""):  # Path("") would be the working directory
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is missing; give it, or put {name} into --config")
    return [str(settings.pop(name)) for name in names]


def build_config(cls, settings: dict):
    """A configuration dataclass from options, each value checked against its field's type.

    Raises:
        InputError: a value of the wrong type, or one the class refuses.
    """
    hints = typing.get_type_hints(cls)
    return cls(**{name: _typed(name, value, hints[name]) for name, value in settings.items()})


def take_flag(settings: dict, name: str, default: bool = False) -> bool:
    """Remove and return an option that is on or off.

    Raises:
        InputError: neither true nor false.
    """
    return _typed(name, settings.pop(name, default), bool)


def check_choices(config, **choices: Iterable) -> None:
    """Refuse a configuration with a field that is none of its choices.

    Raises:
        InputError: names the field, its value and the choices.
    """
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            known = ", ".join(str(choice) for choice in allowed if choice is not None)
            raise InputError(f"{name} is {getattr(config, name)!r}; choose one of {known}")


def find_device(name: str):
    """The torch.device that `auto`, `cpu`, `cuda` or `cuda:1` means on this machine.

    Raises:
        InputError: no such device, or not here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used here; use --device cpu") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported; use --device cpu, cuda or auto")
    return device


def trainer_device(name: str):
    """`find_device` for transformers' Trainer, which uses the first CUDA device.

    Raises:
        InputError: another one.
    """
    device = find_device(name)
    if device.index and device.type == "cuda":
        raise InputError(
            f"device is {name}, but the Trainer uses the first CUDA device; set "
            f"CUDA_VISIBLE_DEVICES={device.index} and use --device cuda"
        )
    return device


class Launch(typing.NamedTuple):
    """This process among those that a launcher started for one job."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on its machine
    local_size: int = 1


def launched_as() -> Launch:
    """What torchrun and `accelerate launch` say in the environment.

    Raises:
        InputError: they say nonsense.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        if (size := int(os.environ.get("WORLD_SIZE", "1"))) <= 1:
            return Launch()
        rank = int(os.environ["RANK"])
        local = int(os.environ.get("LOCAL_RANK", rank))
        return Launch(rank, size, local, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    except (KeyError, ValueError) as error:
        said = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        raise InputError(
            f"the environment announces several processes, but incompletely ({said}); start them "
            "with torchrun, or unset WORLD_SIZE"
        ) from error


def refuse_processes(command: str, instead: str) -> None:
    """For a command that runs in one process.

    Raises:
        InputError: a launcher started several.
    """
    if launched_as().size > 1:
        raise InputError(f"{command} runs in one process; {instead}")


def _typed(name: str, value, hint):
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    for kind in typing.get_args(hint) if union else (hint,):
        if kind is type(None) and value is None:
            return None
        if kind is float and not isinstance(value, bool):
            try:
                return float(value)  # YAML 1.1 reads 3e-4 as text
            except (TypeError, ValueError):
                continue
        if isinstance(value, kind) and (kind is bool) == isinstance(value, bool):
            return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    kinds = [
        names.get(k, str(k)) for k in (typing.get_args(hint) or (hint,)) if k is not type(None)
    ]
    raise InputError(f"{name} is {value!r}; expected {' or '.join(kinds)}")


def field_names(cls) -> set[str]:
    """The fields of a configuration dataclass."""
    return {field.name for field in dataclasses.fields(cls)}
