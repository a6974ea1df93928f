# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint's folder: their headers read, everything checked.

Every fault of a folder (missing, truncated, corrupt, foreign) ends as an InputError that names the
file and says what to do. No code of a repository is ever run.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import torch
import transformers
from safetensors import SafetensorError, safe_open

from pkt_ext.errors import InputError
from pkt_ext.models.anatomy import check_config
from pkt_ext.models.quantisation import gguf

if TYPE_CHECKING:
    from pkt_ext.streaming.quantised import Packed

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {  # by the name safetensors has for them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """Where a parameter lies: a key of a safetensors file, or a tensor of a loaded model."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    file: Path | None = None
    offset: int | None = None  # bytes from the file's start
    tensor: torch.Tensor | None = None
    stamp: tuple[int, int] | None = None  # the file's size and time of change when opened
    remote: bool = False  # only the header was fetched
    packed: Packed | None = None  # how it is quantised, if it is

    @property
    def bytes(self) -> int:
        if self.packed is not None:
            return self.packed.bytes
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read_config(folder: Path, name: str):
    """The folder's configuration, by transformers' own classes."""
    path = folder / "config.json"
    if not path.is_file():
        if _is_gguf(folder, name):
            raise InputError(gguf(name))
        hint = "pass the folder that holds config.json and the model's safetensors"
        if (folder / "adapter_config.json").is_file() or (folder / "run.json").is_file():
            hint = "this looks like an adapter: pass the model, or make one with pkt merge"
        raise InputError(f"{name}: no config.json; {hint}")
    try:
        kind = json.loads(path.read_bytes()).get("model_type")
        if kind is not None and kind not in transformers.CONFIG_MAPPING:
            # a repository's own code, or a family newer than this transformers
            check_config(transformers.PretrainedConfig(model_type=kind))
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # whatever the configuration's own checks raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{path}: unusable ({reason}); download it again") from error


def read_headers(
    folder: Path, name: str, fetch: Callable[[str], Iterable[Stored]] | None = None
) -> dict[str, Stored]:
    """Every tensor named in the headers of the folder's safetensors, by key.

    Args:
        fetch: the tensors of a file that is not in the folder, from elsewhere; None: it is missing.
    """
    where: dict[str, str] = {}
    if (folder / SINGLE).is_file():
        files = [SINGLE]
    elif (folder / INDEX).is_file():
        where = read_index(folder / INDEX)
        files = sorted(set(where.values()))
    elif fetch is not None:
        files = [SINGLE]
    else:
        raise no_safetensors(folder, name)

    def header(file: str) -> list[Stored]:
        path = folder / file
        if path.is_file():
            return list(_read_header(path))
        if fetch is None:
            raise InputError(f"{path}: named in {INDEX} but missing; download it again")
        return list(fetch(file))

    found: dict[str, Stored] = {}
    with ThreadPoolExecutor(8 if fetch else 1) as threads:  # a request takes its time
        for file, tensors in zip(files, threads.map(header, files), strict=True):
            for stored in tensors:
                key = stored.key
                if where.get(key, file) != file:
                    continue
                if key in found:
                    raise InputError(
                        f"{folder / file}: {key} is in {found[key].file} too; remove one file"
                    )
                found[key] = stored
    absent = [key for key in where if key not in found]
    if absent:
        raise InputError(
            f"{folder / where[absent[0]]}: lacks {listed(absent)}, which {INDEX} places there; "
            "download it again"
        )
    return found


def no_safetensors(folder: Path, name: str) -> InputError:
    """The error that says what to do about a checkpoint without safetensors."""
    if _is_gguf(folder, name):
        return InputError(gguf(name))
    command = f"pkt convert {name} {Path(name).name}-safetensors"
    if any(folder.glob("pytorch_model*.bin*")):
        return InputError(f"{name}: only a .bin checkpoint, which is not read; run: {command}")
    hint = "download the checkpoint again"
    if not Path(name).is_dir():
        hint = f"where the repository has .bin files only, run: {command}"
    return InputError(f"{name}: no {SINGLE} and no {INDEX}; {hint}")


def _is_gguf(folder: Path, name: str) -> bool:
    """Whether a checkpoint without safetensors is one of GGUF files; on the Hub, by its name."""
    return any(folder.glob("*.gguf")) or (not Path(name).is_dir() and "gguf" in name.lower())


def _read_header(path: Path) -> Iterable[Stored]:
    stamp = _stamp(path)
    with _named(path), path.open("rb") as file:
        with safe_open(path, framework="np"):  # checks it; as "pt" it would map it, see Files
            size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    for key, entry in header.items():
        if key != "__metadata__":
            dtype, shape = DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"])
            offset = 8 + size + entry["data_offsets"][0]
            yield Stored(key, shape, dtype, file=path, offset=offset, stamp=stamp)


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
def _named(path: Path):
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: truncated or corrupt safetensors ({error}); download or copy it again"
        ) from error


class Files:
    """Safetensors files, each mapped when something of it is first asked for.

    Private and writable, so that nothing can change the file; without a reservation, so that a file
    may be larger than the memory there is, which safetensors' own mapping may not.
    """

    def __init__(self):
        self._mapped: dict[Path, mmap.mmap] = {}

    def tensor(self, stored: Stored) -> torch.Tensor:
        """A mapping of the file, or the loaded model's own tensor.

        Raises:
            InputError: the file vanished, changed since its header was read, or is damaged.
            RuntimeError: only its header was fetched.
        """
        path = stored.file
        if stored.tensor is not None:
            return stored.tensor
        if stored.remote:
            raise RuntimeError(f"{path}: only headers were fetched; open it without headers_only")
        if path not in self._mapped:
            self._mapped[path] = _map(path, stored.stamp)
        if not (count := torch.Size(stored.shape).numel()):
            return torch.empty(stored.shape, dtype=stored.dtype)
        content, size = self._mapped[path], stored.dtype.itemsize
        if stored.offset % size == 0:
            found = torch.frombuffer(content, dtype=stored.dtype, count=count, offset=stored.offset)
        else:  # some writers do not align
            raw = content[stored.offset : stored.offset + count * size]
            found = torch.frombuffer(bytearray(raw), dtype=stored.dtype)
        return found.view(stored.shape)


def _map(path: Path, stamp: tuple[int, int]) -> mmap.mmap:
    if (now := _stamp(path)) != stamp:
        sizes = f"{stamp[0]} bytes then, {now[0]} now" if now[0] != stamp[0] else "same size"
        raise InputError(
            f"{path}: changed since this run opened it ({sizes}); leave it alone while it is used, "
            "and start again"
        )
    try:
        with path.open("rb") as file:
            flags = mmap.MAP_PRIVATE | _NORESERVE
            return mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be mapped ({error.strerror}); copy it to a local disk"
        ) from error


_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
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
