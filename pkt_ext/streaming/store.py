# SPDX-License-Identifier: Apache-2.0
"""Boundary activations of a streamed pass: on the device while they are few, else in host memory
and files.

Plain reads and writes, no memory map: what the operating system keeps of the files is page cache,
which it may take back, and the pass's own memory stays one micro-batch. A durable store writes
everything, so that an interrupted pass can go on; one write runs behind the work.
"""

from __future__ import annotations

import errno
import os
import tempfile
import zlib
from collections.abc import Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from pkt_ext.errors import ResourceError


@dataclass
class _Entry:
    shape: torch.Size
    dtype: torch.dtype
    held: torch.Tensor | None = None  # on the device, or in pinned host memory
    copied: torch.cuda.Event | None = None  # the copy to pinned memory is complete
    offset: int | None = None  # in the group's file
    crc: int | None = None  # crc32 of its bytes there, of a durable store

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    @property
    def pinned_bytes(self) -> int:
        """In pinned memory, which torch hands out in powers of two."""
        return 1 << max(0, self.bytes - 1).bit_length()


class ActivationStore:
    """Tensors by (group, item); a group is dropped as a whole and gives its memory or file back.

    Args:
        device:       where `get` puts the tensors.
        memory_limit: bytes kept on `device`; what comes beyond goes to host memory or disk.
        host_limit:   bytes kept in pinned host memory (CUDA only); what comes beyond goes to disk.
        folder:       where files are made; None is the system's for temporary ones (TMPDIR).
        durable:      write every tensor into `folder`, under its group's name, and leave it there.
    """

    def __init__(
        self,
        device: torch.device,
        memory_limit: int,
        folder: str | os.PathLike | None = None,
        *,
        host_limit: int = 0,
        durable: bool = False,
    ):
        self.device = device
        self.memory_limit, self.host_limit = memory_limit, host_limit
        self.folder, self.durable = folder, durable
        self.bytes_in_memory = 0
        self.bytes_in_host = 0
        self.bytes_on_disk = 0  # written so far
        self._entries: dict[str, dict[Hashable, _Entry]] = {}
        self._durable: set[str] = set()
        self._files: dict[str, object] = {}
        self._ends: dict[str, int] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="pkt-write")
        self._pending: Future | None = None

    def put(
        self, group: str, item: Hashable, tensor: torch.Tensor, *, passing: bool = False
    ) -> None:
        """Keep `tensor`, which the caller no longer changes; an equal key is replaced.

        Args:
            passing: of no use to a resumed run (of all of a group or of none).
        Raises:
            ResourceError: the disk is full (perhaps by what was put before).
        """
        tensor = tensor.detach()
        entries = self._entries.setdefault(group, {})
        old = entries.pop(item, None)
        if old is not None:
            self._release(old)
        entry = entries[item] = _Entry(tensor.shape, tensor.dtype)
        if self.bytes_in_memory + entry.bytes <= self.memory_limit:
            entry.held = tensor
            self.bytes_in_memory += entry.bytes
        elif self._fits_in_host(entry):
            entry.held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            entry.held.copy_(tensor, non_blocking=True)
            entry.copied = torch.cuda.Event()
            entry.copied.record(torch.cuda.current_stream(self.device))
            self.bytes_in_host += entry.pinned_bytes
        if self.durable and not passing:
            self._durable.add(group)
        if entry.held is None or group in self._durable:
            reuse = old is not None and old.offset is not None and old.bytes == entry.bytes
            self._write(group, entry, tensor, old.offset if reuse else None)

    def get(self, group: str, item: Hashable) -> torch.Tensor:
        """The tensor; not to be changed in place, it may be the stored one."""
        entry = self._entries[group][item]
        if entry.held is not None:
            if entry.copied is not None:
                entry.copied.synchronize()
            return entry.held.to(self.device, non_blocking=True)
        self.flush()
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        file = self._file(group)
        file.seek(entry.offset)
        if file.readinto(_bytes_of(tensor)) != entry.bytes:
            raise ResourceError(f"{self._where()}: a file of activations was cut short; run again")
        return tensor.to(self.device)

    def drop(self, group: str) -> None:
        """Forget a group; its memory and its file are free afterwards."""
        for entry in self._entries.pop(group, {}).values():
            self._release(entry)
        self.flush()
        if file := self._files.pop(group, None):
            file.close()
        self._ends.pop(group, None)
        if group in self._durable:
            self._path(group).unlink(missing_ok=True)

    def flush(self) -> None:
        """Wait until everything put has been written.

        Raises:
            ResourceError: the disk is full.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def entries(self, group: str) -> list[dict]:
        """What `restore` needs to find the group's tensors in its file, as plain values."""
        self.flush()
        return [
            {
                "item": item,
                "offset": entry.offset,
                "shape": list(entry.shape),
                "dtype": str(entry.dtype).removeprefix("torch."),
                "crc32": entry.crc,
            }
            for item, entry in self._entries.get(group, {}).items()
        ]

    def restore(self, group: str, entries: list[dict]) -> bool:
        """Take up a group of an earlier durable store; False where it is gone or damaged."""
        if not self._path(group).is_file():
            return False
        for found in entries:
            shape, dtype = torch.Size(found["shape"]), getattr(torch, found["dtype"])
            entry = _Entry(shape, dtype, offset=found["offset"], crc=found["crc32"])
            with self._path(group).open("rb") as file:
                file.seek(entry.offset)
                if zlib.crc32(file.read(entry.bytes)) != entry.crc:
                    return False
            self._entries.setdefault(group, {})[found["item"]] = entry
            self._durable.add(group)
            self._ends[group] = max(self._ends.get(group, 0), entry.offset + entry.bytes)
        return True

    def close(self) -> None:
        """Forget everything; a durable store leaves its files."""
        self._writer.shutdown(wait=True)
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._entries.clear()
        self.bytes_in_memory = self.bytes_in_host = 0

    def _fits_in_host(self, entry: _Entry) -> bool:
        there = self.device.type == "cuda"
        return there and self.bytes_in_host + entry.pinned_bytes <= self.host_limit

    def _release(self, entry: _Entry) -> None:
        if entry.held is not None and entry.copied is not None:
            self.bytes_in_host -= entry.pinned_bytes
        elif entry.held is not None:
            self.bytes_in_memory -= entry.bytes

    def _write(self, group: str, entry: _Entry, tensor: torch.Tensor, offset: int | None) -> None:
        host = tensor.cpu().contiguous()
        self.flush()  # at most one tensor waits for the disk
        if offset is None:
            offset = self._ends.get(group, 0)
            self._ends[group] = offset + entry.bytes
            self.bytes_on_disk += entry.bytes
        entry.offset = offset

        def write() -> None:
            content = _bytes_of(host)
            try:
                file = self._file(group)
                file.seek(offset)
                file.write(content)
                file.flush()
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                where = "--out" if self.durable else "TMPDIR"
                raise ResourceError(
                    f"{self._where()}: no space for {entry.bytes} bytes of activations; free some, "
                    f"or give {where} on a larger disk"
                ) from error
            if group in self._durable:
                entry.crc = zlib.crc32(content)

        self._pending = self._writer.submit(write)

    def _file(self, group: str):
        if group not in self._files:
            if group in self._durable:
                path = self._path(group)
                self._files[group] = path.open("r+b" if path.exists() else "w+b")
            else:
                self._files[group] = tempfile.TemporaryFile(dir=self.folder, prefix="pkt_ext-")
        return self._files[group]

    def _path(self, group: str) -> Path:
        return Path(self.folder or "", f"{group}.activations")

    def _where(self) -> str:
        return str(self.folder or tempfile.gettempdir())


def _bytes_of(tensor: torch.Tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy()
