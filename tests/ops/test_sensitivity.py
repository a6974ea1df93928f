# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pkt_ext.ops import (
    _backend,
    accumulate_sensitivity_,
    accumulate_sensitivity_reference_,
    linear_sensitivity_,
    linear_sensitivity_reference_,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# out_features, in_features, rows of each sample: one element, below, at and above a GPU tile and a
# register tile, primes, samples shorter than a step, empty, and longer than a chunk of the CPU's
SHAPES = [
    (1, 1, [1]),
    (1, 70, [3, 2]),
    (7, 1, [5]),
    (63, 65, [8, 9]),
    (64, 64, [16, 16]),
    (129, 49, [7, 0, 17]),
    (47, 131, [37]),
    (9, 10, [150, 1, 129]),
]


def segments_of(lengths, start=0):
    return torch.tensor([start, *lengths]).cumsum(0)


def randn(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(out_features, in_features, lengths, dtype=torch.float32, weight_dtype=None):
    """score, weight, inputs, grad_outputs, segments"""
    rows = sum(lengths)
    return (
        randn(out_features, in_features, seed=1).abs(),
        randn(out_features, in_features, seed=2, dtype=weight_dtype or dtype),
        randn(rows, in_features, seed=3, dtype=dtype),
        randn(rows, out_features, seed=4, dtype=dtype) * 1e-2,
        segments_of(lengths),
    )


def assert_within_budget(found, score, weight, inputs, grads, segments, split=False):
    """|ours - truth| <= 2 |torch in float32 - truth| + 8 ulp of the terms' magnitudes, or 2^-15 of
    them where float32 is split for the tensor cores."""
    truth, plain = score.double(), score.clone()
    linear_sensitivity_reference_(truth, weight, inputs, grads, segments)
    linear_sensitivity_reference_(plain, weight, inputs, grads, segments)
    terms = score.double().abs()
    linear_sensitivity_reference_(
        terms, weight, inputs.double().abs(), grads.double().abs(), segments
    )
    excess = (found.double() - truth).abs() - 2 * (plain - truth).abs()
    excess -= (2.0**-15 if split else 2.0**-21) * terms
    worst = int(excess.argmax())
    assert excess.max() <= 0, (worst, found.flatten()[worst], truth.flatten()[worst])


def check(backend, score, *operands):
    found = score.to(backend.device, copy=True)
    assert linear_sensitivity_(found, *(t.to(backend.device) for t in operands)) is None
    split = backend.name != "cpu" and operands[1].dtype == torch.float32
    assert_within_budget(found.cpu(), score, *operands, split=split)


def run_variant(operands, variant, sums=None):
    """One of the compiled variants (sensitivity.h), which the public op would not choose here."""
    with _backend.device_of(operands[0]) as launch:
        given = (*operands, sums)
        size = _backend._C.linear_sensitivity_workspace(*given, **launch, variant=variant)
        workspace = torch.empty(size, dtype=torch.uint8, device=operands[0].device)
        _backend._C.linear_sensitivity(*given, workspace, **launch, variant=variant)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_matches_reference(backend, shape, dtype):
    check(backend, *problem(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_at_a_real_size(dtype):
    score, *operands = problem(4864, 896, [23, 31, 12], dtype=dtype)  # Qwen2.5-0.5B up_proj
    found = score.clone()
    linear_sensitivity_(found, *operands)
    assert_within_budget(found, score, *operands)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_variants(backend, dtype):
    """Every instruction set, and both tiles of the GPU, whichever this machine would choose."""
    score, *operands = problem(131, 140, [19, 0, 16], dtype=dtype)
    for variant in (0, 1) if backend.emulated or backend.name == "cuda" else (0, 1, 2):
        found = score.to(backend.device, copy=True)
        run_variant([found, *(t.to(backend.device) for t in operands)], variant)
        assert_within_budget(found.cpu(), score, *operands)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[1], [3] * 20, [160, 7]], ids=str)
def test_linear_keeps_its_documented_bound(backend, dtype, lengths):
    _, weight, inputs, grads, segments = problem(70, 40, lengths, dtype)
    zero = torch.zeros(70, 40, dtype=torch.float64)
    truth, terms = zero.clone(), zero.clone()
    linear_sensitivity_reference_(truth, weight, inputs, grads, segments)
    linear_sensitivity_reference_(
        terms, weight, inputs.double().abs(), grads.double().abs(), segments
    )
    for variant in (0, 1, 2):
        factor = 2.0**-24 * (max(lengths) + len(lengths) + 8)
        if dtype == torch.float32 and variant == 2 and backend.name != "cpu":
            factor += 2.0**-15
        found = torch.zeros(70, 40, device=backend.device)
        run_variant(
            [t.to(backend.device) for t in (found, weight, inputs, grads, segments)], variant
        )
        assert ((found.cpu() - truth).abs() <= factor * terms).all()


@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_linear_with_strided_operands(backend, weight_dtype):
    """Transposed (a Conv1D's weight), offset by one element, every other row and column."""
    out_features, in_features, lengths = 70, 66, [9, 12]
    score, weight, inputs, grads, segments = problem(
        out_features, in_features, lengths, torch.float16, weight_dtype
    )
    weights = [weight.T.contiguous().T, torch.stack([weight, weight], 2)[:, :, 1]]
    rows = [
        lambda t: t.T.contiguous().T,
        lambda t: torch.cat([t[:, :1], t], 1)[:, 1:],
        lambda t: torch.stack([t, t], 1).repeat_interleave(2, 2)[:, 1, ::2],
    ]
    for weight, strided in itertools.product(weights, rows):
        assert not weight.is_contiguous() and not strided(inputs).is_contiguous()
        check(backend, score, weight, strided(inputs), strided(grads), segments)


def test_linear_ignores_rows_outside_segments(backend):
    score, weight, inputs, grads, _ = problem(20, 30, [50])
    inputs[:5], inputs[40:], grads[:5], grads[40:] = (float("nan"),) * 4
    for lengths in ([0, 0, 17, 0, 18, 0], [35], [0]):
        check(backend, score, weight, inputs, grads, segments_of(lengths, start=5))
    check(backend, score, weight, inputs, grads, torch.tensor([50]))  # no sample at all


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (5, 4, 0)], ids=str)
def test_linear_of_nothing(backend, shape):
    out_features, in_features, rows = shape
    score = torch.ones(out_features, in_features, device=backend.device)
    inputs = torch.ones(rows, in_features, device=backend.device)
    grads = torch.ones(rows, out_features, device=backend.device)
    linear_sensitivity_(score, score.clone(), inputs, grads, torch.tensor([0, rows]))
    assert (score == 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("operand", [1, 2, 3])
def test_linear_keeps_what_is_not_finite(backend, bad, operand):
    """Scores are NaN and infinite exactly where the reference's are; infinity times zero is NaN."""
    operands = list(problem(66, 67, [9, 10]))
    operands[1][3], operands[2][:, 5], operands[3][:, 7] = 0.0, 0.0, 0.0
    operands[operand][3, 66 if operand != 3 else 65] = bad
    expected = operands[0].clone()
    linear_sensitivity_reference_(expected, *operands[1:])
    found = [t.to(backend.device, copy=True) for t in operands]
    linear_sensitivity_(*found)
    assert not expected.isfinite().all()
    assert found[0].isnan().cpu().equal(expected.isnan())
    assert found[0].isinf().cpu().equal(expected.isinf())


def test_linear_has_equal_bits_on_any_thread_count(any_threads):
    score, *operands = problem(700, 1100, [60, 0, 200, 7])
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(score.clone())
        linear_sensitivity_(found[-1], *operands)
    assert found[0].equal(found[1]) and found[0].equal(found[2])


def test_linear_has_equal_bits_in_every_run(backend):
    score, *operands = (t.to(backend.device) for t in problem(65, 66, [9, 20]))
    first, second = score.clone(), score.clone()
    linear_sensitivity_(first, *operands)
    linear_sensitivity_(second, *operands)
    assert first.equal(second)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_linear_adds_over_samples_in_any_order(data):
    lengths = data.draw(st.lists(st.integers(0, 140), min_size=1, max_size=5))
    shape = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    dtype = data.draw(st.sampled_from(DTYPES))
    score, weight, inputs, grads, segments = problem(*shape, lengths, dtype)
    whole, split, shuffled = score.clone(), score.clone(), score.clone()
    linear_sensitivity_(whole, weight, inputs, grads, segments)
    cut = data.draw(st.integers(0, len(lengths)))
    for part in (segments[: cut + 1], segments[cut:]):
        linear_sensitivity_(split, weight, inputs, grads, part)
    torch.testing.assert_close(split, whole, rtol=1e-6, atol=0)
    order = data.draw(st.permutations(range(len(lengths))))
    rows = [torch.arange(int(segments[n]), int(segments[n + 1])) for n in order]
    rows = torch.cat(rows)
    linear_sensitivity_(
        shuffled, weight, inputs[rows], grads[rows], segments_of([lengths[n] for n in order])
    )
    torch.testing.assert_close(shuffled, whole, rtol=1e-6, atol=0)
    assert (whole >= score).all()


def test_linear_is_the_gradient_of_each_sample():
    """Against autograd: one backward a sample, as the published script does it."""
    layer = torch.nn.Linear(13, 11)
    lengths = [4, 1, 6]
    inputs, head = randn(11, 13, seed=5), randn(11, 11, seed=6)
    expected, grads = torch.zeros(11, 13), []
    for x, h in zip(inputs.split(lengths), head.split(lengths), strict=True):
        y = layer(x)
        y.retain_grad()
        layer.zero_grad()
        ((y * h).tanh().sum() / len(x)).backward()
        expected += (layer.weight * layer.weight.grad).abs().detach()
        grads.append(y.grad)
    score = torch.zeros(11, 13)
    linear_sensitivity_(score, layer.weight, inputs, torch.cat(grads), segments_of(lengths))
    torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "shape", [(), (0,), (3, 0), (1,), (2047,), (2049,), (4096,), (3, 5, 7)], ids=str
)
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_accumulate_matches_reference(backend, shape, dtypes):
    score = randn(*shape, seed=1).abs()
    weight = randn(*shape, seed=2, dtype=dtypes[0])
    grad = randn(*shape, seed=3, dtype=dtypes[1]) * 1e-3
    truth = score.double()
    accumulate_sensitivity_reference_(truth, weight, grad)
    found = score.to(backend.device, copy=True)
    assert accumulate_sensitivity_(found, weight.to(found.device), grad.to(found.device)) is None
    torch.testing.assert_close(found.cpu().double(), truth, rtol=2.0**-22, atol=0)


def test_accumulate_with_strided_operands(backend):
    score = randn(3, 34, 33, seed=1).abs()
    base = randn(33, 3, 34, seed=2)
    operands = [
        base.permute(1, 2, 0),
        base.permute(1, 2, 0).contiguous(),
        randn(4, 34, 33, seed=3)[1:],
        randn(3, 34, 67, seed=4)[..., 1::2],
        randn(3 * 34 * 33 + 1, seed=5)[1:].view(3, 34, 33),
        randn(33, seed=6).expand(3, 34, 33),
    ]
    for weight, grad in itertools.combinations(operands, 2):
        for part in (slice(None), 0, (slice(None), 3), (0, slice(None), 3)):
            truth = score[part].double().contiguous()
            accumulate_sensitivity_reference_(truth, weight[part], grad[part])
            found = score[part].clone(memory_format=torch.contiguous_format).to(backend.device)
            accumulate_sensitivity_(found, *(t.to(backend.device)[part] for t in (weight, grad)))
            torch.testing.assert_close(found.cpu().double(), truth, rtol=2.0**-22, atol=0)


def test_accumulate_does_not_flush_small_products(backend):
    """A float16 product of these would be zero."""
    score = torch.zeros(9, device=backend.device)
    small = torch.full((9,), 2.0**-14, dtype=torch.float16, device=backend.device)
    accumulate_sensitivity_(score, small, -small)
    assert (score == 2.0**-28).all()


@pytest.mark.parametrize("size", [7, 4099])
def test_accumulate_keeps_what_is_not_finite(backend, size):
    score, weight, grad = (randn(size, seed=i) for i in range(3))
    weight[0], weight[3], grad[3], grad[size - 2] = float("inf"), float("inf"), 0.0, float("nan")
    expected = score.clone()
    accumulate_sensitivity_reference_(expected, weight, grad)
    found = score.to(backend.device, copy=True)
    accumulate_sensitivity_(found, weight.to(backend.device), grad.to(backend.device))
    assert found.isnan().nonzero().flatten().tolist() == [3, size - 2] and found[0] == float("inf")
    assert found.isfinite().cpu().equal(expected.isfinite())


def test_accumulate_has_equal_bits_on_any_thread_count(any_threads):
    score, weight, grad = (randn(1200, 901, seed=i) for i in range(3))
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(score.clone())
        accumulate_sensitivity_(found[-1], weight, grad.T.contiguous().T)
    assert found[0].equal(found[1]) and found[0].equal(found[2])


def test_accumulate_errors(backend):
    score = torch.zeros(3, 4, device=backend.device)
    with pytest.raises(ValueError, match=r"weight: expected score's shape \[3, 4\], got \[4, 3\]"):
        accumulate_sensitivity_(score, score.T, score)
    with pytest.raises(ValueError, match=r"grad: expected score's shape \[3, 4\], got \[4\]"):
        accumulate_sensitivity_(score, score, score[0])
    with pytest.raises(ValueError, match=r"score: expected a contiguous tensor, got strides"):
        accumulate_sensitivity_(score.T, score.T, score.T)
    with pytest.raises(TypeError, match="score: expected dtype float32, got torch.float16"):
        accumulate_sensitivity_(score.half(), score, score)
    with pytest.raises(TypeError, match="weight: expected dtype float32, .* got torch.float64"):
        accumulate_sensitivity_(score, score.double(), score)
    with pytest.raises(TypeError, match="grad: expected dtype float32, .* got torch.int64"):
        accumulate_sensitivity_(score, score, score.long())


def test_linear_errors(backend):
    tensors = [t.to(backend.device) for t in problem(3, 4, [5, 2])]

    def call(place, value):
        linear_sensitivity_(*tensors[:place], value, *tensors[place + 1 :])

    score, weight, inputs, grads, segments = tensors
    for place, value, message in [
        (
            0,
            score.T,
            r"score: expected a contiguous tensor, got strides \[1, 4\] for shape \[4, 3\]",
        ),
        (0, score[0], r"score: expected 2 dimensions, got shape \[4\]"),
        (1, weight.T, r"weight: expected shape \[3, 4\], got \[4, 3\]"),
        (2, inputs[:, 1:], r"inputs: expected shape \[7, 4\], got \[7, 3\]"),
        (3, grads[1:], r"grad_outputs: expected shape \[7, 3\], got \[6, 3\]"),
        (4, segments.cpu()[None], r"segments: expected shape \[N \+ 1\], got \[1, 3\]"),
        (4, segments.cpu()[:0], r"segments: expected shape \[N \+ 1\], got \[0\]"),
        (4, torch.tensor([0, 5, 3]), r"within \[0, 7\], got 3 after 5 at index 2"),
        (4, torch.tensor([0, 5, 8]), r"within \[0, 7\], got 8 after 5 at index 2"),
        (4, torch.tensor([-1, 5]), r"within \[0, 7\], got -1 after 0 at index 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(place, value)
    for place, value, message in [
        (0, score.double(), "score: expected dtype float32, got torch.float64"),
        (1, weight.long(), "weight: expected dtype float32, .* got torch.int64"),
        (2, inputs.double(), "inputs: expected dtype float32, .* got torch.float64"),
        (3, grads.half(), r"grad_outputs \(of the inputs' dtype\): expected dtype float32, got"),
        (4, segments.cpu().int(), "segments: expected dtype int64, got torch.int32"),
    ]:
        with pytest.raises(TypeError, match=message):
            call(place, value)


def test_linear_clamps_bad_offsets_on_the_device(backend):
    """The host does not see them; the kernel reads nothing outside the rows."""
    if backend.name == "cpu":
        pytest.skip("the op validates offsets on the host")
    operands = [t.to(backend.device) for t in problem(70, 20, [9, 20])]
    operands[-1] = torch.tensor([-(2**40), 12, 5, 2**40, 2**41], device=backend.device)
    run_variant(operands, -1)
    assert operands[0].isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_linear_segments_on_either_device():
    score, *operands = (t.cuda() for t in problem(70, 80, [9, 20]))
    found = [score.clone(), score.clone()]
    linear_sensitivity_(found[0], *operands)
    linear_sensitivity_(found[1], *operands[:-1], operands[-1].cpu())
    assert found[0].equal(found[1])
    with pytest.raises(ValueError, match="weight: lies on another device than the first tensor"):
        linear_sensitivity_(score, operands[0].cpu(), *operands[1:])
