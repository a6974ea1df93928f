# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from pkt_ext.ops import _backend
from pkt_ext.ops.small_svd import (
    batched_cholesky_inverse,
    batched_cholesky_inverse_reference,
    batched_svd,
    batched_svd_fits,
    batched_svd_reference,
)

EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}
DTYPES = list(EPS)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sizes_for(backend, small, large):
    return small if backend.emulated else small + large


def grams(batch, size):
    rows = randn(batch, size, 2 * size + 3, seed=size)
    return rows @ rows.mT


# Cholesky


def check_factor(gram, found):
    size, scale = gram.shape[-1], gram.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None]
    lower, inverse = found.lower.cpu(), found.inverse.cpu()
    assert lower.equal(lower.tril()) and inverse.equal(inverse.tril())
    assert ((lower @ lower.mT - gram) / scale).abs().max() <= 2 * size * EPS[torch.float64]
    inside = (inverse @ lower - torch.eye(size, dtype=torch.float64)).norm(dim=(-2, -1))
    limit = size * EPS[torch.float64] * inverse.norm(dim=(-2, -1)) * lower.norm(dim=(-2, -1))
    assert (inside <= limit).all()
    assert found.pivot.cpu().equal(lower.diagonal(dim1=-2, dim2=-1).amin(-1))


def test_cholesky(backend):
    for size in sizes_for(backend, [1, 2, 7, 8, 9, 17, 33], [64, 129, 150]):
        gram = grams(2, size)
        found = batched_cholesky_inverse(gram.to(backend.device))
        check_factor(gram, found)
        for part, truth in zip(found, batched_cholesky_inverse_reference(gram), strict=True):
            torch.testing.assert_close(part.cpu(), truth, rtol=1e-10, atol=1e-11)


def test_cholesky_reads_the_lower_triangle_alone(backend):
    gram = grams(3, 11)
    spoiled = gram.tril() + torch.full_like(gram, math.nan).triu(1)
    whole = batched_cholesky_inverse(gram.to(backend.device))
    for part, same in zip(batched_cholesky_inverse(spoiled.to(backend.device)), whole, strict=True):
        assert part.equal(same)


def test_cholesky_of_graded_rows(backend):
    scale = torch.logspace(-150, 150, 12, dtype=torch.float64)
    gram = grams(1, 12) * scale * scale[:, None]
    found = batched_cholesky_inverse(gram.to(backend.device))
    truth = batched_cholesky_inverse_reference(grams(1, 12))
    torch.testing.assert_close(found.lower.cpu() / scale[:, None], truth.lower)
    torch.testing.assert_close(found.inverse.cpu() * scale, truth.inverse)


def test_cholesky_reports_what_it_cannot_factor(backend):
    size = 19
    gram = grams(7, size)
    gram[1] = 0.0
    gram[2, 17] = gram[2, 4]  # two equal rows and columns
    gram[2, :, 17] = gram[2, :, 4]
    gram[2, 17, 17] = gram[2, 4, 4] * (1 - 1e-12)
    gram[3, 0, 0] = -1.0
    gram[4, 18, 2] = math.nan
    gram[5, 12, 12] = math.inf
    found = [part.cpu() for part in batched_cholesky_inverse(gram.to(backend.device))]
    truth = batched_cholesky_inverse_reference(gram)
    assert (found[2][[0, 6]] > 0).all()
    assert found[2][[1, 2, 3]].equal(torch.zeros(3, dtype=torch.float64))
    assert found[2][[4, 5]].isnan().all()
    for part, wanted in zip(found, truth, strict=True):
        assert part[1:6].isnan().equal(wanted[1:6].isnan())
        torch.testing.assert_close(part[[0, 6]], wanted[[0, 6]])


def test_cholesky_keeps_leading_shape_and_takes_views(backend):
    gram = grams(6, 5).view(2, 3, 5, 5)
    view = torch.empty(3, 2, 5, 10, dtype=torch.float64)[..., ::2].transpose(0, 1).copy_(gram)
    found = batched_cholesky_inverse(view.to(backend.device))
    assert found.lower.shape == (2, 3, 5, 5) and found.pivot.shape == (2, 3)
    one = batched_cholesky_inverse(gram[1, 2].to(backend.device))
    assert one.pivot.shape == ()
    for part, alone in zip(found, one, strict=True):
        assert part[1, 2].equal(alone)
    empty = batched_cholesky_inverse(gram[:0].to(backend.device))
    assert empty.lower.shape == (0, 3, 5, 5) and empty.pivot.shape == (0, 3)


# Singular value decomposition


def check_svd(matrix, found, slack=8):
    """Backward error and orthonormality within slack * sqrt(K) eps, and the signs."""
    eps = EPS[matrix.dtype] * slack * math.sqrt(min(matrix.shape[-2:]))
    u, s, vh = (part.cpu().double() for part in found[:3])
    eye = torch.eye(s.shape[-1], dtype=torch.float64)
    assert found.converged.all() and [part.dtype for part in found[:3]] == [matrix.dtype] * 3
    assert (u.mT @ u - eye).norm(dim=(-2, -1)).max() <= eps * math.sqrt(len(eye))
    assert (vh @ vh.mT - eye).norm(dim=(-2, -1)).max() <= eps * math.sqrt(len(eye))
    assert (s >= 0).all() and (s.diff() <= 0).all()
    wide = matrix.double()
    error = ((u * s[..., None, :]) @ vh - wide).norm(dim=(-2, -1))
    assert (error <= eps * wide.norm(dim=(-2, -1))).all()
    peak = u.abs().argmax(-2, keepdim=True)
    assert (u.gather(-2, peak) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_svd(backend, dtype):
    sizes = sizes_for(backend, [1, 2, 3, 8, 13], [33, 64, 100, 160])
    for shape in [(size, size) for size in sizes] + [(9, 4), (4, 9), (17, 1), (1, 5)]:
        matrix = randn(2, *shape, dtype=dtype, seed=shape[0])
        found = batched_svd(matrix.to(backend.device))
        check_svd(matrix, found)
        values = batched_svd_reference(matrix).s
        error = (found.s.cpu().double() - values).abs().amax(-1)
        assert (error <= 8 * EPS[dtype] * values[:, 0]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_svd_of_separated_values_gives_their_vectors(backend, dtype):
    u, _, vh = torch.linalg.svd(randn(1, 9, 9))
    matrix = ((u * torch.arange(9, 0, -1)) @ vh).to(dtype)
    found, truth = batched_svd(matrix.to(backend.device)), batched_svd_reference(matrix)
    for part, wanted in zip(found[:3], truth[:3], strict=True):
        torch.testing.assert_close(part.cpu().double(), wanted, rtol=0, atol=100 * EPS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_svd_of_degenerate_matrices(backend, dtype):
    size = 7 if backend.emulated else 47
    column = randn(size, 1, dtype=dtype)
    matrices = torch.stack(
        [
            torch.zeros(size, size, dtype=dtype),
            torch.eye(size, dtype=dtype),
            torch.ones(size, size, dtype=dtype),
            column.expand(size, size),
            column.T.expand(size, size),
            torch.eye(size, dtype=dtype).flip(0) * torch.linspace(-3, 2, size, dtype=dtype),
            randn(size, 3, dtype=dtype) @ randn(3, size, dtype=dtype, seed=1),
            torch.cat([randn(size, size - 4, dtype=dtype), torch.zeros(size, 4, dtype=dtype)], 1),
            torch.cat([randn(size - 4, size, dtype=dtype), torch.zeros(4, size, dtype=dtype)], 0),
        ]
    )
    found = batched_svd(matrices.to(backend.device))
    check_svd(matrices, found, slack=16)
    values = batched_svd_reference(matrices).s
    torch.testing.assert_close(found.s.cpu().double(), values, rtol=0, atol=16 * size * EPS[dtype])
    assert not found.s[0].any()


def test_small_singular_values_keep_their_relative_accuracy(backend):
    """Columns of length one are well conditioned here: their scales cost nothing."""
    size = 10 if backend.emulated else 40
    base = randn(1, size, size) + 4 * torch.eye(size, dtype=torch.float64)
    scales = torch.exp2(-torch.arange(size).double() * (900 // size))
    found = batched_svd((base * scales).to(backend.device))
    assert found.converged.all()
    # Scales so far apart decouple the columns: the k-th value is |R_kk| scale_k up to 2^-44.
    wanted = torch.linalg.qr(base).R.diagonal(dim1=-2, dim2=-1).abs() * scales
    torch.testing.assert_close(found.s.cpu(), wanted, rtol=1e-10, atol=0.0)
    u, vh = found.u.cpu(), found.vh.cpu()
    eye = torch.eye(size, dtype=torch.float64)
    assert (u.mT @ u - eye).abs().max() < 1e-14 and (vh @ vh.mT - eye).abs().max() < 1e-14


def test_graded_columns_and_rows_against_a_wider_type(backend):
    grades = torch.logspace(0, -6, 9)
    base = randn(2, 9, 9, dtype=torch.float32)
    for matrix in (base * grades, base * grades[:, None]):
        wanted = torch.linalg.svdvals(matrix.double())  # whose smallest have seven digits left
        found = batched_svd(matrix.to(backend.device)).s.cpu().double()
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_svd_at_the_ends_of_the_range(backend, dtype):
    base = randn(1, 6, 6, dtype=dtype)
    normal = batched_svd(base.to(backend.device))
    huge, tiny = (120, -110) if dtype == torch.float32 else (1015, -1000)
    for exponent in (huge, tiny):
        found = batched_svd((base * 2.0**exponent).to(backend.device))
        assert found.s.equal(normal.s * 2.0**exponent)
        assert found.u.equal(normal.u) and found.vh.equal(normal.vh)
    least = torch.zeros(1, 3, 3, dtype=dtype)
    least[0, 1, 2] = torch.finfo(dtype).tiny
    found = batched_svd(least.to(backend.device))
    assert found.s[0].tolist() == [torch.finfo(dtype).tiny, 0.0, 0.0]
    check_svd(least, found)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_svd_of_non_finite_matrices_is_nan(backend, bad):
    for shape in ((3, 7, 5), (3, 5, 7)):
        matrix = randn(*shape)
        clean = batched_svd(matrix.to(backend.device))
        matrix[1, 4, 2] = bad
        found = batched_svd(matrix.to(backend.device))
        assert found.converged.tolist() == [True, False, True]
        for part, before in zip(found[:3], clean[:3], strict=True):
            assert part[1].isnan().all() and part[::2].equal(before[::2])


def test_svd_keeps_leading_shape_and_takes_views(backend):
    parent = randn(4, 3, 7, 12)
    view = parent[..., 1::2].transpose(0, 1)
    found = batched_svd(view.to(backend.device))
    assert [part.shape for part in found] == [(3, 4, 7, 6), (3, 4, 6), (3, 4, 6, 6), (3, 4)]
    for part, alone in zip(found, batched_svd(view[2, 1].to(backend.device)), strict=True):
        assert part[2, 1].equal(alone)
    for shape in ((0, 4, 4), (2, 0, 3), (2, 3, 0)):
        empty = batched_svd(torch.empty(shape, device=backend.device))
        k = min(shape[1:])
        assert empty.u.shape == (shape[0], shape[1], k) and empty.vh.shape[1:] == (k, shape[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_q_in_the_workspace_gives_equal_bits(backend, dtype, monkeypatch):
    """Where a matrix fits shared memory but Q does not fit beside it."""

    class Tight:
        def __getattr__(self, name):
            return getattr(real, name)

        def small_svd_workspace(self, matrix):
            return matrix.shape[1] * matrix.shape[2]

    real, matrix = _backend._C, randn(2, 11, 8, dtype=dtype).to(backend.device)
    beside = batched_svd(matrix)
    monkeypatch.setattr(_backend, "_C", Tight())
    for part, same in zip(batched_svd(matrix), beside, strict=True):
        assert part.equal(same)


def test_what_32_bits_do_not_count_does_not_fit(backend):
    def fits(rows, cols):
        return batched_svd_fits(torch.empty(0, rows, cols, device=backend.device))

    assert fits(2**27, 15) and fits(15, 2**27)
    assert fits(2**27, 16) == fits(16, 2**27) == (backend.name == "cpu")


def test_what_does_not_fit_a_block_goes_to_torch(backend, monkeypatch):
    class Full:
        def __getattr__(self, name):
            return getattr(real, name)

        def small_svd_workspace(self, matrix):
            return -1

        def cholesky_inverse_fits(self, gram):
            return False

    real = _backend._C
    matrix, gram = randn(2, 9, 7), grams(2, 9)
    matrix[1, 3, 3] = math.nan
    ours = [
        batched_svd(matrix.to(backend.device)),
        batched_cholesky_inverse(gram.to(backend.device)),
    ]
    monkeypatch.setattr(_backend, "_C", Full())
    theirs = [
        batched_svd(matrix.to(backend.device)),
        batched_cholesky_inverse(gram.to(backend.device)),
    ]
    for one, other in zip(ours, theirs, strict=True):
        for part, same in zip(one, other, strict=True):
            torch.testing.assert_close(part, same, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_equal_bits_on_any_number_of_threads(threads):
    matrix, gram = randn(5, 33, 33, seed=1), grams(5, 33)
    alone = [*batched_svd(matrix), *batched_cholesky_inverse(gram)]
    torch.set_num_threads(threads)
    for part, same in zip(
        [*batched_svd(matrix), *batched_cholesky_inverse(gram)], alone, strict=True
    ):
        assert part.equal(same)


def test_repeated_runs_give_equal_bits(backend):
    matrix, gram = randn(2, 7, 7), grams(2, 11)
    runs = [
        [
            *batched_svd(matrix.to(backend.device)),
            *batched_cholesky_inverse(gram.to(backend.device)),
        ]
        for _ in range(2)
    ]
    for part, same in zip(*runs, strict=True):
        assert part.equal(same)


def test_errors():
    with pytest.raises(ValueError, match=r"gram: expected square matrices, got shape \[3, 4\]"):
        batched_cholesky_inverse(torch.rand(3, 4).double())
    with pytest.raises(TypeError, match="gram: expected dtype float64, got torch.float32"):
        batched_cholesky_inverse(torch.rand(3, 3))
    with pytest.raises(ValueError, match="matrix: expected at least 2 dimensions"):
        batched_svd(torch.rand(3))
    with pytest.raises(TypeError, match="expected dtype float32, float64, got torch.float16"):
        batched_svd(torch.rand(3, 3).half())
