# SPDX-License-Identifier: Apache-2.0
"""Rows in a file: what is written comes back, in any order and dtype, and damage shows."""

import errno
import os

import pytest
import torch

from pkt_ext.streaming.rows import RowFile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pieces_in_any_order_come_back(tmp_path, dtype):
    want = torch.randn(13, 5).to(dtype)
    file = RowFile(tmp_path / "rows.activations", want.shape, dtype).create()
    for first, last in ((7, 13), (0, 1), (1, 1), (1, 7)):
        file.write(first, want[first:last].float())
    again = RowFile(tmp_path / "rows.activations", want.shape, dtype)
    assert torch.equal(again.read(), want) and again.read().dtype == dtype
    assert file.path.stat().st_size == file.bytes == 13 * 5 * dtype.itemsize


def test_what_is_not_contiguous(tmp_path):
    want = torch.randn(6, 4, 3)[:, 1]
    file = RowFile(tmp_path / "rows", (6, 3), torch.float32).create()
    file.write(0, want)
    assert torch.equal(file.read(), want)


def test_damage_shows(tmp_path):
    file = RowFile(tmp_path / "rows", (100, 7), torch.float32)
    assert file.checksum() is None
    file.create().write(0, torch.randn(100, 7))
    before = file.checksum()
    assert before == file.checksum() is not None
    file.write(50, torch.zeros(1, 7))
    assert file.checksum() != before
    with file.path.open("r+b") as raw:
        raw.truncate(file.bytes - 1)
    assert file.checksum() is None
    file.remove()
    file.remove()
    assert file.checksum() is None


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space cannot be asked for here")
def test_a_full_disk_shows_when_the_file_is_made(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        RowFile(tmp_path / "rows", (3, 3), torch.float32).create()
