# SPDX-License-Identifier: Apache-2.0
"""Leading singular triplets by block Golub-Kahan-Lanczos.

With full reorthogonalisation and thick restarts: orthonormal bases of the block Krylov spaces of
A^T A and A A^T grow by one block a step, A's projection onto them (`core`) is known exactly, and
the part of A^T that leaves the bases gives every Ritz triplet's residual without another pass. A
step costs two products with A; nothing ever copies A.

When to stop. ||residual|| / (sigma_i - sigma_{r+1}), weighted by sigma_i, bounds the error of the
product U S Vh, but measured 20 to 150 times over it, because residuals point at singular vectors
far below the cut. So the bound only has to fall under 1/4, which rules out that a vector is missing
or swapped, and the error is then read off how far the last step moved the product.

How wide a block. Narrow blocks need fewer columns in all, but a block of b columns finds a singular
value of any multiplicity b times only, and takes a cluster tighter than its polynomials resolve for
one value. So wherever b wanted Ritz values lie within `_SPREAD` of each other the block widens by
random rows, which then get as many steps as the first ones had. A block wider than the rank cannot
miss a wanted value.

Source: Golub, Luk, Overton, ACM TOMS 1981 (block bidiagonalisation); Baglama, Reichel, SISC 2005
(restarts); Musco, Musco, NeurIPS 2015 (block Krylov needs few steps whatever the gap).
"""

import math
from dataclasses import dataclass

import torch

from pkt_ext.ops._thin_products import project_out, thin_products

_BASIS = 1024  # basis vectors before a restart: more make orthogonalisation outweigh the passes
_GAP = 1e-4  # below this share of sigma_r the r-th subspace is not told apart from the next
_SEPARATED = 0.25  # a residual bound under this leaves no doubt which triplets are the leading ones
_SPREAD = 0.05  # as many Ritz values as a block has columns, this close: there may be more of them


@dataclass(frozen=True)
class Found:
    u: torch.Tensor  # [M, R]
    s: torch.Tensor  # [R]
    vh: torch.Tensor  # [R, N]
    error: float
    passes: int


@dataclass(frozen=True)
class Plan:
    """How many columns a block starts with, and how it goes on; multiples of 8."""

    width: int
    widest: int
    steps: int | None = None  # fixed but for clusters, instead of iterating to the tolerance


def lanczos(matrix, rank, plan, tol, seed, threads) -> Found | None:
    """Top triplets (see the module's docstring), or None once that has cost as much as the full
    SVD. Runs on one thread but for products."""
    flipped = matrix.shape[0] < matrix.shape[1]  # start on the shorter side: no null space there
    apply, adjoint = thin_products(matrix.T if flipped else matrix, threads)
    n, m = sorted(matrix.shape)
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    like = {"dtype": dtype, "device": matrix.device}
    generator = torch.Generator().manual_seed(seed)

    def random(count):
        return torch.randn(count, n, generator=generator, dtype=dtype).to(matrix.device)

    width = plan.width
    most = 3 * plan.steps * width if plan.steps else max(_BASIS, 4 * plan.widest)
    capacity = min(most, n - 2 * plan.widest)
    left = torch.empty(capacity, m, **like)  # rows are basis vectors, as in `right`
    right = torch.empty(capacity + plan.widest, n, **like)
    core = torch.empty(capacity, len(right), dtype=torch.float64, device=matrix.device)

    right[:width] = _orthonormalise(random(width), right[:0], generator, threads)[0]
    size = steps = columns = checked = 0
    moved, next_check = 0.0, plan.steps or rank // width + 2
    while True:
        if size + width > capacity:
            size, checked = _restart(left, right, core, size, rank, width), 0
        here, after = slice(size, size + width), slice(size + width, size + 2 * width)
        image = apply(right[here])
        if steps == 0 and not image.isfinite().all():
            raise not_finite(matrix)
        left[here], coupling, factor = _orthonormalise(image, left[:size], generator, threads)
        core[:size, here], core[here, :size], core[here, here] = coupling.T, 0.0, factor.T
        image = adjoint(left[here])
        right[after], _, factor = _orthonormalise(image, right[: after.start], generator, threads)
        core[:size, after], core[here, after] = 0.0, factor
        size, steps, columns = after.start, steps + 1, columns + width

        if steps < next_check:
            continue
        ritz = _assess(core[:size, : size + width], width, rank, 4 * torch.finfo(dtype).eps)
        fall = 0.7
        if checked and moved:
            fall = min(0.99, max(0.01, (ritz.moved / moved) ** (1 / (steps - checked))))
        error = ritz.error(fall)
        missing = width < plan.widest and ritz.clustered(width)
        done = plan.steps or ritz.settled or error <= tol
        if not missing and (done or (math.isinf(error) and ritz.residual <= tol)):
            break
        if columns >= n:
            return None
        if missing:
            extra = min(width, plan.widest - width)
            more = slice(after.stop, after.stop + extra)
            fresh = _orthonormalise(random(extra), right[: more.start], generator, threads)[0]
            right[more], core[:size, more] = fresh, 0.0
            width, checked, next_check = width + extra, 0, 2 * steps
            continue
        wait = steps // 4
        if ritz.bound < 1.0:  # from here on both fall by a steady factor
            excess = max(ritz.moved * fall / tol, ritz.bound / _SEPARATED, 1.0)
            wait = min(int(0.8 * math.log(excess) / -math.log(fall)), steps // 2)
        moved, checked, next_check = ritz.moved, steps, steps + max(1, wait)

    on_left, s, on_right = (part.to(dtype) for part in ritz.triplets)
    left, right = left[:size], right[: size + width]
    if flipped:
        return Found(right.T @ on_right, s, on_left.T @ left, error, 2 * steps)
    return Found(left.T @ on_left, s, on_right.T @ right, error, 2 * steps)


def bound(sigma: torch.Tensor, residual: torch.Tensor, precision: float) -> float:
    """First-order bound of the product's relative error; infinite without a gap.

    sigma: [R + 1] descending (or [R] where there is no next), residual: [R], both float64.
    """
    rank = len(residual)
    floor = precision * float(sigma[0])
    top, following = sigma[:rank], float(sigma[rank]) if len(sigma) > rank else 0.0
    live = top > floor  # the others are rounding: they add nothing to the product
    if not live.any():
        return 0.0
    gap = top - following
    if live[-1] and float(gap[-1]) < _GAP * float(top[-1]):
        return math.inf
    return float((top * residual.clamp(min=floor) / gap)[live].norm() / top.norm())


@dataclass(frozen=True)
class Ritz:
    """What the core knows of the leading triplets."""

    triplets: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # on the bases: [K, R], [R], [K', R]
    moved: float  # how far the last step moved the product, relative to it
    bound: float  # of the relative error of the product a step ago, from its residuals
    noise: float  # of what rounding alone does to the product
    residual: float  # the largest, in units of sigma_r
    floor: float  # values below it are rounding
    settled: bool  # no residual stands above rounding

    def error(self, fall: float) -> float:
        """The product's relative error, `fall` being the factor by which a step reduces it.

        A step's move is nearly orthogonal to the error it leaves (the bases are nested), so a move
        of d leaves d fall / sqrt(1 - fall^2): doubled, for caution.
        """
        left = self.moved * 2 * fall / math.sqrt(1 - fall**2)
        return max(left, self.noise) if self.bound <= _SEPARATED else max(left, self.bound)

    def clustered(self, count: int) -> bool:
        """Do `count` successive wanted values, rounding aside, lie within `_SPREAD`?"""
        s = self.triplets[1].cpu()
        if count > len(s):
            return False
        first, last = s[: len(s) - count + 1], s[count - 1 :]
        return bool(((last > (1 - _SPREAD) * first) & (last > self.floor)).any())


def _assess(core: torch.Tensor, block: int, rank: int, precision: float) -> Ritz:
    """Compare the triplets of core [K, K + b] with those of a step ago, core[:-b, :-b]."""
    earlier = len(core) - block
    x, sigma, y = _triplets(core[:earlier, :-block], rank + 1)
    residual = (core[earlier:, earlier:-block] @ y[-block:, :rank]).norm(dim=0).cpu()
    on_left, s, on_right = _triplets(core, rank)
    change = (on_left * s) @ on_right.T
    change[:earlier, :-block] -= (x[:, :rank] * sigma[:rank]) @ y[:, :rank].T
    sigma = sigma.cpu()
    worst, smallest = float(residual.max()), float(sigma[rank - 1])
    return Ritz(
        triplets=(on_left, s, on_right),
        moved=float(change.norm()) / max(float(s.norm()), torch.finfo(s.dtype).tiny),
        bound=bound(sigma, residual, precision),
        noise=bound(sigma, torch.zeros_like(residual), precision),
        residual=worst / smallest if smallest else 0.0,
        floor=precision * float(sigma[0]),
        settled=worst <= precision * float(sigma[0]),
    )


def _triplets(core: torch.Tensor, count: int):
    """Leading singular triplets of the core, both sides orthonormal even where values are zero."""
    vectors = torch.linalg.eigh(core @ core.T).eigenvectors.flip(1)[:, :count]
    q, r = torch.linalg.qr(core.T @ vectors)
    x, s, zh = torch.linalg.svd(r.T)
    return vectors @ x, s, q @ zh.T


def _restart(left, right, core, size, rank, block) -> int:
    """Keep the best Ritz triplets and the next block; returns the bases' new size."""
    kept = rank + block // 2
    on_left, s, on_right = _triplets(core[:size, :size], kept)
    left[:kept] = on_left.T.to(left.dtype) @ left[:size]
    following = right[size : size + block].clone()
    right[:kept] = on_right.T.to(right.dtype) @ right[:size]
    right[kept : kept + block] = following
    core[:kept, :kept] = s.diag()
    return kept


def _orthonormalise(rows, basis, generator, threads):
    """Split rows [b, n] = coefficients basis + factor q, q's rows orthonormal and off the basis.

    Gram-Schmidt and CholeskyQR with a float64 Gram matrix, both twice. Directions that vanish to
    rounding get a zero column in `factor` and a random row in q, so blocks keep their width.
    """
    coefficients = factor = None
    for first in (True, False):
        part = project_out(rows, basis, threads)
        part, wide = part.double(), rows.double()
        gram = wide @ wide.T
        lower, failed = torch.linalg.cholesky_ex(gram)
        if first:  # rounding of the rows as they came: Pythagoras gives their norms
            longest = float((part.square().sum(1) + gram.diagonal()).max().sqrt())
            noise = 8 * torch.finfo(rows.dtype).eps * longest
        if first and (failed or float(lower.diagonal().min()) <= noise):
            rows, lower = _fill(rows, gram, noise, generator)
        else:
            inverse = torch.linalg.solve_triangular(
                lower, torch.eye(len(lower), dtype=lower.dtype, device=lower.device), upper=False
            )
            rows = inverse.to(rows.dtype) @ rows
        coefficients = part if first else coefficients + factor @ part
        factor = lower if first else factor @ lower
    return rows, coefficients, factor


def _fill(rows, gram, noise, generator):
    """`_orthonormalise`'s first round where rows depend on each other."""
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    kept = values > noise**2
    root = torch.where(kept, values, 0.0).sqrt()
    scaled = torch.where(kept, vectors / root.clamp(min=1e-300), 0.0).T.to(rows.dtype)
    random = torch.randn(rows.shape, generator=generator, dtype=rows.dtype).to(rows.device)
    random /= math.sqrt(rows.shape[1])
    return torch.where(kept[:, None], scaled @ rows, random), vectors * root


def not_finite(matrix: torch.Tensor) -> ValueError:
    bad = (~matrix.isfinite()).nonzero()
    if len(bad):
        return ValueError(f"matrix: NaN or infinity at {bad[0].tolist()}; repair the weights first")
    return ValueError("matrix: its products overflow float32; scale it down, or pass float64")
