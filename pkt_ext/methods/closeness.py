# SPDX-License-Identifier: Apache-2.0
"""How close a student's behaviour is to its teacher's, over the vocabulary that they share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pkt_ext import ops
from pkt_ext.methods.vocabulary import SharedVocabulary
from pkt_ext.models.anatomy import Anatomy
from pkt_ext.streaming.blocks import StreamedModel

_LOGITS = 2**23  # computed at once
_HEAD = 2**24  # elements of a head brought to float32 at once


@dataclass(frozen=True, eq=False)
class Heads:
    """Both heads; of the two that belong together, row i is the same token in both."""

    own: torch.Tensor  # [V, D_s], the student's, whole
    student: torch.Tensor  # [m, D_s]
    teacher: torch.Tensor  # [m, D_t]
    student_cap: float | None
    teacher_cap: float | None

    @classmethod
    def of(
        cls, student, anatomy: Anatomy, teacher: StreamedModel, shared: SharedVocabulary
    ) -> Heads:
        """Of a student in memory, whose head is not copied where its first rows are all shared."""
        own = student.get_submodule(anatomy.head).weight.detach()
        device = own.device
        ours, theirs = (first_rows(ids) for ids in (shared.student, shared.teacher))
        return cls(
            own,
            own[ours if isinstance(ours, slice) else ours.to(device)],
            teacher.fetch_rows(teacher.head_name, theirs).to(device),
            anatomy.logit_softcap,
            teacher.anatomy.logit_softcap,
        )


class Closeness:
    """Gathers over batches how a student's predictions differ from its teacher's.

    Args:
        heads: of both.
    """

    def __init__(self, heads: Heads):
        self.heads = heads
        self.rows = self._agree = 0
        self._kl = 0.0

    @torch.no_grad()
    def add(self, states: torch.Tensor, theirs: torch.Tensor) -> None:
        """Head inputs of the same positions, [M, D_s] and [M, D_t]."""
        heads = self.heads
        each = ops.head_kl(
            states,
            heads.student,
            theirs,
            heads.teacher,
            cap=heads.student_cap,
            teacher_cap=heads.teacher_cap,
        )
        self._kl += float(each.double().sum())
        same = _favourites(states, heads.student) == _favourites(theirs, heads.teacher)
        self._agree += int(same.sum())
        self.rows += len(states)

    def result(self) -> dict[str, float]:
        """`kl` of the teacher's predictions from the student's, in nats a position, and the share
        of positions where both find the same token the most likely."""
        return {"kl": self._kl / self.rows, "agreement": self._agree / self.rows}


def _favourites(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """int64 [M]: the token of highest logit, the first among equals; a soft cap keeps the order."""
    states = states.float()
    step = _at_once(len(states), head)
    best = states.new_full((len(states),), -torch.inf)
    found = torch.zeros(len(states), dtype=torch.int64, device=states.device)
    for first in range(0, len(head), step):
        logits, token = (states @ head[first : first + step].float().T).max(1)
        higher = logits > best
        best = torch.where(higher, logits, best)
        found = torch.where(higher, token + first, found)
    return found


def closeness_bytes(heads: Heads, rows: int, device: str) -> int:
    """The most that `Closeness.add` takes for so many rows.

    Args:
        heads:  on any device, meta too.
        device: "cpu" or "cuda", which need not be here.
    """
    both = heads.student, heads.teacher
    most = ops.head_bytes(rows, both, heads.student.dtype, device)
    for head in both:
        step = min(len(head), _at_once(rows, head))
        copied = 0 if head.dtype == torch.float32 else head.shape[1]
        most = max(most, 4 * step * (rows + copied))
    return most


def _at_once(rows: int, head: torch.Tensor) -> int:
    """Rows of a head."""
    return max(1, min(_LOGITS // max(1, rows), _HEAD // head.shape[1]))


def first_rows(ids: torch.Tensor) -> slice | torch.Tensor:
    """A slice where the ids are 0, 1, 2, ..."""
    count = len(ids)
    return slice(0, count) if torch.equal(ids, torch.arange(count)) else ids
