# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint: found or fetched, their headers read, everything checked.

Every fault of a folder (missing, truncated, corrupt, foreign) ends as an InputError that names the
file and says what to do. Hub access goes through huggingface_hub alone; no code of a repository is
ever run.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
import transformers
from safetensors import SafetensorError, safe_open

from pkt_ext.errors import InputError
from pkt_ext.models.anatomy import check_config

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {  # by the name safetensors has for them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Stored:
    """Where a parameter lies: a key of a safetensors file, or a tensor of a loaded model."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    file: Path | None = None
    tensor: torch.Tensor | None = None
    stamp: tuple[int, int] | None = None  # the file's size and time of change when opened

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def resolve(source: str | Path, revision: str | None = None, weights: str = "safetensors") -> Path:
    """The local folder of a source: itself, or the snapshot of a Hub id (fetched if need be).

    Args:
        source: a folder, or "owner/name" on the Hub (HF_HOME and HF_HUB_OFFLINE are obeyed).
        revision: branch, tag or commit of a Hub id.
        weights: "safetensors" or "bin".

    Raises:
        InputError: no such folder or repository, gated, or offline and not cached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"{source} is a folder; a revision applies to Hub ids only")
        return folder
    if folder.exists():
        raise InputError(f"{source} is a file; pass the folder that holds config.json")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)) or str(source).startswith("."):
        raise InputError(f"{source}: no such folder; pass a checkpoint's folder or a Hub id")
    stem = "model" if weights == "safetensors" else "pytorch_model"
    folder = _snapshot(str(source), revision, _SMALL_FILES)
    index = folder / f"{stem}.{weights}.index.json"
    wanted = sorted(set(read_index(index).values())) if index.is_file() else [f"{stem}.{weights}"]
    # by the commit just resolved, so that both halves come from one revision
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else revision
    return _snapshot(str(source), commit, wanted)


def _snapshot(repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    at = f" at revision {revision}" if revision else ""
    try:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
            )
        )
    except errors.GatedRepoError as error:
        problem, cause = (
            f"is gated; accept its licence at https://huggingface.co/{repository}, "
            "then run: hf auth login",
            error,
        )
    except errors.RepositoryNotFoundError as error:
        problem, cause = (
            "is neither a folder here nor a model on the Hub that you may read; check the "
            "spelling, or run: hf auth login",
            error,
        )
    except errors.RevisionNotFoundError as error:
        problem, cause = "has no such revision; check --revision", error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        problem, cause = (
            "is no folder here, not in the local cache (HF_HOME), and the Hub cannot be reached "
            f"(offline, or HF_HUB_OFFLINE is set); where there is a network: hf download "
            f"{repository}",
            error,
        )
    except errors.HFValidationError as error:
        problem, cause = "is neither a folder nor a valid Hub id", error
    except errors.HfHubHTTPError as error:
        problem, cause = f"could not be fetched: {first_line(error)}", error
    raise InputError(f"{repository}{at} {problem}") from cause


def read_config(folder: Path, name: str):
    """The folder's configuration, by transformers' own classes."""
    path = folder / "config.json"
    if not path.is_file():
        hint = "pass the folder that holds config.json and the model's safetensors"
        if (folder / "adapter_config.json").is_file() or (folder / "run.json").is_file():
            hint = "this looks like an adapter: pass the model, or make one with pkt merge"
        raise InputError(f"{name}: no config.json; {hint}")
    try:
        kind = json.loads(path.read_bytes()).get("model_type")
        if kind is not None and kind not in transformers.CONFIG_MAPPING:
            # a repository's own code, or a family newer than this transformers
            check_config(transformers.PreTrainedConfig(model_type=kind))
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # whatever the configuration's own checks raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{path}: unusable ({reason}); download it again") from error


def read_headers(folder: Path, name: str) -> dict[str, Stored]:
    """Every tensor named in the headers of the folder's safetensors, by key."""
    where: dict[str, str] = {}
    if (folder / _SINGLE).is_file():
        files = [_SINGLE]
    elif (folder / _INDEX).is_file():
        where = read_index(folder / _INDEX)
        files = sorted(set(where.values()))
    else:
        command = f"pkt convert {name} {Path(name).name}-safetensors"
        if any(folder.glob("pytorch_model*.bin*")):
            raise InputError(f"{name}: only a .bin checkpoint, which is not read; run: {command}")
        hint = "download the checkpoint again"
        if not Path(name).is_dir():
            hint = f"where the repository has .bin files only, run: {command}"
        raise InputError(f"{name}: no {_SINGLE} and no {_INDEX}; {hint}")
    found: dict[str, Stored] = {}
    for file in files:
        path = folder / file
        if not path.is_file():
            raise InputError(f"{path}: named in {_INDEX} but missing; download it again")
        stamp = _stamp(path)
        with reading(path) as handle:
            for key in handle.keys():  # noqa: SIM118 - not a dict
                if where.get(key, file) != file:
                    continue
                if key in found:
                    raise InputError(f"{path}: {key} is in {found[key].file} too; remove one file")
                part = handle.get_slice(key)
                dtype = DTYPES.get(part.get_dtype(), part.get_dtype())
                found[key] = Stored(key, tuple(part.get_shape()), dtype, file=path, stamp=stamp)
    absent = [key for key in where if key not in found]
    if absent:
        raise InputError(
            f"{folder / where[absent[0]]}: lacks {listed(absent)}, which {_INDEX} places there; "
            "download it again"
        )
    return found


def read_index(path: Path) -> dict[str, str]:
    """{key: file name} of an index; the files must lie inside the folder."""
    try:
        where = json.loads(path.read_bytes())["weight_map"]
        names = {str(file) for file in where.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not a valid index ({type(error).__name__}); download it again"
        ) from error
    for file in names:
        pure = PurePosixPath(file)
        if pure.is_absolute() or ".." in pure.parts or "\\" in file or not pure.parts:
            raise InputError(
                f"{path}: {file!r} leads out of the folder; do not use this checkpoint"
            )
    return where


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; put it back or download it again") from error
    return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def reading(path: Path, stamp: tuple[int, int] | None = None):
    """An open safetensors file; what goes wrong names the file.

    Args:
        stamp: its size and time of change when its header was read; another file is refused.
    """
    if stamp is not None and (now := _stamp(path)) != stamp:
        sizes = f"{stamp[0]} bytes then, {now[0]} now" if now[0] != stamp[0] else "same size"
        raise InputError(
            f"{path}: changed since this run opened it ({sizes}); leave it alone while it is "
            "used, and start again"
        )
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: truncated or corrupt safetensors ({error}); download or copy it again"
        ) from error


_WILLNEED, _POPULATE_READ = 3, 22  # Linux numbers; the second since 5.14
_UNREADABLE = (errno.EFAULT, errno.EIO, 133)  # the last is EHWPOISON, which errno lacks


def populate(tensor: torch.Tensor, file: str | Path) -> None:
    """Bring the pages of a mapped tensor in, without the GIL; does nothing but on Linux's CPU.

    A page that cannot be read would kill the process (SIGBUS) where it is first touched; here it
    is an error.

    Args:
        tensor: contiguous, a mapping of `file`; not read where it is empty or on another device.
        file:   for the message.
    Raises:
        InputError: the disk fails, or the file is shorter than it was.
    """
    if tensor.device.type != "cpu" or not tensor.numel() or _madvise is None:
        return
    if not tensor.is_contiguous():
        raise ValueError(f"populate: a tensor of shape {tuple(tensor.shape)} is not contiguous")
    page = os.sysconf("SC_PAGESIZE")
    start = tensor.data_ptr() // page * page
    length = tensor.data_ptr() + tensor.numel() * tensor.element_size() - start
    # the first asks the disk for all of it at once, the second waits until it is there
    for advice in (_WILLNEED, _POPULATE_READ):
        failed = _madvise(start, length, advice) and ctypes.get_errno()
        if failed in _UNREADABLE:
            raise InputError(
                f"{file}: cannot be read ({os.strerror(failed)}): it was cut short while in use, "
                "or its disk fails; copy or download it again"
            )
    if failed:  # an older kernel: touch every page
        content = tensor.view(-1).view(torch.uint8)
        content[::page].sum(), content[-1].item()


def _find_madvise():
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


_madvise = _find_madvise()


def listed(names: list[str], limit: int = 6) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def first_line(error: Exception, limit: int = 160) -> str:
    """What an error says, short enough for one line."""
    return next(iter(str(error).strip().splitlines()), "no reason given")[:limit]
