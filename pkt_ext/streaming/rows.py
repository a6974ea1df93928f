# SPDX-License-Identifier: Apache-2.0
"""Rows of numbers in a file: written in pieces while a model streams by, mapped when they are read.

What is read of a mapped file is page cache, which the system takes back when it needs memory.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import torch

_PIECE = 1 << 24  # bytes checked at a time


class RowFile:
    """[N, D] of one dtype in a file of a run's progress.

    Args:
        path:  of the file; `create` makes it, what an interrupted run left is replaced.
        shape: (N, D), both positive.
        dtype: of the numbers.
    """

    def __init__(self, path: str | os.PathLike, shape: tuple[int, int], dtype: torch.dtype):
        self.path, self.shape, self.dtype = Path(path), tuple(shape), dtype

    @property
    def bytes(self) -> int:
        """Of the file."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def create(self) -> RowFile:
        """Make the file, with all its bytes on the disk: a full one shows now.

        Raises:
            OSError: no space.
        """
        with self.path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self.bytes)
            else:
                file.truncate(self.bytes)
        return self

    def write(self, first: int, rows: torch.Tensor) -> None:
        """Put rows [n, D] of any dtype and device at `first` and on."""
        held = rows.detach().to("cpu", self.dtype).contiguous()
        if not len(held):
            return
        with self.path.open("r+b") as file:
            file.seek(first * self.shape[1] * self.dtype.itemsize)
            file.write(memoryview(held.view(torch.uint8).numpy()).cast("B"))

    def read(self) -> torch.Tensor:
        """[N, D], mapped; not to be changed."""
        count = self.shape[0] * self.shape[1]
        return torch.from_file(str(self.path), shared=True, size=count, dtype=self.dtype).view(
            self.shape
        )

    def checksum(self) -> int | None:
        """crc32 of the file; None where it is missing or of another size."""
        if not self.path.is_file() or self.path.stat().st_size != self.bytes:
            return None
        found = 0
        with self.path.open("rb") as file:
            while piece := file.read(_PIECE):
                found = zlib.crc32(piece, found)
        return found

    def remove(self) -> None:
        """Delete the file, if it is there."""
        self.path.unlink(missing_ok=True)
