# SPDX-License-Identifier: Apache-2.0
"""Batches of small dense problems that LAPACK's GPU counterparts take one by one.

On a GPU a block takes a matrix, in shared memory; what does not fit goes to torch.linalg. Equal
bits for equal input, whatever the batch around it and the thread count.

Source: CholeskyQR (Fukaya et al., ScalA 2014) needs the factor and its inverse; one-sided Jacobi
(Hestenes, 1958; de Rijk, SIAM J. Sci. Stat. Comput. 1989; Demmel, Veselic, SIMAX 1992).
"""

import math
from typing import NamedTuple

import torch

from pkt_ext.ops import _backend


class CholeskyInverse(NamedTuple):
    """gram = lower lower^T and inverse = lower^-1, both lower triangular."""

    lower: torch.Tensor  # [..., B, B] float64, NaN throughout where pivot is not positive
    inverse: torch.Tensor  # [..., B, B] float64, likewise
    pivot: torch.Tensor  # [...] float64, the smallest diagonal entry of lower; 0 where gram is not
    # positive definite to working precision, NaN where it holds NaN or infinity


class BatchedSvd(NamedTuple):
    """matrix = u diag(s) vh; K = min(M, N)."""

    u: torch.Tensor  # [..., M, K]
    s: torch.Tensor  # [..., K] descending
    vh: torch.Tensor  # [..., K, N]
    converged: torch.Tensor  # [...] bool; False where u, s, vh are NaN because the matrix was not
    # finite, or where 30 sweeps did not suffice


def batched_cholesky_inverse(gram: torch.Tensor) -> CholeskyInverse:
    """The Cholesky factor of each matrix and the factor's inverse, without a host synchronisation.

    Backward stable: lower lower^T differs from gram by at most about 2 B eps of its diagonal.

    Args:
        gram: [..., B, B] float64; only the lower triangle is read.
    Raises:
        ValueError: fewer than two dimensions, or matrices that are not square.
        TypeError:  another dtype.
    """
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"gram: expected square matrices, got shape {list(gram.shape)}")
    size = gram.shape[-1]
    flat = gram.reshape(math.prod(gram.shape[:-2]), size, size).contiguous()
    with _backend.device_of(flat) as launch:
        if _backend._C.cholesky_inverse_fits(flat):
            lower, inverse = flat.new_empty(flat.shape), flat.new_empty(flat.shape)
            pivot = flat.new_empty(len(flat))
            _backend._C.cholesky_inverse(flat, lower, inverse, pivot, **launch)
        else:
            lower, inverse, pivot = batched_cholesky_inverse_reference(flat)
    leading = gram.shape[:-2]
    return CholeskyInverse(lower.view(gram.shape), inverse.view(gram.shape), pivot.view(leading))


def batched_svd(matrix: torch.Tensor) -> BatchedSvd:
    """The singular value decomposition of each matrix, to working precision.

    u's columns and vh's rows are orthonormal whatever the values. In every left vector the entry of
    largest magnitude (the first of equals) is positive. Small values keep their relative accuracy
    under any scaling of the columns (rows, if M < N), and mostly of both. Values that are 1e-29
    (float64: 1e-280) of the largest or less come out as zero.

    Args:
        matrix: [..., M, N] float32 or float64. A GPU's 99 KB of shared memory hold a shorter side
            of 156 in float32 and 110 in float64, 227 KB 238 and 168; larger matrices take
            torch.linalg.svd, which goes through them one by one.
    Raises:
        ValueError: fewer than two dimensions.
        TypeError:  another dtype.
    """
    if matrix.ndim < 2:
        raise ValueError(f"matrix: expected at least 2 dimensions, got shape {list(matrix.shape)}")
    leading, (m, n) = matrix.shape[:-2], matrix.shape[-2:]
    flat = matrix.reshape(math.prod(leading), m, n)
    found = _tall(flat.contiguous()) if m >= n else _wide(flat.mT.contiguous())
    return BatchedSvd(*(part.view(leading + part.shape[1:]) for part in found))


def batched_svd_fits(matrix: torch.Tensor) -> bool:
    """Whether `batched_svd` has a kernel for [B, M, N] on its device; on the CPU it always has."""
    shorter, longer = sorted(matrix.shape[1:])
    with _backend.device_of(matrix):
        return _backend._C.small_svd_workspace(matrix.new_empty(0, longer, shorter)) >= 0


def _tall(matrix: torch.Tensor) -> BatchedSvd:
    batch, m, n = matrix.shape
    with _backend.device_of(matrix) as launch:
        needed = _backend._C.small_svd_workspace(matrix)
        if needed < 0 or not matrix.numel():
            return _by_torch(matrix)
        u, s = matrix.new_empty(batch, m, n), matrix.new_empty(batch, n)
        vh, workspace = matrix.new_empty(batch, n, n), matrix.new_empty(batch * needed)
        sweeps = torch.empty(batch, dtype=torch.int64, device=matrix.device)
        _backend._C.small_svd(matrix, u, s, vh, workspace, sweeps, **launch)
    return BatchedSvd(u, s, vh, sweeps > 0)


def _wide(transposed: torch.Tensor) -> BatchedSvd:
    v, s, uh, converged = _tall(transposed)
    return BatchedSvd(*oriented(uh.mT, s, v.mT), converged)


def oriented(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In every left vector the entry of largest magnitude (the first of equals) is positive."""
    if not u.numel():
        return u, s, vh
    peak = (u.abs() == u.abs().amax(-2, keepdim=True)).byte().argmax(-2, keepdim=True)
    sign = torch.where(u.gather(-2, peak) < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, s, vh * sign.mT


def _by_torch(matrix: torch.Tensor) -> BatchedSvd:
    finite = matrix.isfinite().flatten(-2).all(-1)
    known = torch.where(finite[..., None, None], matrix, 0.0)
    u, s, vh = oriented(*torch.linalg.svd(known, full_matrices=False))
    u, vh = (torch.where(finite[..., None, None], part, math.nan) for part in (u, vh))
    return BatchedSvd(u, torch.where(finite[..., None], s, math.nan), vh, finite)


def batched_cholesky_inverse_reference(gram: torch.Tensor) -> CholeskyInverse:
    """Plain torch: `batched_cholesky_inverse`."""
    finite = gram.tril().isfinite().flatten(-2).all(-1)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    lower, failed = torch.linalg.cholesky_ex(torch.where(finite[..., None, None], gram, -eye))
    lower = torch.where((failed == 0)[..., None, None], lower, eye)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    pivot = lower.diagonal(dim1=-2, dim2=-1).amin(-1)
    pivot = torch.where(finite, torch.where(failed == 0, pivot, 0.0), math.nan)
    lower, inverse = (
        torch.where(pivot[..., None, None] > 0, part, math.nan) for part in (lower, inverse)
    )
    return CholeskyInverse(lower, inverse, pivot)


def batched_svd_reference(matrix: torch.Tensor) -> BatchedSvd:
    """Plain torch: `batched_svd`, in float64."""
    return _by_torch(matrix.double())
