# SPDX-License-Identifier: Apache-2.0
"""The CPU's register tiles of linear_sensitivity: every compiled variant, its edges, its sums."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pkt_ext.ops import SensitivitySums, _backend, linear_sensitivity_reference_

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VARIANTS = {"baseline": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3, "best": -1}
SUMS = ["rows", "cols", "blocks", "total"]

# around the tiles of 4 x 8, 6 x 16 and 6 x 64, the strips of 64 and the blocks of 192 x 256
HEIGHTS = [1, 4, 5, 6, 7, 63, 64, 66, 191, 193, 200]
WIDTHS = [1, 7, 8, 9, 16, 17, 63, 64, 65, 255, 257, 270]
# around the chunks of 256 steps of one or two rows, cut at half of it or not at all
LENGTHS = [0, 1, 2, 3, 32, 127, 128, 129, 255, 256, 257, 511, 513, 1030]


def run(score, weight, inputs, grads, segments, *, variant, sums=None):
    operands = (score, weight, inputs, grads, segments, sums)
    with _backend.device_of(weight) as launch:
        size = _backend._C.linear_sensitivity_workspace(*operands, **launch, variant=variant)
        workspace = torch.full((size,), 255, dtype=torch.uint8)  # poison: floats of it are NaN
        _backend._C.linear_sensitivity(*operands, workspace, **launch, variant=variant)


def all_sums(weight):
    return SensitivitySums.zeros(weight.shape, device="cpu", rows=True, cols=True, blocks=True)


def segments_of(lengths, start=0):
    return torch.tensor([start, *lengths]).cumsum(0)


def normal(out_features, in_features, lengths, dtype, seed=0):
    """score, weight, inputs, grads, segments"""
    made = torch.Generator().manual_seed(seed)
    shapes = [
        (out_features, in_features),
        (sum(lengths), in_features),
        (sum(lengths), out_features),
    ]
    operands = [torch.randn(shape, generator=made).to(dtype) for shape in shapes]
    score = torch.rand(shapes[0], generator=made)
    return score, *operands, segments_of(lengths)


def integers(out_features, in_features, lengths, dtype, seed=0):
    """The same of small integers: every product and sum is exact in float32."""
    score, *operands, segments = normal(out_features, in_features, lengths, dtype, seed)
    return (score * 9).round(), *((t * 1.5).round().clamp(-3, 3) for t in operands), segments


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(HEIGHTS),
    st.sampled_from(WIDTHS),
    st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=5),
)
def test_integers_are_exact(dtype, variant, out_features, in_features, lengths):
    score, *operands = integers(out_features, in_features, lengths, dtype)
    sums, expected_sums = all_sums(score), all_sums(score)
    found, expected = score.clone(), score.double()
    for _ in range(2):  # everything accumulates
        run(found, *operands, variant=variant, sums=sums)
        linear_sensitivity_reference_(expected, *operands, sums=expected_sums)
    assert found.double().equal(expected)
    for name in SUMS:
        assert getattr(sums, name).equal(getattr(expected_sums, name)), name
    assert sums.nonfinite == 0


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[32] * 9, [3, 0, 257, 1, 64], [1100], [1] * 40], ids=str)
def test_error_budget(dtype, variant, lengths):
    """|ours - truth| <= 8 * 2^-24 of the magnitudes that met: float32 throughout, in every tile."""
    score, weight, inputs, grads, segments = normal(67, 197, lengths, dtype)
    sums, expected_sums = all_sums(score), all_sums(score)
    found, truth, terms = score.clone(), score.double(), score.double()
    run(found, weight, inputs, grads, segments, variant=variant, sums=sums)
    linear_sensitivity_reference_(truth, weight, inputs, grads, segments, sums=expected_sums)
    magnitudes = (t.double().abs() for t in (weight, inputs, grads))
    linear_sensitivity_reference_(terms, *magnitudes, segments)
    error = (found.double() - truth).abs() / terms
    assert error.max() <= 2.0**-21, (int(error.argmax()), float(error.max()) * 2**24)
    for name in SUMS:
        torch.testing.assert_close(
            getattr(sums, name), getattr(expected_sums, name), rtol=2e-6, atol=0
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[40, 0, 500, 7], [33] * 12], ids=str)
def test_equal_bits_on_any_thread_count_and_in_every_run(any_threads, dtype, lengths):
    score, *operands = normal(450, 600, lengths, dtype)
    found = []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        sums = all_sums(score)
        found.append([score.clone(), *(getattr(sums, name) for name in SUMS)])
        run(found[-1][0], *operands, variant=-1, sums=sums)
    for other in found[1:]:
        assert all(ours.equal(first) for ours, first in zip(other, found[0], strict=True))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_sums_do_not_need_the_score(variant):
    """The same bits with it and without, and whichever of the sums are asked for."""
    score, *operands = normal(130, 300, [50, 21], torch.bfloat16)
    whole, alone = all_sums(score), all_sums(score)
    run(score, *operands, variant=variant, sums=whole)
    run(None, *operands, variant=variant, sums=alone)
    for name in SUMS:
        assert getattr(alone, name).equal(getattr(whole, name)), name
    for name in SUMS[:3]:
        part = SensitivitySums.zeros(score.shape, device="cpu", **{name: True})
        run(None, *operands, variant=variant, sums=part)
        assert getattr(part, name).equal(getattr(whole, name)), name


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operand", [1, 2, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_kept(dtype, variant, operand, bad):
    """In the scores it touches and their sums only, also from rows and columns at the edges."""
    operands = list(normal(70, 67, [9, 4, 2], dtype))
    operands[operand][8, 66] = bad
    found, *rest = operands
    expected, sums, expected_sums = found.clone(), all_sums(found), all_sums(found)
    linear_sensitivity_reference_(expected, *rest, sums=expected_sums)
    run(found, *rest, variant=variant, sums=sums)
    pairs = [(found, expected), *((getattr(sums, n), getattr(expected_sums, n)) for n in SUMS)]
    for ours, truth in pairs:
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=0, equal_nan=True)
    assert sums.nonfinite == 1
    assert 0 < expected.isfinite().sum() < expected.numel()


def test_a_score_that_overflows_is_flagged():
    score, *operands = integers(3, 5, [4], torch.float32)
    score[1, 2] = float("inf")
    sums = all_sums(score)
    run(score, *operands, variant=-1, sums=sums)
    assert sums.nonfinite == 1 and sums.total.isfinite()


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype, variant):
    """Transposed, repeated by a stride of zero, far apart, backwards in memory order."""
    score, weight, inputs, grads, segments = integers(71, 130, [30, 0, 261], dtype)
    far = torch.zeros(inputs.shape[0], 3, 5001, dtype=dtype)
    far[:, 1, 7:137] = inputs
    transposed = [t.T.contiguous().T for t in (weight, inputs, grads)]
    cases = [
        (weight, transposed[1], transposed[2]),
        (transposed[0], far[:, 1, 7:137], grads),
        (weight[:1].expand_as(weight), inputs[:1].expand_as(inputs), grads[:, :1].expand_as(grads)),
        (torch.cat([weight, weight], 1)[:, ::2], inputs, torch.stack([grads, grads], 2)[..., 1]),
    ]
    for operands in cases:
        found, expected = score.clone(), score.clone()
        sums, expected_sums = all_sums(score), all_sums(score)
        run(found, *operands, segments, variant=variant, sums=sums)
        linear_sensitivity_reference_(expected, *operands, segments, sums=expected_sums)
        assert found.equal(expected)
        assert all(getattr(sums, name).equal(getattr(expected_sums, name)) for name in SUMS)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_outside_the_segments_do_not_count(dtype, variant):
    """Nor as the partner of a segment's odd last row."""
    score, weight, inputs, grads, _ = integers(20, 70, [31], dtype)
    inputs[:3], inputs[24:], grads[:3], grads[24:] = (float("nan"),) * 4
    for lengths in ([21], [1, 0, 3, 17], [20, 1], []):
        found, expected = score.clone(), score.clone()
        operands = (weight, inputs, grads, segments_of(lengths, start=3))
        run(found, *operands, variant=variant)
        linear_sensitivity_reference_(expected, *operands)
        assert found.equal(expected)


def test_bfloat16_goes_in_pairs_where_the_machine_can():
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "avx512_bf16" not in cpuinfo.read_text():
        pytest.skip("this machine has no AVX512_BF16")
    score, *operands = normal(60, 70, [64], torch.bfloat16)
    found = {name: score.clone() for name in ("avx512", "avx512_bf16", "best")}
    for name, result in found.items():
        run(result, *operands, variant=VARIANTS[name])
    assert found["best"].equal(found["avx512_bf16"])
    assert not found["best"].equal(found["avx512"])  # another order within a pair


@pytest.mark.parametrize("variant", [2, 3])
def test_bfloat16_subnormals(variant):
    """The float32 tiles keep them; the pairs take them, and sums below 2^-126, for zero."""
    score, weight = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bfloat16)
    inputs = torch.tensor([[2.0**100, 2.0**-70]], dtype=torch.bfloat16)
    for grad, truth in [(2.0**-130, [2.0**-30, 0.0]), (2.0**-60, [2.0**40, 2.0**-130])]:
        grads = torch.tensor([[grad]], dtype=torch.bfloat16)
        found = score.clone()
        run(found, weight, inputs, grads, torch.tensor([0, 1]), variant=variant)
        for ours, expected in zip(found[0].tolist(), truth, strict=True):
            assert ours == expected or (
                variant == 3 and ours == 0 and (grad < 2.0**-126 or expected < 2.0**-126)
            )
