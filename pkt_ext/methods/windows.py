# SPDX-License-Identifier: Apache-2.0
"""Scores -> windows -> low-rank factors, block by block while a teacher streams by.

Source: Zhong et al., ICLR 2024 (arXiv 2310.11451), equations S3 to S6 (see methods/seeking.py).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import contextmanager

import torch

from pkt_ext import ops
from pkt_ext.attribution.sensitivity import BlockScores, OuterScores
from pkt_ext.errors import NonFiniteError
from pkt_ext.lora import Factor
from pkt_ext.methods.pairing import Plan, Strongest
from pkt_ext.models.anatomy import Projection
from pkt_ext.streaming.meter import resident_bytes
from pkt_ext.streaming.progress import Progress
from pkt_ext.streaming.ranks import ALONE, World


class Clock:
    """Seconds and peak bytes by stage; memory is looked at when a stage ends."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak_bytes: dict[str, int] = defaultdict(int)

    @contextmanager
    def __call__(self, stage: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start
            self.peak_bytes[stage] = max(self.peak_bytes[stage], resident_bytes())


class Cutter:
    """Turns each block's scores into windows and factors, and keeps those of the best blocks.

    Args:
        plan: which part feeds which.
        tokens: int64 (teacher ids, student ids) of the vocabulary rows to use; None: all.
        clock: books "windows" and "factors".
        rank, mode, seed: of `ops.lora_factors`.
        progress: what is cut is written there, and found there again; None: in memory only.
        world: the processes that share the cutting; the first one has all of it.
    """

    def __init__(
        self,
        plan: Plan,
        tokens: tuple[torch.Tensor, torch.Tensor] | None,
        clock: Clock,
        rank: int,
        mode: str,
        seed: int,
        progress: Progress | None = None,
        world: World = ALONE,
    ):
        self.world = world
        self.plan, self.tokens, self.clock, self.progress = plan, tokens, clock, progress
        self.rank, self.mode, self.seed = rank, mode, seed
        self.strongest = Strongest(len(plan.student.blocks))
        self.totals: dict[int, float] = {}
        self._blocks: dict[int, dict[str, tuple]] = {}  # index -> role -> (B, A, window)
        self._outer: dict[str, tuple] = {}  # "embedding", "head" -> (B, A, window)

    def block(self, scores: BlockScores) -> None:
        """S3 to S6 for one teacher block; nothing is factored that cannot be among the best."""
        found = {}
        if self._offer(scores.index, scores.total):
            found = self._blocks[scores.index] = self._cut_block(scores)
        self._save(f"factors {scores.index}", found, total=scores.total)

    def restore(self, index: int) -> None:
        """Take up the block that an interrupted run has cut."""
        line = self.progress.find(f"factors {index}")
        if self._offer(index, line["total"]):
            self._blocks[index] = self._load(line)

    def restore_outer(self) -> bool:
        """Take up embedding and head; False where they have not been cut."""
        line = self.progress and self.progress.find("factors outer")
        if not all(self.world.gather(bool(line))):
            return False
        self._outer = self._load(line)
        return True

    def finish_outer(self) -> None:
        """Embedding and head are cut."""
        self._outer = self._collect(self._outer, self.plan.outer)
        self._save("factors outer", self._outer)

    def _offer(self, index: int, total: float) -> bool:
        """Whether the block is among the strongest so far; the one it displaces is forgotten."""
        self.totals[index] = total
        out = self.strongest.offer(index, total)
        self._blocks.pop(out, None)
        return out != index

    def _save(self, step: str, found: dict[str, tuple], **facts) -> None:
        if self.progress is None:
            return
        tensors = {
            f"{role}.{k}": t
            for role, (B, A, _) in found.items()
            for k, t in zip("BA", (B, A), strict=True)
        }
        self.progress.record(
            step,
            saved={"factors": self.progress.save(step.replace(" ", "-"), tensors)},
            windows={role: window for role, (_, _, window) in found.items()},
            **facts,
        )

    def _load(self, line: dict) -> dict[str, tuple]:
        tensors = self.progress.load(line["saved"]["factors"])
        return {
            role: (tensors[f"{role}.B"], tensors[f"{role}.A"], window)
            for role, window in line["windows"].items()
        }

    def _mine(self, names: Iterable[str]) -> set[str]:
        """This process's share of the names."""
        return set(list(names)[self.world.rank :: self.world.size])

    def _collect(self, found: dict[str, tuple], names: Iterable[str]) -> dict[str, tuple]:
        """What all processes have cut, in the order of the names; the others have nothing then."""
        each = self.world.gather(found)
        if not self.world.is_main:
            return {}
        every = {name: cut for cuts in each for name, cut in cuts.items()}
        return {name: every[name] for name in names}

    def _cut_block(self, scores: BlockScores) -> dict[str, tuple]:
        own = self._mine(self.plan.cuts)
        found = {
            role: self._cut(
                f"{self.plan.teacher.blocks[scores.index]}.{mine.module}",
                mine.matrix(scores.scores[f"{mine.module}.weight"]),
                mine.matrix(scores.weights[f"{mine.module}.weight"]),
                theirs.shape,
                scores.totals[f"{mine.module}.weight"] if mine.rows is None else None,
            )
            for role, (mine, theirs) in self.plan.cuts.items()
            if role in own
        }
        return self._collect(found, self.plan.cuts)

    def _cut(self, name: str, score, weight, shape, whole: float | None) -> tuple:
        """S5, S6: [n, m] score and weight -> B [n', r], A [r, m'] and the window's record."""
        with self.clock("windows"):
            window = ops.max_window(score, *shape)
            row, col, total = int(window.row), int(window.col), float(window.total)
            if whole is None:  # the total is of the fused projections together
                whole = float(score.sum(dtype=torch.float64))
        matrix = weight[row : row + shape[0], col : col + shape[1]]
        return self._factor(name, matrix, row, col, total, whole)

    def _factor(self, name: str, matrix, row: int, col: int, total: float, whole: float) -> tuple:
        with self.clock("factors"):
            # weights that no sample reaches have finite scores; in pieces: [V, D] can be most of it
            if not all(piece.isfinite().all() for piece in matrix.split(4096)):
                raise NonFiniteError(
                    f"NaN or infinity in the teacher's {name}; repair its checkpoint"
                )
            B, A, found = ops.lora_factors(
                matrix, self.rank, mode=self.mode, seed=self.seed, return_report=True
            )
            B, A = B.cpu(), A.cpu()
        return B, A, {
            "row": row,
            "col": col,
            "height": matrix.shape[0],
            "width": matrix.shape[1],
            "captured": total / whole if whole else 1.0,  # share of the matrix's whole score
            "energy": float(found.captured),  # share of the window's squared norm in B A
            "converged": bool(found.converged),
            "svd_error": float(found.error),  # estimate of B A's relative error; inf: no gap
        }  # fmt: skip

    def outer(self, scores: OuterScores) -> None:
        """The embedding or the head, [V, D]: its window slides along the hidden axis only."""
        if scores.name not in self._mine(self.plan.outer):
            return
        width = self.plan.student.hidden_size
        with self.clock("windows"):
            # equal terms in equal order: the sums of equal windows tie exactly, the first wins
            sums = scores.column_sums.unfold(0, width, 1).sum(-1)
            col = int((sums == sums.max()).nonzero()[0])
        weight = scores.weight()[:, col : col + width]
        if self.tokens is not None:
            weight = weight[self.tokens[0].to(weight.device)]
        embedding = scores.name == "embedding"
        B, A, window = self._factor(
            scores.parameter,
            weight.T if embedding else weight,
            0,
            col,
            float(sums[col]),
            scores.total,
        )
        if self.tokens is not None:  # zero rows for the student's other tokens
            known = self.tokens[1]
            full = torch.zeros(self.plan.student.vocab_size, self.rank)
            if embedding:
                A = full.index_copy(0, known, A.T).T.contiguous()
            else:
                B = full.index_copy(0, known, B)
        if embedding:  # recorded as the weight is stored, [V, D]
            window |= {"height": window["width"], "width": window["height"]}
        self._outer[scores.name] = (B, A, window)

    def result(self) -> tuple[dict[str, Factor], dict[str, dict]]:
        """(student module path -> factors, teacher weight name -> window)."""
        plan, windows, factors = self.plan, {}, {}
        for i, index in enumerate(self.strongest.ordered()):
            parts = defaultdict(list)
            for role, (B, A, window) in self._blocks[index].items():
                mine, theirs = plan.cuts[role]
                part = f"[{role}]" if mine.rows else ""
                path = f"{plan.student.blocks[i]}.{theirs.module}"
                windows[f"{plan.teacher.blocks[index]}.{mine.module}.weight{part}"] = window | {
                    "student": path + (f"[{role}]" if theirs.rows else "")
                }
                parts[theirs.module].append((theirs, B, A))
            for module, found in parts.items():
                size = sum(p.shape[0] for p in plan.student.projections[i] if p.module == module)
                factors[f"{plan.student.blocks[i]}.{module}"] = _stack(found, size)
        for name, (B, A, window) in self._outer.items():
            path = getattr(plan.student, name)
            windows[f"{getattr(plan.teacher, name)}.weight"] = window | {"student": path}
            factors[path] = Factor(A=A, B=B, embedding=name == "embedding")
        return factors, windows


def _stack(parts: list[tuple[Projection, torch.Tensor, torch.Tensor]], size: int) -> Factor:
    """One LoRA for a module: the parts' A stacked, each part's B in its own rows and columns."""
    if parts[0][0].rows is None:
        ((_, B, A),) = parts
        return Factor(A=A, B=B, embedding=False)
    A = torch.cat([a for _, _, a in parts])
    B = torch.zeros(size, len(A))
    rank = 0
    for projection, b, a in parts:
        B[projection.rows.index(), rank : rank + len(a)] = b
        rank += len(a)
    return Factor(A=A, B=B, embedding=False)
