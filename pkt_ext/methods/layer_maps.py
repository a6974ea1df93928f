# SPDX-License-Identifier: Apache-2.0
"""Which teacher block supervises which student block.

Here as in all code blocks count from 0; in the formulas k and ell count from 1, L_t and L_s are the
numbers of blocks of teacher and student.

    A2  ell(k) = max(1, floor(L_t k / L_s))                      a teacher block for every k
    A3  a critical ell* goes to k' = min { k : ell(k) >= ell* }, as the pair (ell(k'), k')
    A4  h = (1 - lambda) h_a + lambda h_b,  b = a + 1            a depth between two blocks:
        u = L_t k / L_s,  a = max(1, min(floor(u), L_t - 1)),  lambda = clip(u - a, 0, 1)

A map is a list with one teacher block for every student block.

Source: SemAlign, arXiv 2510.24208, v1: A2 to A4. Of the variants of 2026 only abstracts are known,
which ask for one source block a target block in order; which one is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pkt_ext.errors import InputError
from pkt_ext.methods.pairing import strongest_blocks


class Pair(NamedTuple):
    """A teacher block and the student block that it supervises."""

    teacher: int
    student: int


class Between(NamedTuple):
    """A depth between two of the teacher's blocks: (1 - share) x lower + share x upper."""

    lower: int
    upper: int
    share: float  # lambda, in [0, 1]


def published_map(teacher_blocks: int, student_blocks: int) -> list[int]:
    """A2; the identity for equal depths, and teacher blocks repeat where the student is deeper."""
    return [max(1, teacher_blocks * k // student_blocks) - 1 for k in range(1, student_blocks + 1)]


def published_pairs(
    critical: Sequence[int], teacher_blocks: int, student_blocks: int
) -> list[Pair]:
    """A3: what serves the critical teacher blocks, by student block.

    The teacher block of a pair is A2's, so it is not the critical one where A2 leaves that out:
    the next deeper one stands in. Critical blocks that one student block serves make one pair.

    Args:
        critical: teacher blocks, in any order.
    Raises:
        InputError: a block that the teacher does not have.
    """
    if outside := [block for block in critical if not 0 <= block < teacher_blocks]:
        raise InputError(
            f"the teacher has no block {outside[0]}; give blocks from 0 to {teacher_blocks - 1}"
        )
    served_by = published_map(teacher_blocks, student_blocks)
    # A2 ends at the last block, so some k serves every critical one
    students = {next(k for k, ell in enumerate(served_by) if ell >= block) for block in critical}
    return [Pair(served_by[k], k) for k in sorted(students)]


def interpolation(teacher_blocks: int, student_blocks: int) -> list[Between]:
    """A4, the depth for every student block; a teacher of one block is that block everywhere."""
    if teacher_blocks == 1:
        return [Between(0, 0, 0.0)] * student_blocks
    found = []
    for k in range(1, student_blocks + 1):
        depth = teacher_blocks * k
        a = max(1, min(depth // student_blocks, teacher_blocks - 1))
        share = (depth - a * student_blocks) / student_blocks
        found.append(Between(a - 1, a, min(max(share, 0.0), 1.0)))
    return found


def critical(scores: Sequence[float], count: int) -> list[int]:
    """The `count` teacher blocks of highest attribution, ascending; the lower one among equals.

    Raises:
        InputError: more than there are, or none.
    """
    if not 1 <= count <= len(scores):
        raise InputError(
            f"{count} critical blocks are asked of a teacher that has {len(scores)}; give 1 to "
            f"{len(scores)}"
        )
    return strongest_blocks([float(score) for score in scores], count)


def by_attribution(scores: Sequence[float], student_blocks: int) -> list[int]:
    """The map of as many teacher blocks of highest attribution as the student has, in order.

    A teacher with fewer blocks than the student: A2, which repeats them.
    """
    if len(scores) < student_blocks:
        return published_map(len(scores), student_blocks)
    return critical(scores, student_blocks)


def order_preserving(similarity: torch.Tensor, *, strict: bool = True) -> list[int]:
    """The map in order whose pairs are the most alike in sum, by dynamic programming.

    Args:
        similarity: [L_s, L_t], any real type, on the CPU; added up in float64.
        strict:     no teacher block serves twice. Where the teacher has fewer blocks than the
                    student that cannot be, and they may repeat.
    Returns:
        of the maps with the highest sum, the one with the smallest teacher block at the first
        place where they differ.
    Raises:
        ValueError: no [L_s, L_t] of finite numbers.
    """
    if similarity.ndim != 2 or not similarity.numel() or not torch.isfinite(similarity).all():
        shape = list(similarity.shape)
        raise ValueError(f"similarity must be [L_s, L_t] of finite numbers, got {shape}")
    rows, blocks = similarity.double().tolist(), similarity.shape[1]
    step = int(strict and blocks >= len(rows))  # how far the next source is, at the least
    # best[t]: the highest sum of the student blocks from here on, with sources from t on
    best = [0.0] * (blocks + 1)
    sums: list[list[float]] = []  # of each student block, by its own source
    for row in reversed(rows):
        sums.append([score + best[t + step] for t, score in enumerate(row)])
        best = [-float("inf")] * (blocks + 1)
        for t in reversed(range(blocks)):
            best[t] = max(sums[-1][t], best[t + 1])
    found, first = [], 0
    for own in reversed(sums):
        source = max(range(first, blocks), key=lambda t: (own[t], -t))
        found.append(source)
        first = source + step
    return found
