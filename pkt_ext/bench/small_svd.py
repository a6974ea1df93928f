# SPDX-License-Identifier: Apache-2.0
"""Contests of the batched small decompositions: nothing published does them, torch is the rival."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pkt_ext.bench.contest import Contest, Contestant, Verdict, Work, input_sets
from pkt_ext.bench.data import Source
from pkt_ext.ops.small_svd import (
    batched_cholesky_inverse,
    batched_cholesky_inverse_reference,
    batched_svd,
)


@dataclass(frozen=True)
class _Batch:
    """`count` square matrices of `side` rows."""

    name: str
    count: int
    side: int
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> str:
        """The problem in words."""
        return f"{self.count} x {self.side}x{self.side}"

    def arithmetic(self, device_type: str) -> torch.dtype:
        """What the ceiling of matrix products is taken in."""
        return self.dtype

    def _contest(self, device, make_one, ours, theirs, judge, work: Work) -> Contest:
        def make(seed):
            source = Source(seed, device)
            found = [make_one(source.spectrum(self.side, self.side, "power").to(self.dtype))
                     for _ in range(self.count)]  # fmt: skip
            return (torch.stack(found),)

        sets = input_sets(make, device)
        matrices = sets[0][0]

        def check(output):
            return Verdict(judge(matrices.double(), output), 400 * torch.finfo(self.dtype).eps)

        contestants = [
            Contestant("ours", "ours", ours, check, work),
            Contestant("torch.linalg", "torch", theirs, check, work),
            Contestant("torch.bmm of the matrices", "light", lambda m: torch.bmm(m, m), work=work),
        ]
        return Contest(sets, contestants)


@dataclass(frozen=True)
class Svd(_Batch):
    """batched_svd of square matrices with singular values i^-0.3."""

    op = "batched_svd"

    def work(self) -> Work:
        """26 n^3 FLOPs (Golub, Van Loan); the matrix read, three factors written."""
        n = float(self.side)
        return Work(self.count * 26.0 * n**3, self.count * (3 * n * n + n) * self.dtype.itemsize)

    def contest(self, device: torch.device) -> Contest:
        """Make the inputs and name the contestants."""

        def judge(truth, output):
            u, s, vh = (part.double() for part in output[:3])
            eye = torch.eye(self.side, dtype=u.dtype, device=u.device)
            return max(
                float((u * s[:, None, :] @ vh - truth).norm() / truth.norm()),
                float((u.mT @ u - eye).abs().max()),
                float((vh @ vh.mT - eye).abs().max()),
            )

        def theirs(m):
            return torch.linalg.svd(m, full_matrices=False)

        return self._contest(device, lambda one: one, batched_svd, theirs, judge, self.work())


@dataclass(frozen=True)
class CholeskyInverse(_Batch):
    """batched_cholesky_inverse of Gram matrices with condition 10^3 or so."""

    dtype: torch.dtype = torch.float64

    op = "batched_cholesky_inverse"

    def work(self) -> Work:
        """n^3 / 3 FLOPs for the factor and as many for its inverse; three matrices moved."""
        n = float(self.side)
        return Work(self.count * 2 * n**3 / 3, self.count * 3 * n * n * self.dtype.itemsize)

    def contest(self, device: torch.device) -> Contest:
        """Make the inputs and name the contestants."""

        def judge(truth, output):
            lower, inverse = output[0], output[1]
            eye = torch.eye(self.side, dtype=lower.dtype, device=lower.device)
            return max(
                float((lower @ lower.mT - truth).norm() / truth.norm()),
                float((inverse @ lower - eye).abs().max()),
            )

        ours, theirs = batched_cholesky_inverse, batched_cholesky_inverse_reference
        return self._contest(device, lambda a: a @ a.mT, ours, theirs, judge, self.work())
