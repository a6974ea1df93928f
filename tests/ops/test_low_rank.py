# SPDX-License-Identifier: Apache-2.0
import functools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pkt_ext.ops import _krylov, _thin_products, low_rank
from pkt_ext.ops.low_rank import (
    lora_factors,
    lora_factors_reference,
    truncated_svd,
    truncated_svd_reference,
)

# Above 512 on the shorter side the block Lanczos runs, below it the full SVD.
SHAPES = [(640, 576), (576, 640), (1031, 521), (523, 2003)]
SPECTRA = ["power", "spiked", "geometric", "repeated", "deficient"]


@pytest.fixture(autouse=True)
def one_thread():
    """These products are too short for two: on busy cores the waiting would take minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def spectrum(name, count):
    i = torch.arange(1, count + 1, dtype=torch.float64)
    if name == "power":
        return i**-0.3
    if name == "spiked":  # a Marchenko-Pastur bulk below 1, 6 % power-law spikes above it
        bulk = torch.linalg.svdvals(torch.randn(count, 2 * count, generator=generator()).double())
        spikes = max(1, int(0.06 * count))
        heads = (i[:spikes] / (spikes + 1)) ** -0.5
        return torch.cat([heads, bulk[: count - spikes] / bulk[0]])
    if name == "geometric":
        return 0.7**i
    if name == "repeated":  # three equal, well apart from the rest
        return torch.where(i < 6, 2.0, torch.where(i < 9, 1.0, 0.5 * i**-0.3))
    if name == "deficient":
        return torch.where(i <= 5, 1 / i, 0.0)
    raise KeyError(name)


@functools.cache
def example(shape, name):
    """A float64 matrix, built from its singular vectors and values, which come with it."""
    short = min(shape)
    s = spectrum(name, short)
    u, v = (torch.linalg.qr(torch.randn(side, short, generator=generator(side)).double()).Q
            for side in shape)  # fmt: skip
    return (u * s) @ v.T, u, s, v


def best(shape, name, rank):
    _, u, s, v = example(shape, name)
    return (u[:, :rank] * s[:rank]) @ v[:, :rank].T


def distance(found, wanted):
    """||found - wanted|| / ||wanted||, in float64."""
    return float((found.double() - wanted).norm() / wanted.norm())


def check_orthonormal(rows, limit=2e-5):
    eye = torch.eye(len(rows), dtype=torch.float64)
    assert (rows.double() @ rows.double().T - eye).abs().max() < limit


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_is_the_full_svds(shape, name):
    matrix, _, s, _ = example(shape, name)
    rank = 8
    u, values, vh, report = truncated_svd(matrix.float(), rank, return_report=True)
    assert [t.dtype for t in (u, values, vh)] == [torch.float32] * 3
    wanted = best(shape, name, rank)
    assert report.converged and report.error <= 1e-3
    assert distance((u * values) @ vh, wanted) <= report.error + 1e-6
    torch.testing.assert_close(values.double(), s[:rank], rtol=1e-5, atol=1e-6)
    assert float(report.captured) == pytest.approx(
        float(s[:rank].square().sum() / s.square().sum()), rel=1e-5
    )
    assert report.passes > 0
    check_orthonormal(u.T)
    check_orthonormal(vh)
    b, a = lora_factors(matrix.float(), rank)
    assert a.equal(vh) and distance(b @ a, wanted) <= report.error + 1e-6


@pytest.mark.parametrize("rank", [1, 2, 15, 16, 17, 33, 100, 128])
def test_ranks(rank):
    matrix = example((1031, 700), "power")[0].float()
    b, a, report = lora_factors(matrix, rank, return_report=True)
    assert b.shape == (1031, rank) and a.shape == (rank, 700)
    assert report.converged
    assert distance(b @ a, best((1031, 700), "power", rank)) <= min(
        1e-3, float(report.error) + 1e-6
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (31, 33), (512, 40), (257, 513)], ids=str)
@pytest.mark.parametrize("mode", ["converged", "fast", "exact"])
def test_small_matrices_take_the_full_svd(shape, mode):
    matrix = torch.randn(shape, generator=generator())
    rank = min(4, *shape)
    u, s, vh, report = truncated_svd(matrix, rank, mode=mode, return_report=True)
    wanted = truncated_svd_reference(matrix, rank)
    for found, truth in zip((u, s, vh), wanted, strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=2e-4, atol=2e-5)
    assert report.passes == 0 and report.converged


def test_error_budget_against_torch_in_float32():
    matrix, *_ = example((640, 576), "power")
    wanted = best((640, 576), "power", 16)
    u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    torch_error = distance((u[:, :16] * s[:16]) @ vh[:16], wanted)
    b, a = lora_factors(matrix.float(), 16, tol=1e-5)
    assert distance(b @ a, wanted) <= 2 * torch_error + 2e-6


@pytest.mark.parametrize("tol", [1e-3, 1e-10])
def test_float64(tol):
    matrix, _, s, _ = example((640, 576), "power")
    u, values, vh, report = truncated_svd(matrix, 16, tol=tol, return_report=True)
    assert values.dtype == torch.float64 and report.converged
    assert distance((u * values) @ vh, best((640, 576), "power", 16)) <= tol
    check_orthonormal(u.T, 1e-12)
    check_orthonormal(vh, 1e-12)


def test_a_tolerance_below_rounding_ends_and_says_so():
    matrix = example((640, 576), "power")[0].float()
    b, a, report = lora_factors(matrix, 16, tol=1e-9, return_report=True)
    assert not report.converged and 1e-9 < report.error < 1e-4
    assert distance(b @ a, best((640, 576), "power", 16)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(640, 576), (523, 2003)], ids=str)
def test_16_bit_is_factored_as_stored(shape, dtype):
    matrix = example(shape, "spiked")[0].to(dtype)
    b, a = lora_factors(matrix, 16)
    assert b.dtype == a.dtype == torch.float32
    wide_b, wide_a = lora_factors(matrix.float(), 16)
    assert distance(b @ a, (wide_b @ wide_a).double()) < 1e-5
    exact_b, exact_a = lora_factors_reference(matrix, 16)
    assert distance(b @ a, exact_b @ exact_a) < 1e-3


class LargestResult(TorchDispatchMode):
    """Remembers the size of the largest tensor any operation allocates."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for out in result if isinstance(result, tuple | list) else [result]:
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in inputs:
                self.elements = max(self.elements, out.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_matrix_is_never_copied(dtype, transposed):
    parent = torch.randn(1400, 3001, generator=generator()).to(dtype)
    window = parent[100:, 3:2900]
    window = window.T if transposed else window
    with LargestResult() as seen:
        truncated_svd(window, 4, mode="fast")
    assert 0 < seen.elements < window.numel() // 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_give_what_their_copies_give(dtype):
    parent = torch.randn(1400, 1500, generator=generator()).to(dtype)
    parent[:, :700] *= 3.0  # some structure, so that the fast mode has something to find
    for view in (
        parent[11:640, 5:601],
        parent[11:640, 5:601].T,
        parent[::2, 1:1200:2],
        parent[:, :1].expand(1400, 600),
        parent.view(700, 2, 1500)[:, 1, 7:],
    ):
        b, a = lora_factors(view, 3, mode="fast")
        copy_b, copy_a = lora_factors(view.contiguous(), 3, mode="fast")
        assert distance(b @ a, (copy_b @ copy_a).double()) < 1e-3


def test_batches_equal_their_members_bit_by_bit():
    batch = torch.randn(2, 3, 600, 530, generator=generator()).transpose(0, 1)
    u, s, vh, report = truncated_svd(batch, 5, mode="fast", return_report=True)
    assert u.shape == (3, 2, 600, 5) and s.shape == (3, 2, 5) and vh.shape == (3, 2, 5, 530)
    assert {tuple(field.shape) for field in report} == {(3, 2)}
    for i, j in ((0, 0), (2, 1)):
        for part, alone in zip((u, s, vh), truncated_svd(batch[i, j], 5, mode="fast"), strict=True):
            assert part[i, j].equal(alone)


@pytest.fixture(params=["eigh", "core in a kernel", "core's part in a kernel"])
def together(request, monkeypatch):
    """Batches of up to five, as on a GPU, and its ways with the core."""
    monkeypatch.setattr(low_rank, "_together", lambda matrix, plan: 5)
    if request.param != "eigh":
        monkeypatch.setattr(_krylov, "_by_jacobi", lambda core: True)
        fits = request.param == "core in a kernel"
        monkeypatch.setattr(_krylov, "batched_svd_fits", lambda core: fits and core.shape[1] < 60)


@pytest.mark.parametrize("shape", [(640, 576), (576, 640)], ids=str)
def test_matrices_that_go_together_converge_each_for_itself(together, shape):
    names = ["geometric", "power", "spiked", "deficient", "repeated", "power"]
    batch = torch.stack([example(shape, name)[0] for name in names]).float()
    batch[5] = 0.0
    rank = 8
    u, s, vh, report = truncated_svd(batch, rank, return_report=True)
    assert report.converged.all() and len(report.passes.unique()) > 2
    for i, name in enumerate(names[:-1]):
        wanted, values = best(shape, name, rank), example(shape, name)[2]
        assert distance((u[i] * s[i]) @ vh[i], wanted) <= report.error[i] + 1e-6
        share = float(values[:rank].square().sum() / values.square().sum())
        assert float(report.captured[i]) == pytest.approx(share, rel=1e-5)
    assert not s[5].any() and report.captured[5] == 1
    for i in range(len(names)):
        check_orthonormal(u[i].T)
        check_orthonormal(vh[i])
    alone = truncated_svd(batch[1], rank)
    torch.testing.assert_close(s[1], alone[1], rtol=1e-4, atol=0.0)


def test_together_in_float64_and_with_restarts(together, monkeypatch):
    monkeypatch.setattr(_krylov, "_BASIS", 64)
    names = ["geometric", "power", "spiked"]
    batch = torch.stack([example((640, 576), name)[0] for name in names])
    u, s, vh, report = truncated_svd(batch, 8, tol=1e-6, return_report=True)
    assert report.converged.all() and report.passes.max() > 2 * 64 // 8
    for i, name in enumerate(names):
        assert distance((u[i] * s[i]) @ vh[i], best((640, 576), name, 8)) <= 1e-6


def test_together_in_fast_mode_from_views(together):
    parent = torch.zeros(3, 1100, 720, dtype=torch.bfloat16)
    for i, name in enumerate(["power", "spiked", "power"]):
        parent[i, 5:1036, 3:703] = example((1031, 700), name)[0].to(torch.bfloat16)
    view = parent[:, 5:1036, 3:703]
    b, a, report = lora_factors(view, 16, mode="fast", return_report=True)
    assert (report.passes == report.passes[0]).all()
    for i, name in enumerate(["power", "spiked", "power"]):
        energy = float((b[i] @ a[i]).double().norm() ** 2)
        assert energy >= 0.997 * float(example((1031, 700), name)[2][:16].square().sum())
    assert b[0].equal(b[2]) and a[0].equal(a[2])


def test_together_one_may_need_the_full_svd_or_be_refused(together, monkeypatch):
    monkeypatch.setattr(_krylov, "_BASIS", 48)  # slow enough to reach the full SVD's cost
    flat = torch.randn(640, 576, generator=generator()).double()
    batch = torch.stack([example((640, 576), "geometric")[0], flat])
    u, s, vh, report = truncated_svd(batch, 8, tol=1e-11, return_report=True)
    assert report.passes[0] > 0 and report.passes[1] == 0 and report.converged.all()
    torch.testing.assert_close(s, truncated_svd_reference(batch, 8)[1], rtol=0, atol=1e-8)
    batch[1, 17, 23] = math.nan
    with pytest.raises(ValueError, match=r"matrix: NaN or infinity at \[17, 23\]"):
        truncated_svd(batch, 8)


def test_empty_batch():
    u, s, vh, report = truncated_svd(torch.empty(0, 3, 9, 7), 2, return_report=True)
    assert (u.shape, s.shape, vh.shape) == ((0, 3, 9, 2), (0, 3, 2), (0, 3, 2, 7))
    assert report.converged.shape == (0, 3)


def test_zero_matrix_has_orthonormal_factors():
    u, s, vh, report = truncated_svd(torch.zeros(600, 530), 20, return_report=True)
    assert not s.any() and report.converged and report.captured == 1
    check_orthonormal(u.T)
    check_orthonormal(vh)


def test_a_tie_at_the_cut_is_judged_by_energy():
    """Twenty equal values: no rank-16 part of them is the best one."""
    short, rank = 560, 16
    s = torch.cat([torch.ones(20), 0.5 * torch.arange(1, short - 19) ** -0.3]).double()
    _, u, _, v = example((640, short), "power")
    matrix = ((u * s) @ v.T).float()
    b, a, report = lora_factors(matrix, rank, return_report=True)
    assert not report.converged and math.isinf(report.error)
    assert float((b @ a).double().norm() ** 2) == pytest.approx(rank, rel=2e-3)


def test_identity_and_more_equal_values_than_a_block_holds():
    u, s, vh, report = truncated_svd(torch.eye(560), 40, return_report=True)
    torch.testing.assert_close(s, torch.ones(40), rtol=0, atol=1e-5)
    assert not report.converged
    two = torch.eye(600)
    two[:40] *= 2  # 40 equal values, all of them wanted, and a flat rest
    b, a, report = lora_factors(two, 40, return_report=True)
    assert report.converged
    assert (
        distance(b @ a, torch.diag(torch.where(torch.arange(600) < 40, 2.0, 0.0)).double()) < 1e-3
    )


def test_flat_noise_is_told_apart_from_convergence():
    """The worst case: gaps of a thousandth. Fast mode must not claim what it does not reach."""
    matrix = torch.randn(900, 800, generator=generator())
    wanted_b, wanted_a = lora_factors_reference(matrix, 16)
    wanted = wanted_b @ wanted_a
    b, a, report = lora_factors(matrix, 16, mode="fast", return_report=True)
    assert not report.converged and report.error > 1e-3 and distance(b @ a, wanted) > 1e-3
    b, a, report = lora_factors(matrix, 16, return_report=True)
    assert report.converged and distance(b @ a, wanted) <= report.error <= 1e-3


@pytest.mark.parametrize("rank", [1, 4, 16, 48])
@pytest.mark.parametrize("name", ["power", "spiked"])
def test_fast_mode_keeps_the_energy_in_few_columns(name, rank):
    matrix, _, s, _ = example((1031, 700), name)
    b, a, report = lora_factors(matrix.float(), rank, mode="fast", return_report=True)
    assert report.passes == {1: 8, 4: 10, 16: 18, 48: 24}[rank]
    assert float((b @ a).double().norm() ** 2) >= 0.999 * float(s[:rank].square().sum())


@pytest.mark.parametrize("mode", ["fast", "converged"])
@pytest.mark.parametrize("count, width", [(9, 0.0), (12, 1e-4), (20, 0.0), (20, 1e-2)])
@pytest.mark.parametrize("first", [0, 3])
def test_clusters_wider_than_a_block_are_found_whole(mode, count, width, first):
    """Blocks of 8 columns see a value of higher multiplicity eight times only."""
    shape, rank = (1031, 700), first + count
    s = 0.25 * torch.arange(1, 701).double() ** -0.3
    s[:first] = torch.linspace(3, 2, first)
    s[first : first + count] = torch.linspace(1, 1 - width, count)
    _, u, _, v = example(shape, "power")
    matrix = (u * s) @ v.T
    wanted = (u[:, :rank] * s[:rank]) @ v[:, :rank].T
    b, a, report = lora_factors(matrix.float(), rank, mode=mode, return_report=True)
    assert distance(b @ a, wanted) < (1e-3 if mode == "converged" else 3e-2)
    assert report.converged or mode == "fast"
    for cut in (first + count // 2, rank - 1):  # inside the cluster: a tie, if it is tight
        report = lora_factors(matrix.float(), cut, mode="converged", return_report=True)[2]
        assert report.converged == (width > 1e-3) and math.isinf(report.error) == (width < 1e-3)


def test_restarts_keep_the_answer(monkeypatch):
    monkeypatch.setattr(_krylov, "_BASIS", 64)
    matrix, *_ = example((640, 576), "power")
    u, s, vh, report = truncated_svd(matrix.float(), 8, return_report=True)
    assert report.passes > 2 * 64 // 16  # else nothing was restarted
    assert report.converged and distance((u * s) @ vh, best((640, 576), "power", 8)) < 1e-3
    check_orthonormal(u.T)
    check_orthonormal(vh)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_extreme_scales(scale):
    matrix = (example((640, 576), "spiked")[0] * scale).float()
    b, a, report = lora_factors(matrix, 8, return_report=True)
    assert report.converged
    assert distance(b.double() @ a.double(), best((640, 576), "spiked", 8) * scale) < 1e-3


def test_splits():
    matrix = example((640, 576), "spiked")[0].float()
    u, s, vh = truncated_svd(matrix, 8, tol=1e-5)
    b, a = lora_factors(matrix, 8, tol=1e-5)
    assert b.equal(u * s) and a.equal(vh)
    b, a = lora_factors(matrix, 8, split="sqrt", tol=1e-5)
    assert b.equal(u * s.sqrt()) and a.equal(vh * s.sqrt()[:, None])
    for split in ("none", "sqrt"):
        wanted = lora_factors_reference(matrix, 8, split)
        for found, truth in zip(
            lora_factors(matrix, 8, split=split, tol=1e-5), wanted, strict=True
        ):
            torch.testing.assert_close(found.double(), truth, rtol=1e-3, atol=1e-4)


def test_same_bits_from_the_same_seed_and_the_global_one_untouched():
    matrix = torch.randn(600, 530, generator=generator())
    state = torch.get_rng_state()
    first = truncated_svd(matrix, 6, mode="fast", seed=3)
    assert torch.get_rng_state().equal(state)
    for one, two in zip(first, truncated_svd(matrix, 6, mode="fast", seed=3), strict=True):
        assert one.equal(two)
    assert not first[0].equal(truncated_svd(matrix, 6, mode="fast", seed=4)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(640, 576), (523, 2003)], ids=str)
def test_same_bits_on_any_thread_count_which_is_restored(monkeypatch, shape, dtype):
    monkeypatch.setattr(_thin_products, "_ALONE", 0)  # however short, on every thread
    matrix = example(shape, "power")[0].to(dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(truncated_svd(matrix, 16, return_report=True))
        assert torch.get_num_threads() == threads
    (*one, report), *others = results
    assert report.passes > 0
    for *other, _ in others:
        assert all(a.equal(b) for a, b in zip(one, other, strict=True))


MATMULS = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)


def precision_settings():
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # both kinds of setting are in use
        legacy = "mixed"
    return legacy, [backend.fp32_precision for backend in MATMULS]


@pytest.fixture(params=["none", "legacy", "per backend"])
def loose_precision(request):
    before = precision_settings()
    if request.param == "legacy":
        torch.set_float32_matmul_precision("medium")
    elif request.param == "per backend":
        MATMULS[0].fp32_precision = "bf16"
    yield
    if request.param == "legacy":
        torch.set_float32_matmul_precision(before[0])
    for backend, precision in zip(MATMULS, before[1], strict=True):
        backend.fp32_precision = precision
    assert precision_settings() == before


def test_the_callers_precision_settings_neither_harm_nor_change(loose_precision):
    matrix = example((640, 576), "power")[0].float().requires_grad_()
    chosen = precision_settings()
    with torch.autocast("cpu", torch.bfloat16):
        b, a = lora_factors(matrix, 16, tol=1e-5)
        assert torch.is_autocast_enabled("cpu")
    assert precision_settings() == chosen
    assert not b.requires_grad and b.dtype == torch.float32
    assert distance(b @ a, best((640, 576), "power", 16)) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(30, 40), (600, 530), (530, 600)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_weights_are_named(bad, shape, dtype):
    matrix = torch.randn(shape, generator=generator()).to(dtype)
    matrix[17, 23] = bad
    with pytest.raises(ValueError, match=r"matrix: NaN or infinity at \[17, 23\]"):
        truncated_svd(matrix, 4)


def test_overflow_is_not_called_nan():
    with pytest.raises(ValueError, match="products overflow float32; scale it down"):
        truncated_svd(torch.full((600, 530), 3e38), 4)


def test_errors():
    matrix = torch.rand(4, 5)
    with pytest.raises(ValueError, match="rank: 5 is not between 1 and the shorter side of 4 x 5"):
        truncated_svd(matrix, 5)
    with pytest.raises(ValueError, match="rank: 0 is not between"):
        lora_factors(matrix, 0)
    with pytest.raises(ValueError, match="rank: 1 is not between 1 and the shorter side of 0 x 5"):
        lora_factors(torch.rand(0, 5), 1)
    with pytest.raises(TypeError, match="integer"):
        truncated_svd(matrix, 2.0)
    with pytest.raises(TypeError, match="expected dtype float32, .* got torch.int64"):
        truncated_svd(matrix.long(), 2)
    with pytest.raises(ValueError, match="expected at least 2 dimensions"):
        truncated_svd(matrix[0], 2)
    with pytest.raises(ValueError, match="tol: expected a value between 0 and 1, got 0"):
        truncated_svd(matrix, 2, tol=0.0)
    with pytest.raises(ValueError, match="mode: expected 'converged', 'fast' or 'exact'"):
        truncated_svd(matrix, 2, mode="quick")
    with pytest.raises(ValueError, match="split: expected 'none' or 'sqrt'"):
        lora_factors(matrix, 2, split="even")
