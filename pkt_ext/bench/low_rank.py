# SPDX-License-Identifier: Apache-2.0
"""Contests of lora_factors."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from pkt_ext.bench.contest import Contest, Contestant, Estimate, Verdict, Work
from pkt_ext.bench.data import Source
from pkt_ext.ops import lora_factors
from pkt_ext.ops._thin_products import on_threads

_OFFSET = 517  # the column a window starts at: odd, as most are


@dataclass(frozen=True)
class LowRank:
    """lora_factors of a window [rows, cols] within rows of `stride` elements, `count` at once."""

    name: str
    rows: int
    cols: int
    rank: int
    spectrum: str
    stride: int = 0  # 0: the matrix by itself
    count: int = 1
    dtype: torch.dtype = torch.bfloat16
    shrink: int = 2  # the published full SVD runs on sides so much shorter; 1: on the real ones

    op = "lora_factors"

    @property
    def shape(self) -> str:
        """The problem in words."""
        batch = f"{self.count} x " if self.count > 1 else ""
        view = ", a view" if self.stride else ""
        return f"{batch}{self.rows}x{self.cols}, rank {self.rank}, {self.spectrum}{view}"

    def arithmetic(self, device_type: str) -> torch.dtype:
        """What products are computed in: float32 on a CPU, slices of 16 bits on a GPU."""
        return torch.float32 if device_type == "cpu" else self.dtype

    def work(self, passes: int, device_type: str = "cpu", columns: int = 0) -> Work:
        """`passes` products with `columns` columns (else the rank's), the matrix read in each.

        16-bit arithmetic needs three slices of the thin factor to be as exact as float32's.
        """
        count = float(self.count * self.rows * self.cols) * passes
        slices = 3 if self.arithmetic(device_type).itemsize == 2 else 1
        flops = 2.0 * count * (columns or self.rank) * slices
        return Work(flops, count * self.dtype.itemsize)

    def energy(self, device_type: str) -> float:
        """What fast mode must capture of the energy that rank r can.

        Its 18 passes on a CPU take 0.9997 and more of every spectrum here but noise (0.956), which
        has nothing to tell apart; a GPU's 8 passes are unmeasured.
        """
        if self.spectrum == "flat":
            return 0.95
        return 0.999 if device_type == "cpu" else 0.997

    def _exact(self, judge: _Judge) -> Callable[[object], Verdict]:
        """The best product, or where there is none to agree on its energy."""
        flat = self.spectrum == "flat"
        return (lambda out: judge.energy(out, 0.999)) if flat else judge.converged

    def contest(self, device: torch.device) -> Contest:
        """Make the inputs and name the contestants."""

        source = Source(0, device)
        stride = self.stride or self.cols
        first = _OFFSET if self.stride else 0
        wide = source.normal(self.count, self.rows, stride).to(self.dtype)
        matrix = wide[:, :, first : first + self.cols]
        for one in matrix:
            one.copy_(source.spectrum(self.rows, self.cols, self.spectrum))
        judge = _Judge(matrix[-1], self.rank)
        least = self.energy(device.type)
        passes = {}
        for mode in ("converged", "fast"):
            report = lora_factors(matrix, self.rank, mode=mode, return_report=True)[2]
            passes[mode] = int(report.passes.double().mean())
        contestants = [
            Contestant(
                f"ours{', fast' if mode == 'fast' else ''}",
                "ours",
                lambda m, mode=mode: lora_factors(m, self.rank, mode=mode),
                (lambda out: judge.energy(out, least)) if mode == "fast" else self._exact(judge),
                self.work(passes[mode], device.type),
            )
            for mode in passes
        ]
        contestants += [self._published(device)]
        for width, steps, kept in ((self.rank, 2, 0.75), (self.rank + 8, 4, 0.85)):
            contestants.append(
                Contestant(
                    f"svd_lowrank(q={width}, niter={steps})",
                    "torch",
                    lambda m, width=width, steps=steps: self._randomised(m, width, steps),
                    lambda out, kept=kept: judge.energy(out, kept),
                    self.work(2 + 2 * steps, columns=width),  # in float32 everywhere
                    arithmetic=torch.float32,
                )
            )
        contestants += self._arpack(judge) if device.type == "cpu" else []
        # aligned and in the kernels' arithmetic, with as many columns as they need
        arithmetic = self.arithmetic(device.type)
        wide = matrix.to(arithmetic).contiguous()
        columns = 16 * -(-self.rank // 16) * (3 if arithmetic.itemsize == 2 else 1)
        thin, tall = (
            Source(1, device).normal(n, columns).to(arithmetic) for n in (self.cols, self.rows)
        )

        def products(_):
            for one in wide:
                for _ in range(passes["converged"] // 2):
                    torch.mm(one, thin)
                    torch.mm(one.T, tall)

        contestants.append(
            Contestant(
                "its products alone, by torch.mm",
                "light",
                products,
                work=self.work(passes["converged"], device.type),
            )
        )
        return Contest([(matrix,)], contestants)  # each call reads it many times: no rotation

    def _published(self, device: torch.device) -> Contestant:
        """A full SVD with square factors; cubic growth takes it from a smaller matrix to all."""
        rows, cols = self.rows // self.shrink, self.cols // self.shrink
        small = Source(2, device).spectrum(rows, cols, self.spectrum)
        rank = min(self.rank, rows, cols)

        def call(*_):
            start = time.perf_counter()
            u, s, vh = torch.linalg.svd(small, full_matrices=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = (time.perf_counter() - start) * self.count * self.shrink**3
            return Estimate(seconds, [(u[:, :rank] * s[:rank], vh[:rank])])

        scaled = f", times {self.shrink**3}" if self.shrink > 1 else ""
        several = f", times {self.count}" if self.count > 1 else ""
        return Contestant(
            "published: full SVD",
            "published",
            call,
            lambda out: _Judge(small, rank).energy(out, 0.9999),
            part=f"one of {rows}x{cols}{scaled}{several}",
        )

    def _randomised(self, matrix: torch.Tensor, width: int, steps: int) -> list[tuple]:
        factors = []
        for one in matrix:
            left, sigma, right = torch.svd_lowrank(one.float(), width, steps)
            factors.append((left[:, : self.rank] * sigma[: self.rank], right[:, : self.rank].T))
        return factors

    def _arpack(self, judge: _Judge) -> list[Contestant]:
        try:
            from scipy.sparse.linalg import svds
        except ImportError:
            return []

        def call(matrix):
            factors = []
            for one in matrix:
                left, sigma, right = svds(one.float().numpy(), k=self.rank)
                factors.append((torch.from_numpy(left * sigma), torch.from_numpy(right)))
            return factors

        # tol=0, its default: nobody asks it for 1e-3 of the product
        name = "ARPACK (svds), machine precision"
        return [Contestant(name, "other", call, self._exact(judge))]


class _Judge:
    """Compares factors with the leading singular triplets in float64 of one matrix."""

    def __init__(self, matrix: torch.Tensor, rank: int):
        self._matrix, self._rank = matrix, rank

    @cached_property
    def _truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        u, s, vh = leading_triplets(self._matrix, self._rank)
        return u * s, vh

    def converged(self, output) -> Verdict:
        """The product is the best one to 1e-3."""
        error, energy = self._measure(output)
        return Verdict(error, 1e-3, f"{energy:.4f} of the energy, product off by {error:.0e}")

    def energy(self, output, least: float) -> Verdict:
        """The factors capture at least this share of the energy that rank r can."""
        error, energy = self._measure(output)
        note = f"{energy:.4f} of the energy, product off by {error:.0e}"
        return Verdict(1.0 - energy, 1.0 - least, note)

    def _measure(self, output) -> tuple[float, float]:
        """(relative error of the product, its share of the energy one can capture)."""
        if isinstance(output, tuple):  # B [count, M, R], A [count, R, N]
            output = list(zip(*output, strict=True))
        b, a = (factor.double() for factor in output[-1])
        best_b, best_a = self._truth
        optimal = _inner(best_b, best_a, best_b, best_a)
        norm = _inner(b, a, b, a)
        apart = norm + optimal - 2.0 * _inner(b, a, best_b, best_a)
        captured = 0.0
        for start in range(0, len(self._matrix), 1024):
            rows = self._matrix[start : start + 1024].double()
            captured += float(((rows @ a.T) * b[start : start + 1024]).sum())
        return (max(apart, 0.0) / optimal) ** 0.5, captured**2 / norm / optimal


def _inner(b, a, d, c) -> float:
    """<b a, d c> without forming either product."""
    return float(((b.T @ d) * (a @ c.T)).sum())


def leading_triplets(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, ...]:
    """(U [M, R], S [R], Vh [R, N]) in float64, by block Krylov iteration until they stand still.

    Plain on purpose: every basis vector is kept and orthogonalised by Householder QR. Up to 512 on
    the shorter side it is the full SVD. A spectrum on which 1536 vectors do not suffice has no
    product to agree on, but its energy is known by then.
    """
    wide = matrix.double()
    if min(wide.shape) <= 512:
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    generator = torch.Generator(wide.device).manual_seed(7)
    qr, eigh = (on_threads(1)(f) for f in (torch.linalg.qr, torch.linalg.eigh))
    block = torch.randn(
        wide.shape[1], rank + 32, generator=generator, dtype=wide.dtype, device=wide.device
    )
    basis = qr(block).Q
    image = wide @ basis
    before = None
    while basis.shape[1] < min(*wide.shape, 1536):
        block = wide.T @ image[:, -block.shape[1] :]
        for _ in range(2):
            block = qr(block - basis @ (basis.T @ block)).Q
        basis = torch.cat([basis, block], 1)
        image = torch.cat([image, wide @ block], 1)
        values, vectors = eigh(image.T @ image)
        turned = vectors.flip(1)[:, :rank]
        s = values.flip(0)[:rank].clamp(min=0).sqrt()
        u, v = image @ turned / s, basis @ turned
        if before is not None:
            moved = _inner(*before, *before) + _inner(u * s, v.T, u * s, v.T)
            moved -= 2.0 * _inner(*before, u * s, v.T)
            if moved <= 1e-12 * float(s.square().sum()):
                break
        before = (u * s, v.T)
    return u, s, v.T
