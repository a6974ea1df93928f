# SPDX-License-Identifier: Apache-2.0
"""The processes that share one job, as torchrun or `accelerate launch` started them.

Each takes its share of the samples; sums over samples are added up over the processes. An error of
one process is every other's at their next meeting (any of the methods below that talks), so that
nobody waits for ever and one line is printed: `reported_by` on an error says by whom.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch

from pkt_ext.errors import InputError, PktError, ResourceError
from pkt_ext.settings import find_device, launched_as
from pkt_ext.streaming.batches import Sample

# How long a process waits at a meeting: a block of the slowest disk, not a fault. The launcher ends
# the others when one dies, and a closed connection is noticed at once.
_PATIENCE = timedelta(hours=12)


class World:
    """The processes of a job; by default this one alone, which talks to nobody.

    Every process has to call the same methods in the same order.

    Args:
        rank:       number of this process.
        size:       number of processes.
        local_rank: number of this process on its machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._lost = False

    @property
    def is_main(self) -> bool:
        """Whether this process publishes and prints."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """`find_device`, where auto and cuda mean a GPU of each process's own.

        Raises:
            InputError: no such device, more processes than GPUs, one GPU for all.
        """
        if self.size == 1 or name == "cpu" or name == "auto" and not torch.cuda.is_available():
            return find_device(name)
        if name not in ("auto", "cuda"):
            find_device(name)
            raise InputError(
                f"device is {name!r} for each of {self.size} processes; give cuda, which is one "
                "GPU for each, or cpu"
            )
        find_device("cuda")
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise InputError(
                f"process {self.local_rank + 1} of this machine has no GPU, there are {count}; "
                "start as many processes as GPUs, or give --device cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def share(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """This process's samples: by length, dealt round.

        Raises:
            InputError: fewer samples than processes.
        """
        if self.size == 1:
            return samples
        if len(samples) < self.size:
            raise InputError(
                f"{self.size} processes, but only {len(samples)} sample(s) to share out; start at "
                "most as many processes as there are samples, or give more data"
            )
        return by_length(samples)[self.rank :: self.size]

    def gather(self, value=None) -> list:
        """Every process's `value`, by rank; a meeting, with None a mere one.

        Raises:
            PktError: what another process has raised.
            ResourceError: another process has ended.
        """
        return [value] if self.size == 1 else self._meet(value, None)

    def sum_(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its sum over all processes, in place; a meeting.

        The sums depend on the number of processes by rounding; they are equal in every run.
        """
        if self.size == 1:
            return
        from torch import distributed

        self.gather()
        for tensor in tensors:
            self._talk(distributed.all_reduce, tensor)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one process raises inside, all raise; they leave together."""
        try:
            yield
        except Exception as error:  # a signal's exception waits for nobody
            if self.size > 1 and not hasattr(error, "reported_by"):
                self._meet(None, error)
            raise
        else:
            self.gather()

    def part(self) -> None:
        """After an error that all have raised: wait until all are here."""
        if not self._lost:
            with suppress(PktError):
                self.gather()

    def _meet(self, value, error: Exception | None) -> list:
        from torch import distributed

        found = [None] * self.size
        self._talk(distributed.all_gather_object, found, (value, _portable(error)))
        failed = [rank for rank, (_, theirs) in enumerate(found) if theirs is not None]
        if not failed:
            return [theirs for theirs, _ in found]
        chosen = error if failed[0] == self.rank else found[failed[0]][1]
        chosen.reported_by = failed[0]
        raise chosen

    def _talk(self, function, *args) -> None:
        try:
            function(*args)
        except RuntimeError as error:
            self._lost = True
            lost = ResourceError(
                f"one of the {self.size} processes has ended, see what it or the launcher says; "
                "run again"
            )
            lost.reported_by = 0
            raise lost from error


ALONE = World()


@contextmanager
def join() -> Iterator[World]:
    """The processes that the launcher started, or that the caller's process group holds.

    Without either this process is alone and nothing is imported or opened.

    Raises:
        InputError: the launcher's environment is incomplete.
    """
    from torch import distributed

    launch = launched_as()
    if distributed.is_available() and distributed.is_initialized():
        yield World(distributed.get_rank(), distributed.get_world_size(), launch.local_rank)
        return
    if launch.size == 1:
        yield ALONE
        return
    backend = "gloo"
    if torch.cuda.is_available() and distributed.is_nccl_available():
        backend = "cpu:gloo,cuda:nccl"
    try:
        distributed.init_process_group(backend, timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"{launch.size} processes were announced (WORLD_SIZE) but do not find each other: "
            f"{error}; start them with torchrun"
        ) from error
    try:
        yield World(launch.rank, launch.size, launch.local_rank)
    finally:
        distributed.destroy_process_group()


def by_length(samples: Sequence[Sample]) -> list[Sample]:
    """The longest first, in their order where equally long: how `make_batches` takes them."""
    return sorted(samples, key=lambda sample: -len(sample.input_ids))


def _portable(error: Exception | None) -> PktError | None:
    """What the other processes raise: ours as they are, others in words."""
    if error is None or isinstance(error, PktError):
        return error
    return PktError(f"{type(error).__name__}: {error}"[:400])
