# SPDX-License-Identifier: Apache-2.0
"""Leading singular triplets by block Golub-Kahan-Lanczos.

With full reorthogonalisation and thick restarts: orthonormal bases of the block Krylov spaces of
A^T A and A A^T grow by one block a step, A's projection onto them (`core`) is known exactly, and
the part of A^T that leaves the bases gives every Ritz triplet's residual without another pass. A
step costs two products with A; nothing ever copies A.

When to stop. ||residual|| / (sigma_i - sigma_{r+1}), weighted by sigma_i, bounds the error of the
product U S Vh, but measured 20 to 150 times over it, because residuals point at singular vectors
far below the cut. So each triplet's ||residual|| / (sigma_i - sigma_{r+1}) only has to fall under
1/4, which rules out that a vector is missing or swapped; those over it count as errors. What the
others leave is read off how far the last step moved the product.

How wide a block. Narrow blocks need fewer columns in all, but a block of b columns finds a singular
value of any multiplicity b times only, and takes a cluster tighter than its polynomials resolve for
one value. So wherever b wanted Ritz values lie within `_SPREAD` of each other the block widens by
random rows, which then get as many steps as the first ones had. A block wider than the rank cannot
miss a wanted value.

Many matrices of one shape go together, for a GPU's sake: every array has a batch dimension, the
host waits for the device once a check and once an orthogonalisation, not once a matrix, and those
that have converged leave the batch. Products with A go through one matrix after another.

Source: Golub, Luk, Overton, ACM TOMS 1981 (block bidiagonalisation); Baglama, Reichel, SISC 2005
(restarts); Musco, Musco, NeurIPS 2015 (block Krylov needs few steps whatever the gap).
"""

import math
from dataclasses import dataclass

import torch

from pkt_ext.ops._thin_products import project_out, thin_products
from pkt_ext.ops.small_svd import batched_cholesky_inverse, batched_svd, batched_svd_fits

_BASIS = 1024  # basis vectors before a restart: more make orthogonalisation outweigh the passes
_GAP = 1e-4  # below this share of sigma_r the r-th subspace is not told apart from the next
_SEPARATED = 0.25  # residual over gap below which there is no doubt which triplet this is
_SPREAD = 0.01  # as many Ritz values as a block has columns, this close: there may be more of them


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


class _Bases:
    """Orthonormal bases of the matrices still at work, and A's projection onto them."""

    def __init__(self, batch: int, shape: tuple[int, int], capacity: int, widest: int, like: dict):
        n, m = shape
        self.capacity = capacity
        self.members = list(range(batch))  # what each place of the batch belongs to
        self.left = torch.empty(batch, capacity, m, **like)  # rows are basis vectors
        self.right = torch.empty(batch, capacity + widest, n, **like)
        wide = like | {"dtype": torch.float64}
        self.core = torch.empty(batch, capacity, capacity + widest, **wide)

    def keep(self, places: list[int], used: int) -> None:
        """Drop all but these places of the batch; `used` rows of the right basis matter."""
        if len(places) == len(self.members):
            return
        self.members = [self.members[place] for place in places]
        kept = torch.tensor(places, device=self.left.device)
        for name in ("left", "right", "core"):
            whole = getattr(self, name)
            smaller = whole.new_empty(len(places), *whole.shape[1:])
            smaller[:, :used] = whole[kept, :used]
            setattr(self, name, smaller)


def lanczos(matrices, rank, plan, tol, seed, threads) -> list[Found | None]:
    """Top triplets (see the module's docstring) of each matrix, all of one shape, dtype and device,
    or None once they have cost as much as the full SVD. Runs on one thread but for products."""
    shape, device = matrices[0].shape, matrices[0].device
    flipped = shape[0] < shape[1]  # start on the shorter side: no null space there
    products = [thin_products(one.T if flipped else one, threads) for one in matrices]
    n, m = sorted(shape)
    dtype = torch.float64 if matrices[0].dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(seed)

    def random(count):  # the same rows for all
        rows = torch.randn(count, n, generator=generator, dtype=dtype).to(device)
        return rows.repeat(len(bases.members), 1, 1)

    def multiply(direction, rows):
        found = [
            products[member][direction](one)
            for member, one in zip(bases.members, rows, strict=True)
        ]
        return torch.stack(found) if len(found) > 1 else found[0][None]

    width = plan.width
    capacity = min(_columns(plan), n - 2 * plan.widest)
    bases = _Bases(len(matrices), (n, m), capacity, plan.widest, {"dtype": dtype, "device": device})
    results: list[Found | None] = [None] * len(matrices)
    bases.right[:, :width] = _orthonormalise(random(width), None, generator, threads)[0]
    size = steps = columns = checked = 0
    moved, next_check = [0.0] * len(matrices), plan.steps or rank // width + 2
    while True:
        if size + width > capacity:
            size, checked = _restart(bases, size, rank, width), 0
        left, right, core = bases.left, bases.right, bases.core
        here, after = slice(size, size + width), slice(size + width, size + 2 * width)
        image = multiply(0, right[:, here])
        if steps == 0 and not (finite := image.isfinite().flatten(1).all(1)).all():
            raise not_finite(matrices[int(finite.byte().argmin())])
        left[:, here], coupling, factor = _orthonormalise(image, left[:, :size], generator, threads)
        core[:, :size, here], core[:, here, :size] = coupling.mT, 0.0
        core[:, here, here] = factor.mT
        image = multiply(1, left[:, here])
        known = right[:, : after.start]
        right[:, after], _, factor = _orthonormalise(image, known, generator, threads)
        core[:, :size, after], core[:, here, after] = 0.0, factor
        size, steps, columns = after.start, steps + 1, columns + width

        if steps < next_check:
            continue
        precision = 4 * torch.finfo(dtype).eps
        triplets, assessed = _assess(core[:, :size, : size + width], width, rank, precision)
        remaining, waits, missing = [], [], False
        for place, (member, ritz) in enumerate(zip(bases.members, assessed, strict=True)):
            fall = 0.7
            if checked and moved[member]:
                fall = (ritz.moved / moved[member]) ** (1 / (steps - checked))
                fall = min(0.99, max(0.01, fall))
            error = ritz.error(fall)
            clustered = width < plan.widest and ritz.clustered(width)
            done = plan.steps or ritz.settled or error <= tol
            if not clustered and (done or (math.isinf(error) and ritz.residual <= tol)):
                on_left, s, on_right = (part[place].to(dtype) for part in triplets)
                u, v = left[place, :size].T @ on_left, right[place, : size + width].T @ on_right
                u, v = (v, u) if flipped else (u, v)
                results[member] = Found(u, s, v.T, error, 2 * steps)
                continue
            wait = steps // 4
            if ritz.bound < 1.0:  # from here on both fall by a steady factor
                excess = max(ritz.moved * fall / tol, ritz.bound / _SEPARATED, 1.0)
                wait = min(int(0.5 * math.log(excess) / -math.log(fall)), steps // 2)
            moved[member] = ritz.moved
            remaining.append(place)
            waits.append(max(1, wait))
            missing |= clustered
        if not remaining or columns >= n:
            return results
        bases.keep(remaining, size + width)
        checked, next_check = steps, steps + min(*waits, -(-(n - columns) // width))
        if missing:
            extra = min(width, plan.widest - width)
            more = slice(after.stop, after.stop + extra)
            known = bases.right[:, : more.start]
            bases.right[:, more] = _orthonormalise(random(extra), known, generator, threads)[0]
            bases.core[:, :size, more] = 0.0
            width, checked, next_check = width + extra, 0, 2 * steps


def _columns(plan: Plan) -> int:
    """Columns the bases may have."""
    if plan.steps:  # clusters take up to three times as many
        return (1 if plan.width == plan.widest else 3) * plan.steps * plan.width
    return max(_BASIS, 4 * plan.widest)


def bytes_needed(shape: tuple[int, int], plan: Plan, itemsize: int) -> int:
    """Memory for the bases and the core of one matrix."""
    columns = min(_columns(plan), min(shape)) + plan.widest
    return columns * (sum(shape) * itemsize + 8 * columns)


def bound(sigma, residual, precision: float, beyond: float = 0.0) -> float:
    """First-order bound of the product's relative error, of those triplets whose residual is over
    `beyond` times their gap; infinite without a gap.

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
    angle = residual.clamp(min=floor) / gap
    return float((top * angle)[live & (angle > beyond)].norm() / top.norm())


@dataclass(frozen=True)
class Ritz:
    """What the core knows of the leading triplets."""

    values: torch.Tensor  # [R] float64
    moved: float  # how far the last step moved the product, relative to it
    bound: float  # of the relative error of the product a step ago, from its residuals
    doubt: float  # the same, of triplets that may not be the leading ones
    noise: float  # of what rounding alone does to the product
    residual: float  # the largest, in units of sigma_r
    floor: float  # values below it are rounding
    settled: bool  # no residual stands above rounding

    def error(self, fall: float) -> float:
        """The product's relative error, `fall` being the factor by which a step reduces it.

        A step's move is nearly orthogonal to the error it leaves (the bases are nested), so a move
        of d leaves d fall / sqrt(1 - fall^2): tripled, for caution.
        """
        return max(self.moved * 3 * fall / math.sqrt(1 - fall**2), self.doubt, self.noise)

    def clustered(self, count: int) -> bool:
        """Do `count` successive wanted values, rounding aside, lie within `_SPREAD`?"""
        s = self.values
        if count > len(s):
            return False
        first, last = s[: len(s) - count + 1], s[count - 1 :]
        return bool(((last > (1 - _SPREAD) * first) & (last > self.floor)).any())


def _assess(core: torch.Tensor, block: int, rank: int, precision: float):
    """Each core's [B, K, K + b] leading triplets, batched, and what to think of them: they are
    compared with those of a step ago, core[:, :-b, :-b]."""
    earlier = core.shape[1] - block
    x, sigma, y = _triplets(core[:, :earlier, :-block], rank + 1)
    residual = (core[:, earlier:, earlier:-block] @ y[:, -block:, :rank]).norm(dim=1)
    on_left, s, on_right = _triplets(core, rank)
    change = (on_left * s[:, None]) @ on_right.mT
    change[:, :earlier, :-block] -= (x[..., :rank] * sigma[:, None, :rank]) @ y[..., :rank].mT
    facts = torch.cat([change.flatten(1).norm(dim=1, keepdim=True), s, residual, sigma], 1).cpu()
    assessed = [
        _judge(float(one[0]), *one[1:].split([rank, rank, sigma.shape[1]]), precision)
        for one in facts
    ]
    return (on_left, s, on_right), assessed


def _judge(change, values, residual, sigma, precision) -> Ritz:
    worst, smallest = float(residual.max()), float(sigma[len(values) - 1])
    return Ritz(
        values=values,
        moved=change / max(float(values.norm()), torch.finfo(values.dtype).tiny),
        bound=bound(sigma, residual, precision),
        doubt=bound(sigma, residual, precision, _SEPARATED),
        noise=bound(sigma, torch.zeros_like(residual), precision),
        residual=worst / smallest if smallest else 0.0,
        floor=precision * float(sigma[0]),
        settled=worst <= precision * float(sigma[0]),
    )


def _by_jacobi(core: torch.Tensor) -> bool:
    """On a GPU LAPACK's counterparts go through a batch one by one; on the CPU they are quicker."""
    return core.is_cuda


def _triplets(core: torch.Tensor, count: int):
    """Leading singular triplets of each core, both sides orthonormal even where values are zero."""
    jacobi = _by_jacobi(core)
    if jacobi and batched_svd_fits(core):
        x, s, yh, _ = batched_svd(core)
        return x[..., :count], s[..., :count], yh[..., :count, :].mT
    vectors = torch.linalg.eigh(core @ core.mT).eigenvectors.flip(-1)[..., :count]
    if jacobi:
        y, s, xh, _ = batched_svd(core.mT @ vectors)
        return vectors @ xh.mT, s, y
    q, r = torch.linalg.qr(core.mT @ vectors)
    x, s, zh = torch.linalg.svd(r.mT)
    return vectors @ x, s, q @ zh.mT


def _restart(bases, size, rank, block) -> int:
    """Keep the best Ritz triplets and the next block; returns the bases' new size."""
    left, right, core = bases.left, bases.right, bases.core
    kept = rank + block // 2
    on_left, s, on_right = _triplets(core[:, :size, :size], kept)
    left[:, :kept] = on_left.mT.to(left.dtype) @ left[:, :size]
    following = right[:, size : size + block].clone()
    right[:, :kept] = on_right.mT.to(right.dtype) @ right[:, :size]
    right[:, kept : kept + block] = following
    core[:, :kept, :kept] = s.diag_embed()
    return kept


def _orthonormalise(rows, basis, generator, threads):
    """Split rows [B, b, n] = coefficients basis + factor q, q's rows orthonormal and off the basis.

    Gram-Schmidt and CholeskyQR with a float64 Gram matrix, both twice. Directions that vanish to
    rounding get a zero column in `factor` and a random row in q, so blocks keep their width.
    """
    coefficients = factor = None
    basis = rows[:, :0] if basis is None else basis
    for first in (True, False):
        part = project_out(rows, basis, threads)
        part, wide = part.double(), rows.double()
        gram = wide @ wide.mT
        lower, inverse, pivot = batched_cholesky_inverse(gram)
        scaled = inverse.to(rows.dtype) @ rows
        if first:  # rounding of the rows as they came: Pythagoras gives their norms
            norms = (part.square().sum(2) + gram.diagonal(dim1=1, dim2=2)).amax(1).sqrt()
            noise = 8 * torch.finfo(rows.dtype).eps * norms
            for place in (~(pivot > noise)).nonzero()[:, 0].tolist():
                scaled[place], lower[place] = _fill(
                    rows[place], gram[place], float(noise[place]), generator
                )
        rows = scaled
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
