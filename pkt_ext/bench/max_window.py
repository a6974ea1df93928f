# SPDX-License-Identifier: Apache-2.0
"""Contests of max_window."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from pkt_ext.bench.contest import Contest, Contestant, Estimate, Verdict, Work, input_sets
from pkt_ext.bench.data import Source
from pkt_ext.ops import max_window, max_window_reference

_POSITIONS = 5_000  # that the published loop is timed on


@dataclass(frozen=True)
class Window:
    """max_window of height x width in a score [rows, cols]."""

    name: str
    rows: int
    cols: int
    height: int
    width: int

    op = "max_window"
    dtype = torch.float32

    @property
    def shape(self) -> str:
        """The problem in words."""
        return f"{self.rows}x{self.cols} -> {self.height}x{self.width}"

    @property
    def positions(self) -> int:
        """Where a window can start."""
        return (self.rows - self.height + 1) * (self.cols - self.width + 1)

    def arithmetic(self, device_type: str) -> torch.dtype:
        """What the ceiling of matrix products is taken in."""
        return self.dtype

    def work(self) -> Work:
        """The score read once; each element added once, two sums a position to slide there."""
        count = self.rows * self.cols
        return Work(count + 2.0 * self.positions, 4.0 * count)

    def contest(self, device: torch.device) -> Contest:
        """Make the inputs and name the contestants."""
        size = self.height, self.width
        sets = input_sets(lambda seed: (Source(seed, device).score(self.rows, self.cols),), device)
        score = sets[0][0]
        host = score.cpu()
        best = max_window_reference(score, *size)

        def check(allowed):
            def judge(found):
                return Verdict(self._apart(found, score, float(best.total)), allowed)

            return judge

        work = self.work()
        looped = min(self.positions, _POSITIONS)
        contestants = [
            Contestant("ours", "ours", lambda s: max_window(s, *size), check(1e-12), work),
            Contestant(
                "published: a Python loop",
                "published",
                lambda *_: published_search(host, *size),
                lambda _: _check_published(host),
                work,
                part=f"on the CPU, {looped:,} of {self.positions:,} positions",
            ),
            Contestant(
                "sliding difference, float64",
                "torch",
                lambda s: max_window_reference(s, *size),
                check(1e-12),
                work,
            ),
            Contestant("reading the score once", "light", lambda s: s.sum(), work=work),
        ]
        return Contest(sets, contestants)

    def _apart(self, found, score: torch.Tensor, best: float) -> float:
        """How far the stated sum is from its window's, and that from the best one, of the best."""
        row, col = int(found[0]), int(found[1])
        if not (0 <= row <= self.rows - self.height and 0 <= col <= self.cols - self.width):
            return float("inf")
        window = score[row : row + self.height, col : col + self.width]
        truth = float(window.sum(dtype=torch.float64))
        return max(abs(float(found[2]) - truth), best - truth) / best


def published_search(
    score: torch.Tensor, height: int, width: int, most: int = _POSITIONS
) -> Estimate:
    """As published: a float32 summed-area table, then a Python step a position.

    Whole rows of positions until `most` are done; the seconds are those of all positions.
    """
    rows, cols = score.shape
    start = time.perf_counter()
    table = torch.zeros(rows + 1, cols + 1)
    table[1:, 1:] = score.cumsum(0).cumsum(1)
    built = time.perf_counter()
    best, place, done = torch.tensor(-1.0), (0, 0), 0
    for i in range(rows - height + 1):
        for j in range(cols - width + 1):
            total = table[i + height, j + width] - table[i, j + width]
            total = total - table[i + height, j] + table[i, j]
            if total > best:
                best, place = total, (i, j)
            done += 1
        if done >= most:
            break
    loop = time.perf_counter() - built
    positions = (rows - height + 1) * (cols - width + 1)
    return Estimate(built - start + loop * positions / done, (*place, best))


def _check_published(score: torch.Tensor) -> Verdict:
    """The loop, to its end, on a corner: float32 tables cost it some digits (BASELINES 2)."""
    corner = score[:64, :48].contiguous()
    case = Window("", *corner.shape, max(1, len(corner) * 3 // 4), max(1, corner.shape[1] * 3 // 4))
    found = published_search(corner, case.height, case.width).output
    best = max_window_reference(corner, case.height, case.width)
    return Verdict(case._apart(found, corner, float(best.total)), 1e-6)
