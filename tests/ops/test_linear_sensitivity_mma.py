# SPDX-License-Identifier: Apache-2.0
"""The tensor-core kernels of linear_sensitivity_, under the emulation and on a GPU."""

import pytest
import torch

from pkt_ext.ops import SensitivitySums, _backend, linear_sensitivity_reference_

MMA, WGMMA = 2, 3  # variants: sensitivity.h
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [*HALVES, torch.float32]
CASES = [(MMA, dtype) for dtype in DTYPES] + [(WGMMA, dtype) for dtype in HALVES]

# out_features, in_features, rows of each sample: one score, primes, below, at and above a tile and
# a warp's part of one; samples below, at and above half a step and a step, empty, many steps long
SHAPES = [
    (1, 1, [1]),
    (127, 37, [15, 17]),
    (128, 128, [16]),
    (131, 8, [33, 0, 1]),
    (9, 257, [32]),
    (64, 33, [0, 161]),
    (2, 65, [7, 353]),
]


@pytest.fixture(autouse=True)
def only_where_the_kernels_run(backend):
    if backend.name == "cpu":
        pytest.skip("tensor-core kernels have no CPU version")


@pytest.fixture(
    params=CASES, ids=lambda case: f"{'wgmma' if case[0] == WGMMA else 'mma'}-{case[1]}"
)
def case(request, backend):
    """(variant, dtype)"""
    if request.param[0] == WGMMA and not backend.has_wgmma:
        pytest.skip("wgmma needs sm_90a")
    return request.param


def segments_of(lengths, start=0):
    return torch.tensor([start, *lengths]).cumsum(0)


def randn(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(out_features, in_features, lengths, dtype):
    """score, weight, inputs, grad_outputs, segments; rows are apart by a multiple of 16 bytes."""
    rows, wide = sum(lengths), [-(-size // 8) * 8 for size in (in_features, out_features)]
    return (
        randn(out_features, in_features, seed=1).abs(),
        randn(out_features, in_features, seed=2, dtype=dtype),
        randn(rows, wide[0], seed=3, dtype=dtype)[:, :in_features],
        (randn(rows, wide[1], seed=4) * 1e-2).to(dtype)[:, :out_features],
        segments_of(lengths),
    )


def run(backend, score, *operands, variant=MMA, sums=None):
    """The score after the call; operands keep their strides on their way to the device."""
    to_device = [
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=backend.device).copy_(t)
        for t in operands  # to() would make a view dense
    ]
    found = score if score is None else score.to(backend.device, copy=True)
    arguments = (found, *to_device, sums)
    with _backend.device_of(to_device[0]) as launch:
        size = _backend._C.linear_sensitivity_workspace(*arguments, **launch, variant=variant)
        workspace = torch.empty(size, dtype=torch.uint8, device=backend.device)
        _backend._C.linear_sensitivity(*arguments, workspace, **launch, variant=variant)
    return found if score is None else found.cpu()


def truth_of(score, *operands):
    """The score in float64, and |weight| sum |grad| |input| in it, to which errors are relative."""
    truth, terms = score.double(), torch.zeros_like(score, dtype=torch.float64)
    linear_sensitivity_reference_(truth, *operands)
    weight, inputs, grads, segments = operands
    linear_sensitivity_reference_(
        terms, weight, inputs.double().abs(), grads.double().abs(), segments
    )
    return truth, terms


def assert_within_budget(found, score, *operands):
    """Of the terms: 2^-15 for the split of float32, 2^-22 for each 16 rows; 2^-22 of the score."""
    truth, terms = truth_of(score, *operands)
    longest = int(operands[-1].diff().max()) if len(operands[-1]) > 1 else 0
    split = 2.0**-15 if operands[1].dtype == torch.float32 else 0.0
    budget = (split + 2.0**-22 * (2 + longest / 16)) * terms + 2.0**-22 * truth
    excess = (found.double() - truth).abs() - budget
    worst = int(excess.argmax())
    assert excess.max() <= 0, (worst, found.flatten()[worst], truth.flatten()[worst])


def check(backend, score, *operands, **kwargs):
    assert_within_budget(run(backend, score, *operands, **kwargs), score, *operands)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(backend, case, shape):
    variant, dtype = case
    check(backend, *problem(*shape, dtype), variant=variant)


def test_several_tiles(backend, case):
    """Every tile at its place, and no column or row of one in another's."""
    variant, dtype = case
    check(backend, *problem(257, 130, [17, 5], dtype), variant=variant)
    check(backend, *problem(70, 385, [16, 20], dtype), variant=variant)
    if variant == MMA:  # beyond one band of TilePlace
        check(backend, *problem(13 * 128 + 1, 129, [3], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_operands(backend, dtype):
    """Transposed, offset by one element, every other column; each operand by itself."""
    score, weight, inputs, grads, segments = problem(40, 24, [18, 3], dtype)
    strided = [
        lambda t: t.T.contiguous().T,
        lambda t: torch.cat([t[:, :1], t], 1)[:, 1:],
        lambda t: t.repeat_interleave(2, 1)[:, ::2],
    ]
    for change in strided:
        for x, d in ((change(inputs), grads), (inputs, change(grads))):
            assert not (x.is_contiguous() and d.is_contiguous())
            check(backend, score, weight.T.contiguous().T, x, d, segments)


def test_rows_outside_segments_do_not_count(backend, case):
    variant, dtype = case
    score, weight, inputs, grads, _ = problem(20, 30, [70], dtype)
    inputs[:5], inputs[60:], grads[:5], grads[60:] = (float("nan"),) * 4
    for lengths in ([0, 0, 17, 0, 38, 0], [55], [0], []):
        segments = segments_of(lengths, start=5)
        check(backend, score, weight, inputs, grads, segments, variant=variant)


def test_bad_segments_are_clamped(backend, case):
    """Offsets the caller could not check on a GPU: nothing outside the operands is read."""
    variant, dtype = case
    score, weight, inputs, grads, _ = problem(20, 30, [40], dtype)
    segments = torch.tensor([-3, 10, 5, 20, 1 << 40])
    found = run(backend, score, weight, inputs, grads, segments, variant=variant)
    rows = torch.cat([torch.arange(0, 10), torch.arange(5, 20), torch.arange(20, 40)])
    meant = (score, weight, inputs[rows], grads[rows], segments_of([10, 15, 20]))
    assert_within_budget(found, *meant)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("operand", [1, 2, 3])
def test_keeps_what_is_not_finite(backend, case, bad, operand):
    """Scores are NaN and infinite exactly where float32's are; infinity times zero is NaN."""
    variant, dtype = case
    operands = list(problem(66, 67, [9, 10], dtype))
    operands[1][3], operands[2][:, 5], operands[3][:, 7] = 0.0, 0.0, 0.0
    operands[operand][3, 66 if operand != 3 else 65] = bad
    expected = operands[0].clone()
    linear_sensitivity_reference_(expected, *operands[1:])
    sums = SensitivitySums.zeros(expected.shape, device=backend.device)
    found = run(backend, *operands, variant=variant, sums=sums)
    assert not expected.isfinite().all()
    assert found.isnan().equal(expected.isnan())
    assert found.isinf().equal(expected.isinf())
    assert sums.nonfinite == 1


def test_float32_beyond_bfloat16_stays_finite(backend):
    """The largest float32 rounds to infinity in bfloat16; its high part must not."""
    largest = torch.finfo(torch.float32).max
    for sign in (1.0, -1.0):
        inputs = torch.tensor([[sign * largest, 1.0]]).repeat(3, 1)
        grads = torch.tensor([[0.25, 2.0**-126]]).repeat(3, 1)
        operands = (torch.zeros(2, 2), torch.ones(2, 2), inputs, grads, torch.tensor([0, 3]))
        found = run(backend, *operands)
        assert found.isfinite().all()
        assert_within_budget(found, *operands)


def test_float32_split_is_as_good_as_it_says(backend):
    """The budget is not slack: single bfloat16 products miss it, three stay far within it."""
    score, *operands = problem(32, 48, [200], torch.float32)
    truth, terms = truth_of(torch.zeros_like(score), *operands)
    error = (run(backend, torch.zeros_like(score), *operands).double() - truth).abs() / terms
    assert error.max() < 2.0**-17
    weight, inputs, grads, segments = operands
    rounded = (weight, inputs.bfloat16(), grads.bfloat16(), segments)
    error = (run(backend, torch.zeros_like(score), *rounded).double() - truth).abs() / terms
    assert error.max() > 2.0**-12


def test_only_sums(backend, case):
    """Without a score: the sums of what would have been added to it, to the bit."""
    variant, dtype = case
    shape, lengths = (130, 140), [19, 16]
    score, *operands = problem(*shape, lengths, dtype)
    wanted = dict(device=backend.device, rows=True, cols=True, blocks=True)
    alone, beside = (SensitivitySums.zeros(shape, **wanted) for _ in range(2))
    zero = torch.zeros_like(score)
    assert run(backend, None, *operands, variant=variant, sums=alone) is None
    contributions = run(backend, zero, *operands, variant=variant, sums=beside)
    expected = SensitivitySums.zeros(shape, **wanted | {"device": "cpu"})
    expected.add_reference(contributions)
    for name in ("rows", "cols", "blocks", "total", "nonfinite"):
        found = getattr(alone, name).cpu()
        assert found.equal(getattr(beside, name).cpu())
        torch.testing.assert_close(found, getattr(expected, name), rtol=1e-13, atol=0)


def test_equal_bits_in_every_run(backend, case):
    variant, dtype = case
    operands = problem(65, 66, [9, 40], dtype)
    first, second = (run(backend, *operands, variant=variant) for _ in range(2))
    assert first.equal(second)


@pytest.mark.parametrize("lengths", [[170] * 4, [1, 15, 16, 17, 33, 300]], ids=str)
def test_at_a_real_size(backend, case, lengths):
    if backend.emulated:
        pytest.skip("too large for the emulation")
    variant, dtype = case
    check(backend, *problem(4864, 896, lengths, dtype), variant=variant)  # Qwen2.5-0.5B up_proj


@pytest.mark.parametrize("dtype", HALVES)
def test_wgmma_agrees_with_mma(backend, dtype):
    if not backend.has_wgmma:
        pytest.skip("wgmma needs sm_90a")
    operands = problem(131, 200, [64, 47, 81], dtype)
    _, terms = truth_of(*operands)
    mma, wgmma = (run(backend, *operands, variant=variant).double() for variant in (MMA, WGMMA))
    assert ((mma - wgmma).abs() <= 2.0**-18 * (terms + operands[0])).all()
