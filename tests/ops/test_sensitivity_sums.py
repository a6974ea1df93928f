# SPDX-License-Identifier: Apache-2.0
"""The sums that both sensitivities form beside, or instead of, the score."""

import dataclasses
import itertools

import pytest
import torch

from pkt_ext.ops import (
    SensitivitySums,
    _backend,
    accumulate_sensitivity_,
    accumulate_sensitivity_reference_,
    linear_sensitivity_,
    linear_sensitivity_reference_,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ALL = {"rows": True, "cols": True, "blocks": True}
RTOL = 1e-6  # worst seen below 5e-7: float32 contributions of a few rows
SPLIT_TOL = 1e-5  # float32 on the tensor cores; these problems' terms add up to less than 1
FIELDS = ("rows", "cols", "blocks", "total")

# one element, one row, one column, below, at and above a block and a tile, primes, several tiles
SHAPES = [(1, 1), (1, 131), (67, 1), (63, 65), (64, 64), (65, 192), (128, 130), (131, 60)]


def randn(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def zeros(shape, backend=None, **wanted):
    return SensitivitySums.zeros(shape, device=backend.device if backend else "cpu", **wanted)


def linear_problem(shape, dtype=torch.float32, weight_dtype=None, lengths=(5, 0, 7)):
    """weight, inputs, grad_outputs, segments"""
    out_features, in_features = shape
    return (
        randn(*shape, seed=2, dtype=weight_dtype or dtype),
        randn(sum(lengths), in_features, seed=3, dtype=dtype),
        randn(sum(lengths), out_features, seed=4, dtype=dtype) * 1e-2,
        torch.tensor([0, *lengths]).cumsum(0),
    )


def elementwise_problem(shape, dtype=torch.float32, weight_dtype=None):
    """weight, grad"""
    return randn(*shape, seed=2, dtype=weight_dtype or dtype), randn(*shape, seed=3, dtype=dtype)


OPS = {
    "linear": (linear_sensitivity_, linear_sensitivity_reference_, linear_problem),
    "elementwise": (
        accumulate_sensitivity_,
        accumulate_sensitivity_reference_,
        elementwise_problem,
    ),
}


@pytest.fixture(params=OPS)
def op(request):
    """(op, its reference, a problem of a shape)"""
    return OPS[request.param]


def on(backend, tensors):
    return [t.to(backend.device, copy=True) for t in tensors]


def check(backend, op, shape, operands, score=None, calls=1, **wanted):
    """Against float64: a sum of float32 contributions is off by their rounding and no more."""
    ours, reference, _ = op
    split = backend.name != "cpu" and ours is linear_sensitivity_ and operands[1].dtype == DTYPES[0]
    tol = {"rtol": SPLIT_TOL, "atol": SPLIT_TOL} if split else {"rtol": RTOL, "atol": 0}
    found, truth = zeros(shape, backend, **wanted), zeros(shape, **wanted)
    written = None if score is None else score.to(backend.device, copy=True)
    expected = None if score is None else score.double()
    for _ in range(calls):
        ours(written, *on(backend, operands), sums=found)
        reference(expected, *operands, sums=truth)
    for field in FIELDS:
        a, b = getattr(found, field), getattr(truth, field)
        assert (a is None) == (b is None), field
        if a is not None:
            torch.testing.assert_close(a.cpu(), b, **tol)
    assert found.nonfinite.item() == truth.nonfinite.item() == 0
    if score is not None:
        torch.testing.assert_close(written.cpu().double(), expected, **tol)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_score", [True, False])
def test_sums_match_reference(backend, op, shape, with_score):
    score = randn(*shape, seed=1).abs() if with_score else None
    check(backend, op, shape, op[2](shape), score, calls=2, **ALL)


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_sums_of_every_dtype(backend, op, dtypes):
    check(backend, op, (68, 72), op[2]((68, 72), *dtypes), **ALL)
    check(backend, op, (68, 72), op[2]((68, 72), *dtypes))  # the total alone


@pytest.mark.parametrize(
    "wanted", [dict(zip(ALL, w, strict=True)) for w in itertools.product([0, 1], repeat=3)], ids=str
)
def test_only_what_is_asked_for(backend, op, wanted):
    """Each alone equals, to the bit, the same among all."""
    shape, (ours, _, problem) = (130, 70), op
    operands = on(backend, problem(shape))
    alone, among = zeros(shape, backend, **wanted), zeros(shape, backend, **ALL)
    ours(None, *operands, sums=alone)
    ours(None, *operands, sums=among)
    for name, asked in wanted.items():
        if asked:
            assert getattr(alone, name).equal(getattr(among, name)), name
        else:
            assert getattr(alone, name) is None
    nothing = dataclasses.replace(among, total=None, nonfinite=None, **dict.fromkeys(ALL))
    score = torch.zeros(shape, device=backend.device)
    ours(score, *operands, sums=nothing)
    assert score.count_nonzero() > 0
    ours(None, *operands, sums=nothing)


@pytest.mark.parametrize("variant", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_every_kernel(backend, variant, dtype):
    """Every instruction set, and every tile of the GPU, whichever this machine would choose."""
    shape = (131, 140)
    operands = linear_problem(shape, dtype)
    score, found = torch.zeros(shape, device=backend.device), zeros(shape, backend, **ALL)
    truth = zeros(shape, **ALL)
    with _backend.device_of(score) as launch:
        given = (score, *on(backend, operands), found)
        size = _backend._C.linear_sensitivity_workspace(*given, **launch, variant=variant)
        workspace = torch.empty(size, dtype=torch.uint8, device=score.device)
        _backend._C.linear_sensitivity(*given, workspace, **launch, variant=variant)
    truth.add_reference(score.cpu())  # onto zeros: the scores are the contributions
    for field in FIELDS:
        ours, theirs = getattr(found, field).cpu(), getattr(truth, field)
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)


def test_sums_do_not_change_the_score(backend, op):
    shape, (ours, _, problem) = (70, 133), op
    operands = on(backend, problem(shape))
    plain, beside = (torch.ones(shape, device=backend.device) for _ in range(2))
    ours(plain, *operands)
    ours(beside, *operands, sums=zeros(shape, backend, **ALL))
    assert plain.equal(beside)


def test_sums_agree_with_each_other_and_the_score(backend, op):
    shape, (ours, _, problem) = (200, 190), op
    score, sums = torch.zeros(shape, device=backend.device), zeros(shape, backend, **ALL)
    ours(score, *on(backend, problem(shape)), sums=sums)
    exact = score.double()  # one call onto zeros: the scores are the contributions
    torch.testing.assert_close(sums.rows, exact.sum(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(sums.cols, exact.sum(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(sums.total, exact.sum(), rtol=1e-14, atol=0)
    padded = torch.nn.functional.pad(exact, (0, 2, 0, -200 % 64)).view(4, 64, 3, 64)
    torch.testing.assert_close(sums.blocks, padded.sum((1, 3)), rtol=1e-14, atol=0)


def test_sums_with_strided_operands(backend):
    """Transposed, offset by one element, every other row and column, and broadcast."""
    shape = (66, 72)
    weight, inputs, grads, segments = linear_problem(shape, torch.bfloat16)
    ways = [
        lambda t: t.T.contiguous().T,
        lambda t: torch.cat([t[:, :1], t], 1)[:, 1:],
        lambda t: torch.stack([t, t], 1).repeat_interleave(2, 2)[:, 1, ::2],
    ]
    for way, other in itertools.product(ways, ways):
        operands = way(weight), other(inputs), other(grads), segments
        truth, found = zeros(shape, **ALL), zeros(shape, backend, **ALL)
        linear_sensitivity_reference_(None, *operands, sums=truth)
        device = [
            way(weight.to(backend.device)),
            *(other(t.to(backend.device)) for t in (inputs, grads)),
        ]
        linear_sensitivity_(None, *device, segments.to(backend.device), sums=found)
        for field in FIELDS:
            torch.testing.assert_close(
                getattr(found, field).cpu(), getattr(truth, field), rtol=RTOL, atol=0
            )
        truth, found = zeros(shape, **ALL), zeros(shape, backend, **ALL)
        accumulate_sensitivity_reference_(None, way(weight), other(weight), sums=truth)
        accumulate_sensitivity_(None, device[0], other(weight.to(backend.device)), sums=found)
        for field in FIELDS:
            torch.testing.assert_close(
                getattr(found, field).cpu(), getattr(truth, field), rtol=RTOL, atol=0
            )


@pytest.mark.parametrize("shape", [(), (5,), (3, 5, 7), (2, 3, 4, 65)], ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_tensors_are_seen_as_matrices(backend, shape, permuted):
    """[..., C] is [R, C]; a permuted operand's strides may be no single one."""
    weight, grad = elementwise_problem(shape)
    operands = on(backend, (weight, grad))
    if permuted:
        operands[0] = operands[0].mT.contiguous().mT if len(shape) > 1 else operands[0]
        order = list(reversed(range(len(shape))))
        operands[1] = operands[1].permute(order).contiguous().permute(order)
    score = torch.zeros(shape, device=backend.device)
    truth, found = zeros(shape, **ALL), zeros(shape, backend, **ALL)
    accumulate_sensitivity_reference_(None, weight, grad, sums=truth)
    accumulate_sensitivity_(score, *operands, sums=found)
    for field in FIELDS:
        torch.testing.assert_close(
            getattr(found, field).cpu(), getattr(truth, field), rtol=1e-6, atol=0
        )
    torch.testing.assert_close(score.cpu(), (weight * grad).abs(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_sums_of_nothing(backend, op, shape):
    ours, _, problem = op
    sums = zeros(shape, backend, **ALL)
    sums.total.fill_(3)
    ours(None, *on(backend, problem(shape)), sums=sums)
    assert sums.total == 3 and sums.nonfinite == 0
    assert sums.rows.count_nonzero() == sums.cols.count_nonzero() == 0
    assert sums.blocks.shape == (-(-shape[0] // 64), -(-shape[1] // 64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("with_score", [True, False])
def test_what_is_not_finite_is_flagged(backend, op, bad, with_score):
    """Every operand, first and last element; the sums it is no part of stay finite."""
    shape, (ours, _, problem) = (70, 68), op
    for operand, (row, col) in itertools.product((0, 1), ((0, 0), (-1, -1))):
        operands = on(backend, problem(shape))
        operands[operand][row, col] = bad
        sums = zeros(shape, backend, **ALL)
        score = torch.zeros(shape, device=backend.device) if with_score else None
        ours(score, *operands, sums=sums)
        assert sums.nonfinite == 1 and not sums.total.isfinite()
        assert not sums.cols[col].isfinite() and not sums.blocks[row, col].isfinite()
        assert sums.cols[:-1].isfinite().all() if col else sums.cols[1:].isfinite().all()
        clean = zeros(shape, backend)
        ours(None, *on(backend, problem(shape)), sums=clean)
        assert clean.nonfinite == 0
        ours(None, *on(backend, problem(shape)), sums=sums)
        assert sums.nonfinite == 1  # and stays so


def test_infinite_weight_times_zero_is_flagged(backend, op):
    shape, (ours, _, problem) = (66, 70), op
    operands = on(backend, problem(shape))
    operands[0][65, 3] = float("inf")
    operands[1][:, 3] = 0.0  # of the gradient, or of the inputs
    sums = zeros(shape, backend, **ALL)
    ours(None, *operands, sums=sums)
    assert sums.nonfinite == 1 and sums.cols[3].isnan() and sums.rows[65].isnan()
    assert sums.cols.isnan().sum() == sums.rows.isnan().sum() == sums.blocks.isnan().sum() == 1


def test_score_beyond_float32_is_flagged(backend, op):
    """Finite contributions onto a score near the largest float32."""
    shape, (ours, _, problem) = (5, 6), op
    operands = on(backend, problem(shape))
    operands[0].fill_(2e38)
    operands[1].fill_(1.0 if len(operands) == 2 else 1e-3)
    if len(operands) == 4:
        operands[2].fill_(1e2)
    sums = zeros(shape, backend)
    ours(None, *operands, sums=sums)
    assert sums.nonfinite == 0 and sums.total > 1e38 and sums.total.isfinite()
    score = torch.full(shape, 3e38, device=backend.device)
    ours(score, *operands, sums=sums)
    assert score.isinf().all() and sums.nonfinite == 1 and sums.total.isfinite()


def test_sums_have_equal_bits_on_any_thread_count(op, any_threads):
    shape, (ours, _, problem) = (600, 1100), op
    operands, found = problem(shape), []
    for threads in (1, 2, 5, 2):
        torch.set_num_threads(threads)
        found.append(zeros(shape, **ALL))
        ours(None, *operands, sums=found[-1])
    for other in found[1:]:
        assert all(getattr(other, f).equal(getattr(found[0], f)) for f in FIELDS)


def test_sums_have_equal_bits_in_every_run(backend, op):
    shape, (ours, _, problem) = (130, 200), op
    operands, found = on(backend, problem(shape)), [zeros(shape, backend, **ALL) for _ in range(2)]
    for sums in found:
        ours(None, *operands, sums=sums)
    assert all(getattr(found[0], f).equal(getattr(found[1], f)) for f in FIELDS)


def test_errors(backend, op):
    shape, (ours, _, problem) = (66, 5), op
    operands, sums = on(backend, problem(shape)), zeros(shape, backend, **ALL)

    def call(**fields):
        ours(None, *operands, sums=dataclasses.replace(sums, **fields))

    with pytest.raises(ValueError, match="score and sums: both are None, there is nothing to add"):
        ours(None, *operands)
    for field, value, message in [
        ("rows", sums.rows[1:], r"sums.rows: expected shape \[66\], got \[65\]"),
        ("cols", sums.cols[None], r"sums.cols: expected 1 dimensions, got shape \[1, 5\]"),
        ("blocks", sums.blocks.T, r"sums.blocks: expected shape \[2, 1\], got \[1, 2\]"),
        ("total", sums.rows, r"sums.total: expected 0 dimensions, got shape \[66\]"),
        ("rows", sums.rows.repeat(2)[::2], r"sums.rows: expected a contiguous tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(**{field: value})
    for field, value, message in [
        ("cols", sums.cols.float(), "sums.cols: expected dtype float64, got torch.float32"),
        (
            "nonfinite",
            sums.nonfinite.long(),
            "sums.nonfinite: expected dtype int32, got torch.int64",
        ),
    ]:
        with pytest.raises(TypeError, match=message):
            call(**{field: value})
    with pytest.raises(ValueError, match="expected"):
        ours(None, operands[0], operands[1][:, 1:], *operands[2:], sums=sums)
