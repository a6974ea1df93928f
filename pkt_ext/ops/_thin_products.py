# SPDX-License-Identifier: Apache-2.0
"""Products of a weight view with thin float32 factors, without widening or copying the weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from pkt_ext.ops import _backend

_ALONE = 1 << 23  # multiply-adds below which waking threads costs more than it saves
Product = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Run torch's CPU operations on `count` threads.

    Small dense algebra belongs on one: LAPACK's many short parallel regions gain nothing when the
    cores are free and wait a time slice each when they are not (measured: 10 to 1000 times).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def thin_products(matrix: torch.Tensor, threads: int) -> tuple[Product, Product]:
    """The maps of rows Z [b, N] -> Z A^T and Y [b, M] -> Y A for A [M, N], b a multiple of 8, in
    float32 (float64 for a float64 matrix), on `threads` CPU threads whatever the caller runs on."""
    m, n = matrix.shape
    if matrix.stride(0) == 1 and matrix.stride(1) >= m:
        return thin_products(matrix.T, threads)[::-1]
    if matrix.stride(1) != 1 or matrix.stride(0) < n:
        matrix = matrix.contiguous()  # strides no BLAS reads: one copy instead of one a product
    if matrix.is_cuda and matrix.element_size() == 2:
        return _sliced_products(matrix)
    multiply = _by_torch if matrix.is_cuda or matrix.dtype == torch.float64 else _by_kernel
    return partial(multiply, matrix, threads, False), partial(multiply, matrix, threads, True)


def _by_torch(matrix, threads: int, transposed: bool, thin: torch.Tensor) -> torch.Tensor:
    with on_threads(threads):
        return thin @ (matrix if transposed else matrix.T)


def _by_kernel(matrix, threads: int, transposed: bool, thin: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(thin), matrix.shape[1 if transposed else 0])
    _backend._C.thin_product(matrix, thin, out, transposed, threads=threads)
    return out


def project_out(rows: torch.Tensor, basis: torch.Tensor, threads: int) -> torch.Tensor:
    """Take from rows [B, b, N], in place, what lies in the orthonormal bases [B, K, N]; returns the
    coefficients [B, b, K]. b a multiple of 8; on the CPU in float32, equal bits on any thread
    count."""
    threads = threads if basis.shape[1] * rows.numel() > _ALONE else 1
    if rows.is_cuda or rows.dtype == torch.float64:
        with on_threads(threads):
            part = rows @ basis.mT
            rows.baddbmm_(part, basis, alpha=-1)
        return part
    part = torch.empty(*rows.shape[:2], basis.shape[1])
    product = _backend._C.thin_product
    for one, span, inside in zip(rows, basis, part, strict=True):
        product(span, one, inside, False, threads=threads)
        product(span, inside.neg(), one, True, accumulate=True, threads=threads)
    return part


def square_sum(matrix: torch.Tensor) -> torch.Tensor:
    """||A||^2 of A [M, N], float64 []; on the CPU equal bits on any thread count."""
    if matrix.stride(0) == 1:
        matrix = matrix.T
    if matrix.is_cuda or matrix.stride(1) != 1:
        norms = [torch.linalg.vector_norm(p, dtype=torch.float64) for p in matrix.split(1024)]
        return torch.stack(norms).square().sum()
    threads = torch.get_num_threads()
    return torch.tensor(_backend._C.square_sum(matrix, threads=threads), dtype=torch.float64)


def _sliced_products(matrix: torch.Tensor) -> tuple[Product, Product]:
    """16-bit products on a GPU: the thin factor becomes three 16-bit slices, exact to 2^-24, and
    one tensor-core GEMM with float32 output multiplies all three. A view whose rows start off the
    16-byte grid is read from the grid on, with zero rows in the slices against the extra columns.
    """
    n = matrix.shape[1]
    wide, lead = _aligned_superset(matrix)

    def multiply(a: torch.Tensor, thin: torch.Tensor, rows: int, skip_in: int, skip_out: int):
        thin = thin.T.contiguous()
        if matrix.dtype == torch.float16:  # use float16's range: a column's peak at 2^14
            peak = thin.abs().amax(0)
            scale = torch.exp2(15 - torch.frexp(peak)[1].clamp(min=-100).float())
        else:
            scale = torch.ones(thin.shape[1], device=thin.device)
        count = thin.shape[1]
        slices = torch.empty(a.shape[1], 3 * count, dtype=matrix.dtype, device=matrix.device)
        out = torch.empty(rows, count, device=matrix.device)
        with _backend.device_of(matrix) as launch:
            _backend._C.split_slices(thin, scale, slices, skip_in, **launch)
            _backend._C.merge_slices(_mm_float32(a, slices), scale, out, skip_out, **launch)
        return out.T.contiguous()

    def apply(z: torch.Tensor) -> torch.Tensor:
        return multiply(wide, z, len(matrix), lead, 0)

    def adjoint(y: torch.Tensor) -> torch.Tensor:
        return multiply(wide.T, y, n, 0, lead)

    return apply, adjoint


def _mm_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.mm(a, b, out_dtype=torch.float32)


def _aligned_superset(matrix: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A view of at most 14 more columns whose rows start and end on 16 bytes, and how many lead."""
    m, n = matrix.shape
    offset, stride = matrix.storage_offset(), matrix.stride(0)
    lead = matrix.data_ptr() % 16 // 2
    width = -(-(lead + n) // 8) * 8
    last = offset - lead + (m - 1) * stride + width
    if stride % 8 or lead > offset or last * 2 > matrix.untyped_storage().nbytes():
        return matrix, 0
    wide = matrix.as_strided((m, width), (stride, 1), offset - lead)
    # Zero rows do not silence a neighbour's NaN.
    if wide[:, :lead].isfinite().all() and wide[:, lead + n :].isfinite().all():
        return wide, lead
    return matrix, 0
