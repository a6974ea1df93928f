# SPDX-License-Identifier: Apache-2.0
"""What LaTen and SemAlign share: a run over two models, its output and its progress."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pkt_ext import artifact
from pkt_ext.errors import NonFiniteError
from pkt_ext.models.anatomy import Anatomy
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.progress import Progress


@dataclass(frozen=True)
class TwoModels:
    """Teacher and student, in that order."""

    streams: tuple[StreamedModel, StreamedModel]

    @property
    def student(self) -> Checkpoint:
        return self.streams[1].checkpoint

    @property
    def anatomies(self) -> tuple[Anatomy, Anatomy]:
        return self.streams[0].anatomy, self.streams[1].anatomy

    @property
    def durable(self) -> bool:
        """Whether both lie in files, so that an interrupted run finds them again."""
        return all(stream.checkpoint.folder is not None for stream in self.streams)


def open_both(models: Sequence, revisions: Sequence[str | None]) -> list[Checkpoint]:
    """Teacher and student, each a folder, a hub id or a loaded model."""
    return [
        Checkpoint.open(model, revision=revision)
        for model, revision in zip(models, revisions, strict=True)
    ]


@contextmanager
def publishing(
    job: TwoModels, out: Path, place: Path, state: Mapping, *, resume: bool, **published
) -> Iterator[tuple[Path, Progress]]:
    """Publish `out`, its progress kept in `place` until the caller removes it.

    What an error leaves: the progress, and a note that says so; or nothing, where going on would
    not help.

    Args:
        state:     what the progress belongs to; see `Progress`.
        resume:    go on from what an interrupted run has left.
        published: see `artifact.publish`.
    Yields:
        (the staging folder, the progress)
    """
    kept: Progress | None = None
    try:
        with artifact.publish(out, **published) as staging:
            # what is in memory may be anything: such a run goes on from none, and deletes none
            unique = {} if job.durable else {"model in memory": uuid.uuid4().hex}
            kept = Progress(place, {**state, **unique}, resume=resume)
            yield staging, kept
    except BaseException as error:
        # with NaN about, weights or options have to change, and the progress would not fit them
        helps = job.durable and not isinstance(error, NonFiniteError)
        if kept is not None and kept.found and helps:
            error.add_note(
                f"what is finished is kept in {place}: the same command goes on from there"
            )
        elif kept is not None:
            kept.remove()
        raise
