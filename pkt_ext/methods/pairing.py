# SPDX-License-Identifier: Apache-2.0
"""Which teacher block goes to which student block, and which matrix to which.

Source: Zhong et al., ICLR 2024 (arXiv 2310.11451): the k blocks of highest score (S3), in their
order in the teacher (S4). Among equal scores the lower index goes first, as published.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pkt_ext.errors import InputError
from pkt_ext.models.anatomy import Anatomy, Projection

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")


class Strongest:
    """The `count` highest scores among those offered so far, whatever the order they come in.

    What is displaced can never come back, so a caller may free it at once.
    """

    def __init__(self, count: int):
        self.count = count
        self._kept: dict[int, float] = {}  # index -> score

    def offer(self, index: int, score: float) -> int | None:
        """Take a score in; the index that is out because of it: this one, another or None."""
        self._kept[index] = score
        if len(self._kept) <= self.count:
            return None
        out = min(self._kept, key=lambda i: (self._kept[i], -i))
        del self._kept[out]
        return out

    def ordered(self) -> list[int]:
        """The kept indices, ascending: the k-th goes to student block k."""
        return sorted(self._kept)


def strongest_blocks(scores: Sequence[float], count: int) -> list[int]:
    """The `count` blocks of highest score, ascending; the k-th goes to student block k."""
    leaders = Strongest(count)
    for index, score in enumerate(scores):
        leaders.offer(index, score)
    return leaders.ordered()


@dataclass(frozen=True)
class Plan:
    """Which teacher part feeds which student part."""

    teacher: Anatomy
    student: Anatomy
    cuts: dict[str, tuple[Projection, Projection]]  # role -> (teacher's, student's)
    outer: tuple[str, ...]  # of "embedding", "head"
    skipped: list[dict]  # {"matrix", "reason"}

    def adapter_bytes(self, rank: int) -> int:
        """Size of one float32 adapter."""
        sides = sum(sum(s.shape) for _, s in self.cuts.values()) * len(self.student.blocks)
        sides += len(self.outer) * (self.student.hidden_size + self.student.vocab_size)
        return sides * rank * 4

    def ranks(self, rank: int) -> dict[str, int]:
        """Student module path -> rank of its factors; a fused module has its parts' together."""
        found: dict[str, int] = {}
        for block in self.student.blocks:
            for _, theirs in self.cuts.values():
                path = f"{block}.{theirs.module}"
                found[path] = found.get(path, 0) + rank
        return found | {getattr(self.student, name): rank for name in self.outer}

    def check_rank(self, rank: int, tokens: int | None = None) -> None:
        """Refuse a rank that some window to be factored cannot have.

        Args:
            tokens: vocabulary rows cut for embedding and head; None: all.
        Raises:
            InputError: names the matrix and the largest possible rank.
        """
        path = self.student.blocks[0]
        sides = {f"{path}.{s.module}[{role}]": s.shape for role, (_, s) in self.cuts.items()}
        rows = self.student.vocab_size if tokens is None else tokens
        sides |= {getattr(self.student, n): (rows, self.student.hidden_size) for n in self.outer}
        name, shape = min(sides.items(), key=lambda item: min(item[1]))
        if rank > min(shape):
            raise InputError(
                f"rank {rank} is larger than a side of {name} ({_by(shape)}); "
                f"the largest possible --rank is {min(shape)}"
            )


def pair_parts(
    teacher: Anatomy, student: Anatomy, *, roles: Sequence[str], embeddings: bool
) -> Plan:
    """Match the parts by role; refuse what cannot work, note what is left out and why."""
    if len(student.blocks) > len(teacher.blocks):
        raise InputError(
            f"the student has {len(student.blocks)} blocks, the teacher only "
            f"{len(teacher.blocks)}; choose a teacher at least as deep"
        )
    larger, smaller = _uniform(teacher, "teacher"), _uniform(student, "student")
    cuts, skipped = {}, []
    for role in ATTENTION + MLP:
        if role not in roles or role not in smaller and role not in larger:
            continue
        if role not in smaller or role not in larger:
            where, lacks = (larger, "student") if role in larger else (smaller, "teacher")
            skipped.append({"matrix": where[role].module, "reason": f"the {lacks} has no {role}"})
            continue
        have, need = larger[role].shape, smaller[role].shape
        if need[0] > have[0] or need[1] > have[1]:
            reason = f"{role} is {_by(need)} in the student, only {_by(have)} in the teacher"
            skipped.append({"matrix": smaller[role].module, "reason": reason})
            continue
        cuts[role] = (larger[role], smaller[role])
    outer: tuple[str, ...] = ()
    if embeddings:
        names = {"embedding": student.embedding, "head": student.head}
        if student.tied:
            reason = "the student ties them: two deltas would meet in one tensor"
        elif student.hidden_size > teacher.hidden_size:
            reason = f"hidden size {student.hidden_size}, the teacher's is {teacher.hidden_size}"
        else:
            reason, outer = None, tuple(names)
        skipped += [{"matrix": name, "reason": reason} for name in names.values() if reason]
    if not cuts and not outer:
        reasons = "; ".join(dict.fromkeys(s["reason"] for s in skipped)) or "none was asked for"
        raise InputError(f"no matrix can be extracted ({reasons}); choose a wider teacher")
    if student.position_embedding:
        reason = "learned positions are never extracted"
        skipped.append({"matrix": student.position_embedding, "reason": reason})
    return Plan(teacher, student, cuts, outer, skipped)


def _uniform(anatomy: Anatomy, whose: str) -> dict[str, Projection]:
    """The projections of every block, by role: a window must fit whichever block it goes to."""
    first = anatomy.projections[0]
    for path, projections in zip(anatomy.blocks, anatomy.projections, strict=True):
        if projections != first:
            raise InputError(f"{path} of the {whose} differs in shape from the first block")
    return {p.role: p for p in first}


def _by(shape) -> str:
    return " x ".join(map(str, shape))
