# SPDX-License-Identifier: Apache-2.0
"""Rows as two models read them, and which positions of theirs belong together.

Where a token has the same id in both tokenizers, the teacher is given the student's token ids, and
a position belongs to itself. Else each model reads a row with its own tokenizer and its own
rendering, and two positions belong together where both models have read the same part of the
answer: as many of its characters, blanks around it left out, none to all. Of several positions that
have (a character may be split into tokens) the last one counts. What follows the answer differs
from one rendering to another, and its positions stay alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from pkt_ext.data import describe_sample, encode, left_out, resolve_format
from pkt_ext.errors import InputError
from pkt_ext.rendering import Rendered, Row, answer_start, render
from pkt_ext.streaming.batches import IGNORED, Sample, with_distinct_ids

_STAGE = "train"  # of `data.encode`: the student is trained on these rows
Positions = tuple[torch.Tensor, torch.Tensor]  # the teacher's and the student's, int64 [m]


@dataclass(frozen=True)
class PairedRows:
    """What became of the rows; the samples of both models in the same order, under the same ids."""

    teacher: list[Sample]
    student: list[Sample]
    positions: list[Positions]  # by row, ascending; the next token of each carries loss
    dropped: list[tuple[str, str]]  # (row id, reason)
    truncated: list[str]  # ids of kept rows that lost tokens at the end, in one model or both
    example: dict  # the first kept row: id, teacher and student as in `Encoded`, positions of both

    def left_out(self) -> str:
        """What was dropped, in one line however many rows that are."""
        return left_out(self.dropped, len(self.student))


def encode_pairs(
    rows: Sequence[Row],
    teacher_tokenizer,
    student_tokenizer,
    shared_ids: bool,
    *,
    max_length: int,
    prompt_format: str = "auto",
    train_on_inputs: bool = False,
) -> PairedRows:
    """Render, tokenise and mask the rows for both models, and pair their positions.

    Args:
        rows:            from `data.read_rows`; a repeated id gets a number behind it.
        shared_ids:      a token has the same id in both: the student's tokenizer reads for both,
                         and a row with a token that the teacher's does not have is dropped.
        max_length:      tokens that each model keeps of a row, counted from its start.
        prompt_format:   see `data.encode`, stage "train"; `auto` is resolved by each tokenizer.
        train_on_inputs: every token carries loss. Two tokenizers' positions are then paired by what
                         is read of the whole text, which both must render alike.
    Raises:
        InputError: see `data.encode`; without `shared_ids` also a tokenizer that does not tell its
            tokens' characters, a template that writes no answers, texts that differ with
            `train_on_inputs`; no row with a pair is left.
    """
    rows = with_distinct_ids(rows)
    options = max_length, prompt_format, train_on_inputs
    student = _Reading.of("student", rows, student_tokenizer, *options)
    if shared_ids:
        teacher, known = student, set(teacher_tokenizer.get_vocab().values())
    else:
        teacher, known = _Reading.of("teacher", rows, teacher_tokenizer, *options), None
    kept: dict[str, Positions] = {}
    dropped: list[tuple[str, str]] = []
    for row in rows:
        found = teacher.reason(row) or student.reason(row)
        if found is None and known is not None:
            found = _same_ids(student.samples[row.id], known)
        elif found is None:
            found = _same_text(row, teacher, student, train_on_inputs)
        if isinstance(found, str):
            dropped.append((row.id, found))
        else:
            kept[row.id] = found
    if not kept:
        name, reason = dropped[0]
        raise InputError(
            f"none of the {len(rows)} rows can be paired ({name}: {reason}); give other rows, or "
            "raise --max-length"
        )
    first, positions = next(iter(kept.items()))
    example = {
        "id": first,
        "teacher": describe_sample(teacher.samples[first], teacher.tokenizer, teacher.form),
        "student": describe_sample(student.samples[first], student.tokenizer, student.form),
        "positions": [each.tolist() for each in positions],
    }
    return PairedRows(
        [teacher.samples[name] for name in kept],
        [student.samples[name] for name in kept],
        list(kept.values()),
        dropped,
        [name for name in kept if name in teacher.truncated | student.truncated],
        example,
    )


@dataclass(frozen=True)
class _Reading:
    """The rows as one tokenizer gives them to its model."""

    who: str
    tokenizer: object
    form: str
    samples: dict[str, Sample]  # by row id
    dropped: dict[str, str]  # row id -> reason
    truncated: set[str]

    @classmethod
    def of(
        cls,
        who: str,
        rows: Sequence[Row],
        tokenizer,
        max_length: int,
        prompt_format: str,
        train_on_inputs: bool,
    ) -> _Reading:
        with _naming(who):
            form = resolve_format(prompt_format, tokenizer)
            found = encode(rows, tokenizer, max_length=max_length, prompt_format=form, stage=_STAGE)
        samples = found.samples
        if train_on_inputs:
            samples = [replace(sample, labels=sample.input_ids) for sample in samples]
        return cls(
            who,
            tokenizer,
            form,
            {sample.id: sample for sample in samples},
            dict(found.dropped),
            set(found.truncated),
        )

    def reason(self, row: Row) -> str | None:
        """Why the row was dropped, if it was."""
        found = self.dropped.get(row.id)
        return found and f"{self.who}: {found}"

    def text(self, row: Row) -> Rendered:
        """The row as this tokenizer was given it."""
        return render(row, self.tokenizer, self.form, _STAGE)

    def answer_start(self, row: Row) -> int | None:
        """See `rendering.answer_start`."""
        with _naming(self.who):
            return answer_start(row, self.text(row), self.tokenizer)

    def last_after(self, row: Row, start: int, length: int) -> dict[int, int]:
        """How many of `length` characters from `start` are read -> the last such position."""
        with _naming(self.who):
            ends = self.text(row).ends(self.tokenizer)
        found = {}
        for position in _supervised(self.samples[row.id]).tolist():
            if (read := max(0, ends[position] - start)) <= length:
                found[read] = position
        return found


@contextmanager
def _naming(who: str):
    """Which of two tokenizers an error is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{who}: {error}") from error


def _supervised(sample: Sample) -> torch.Tensor:
    """int64 [n]: the positions whose next token carries loss."""
    return (sample.labels[1:] != IGNORED).nonzero().squeeze(1)


def _same_ids(sample: Sample, known: set[int]) -> Positions | str:
    """A position belongs to itself; or why the teacher cannot read the sample."""
    if unknown := [token for token in sample.input_ids.tolist() if token not in known]:
        return f"token {unknown[0]} is not in the teacher's vocabulary"
    positions = _supervised(sample)
    return positions, positions


def _same_text(row: Row, teacher: _Reading, student: _Reading, whole: bool) -> Positions | str:
    """The positions where both have read as much; or why there are none.

    Args:
        whole: of the whole text; else of the answer.
    """
    sides = teacher, student
    if whole:
        texts = [side.text(row).text for side in sides]
        if texts[0] != texts[1]:
            raise InputError(
                f"{row.where}: teacher ({teacher.form}) and student ({student.form}) are given "
                "different texts, and inputs can be paired in one text alone; use --prompt-format "
                "published, or do not train on inputs"
            )
        starts, length = [0, 0], len(texts[0])
    else:
        starts = [side.answer_start(row) for side in sides]
        if None in starts:
            return f"{sides[starts.index(None)].who}: the chat template rewrites its answer"
        length = len(row.messages[-1]["content"].strip())
    theirs, ours = (
        side.last_after(row, start, length) for side, start in zip(sides, starts, strict=True)
    )
    both = sorted(theirs.keys() & ours.keys())
    if not both:
        return "there is no part of its answer after which both models predict a token"
    return torch.tensor([theirs[n] for n in both]), torch.tensor([ours[n] for n in both])
