# SPDX-License-Identifier: Apache-2.0
"""Weights on their way to the device: the next part is brought in while the present one is at work.

disk     a thread has the pages of the checkpoint read,
link     converts them (CPU), or copies them through two pinned buffers to the device on a
         stream of its own (CUDA),
compute  the caller takes the part; what it had to wait for is booked.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.meter import Meter

_PINNED = 64 * 2**20  # bytes of each of the two buffers: long copies, little memory


@dataclass(frozen=True, eq=False)
class Part:
    """What is brought in at once."""

    names: tuple[str, ...]  # of parameters
    rows: slice | torch.Tensor | None = None  # only these rows of the one matrix named

    @property
    def key(self) -> tuple:
        """Equal for equal parts; row numbers in a tensor are equal to themselves only."""
        rows = (self.rows.start, self.rows.stop) if isinstance(self.rows, slice) else id(self.rows)
        return self.names, rows

    def stored_bytes(self, checkpoint: Checkpoint) -> int:
        """Bytes of it in the checkpoint."""
        total = checkpoint.bytes_of(self.names)
        if self.rows is None:
            return total
        sliced = isinstance(self.rows, slice)
        wanted = self.rows.stop - self.rows.start if sliced else len(self.rows)
        return total // checkpoint.shape(self.names[0])[0] * wanted


class Reader:
    """Brings parts of a model to its device.

    Args:
        stream: the model.
        meter:  what is waited for is booked there.
        ahead:  start on the next part as soon as one is taken: two are there at once.
    """

    def __init__(self, stream: StreamedModel, meter: Meter, *, ahead: bool):
        self.stream, self.meter, self.ahead = stream, meter, ahead
        self._order: deque[Part] = deque()
        self._next: tuple[Part, Future] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pkt-read")
        self._link = _Link(stream.device) if stream.device.type == "cuda" else None
        self._stalls: list[tuple[float, torch.cuda.Event, torch.cuda.Event]] = []

    def plan(self, order: Iterable[Part]) -> None:
        """The parts, in the order in which they will be taken."""
        self._order = deque(order)
        self._advance()

    def take(self, part: Part) -> dict[str, torch.Tensor]:
        """A part, on the device; one that was not planned is brought in now.

        Raises:
            InputError: see `Checkpoint.load`.
        """
        if self._next is not None and self._next[0].key == part.key:
            _, future = self._next
            self._next = None
        else:
            future = self._thread.submit(self._bring, part)
        start = time.perf_counter()
        tensors, disk, ready = future.result()
        waited = time.perf_counter() - start
        self.meter.waits["disk"] += waited * disk
        self.meter.waits["link"] += waited * (1 - disk)
        if ready is not None:
            self._wait_on_device(tensors, ready, disk)
        self.meter.bytes_read += part.stored_bytes(self.stream.checkpoint)
        self._advance()
        return tensors

    def close(self) -> None:
        """Stop reading; what was read ahead is dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._next = None
        for disk, before, after in self._stalls:
            after.synchronize()
            stalled = before.elapsed_time(after) / 1000
            self.meter.waits["disk"] += stalled * disk
            self.meter.waits["link"] += stalled * (1 - disk)
        self._stalls.clear()

    def _advance(self) -> None:
        if self.ahead and self._next is None and self._order:
            part = self._order.popleft()
            self._next = part, self._thread.submit(self._bring, part)

    def _bring(self, part: Part):
        """(tensors, the disk's share of the time, event after which they are there)."""
        checkpoint = self.stream.checkpoint
        start, before = time.perf_counter(), checkpoint.disk_seconds
        if self._link is None:
            tensors, ready = self._fetch(part), None
            checkpoint.populate(tensors)
        else:
            with torch.cuda.stream(self._link.stream):
                tensors = self._fetch(part, self._link.move)
                ready = self._link.stream.record_event()
        took = time.perf_counter() - start
        disk = (checkpoint.disk_seconds - before) / took if took else 1.0
        return tensors, min(1.0, disk), ready

    def _fetch(self, part: Part, move=None) -> dict[str, torch.Tensor]:
        if part.rows is None:
            return self.stream.fetch(part.names, move)
        (name,) = part.names
        return {name: self.stream.fetch_rows(name, part.rows, move)}

    def _wait_on_device(self, tensors: dict, ready: torch.cuda.Event, disk: float) -> None:
        work = torch.cuda.current_stream(self.stream.device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(work)
        work.wait_event(ready)
        after.record(work)
        self._stalls.append((disk, before, after))
        for tensor in tensors.values():
            tensor.record_stream(work)  # not to be reused by the link while work still reads it


class _Link:
    """Host to device on a stream of its own, through two pinned buffers in turn."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(_PINNED, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._free: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def move(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device, complete when the stream is."""
        if tensor.is_cuda:
            return tensor.to(self.device)
        target = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        source = tensor.contiguous().view(-1).view(torch.uint8)
        bytes_there = target.view(-1).view(torch.uint8)
        for start in range(0, len(source), _PINNED):
            piece = source[start : start + _PINNED]
            self._turn ^= 1
            if (event := self._free[self._turn]) is not None:
                event.synchronize()
            buffer = self._buffers[self._turn][: len(piece)]
            buffer.copy_(piece)
            bytes_there[start : start + len(piece)].copy_(buffer, non_blocking=True)
            self._free[self._turn] = self.stream.record_event()
        return target
