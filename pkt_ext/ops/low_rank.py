# SPDX-License-Identifier: Apache-2.0
"""Leading singular triplets of weight matrices, and the LoRA factors made of them.

Both iterate on the matrix as stored (`_krylov` tells how, and when they stop). What is near the
full SVD's cost is left to the full SVD.
"""

import itertools
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch

from pkt_ext.ops import _backend
from pkt_ext.ops._krylov import Found, Plan, bound, bytes_needed, lanczos, not_finite
from pkt_ext.ops._thin_products import on_threads, square_sum
from pkt_ext.ops.small_svd import oriented

Mode = Literal["converged", "fast", "exact"]

_SMALL = 512  # up to this shorter side the full SVD is as quick as anything else


class LowRankReport(NamedTuple):
    """How far to trust a truncated SVD; each field, on the CPU, has the matrix's leading shape.

    `error` is a cautious estimate of ||U S Vh - best|| / ||best||, best being the full SVD's.
    `converged` says that it is at most `tol`. It is False where sigma_r and sigma_{r+1} lie closer
    than 1e-4 sigma_r: the best approximation is then not unique in practice, and the iteration ran
    until the singular values, hence the captured energy, were within `tol` instead.
    """

    converged: torch.Tensor  # bool
    error: torch.Tensor  # float64; infinite where the gap is too small
    captured: torch.Tensor  # float64, ||U S Vh||^2 / ||A||^2; 1 for a zero matrix
    passes: torch.Tensor  # int64, products with A or A^T; 0 where the full SVD was taken


def truncated_svd(
    matrix: torch.Tensor,
    rank: int,
    *,
    tol: float = 1e-3,
    mode: Mode = "converged",
    seed: int = 0,
    return_report: bool = False,
) -> tuple[torch.Tensor, ...]:
    """The leading singular triplets (U, S, Vh) of each matrix, to working accuracy.

    Stops when the *product* U diag(S) Vh lies within `tol` of the full SVD's (the module tells how
    that is known): the same adapter, not one that leaves as small a residual. In every left vector
    the entry of largest magnitude (the first of equals) is positive. Equal bits for equal seed and
    device; on the CPU on any thread count, float64 and full SVDs excepted. A GPU takes the matrices
    of a batch together, so there the batch counts too. Not differentiable. A matrix whose shorter
    side is at most 512 or about 8 * rank takes the full SVD whatever the mode, and so does one that
    has not converged by the full SVD's cost.

    Args:
        matrix: [..., M, N] float32, float64, bfloat16 or float16; views are read in place, and
            16-bit ones are never widened as a whole (full SVDs excepted).
        rank:   triplets wanted, 1 to min(M, N).
        tol:    relative error of the product, 0 < tol < 1; about 1e-5 is what float32 allows.
        mode:   "converged"; "exact", the full SVD; "fast", as many passes as the rank alone decides
                (more where singular values cluster). On the CPU those are max(4 R, 3 R + 24)
                columns in blocks of 8 (rank 16: 18 passes; wider above rank 32): at least 0.999 of
                the optimal energy measured on weight-like spectra, 0.9955 on a 4096 x 32000 matrix
                whose spikes sink into the noise. On a GPU 64 or more columns and 8 passes, not
                measured on a card.
        seed:   of the random start.
        return_report: also return a `LowRankReport`.
    Returns:
        U [..., M, R], S [..., R] descending, Vh [..., R, N], and the report if asked for; float64
        for a float64 matrix, else float32.
    Raises:
        ValueError: rank, tol or mode out of range, fewer than two dimensions, NaN or infinity.
        TypeError:  a dtype not listed above.
    """
    u, s, vh, report = _decompose(matrix, rank, tol, mode, seed, return_report, (0.0, 0.0))
    return (u, s, vh, report) if return_report else (u, s, vh)


def lora_factors(
    matrix: torch.Tensor,
    rank: int,
    *,
    split: Literal["none", "sqrt"] = "none",
    tol: float = 1e-3,
    mode: Mode = "converged",
    seed: int = 0,
    return_report: bool = False,
) -> tuple[torch.Tensor, ...]:
    """The factors (B, A) whose product is the best rank-r approximation of each matrix.

    `split="none"` gives B = U diag(S) and A = Vh as Seeking publishes them (A's rows orthonormal);
    `split="sqrt"` shares sqrt(S) between both, as PiSSA does. Else as `truncated_svd`.

    Returns:
        B [..., M, R], A [..., R, N], and a `LowRankReport` if asked for.
    Raises:
        as `truncated_svd`, and ValueError for an unknown split.
    Source: Zhong et al., ICLR 2024 (arXiv 2310.11451), METHODS S6; PiSSA (arXiv 2404.02948).
    """
    powers = {"none": (1.0, 0.0), "sqrt": (0.5, 0.5)}.get(split)
    if powers is None:
        raise ValueError(f"split: expected 'none' or 'sqrt', got {split!r}")
    b, _, a, report = _decompose(matrix, rank, tol, mode, seed, return_report, powers)
    return (b, a, report) if return_report else (b, a)


def _decompose(matrix, rank, tol, mode, seed, reporting, powers):
    """Checks, then some matrices after others; U and Vh carry S to the two `powers`."""
    rank = operator.index(rank)
    if matrix.ndim < 2:
        raise ValueError(f"matrix: expected at least 2 dimensions, got shape {list(matrix.shape)}")
    if matrix.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise TypeError(
            f"matrix: expected dtype float32, float64, float16 or bfloat16, got {matrix.dtype}"
        )
    *leading, m, n = matrix.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank: {rank} is not between 1 and the shorter side of {m} x {n}")
    if not 0.0 < tol < 1.0:
        raise ValueError(f"tol: expected a value between 0 and 1, got {tol}")
    if mode not in ("converged", "fast", "exact"):
        raise ValueError(f"mode: expected 'converged', 'fast' or 'exact', got {mode!r}")

    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    empty = {"dtype": dtype, "device": matrix.device}
    u = torch.empty(*leading, m, rank, **empty)
    s = torch.empty(*leading, rank, **empty)
    vh = torch.empty(*leading, rank, n, **empty)
    kinds = (torch.bool, torch.float64, torch.float64, torch.int64)
    report = LowRankReport(*(torch.empty(leading, dtype=kind) for kind in kinds))
    plan = _plan(rank, mode == "fast", matrix.is_cuda)
    exact = mode == "exact" or min(m, n) <= max(_SMALL, 8 * plan.widest)
    threads = torch.get_num_threads()
    count = _together(matrix, plan)
    places = list(itertools.product(*map(range, leading)))
    energies, captured = [], []
    with torch.no_grad(), _full_precision(matrix.device.type):
        for first in range(0, len(places), count):
            chunk = places[first : first + count]
            some = [matrix[index] for index in chunk]
            results = [None] * len(some)
            if not exact:
                with on_threads(1):
                    results = lanczos(some, rank, plan, tol, seed, threads)
            for index, one, found in zip(chunk, some, results, strict=True):
                found = found or _full_svd(one, rank, dtype)
                u[index], s[index], vh[index] = found.u, found.s, found.vh
                scales = (found.s**power for power in powers)
                with _backend.device_of(matrix) as launch:
                    _backend._C.orient_factors(u[index], vh[index], *scales, **launch)
                if reporting:
                    energies.append(square_sum(one))
                    captured.append(found.s.double().square().sum())
                    report.converged[index] = found.error <= tol
                    report.error[index] = found.error
                    report.passes[index] = found.passes
        if energies:
            energy, known = torch.stack([torch.stack(energies), torch.stack(captured)]).cpu()
            report.captured.copy_(torch.where(energy > 0, known / energy, 1.0).view(leading))
    return u, s, vh, report


def workspace_bytes(
    shape: tuple[int, int], rank: int, *, mode: Mode, dtype: torch.dtype, device: torch.device
) -> int:
    """Bytes that one matrix [M, N] takes on its way to factors, beside itself and them.

    Where the iteration does not converge and the full SVD is taken after all, it takes more.
    """
    plan = _plan(rank, mode == "fast", device.type == "cuda")
    small, large = sorted(shape)
    if mode == "exact" or small <= max(_SMALL, 8 * plan.widest):
        # float32 copies for and by LAPACK's gesdd, both factors, and its own work
        copies = 2 if dtype == torch.float32 else 3
        return 4 * (copies * small * large + 5 * small * small)
    return bytes_needed(shape, plan, 8 if dtype == torch.float64 else 4)


def _together(matrix: torch.Tensor, plan: Plan) -> int:
    """How many matrices go at once: on a GPU what 4 GB of bases allow. On the CPU one, whose bases
    stay in the cache; together they are no faster there."""
    if not matrix.is_cuda:
        return 1
    itemsize = 8 if matrix.dtype == torch.float64 else 4
    return max(1, 2**32 // bytes_needed(matrix.shape[-2:], plan, itemsize))


def _plan(rank: int, fast: bool, on_gpu: bool) -> Plan:
    """Blocks for the fewest columns on the CPU, for the fewest passes on a GPU."""
    if on_gpu:  # 64 columns cost what one does: the matrix has to be read
        width = max(64, 16 * -(-(rank + rank // 4 if fast else rank + 1) // 16))
        return Plan(width, width, 4 if fast else None)
    width = 8 * -(-rank // 32)
    # what it captures: truncated_svd
    steps = -(-max(4 * rank, 3 * rank + 24) // width)
    return Plan(width, 8 * (rank // 8 + 1), steps if fast else None)


def _full_svd(matrix: torch.Tensor, rank: int, dtype: torch.dtype) -> Found:
    if not matrix.isfinite().all():
        raise not_finite(matrix)
    u, s, vh = torch.linalg.svd(matrix.to(dtype), full_matrices=False)
    sigma = s[: rank + 1].double().cpu()
    error = bound(sigma, torch.zeros(rank, dtype=torch.float64), torch.finfo(dtype).eps)
    return Found(u[:, :rank], s[:rank], vh[:rank], error, 0)


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """Switch autocast, TF32 and bf16 products off: they would cost more than `tol` allows."""
    backends = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    saved = [backend.fp32_precision for backend in backends]
    try:
        legacy = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:  # the caller uses the newer setting, which this one must not be mixed with
        legacy = None
        for backend in backends:
            backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for backend, precision in zip(backends, saved, strict=True):
            backend.fp32_precision = precision


def truncated_svd_reference(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, ...]:
    """Plain torch: the full SVD in float64, cut, with `truncated_svd`'s signs."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return oriented(u[..., :rank], s[..., :rank], vh[..., :rank, :])


def lora_factors_reference(
    matrix: torch.Tensor, rank: int, split: Literal["none", "sqrt"] = "none"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch: `lora_factors` by the full SVD in float64."""
    u, s, vh = truncated_svd_reference(matrix, rank)
    if split == "none":
        return u * s[..., None, :], vh
    return u * s[..., None, :].sqrt(), vh * s[..., :, None].sqrt()
