# SPDX-License-Identifier: Apache-2.0
"""Alignment losses and gradients against the definitions in float64: rows, heads, hidden states."""

import itertools

import pytest
import torch
from conftest import Backend

from pkt_ext import ops
from pkt_ext.bench.contest import peak_bytes
from pkt_ext.ops import _backend, _head_products, alignment

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = {
    "kl": (ops.kl_rows_, ops.kl_rows_reference),
    "fisher": (ops.fisher_rows_, ops.fisher_rows_reference),
    "cosine_onehot": (ops.cosine_onehot_rows_, ops.cosine_onehot_rows_reference),
    "cross_entropy": (ops.cross_entropy_rows_, ops.cross_entropy_rows_reference),
}
HEADS = {
    "kl": (ops.head_kl, ops.head_kl_reference),
    "fisher": (ops.head_fisher, ops.head_fisher_reference),
    "cosine_onehot": (ops.head_cosine_onehot, ops.head_cosine_onehot_reference),
    "cross_entropy": (ops.head_cross_entropy, ops.head_cross_entropy_reference),
}
# one of each, below, at and above a block of 512 columns and a sweep of 1024, primes
SHAPES = [(1, 1), (3, 2), (2, 37), (2, 511), (1, 512), (3, 521), (2, 1024), (5, 2053)]


def randn(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def has_targets(loss):
    return loss in ("kl", "fisher")


def problem(loss, rows, columns, dtype=torch.float32, spread=3.0):
    """(logits, targets or labels)"""
    logits = spread * randn(rows, columns, seed=1)
    if has_targets(loss):
        return logits, (logits + spread * randn(rows, columns, seed=2)).to(dtype)
    return logits, torch.arange(rows) * 7919 % columns


def plain(loss, logits, other, dtype, **options):
    """(losses, gradient) by autograd through the reference, in a dtype."""
    logits = logits.detach().to(dtype).requires_grad_()
    other = other.to(dtype) if has_targets(loss) else other
    losses = ROWS[loss][1](logits, other, **options)
    losses.sum().backward()
    return losses.detach(), logits.grad


def ours(backend, loss, logits, other, **options):
    logits = logits.to(backend.device).clone()
    losses = ROWS[loss][0](logits, other.to(backend.device), **options)
    assert losses.dtype == torch.float32
    return losses.cpu(), logits.cpu()


def assert_within_budget(found, truth, torchs, floor=2.0**-21, terms=0.0):
    """Row by row at most four times what plain torch in float32 errs there, and a floor: a share of
    the row's largest value, or of `terms` where that is the difference of larger ones."""
    for mine, right, other in zip(found, truth, torchs, strict=True):
        assert mine.shape == right.shape
        if mine.numel() == 0:
            continue
        mine, right, other = (t.double().reshape(len(t), -1) for t in (mine, right, other))
        largest = right.abs().amax(1) + terms
        allowed = 4 * (other - right).abs().amax(1) + floor * largest + 1e-12
        error = (mine - right).abs().amax(1)
        assert (error <= allowed).all(), (error / allowed, allowed)


def check(backend, loss, logits, other, **options):
    truth = plain(loss, logits, other, torch.float64, **options)
    torchs = plain(loss, logits, other, torch.float32, **options)
    terms = 1.0 if loss == "cosine_onehot" else 0.0
    assert_within_budget(ours(backend, loss, logits, other, **options), truth, torchs, terms=terms)


# --- rows of logits -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("loss", ROWS)
def test_rows_match_the_definition(backend, loss, shape):
    check(backend, loss, *problem(loss, *shape))


@pytest.mark.parametrize("loss", ROWS)
def test_rows_of_a_wide_vocabulary(backend, loss):
    """Above the width where a GPU takes more threads a row."""
    check(backend, loss, *problem(loss, 2, 16387))


@pytest.mark.parametrize("loss", ROWS)
def test_rows_of_a_real_vocabulary(loss):
    check(Backend("cpu", "cpu"), loss, *problem(loss, 2, 151936))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", ["kl", "fisher"])
@pytest.mark.parametrize("temperature, caps", [(2.5, (None, None)), (0.5, (5.0, 7.0))], ids=str)
def test_dtypes_temperatures_and_caps(backend, loss, dtype, temperature, caps):
    options = {"temperature": temperature, "cap": caps[0]}
    if loss == "kl":
        options["target_cap"] = caps[1]
    check(backend, loss, *problem(loss, 3, 700, dtype), **options)


@pytest.mark.parametrize("loss", ["cosine_onehot", "cross_entropy"])
def test_capped_labels(backend, loss):
    check(backend, loss, *problem(loss, 3, 700, spread=20.0), cap=30.0)


@pytest.mark.parametrize("loss", ROWS)
def test_views_of_larger_tensors(backend, loss):
    """Rows far apart, off the 16-byte grid; targets transposed or every other column."""
    logits, other = problem(loss, 3, 517, torch.float16)
    expected = ours(backend, loss, logits, other)
    wide = torch.full((3, 100_000), 7.0)
    view = wide[:, 5 : 5 + 517]
    others = [other]
    if has_targets(loss):
        spaced = torch.zeros(3, 2 * 517, dtype=other.dtype)[:, ::2].copy_(other)
        others = [other.T.contiguous().T, spaced, torch.cat([other, other], 1)[:, 517:]]
    for one in others:
        view.copy_(logits)
        on_device = wide.to(backend.device)
        rows = on_device[:, 5 : 5 + 517]
        losses = ROWS[loss][0](rows, one.to(backend.device))
        assert losses.cpu().equal(expected[0]) and rows.cpu().equal(expected[1])
        assert (on_device[:, :5] == 7).all() and (on_device[:, 5 + 517 :] == 7).all()
    if has_targets(loss):
        assert one.equal(other)  # targets stay as they are


@pytest.mark.parametrize("loss", ROWS)
@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (2, 0)], ids=str)
def test_nothing_to_do(backend, loss, shape):
    if shape == (2, 0) and not has_targets(loss):
        pytest.skip("no label is a column")
    other = torch.zeros(shape) if has_targets(loss) else torch.zeros(shape[0]).long()
    losses, gradient = ours(backend, loss, torch.zeros(shape), other)
    assert losses.shape == shape[:1] and not losses.any() and gradient.shape == shape


@pytest.mark.parametrize("loss", ROWS)
def test_extreme_logits(backend, loss):
    """±10^4, constant rows, all the probability on one token, steep and flat against each other."""
    logits, other = problem(loss, 6, 600)
    logits[0] *= 1e4 / 3
    logits[1] = -1e4
    logits[2, :] = 0.0
    logits[2, 5] = 1e4
    logits[3] += 1e4
    if has_targets(loss):
        other[0], other[4] = -logits[0], 250.0 * other[4]
        other[1] = logits[1] + 17.0
        other[2, 9] = 1e4
    else:
        other[2] = 5
    losses, gradient = ours(backend, loss, logits, other)
    assert losses.isfinite().all() and gradient.isfinite().all()
    check(backend, loss, logits, other)


def test_equal_rows_have_no_divergence(backend):
    logits, _ = problem("kl", 3, 900)
    for loss in ("kl", "fisher"):
        losses, gradient = ours(backend, loss, logits, logits.clone(), temperature=1.5)
        assert not losses.any() and not gradient.any()


def test_divergences_are_never_negative_and_keep_their_digits(backend):
    """Distributions 10^-1 to 10^-6 apart, where the difference of rounded logarithms has none."""
    logits, _ = problem("kl", 6, 800)
    step = 10.0 ** -torch.arange(1, 7)[:, None]
    targets = logits + step * randn(6, 800, seed=5)
    truth, _ = plain("kl", logits, targets, torch.float64)
    losses, _ = ours(backend, "kl", logits, targets)
    assert (losses > 0).all()
    # the operands' own rounding, 2^-22 of a logit's difference, is what is left
    allowed = 1e-5 + (2.0**-20 / step[:, 0]).square()
    assert ((losses - truth).abs() / truth <= allowed).all()


def test_quadratic_is_the_divergence_to_third_order(backend):
    """METHODS A9: the gap falls with the cube of the step."""
    targets = 2 * randn(2, 400, seed=1)
    direction = randn(2, 400, seed=2)
    gaps = []
    for step in (0.2, 0.1, 0.05):
        logits = targets + step * direction
        kl, _ = ours(backend, "kl", logits, targets, temperature=2.0)
        fisher, _ = ours(backend, "fisher", logits, targets, temperature=2.0)
        assert ((kl - fisher).abs() < 0.2 * step * fisher).all()
        gaps.append((kl - fisher).abs())
    for wide, narrow in itertools.pairwise(gaps):
        assert (narrow < wide / 5).all()


def test_confident_cross_entropy_keeps_its_digits(backend):
    logits, labels = torch.zeros(3, 700), torch.tensor([3, 600, 699])
    logits[torch.arange(3), labels] = torch.tensor([20.0, 40.0, 60.0])
    truth, gradient = plain("cross_entropy", logits, labels, torch.float64)
    losses, found = ours(backend, "cross_entropy", logits, labels)
    exact = torch.log1p(699 * torch.exp(-logits.double().amax(1)))
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=0)
    at_label = found[torch.arange(3), labels].double()
    torch.testing.assert_close(at_label, torch.expm1(-exact), rtol=1e-5, atol=0)


def test_a_zero_row_is_at_right_angles(backend):
    losses, gradient = ours(backend, "cosine_onehot", torch.zeros(2, 40), torch.tensor([0, 39]))
    assert (losses == 1).all() and not gradient.any()


@pytest.mark.parametrize("cap", [None, 4.0], ids=str)
@pytest.mark.parametrize("loss", ROWS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_value_that_is_not_finite_shows(backend, loss, bad, cap):
    options = {"cap": cap}
    if loss == "kl":
        options["target_cap"] = cap
    logits, other = problem(loss, 4, 1030)
    expected = ours(backend, loss, logits, other, **options)
    logits[1, 1027] = bad
    if has_targets(loss):
        other[2, 3] = bad
    losses, gradient = ours(backend, loss, logits, other, **options)
    spoilt = torch.tensor([False, True, has_targets(loss), False])
    assert losses.isnan().equal(spoilt)
    assert gradient[spoilt].isnan().all()
    assert losses[~spoilt].equal(expected[0][~spoilt])
    assert gradient[~spoilt].equal(expected[1][~spoilt])


def test_a_label_beyond_the_row_shows_on_a_gpu(backend):
    """Where validating it would wait for the device."""
    if backend.name == "cpu":
        pytest.skip("validated before the kernel")
    for name in ("cosine_onehot_rows", "cross_entropy_rows"):
        logits = randn(3, 50, seed=1).to(backend.device)
        losses = torch.zeros(3, device=backend.device)
        labels = torch.tensor([0, 50, -1]).to(backend.device)
        with _backend.device_of(logits) as launch:
            getattr(_backend._C, name)(losses, logits, labels, 0.0, **launch)
        assert losses.isnan().tolist() == [False, True, True]
        assert logits.isnan().any(1).tolist() == [False, True, True]


@pytest.mark.parametrize("loss", ROWS)
def test_equal_bits_in_every_run_and_on_any_thread_count(backend, loss, any_threads):
    operands = problem(loss, 40, 1031)
    torch.set_num_threads(1)
    first = ours(backend, loss, *operands)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        again = ours(backend, loss, *operands)
        assert again[0].equal(first[0]) and again[1].equal(first[1])


# --- through heads --------------------------------------------------------------------------------


def head_problem(loss, rows, vocab=301, width=24, teacher_width=40, dtype=torch.float32):
    """Operands in the order of the ops, states first."""
    states, head = randn(rows, width, seed=1, dtype=dtype), randn(vocab, width, seed=2)
    head = (head * 0.5).to(dtype)
    if loss == "kl":
        teacher_head = (randn(vocab, teacher_width, seed=4) * 0.4).to(dtype)
        return states, head, randn(rows, teacher_width, seed=3, dtype=dtype), teacher_head
    if loss == "fisher":
        return states, states + 0.3 * randn(rows, width, seed=3, dtype=dtype), head
    return states, head, torch.arange(rows) * 7919 % vocab


def through_head(function, operands, weights, dtype=None, **options):
    """(losses, gradient by states of their weighted sum)"""
    states, *rest = (t.to(dtype) if dtype and t.is_floating_point() else t for t in operands)
    states = states.detach().clone().requires_grad_()
    losses = function(states, *rest, **options)
    (losses * weights.to(losses)).sum().backward()
    return losses.detach().cpu(), states.grad.cpu()


@pytest.mark.parametrize("rows", [0, 1, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", HEADS)
def test_heads_match_the_definition(backend, loss, dtype, rows):
    function, reference = HEADS[loss]
    operands = [t.to(backend.device) for t in head_problem(loss, rows, dtype=dtype)]
    weights = randn(rows, seed=9)
    truth = through_head(reference, operands, weights, torch.float64)
    torchs = through_head(reference, operands, weights, torch.float32)
    for chunk_bytes in (None, 1, 9000):
        found = through_head(function, operands, weights, chunk_bytes=chunk_bytes)
        assert found[0].dtype == torch.float32 and found[1].dtype == dtype
        if backend.device == "cuda" and dtype != torch.float32:
            torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-3, atol=1e-3)
            continue
        assert_within_budget(found[:1], truth[:1], torchs[:1], floor=2.0**-19)
        assert_within_budget(found[1:], truth[1:], torchs[1:], floor=torch.finfo(dtype).eps)


@pytest.mark.parametrize("loss", HEADS)
def test_options_reach_the_rows(backend, loss):
    function, reference = HEADS[loss]
    operands = [t.to(backend.device) for t in head_problem(loss, 9)]
    options = {"cap": 3.0}
    options |= {"temperature": 1.7} if has_targets(loss) else {}
    options |= {"teacher_cap": 2.0} if loss == "kl" else {}
    weights = randn(9, seed=9)
    truth = through_head(reference, operands, weights, torch.float64, **options)
    torchs = through_head(reference, operands, weights, torch.float32, **options)
    found = through_head(function, operands, weights, chunk_bytes=8000, **options)
    assert_within_budget(found, truth, torchs, floor=2.0**-19)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_any_strides_and_dtypes(backend, dtype):
    """Transposed, every other row and column, off the grid; states of another dtype."""
    states, head, labels = head_problem("cross_entropy", 5)
    head = head.to(dtype)
    weights = torch.ones(5)
    expected = through_head(
        ops.head_cross_entropy_reference, (states, head.float(), labels), weights
    )
    wide = torch.zeros(2 * 301, 2 * 24 + 1, dtype=dtype)
    wide[::2, 1::2] = head
    for one in (head.T.contiguous().T, wide[::2, 1::2]):
        operands = [t.to(backend.device) for t in (states, one, labels)]
        found = through_head(ops.head_cross_entropy, operands, weights, chunk_bytes=20_000)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)


def test_float16_gradients_keep_small_values():
    """As they are rounded for a product on a GPU: rows scaled, a NaN stays in its row."""
    gradient = torch.tensor(
        [[1e-9, -3e-9, 0.0], [torch.nan, 1.0, 2.0], [700.0, -9e4, 1.0], [0] * 3]
    )
    expected = gradient.clone()
    rounded, scale = _head_products.rounded_rows(gradient, torch.float16)
    assert rounded.dtype == torch.float16
    found = rounded.double() / scale
    assert found[1].isnan().any() and not found[[0, 2, 3]].isnan().any()
    torch.testing.assert_close(
        found[[0, 2, 3]], expected[[0, 2, 3]].double(), rtol=2.0**-10, atol=1e-12
    )
    rounded, scale = _head_products.rounded_rows(expected, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16 and scale is None


@pytest.mark.parametrize("loss", HEADS)
def test_a_row_that_is_not_finite_is_alone(backend, loss):
    operands = [t.to(backend.device) for t in head_problem(loss, 6)]
    weights = torch.ones(6)
    clean = through_head(HEADS[loss][0], operands, weights)
    operands[0][2, 3] = torch.nan
    losses, gradient = through_head(HEADS[loss][0], operands, weights)
    others = torch.arange(6) != 2
    assert losses[2].isnan() and gradient[2].isnan().all()
    torch.testing.assert_close(losses[others], clean[0][others])
    torch.testing.assert_close(gradient[others], clean[1][others])


def test_autocast_does_not_reach_inside():
    operands = head_problem("kl", 7)
    weights = torch.ones(7)
    expected = through_head(ops.head_kl, operands, weights)
    with torch.autocast("cpu", torch.bfloat16):
        found = through_head(ops.head_kl, operands, weights)
    assert found[0].equal(expected[0]) and found[1].equal(expected[1])


def products(call):
    """How many matrix products a call runs."""
    with torch.autograd.profiler.profile() as profile:
        call()
    return sum(event.name == "aten::mm" for event in profile.function_events)


@pytest.mark.parametrize("loss", HEADS)
def test_states_that_need_no_gradient_cost_no_product(loss):
    states, *rest = head_problem(loss, 5)
    function = HEADS[loss][0]
    both = 2 if has_targets(loss) else 1
    assert products(lambda: function(states, *rest)) == both
    assert not function(states, *rest).requires_grad
    states.requires_grad_()
    with torch.no_grad():
        assert products(lambda: function(states, *rest)) == both
    assert products(lambda: function(states, *rest).sum().backward()) == both + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", HEADS)
def test_memory_is_a_chunk_whatever_the_rows(loss, dtype):
    """Beyond result and gradient nothing grows; the budget holds, with 16-bit heads as well."""
    vocab, width, budget = 5000, 16, 400_000
    for rows in (40, 400):
        operands = head_problem(loss, rows, vocab, width, 24, dtype)
        operands[0].requires_grad_()
        kept = rows * (width + 2) * 4  # gradients, and losses twice
        peak = peak_bytes(lambda o=operands: HEADS[loss][0](*o, chunk_bytes=budget), CPU) - kept
        heads = [t for t in operands if len(t) == vocab] * (2 if loss == "fisher" else 1)
        predicted = alignment.head_bytes(rows, heads, dtype, "cpu", budget)
        assert 0.9 * predicted <= peak <= predicted <= budget


def test_memory_is_predicted_without_memory():
    """For a device that is not here and heads that are nowhere; what is rounded counts there."""
    head = torch.empty(256_000, 4096, dtype=torch.bfloat16, device="meta")
    here = alignment.head_bytes(10_000, [head, head], torch.bfloat16, "cpu")
    there = alignment.head_bytes(10_000, [head, head], torch.bfloat16, "cuda")
    assert 0.9 * alignment.CPU_CHUNK_BYTES <= here <= alignment.CPU_CHUNK_BYTES
    assert 0.9 * alignment.CUDA_CHUNK_BYTES <= there <= alignment.CUDA_CHUNK_BYTES
    row = alignment.head_bytes(1, [head], torch.bfloat16, "cuda", 1)
    assert 6 * len(head) <= row <= 6.3 * len(head)


def test_a_vocabulary_of_256k_fits_its_default_budget():
    operands = head_problem("kl", 9, 256_000, 4, 4, torch.bfloat16)
    operands[0].requires_grad_()
    assert alignment.CPU_CHUNK_BYTES < alignment.CUDA_CHUNK_BYTES <= 1 << 30
    peak = peak_bytes(lambda: ops.head_kl(*operands), CPU)
    assert peak <= alignment.CPU_CHUNK_BYTES


# --- hidden states --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 5), (7, 257), (9, 64)], ids=str)
@pytest.mark.parametrize(
    "dtypes", [(s, t) for s in DTYPES for t in (torch.float32, s)][1:], ids=str
)
def test_cosine_matches_the_definition(backend, shape, dtypes):
    states = randn(*shape, seed=1, dtype=dtypes[0]).to(backend.device)
    targets = randn(*shape, seed=2, dtype=dtypes[1]).to(backend.device)
    weights = randn(shape[0], seed=3)
    operands = (states, targets)
    truth = through_head(ops.cosine_loss_reference, operands, weights, torch.float64)
    torchs = through_head(ops.cosine_loss_reference, operands, weights, torch.float32)
    found = through_head(ops.cosine_loss, operands, weights)
    assert found[0].dtype == torch.float32 and found[1].dtype == dtypes[0]
    assert_within_budget(found[:1], truth[:1], torchs[:1], floor=2.0**-22, terms=1.0)
    if shape[1] > 1:  # of one column the gradient is zero: nothing to compare with
        floor = torch.finfo(dtypes[0]).eps
        assert_within_budget(found[1:], truth[1:], torchs[1:], floor=floor)


def test_cosine_of_views(backend):
    states, targets = randn(5, 70, seed=1), randn(5, 70, seed=2)
    weights = torch.ones(5)
    expected = through_head(ops.cosine_loss, [t.to(backend.device) for t in (states, targets)],
                            weights)  # fmt: skip
    wide = randn(5, 300, seed=4).to(backend.device)
    wide[:, 7:77] = targets
    operands = (states.T.contiguous().to(backend.device).T, wide[:, 7:77])
    found = through_head(ops.cosine_loss, operands, weights)
    assert found[0].equal(expected[0]) and found[1].equal(expected[1])


def test_cosine_at_its_edges(backend):
    """Equal rows, opposite ones, zeros, values that are not finite."""
    states, targets = randn(7, 33, seed=1), randn(7, 33, seed=2)
    targets[0], targets[1] = states[0], -states[1]
    states[2], targets[3] = 0.0, 0.0
    states[4, 5], targets[5, 6] = torch.nan, torch.inf
    operands = [t.to(backend.device) for t in (states, targets)]
    losses, gradient = through_head(ops.cosine_loss, operands, torch.ones(7))
    assert losses[:4].tolist() == [0.0, 2.0, 1.0, 1.0]
    assert gradient[:2].abs().max() < 1e-6 and not gradient[2:4].any()
    assert losses.isnan().tolist() == [False] * 4 + [True, True, False]
    assert gradient[4:6].isnan().all() and gradient[6].isfinite().all()


def test_cosine_has_equal_bits_everywhere(backend, any_threads):
    operands = [randn(300, 131, seed=s).to(backend.device) for s in (1, 2)]
    torch.set_num_threads(1)
    first = through_head(ops.cosine_loss, operands, torch.ones(300))
    torch.set_num_threads(3)
    again = through_head(ops.cosine_loss, operands, torch.ones(300))
    assert again[0].equal(first[0]) and again[1].equal(first[1])


# --- references -----------------------------------------------------------------------------------


def test_references_pass_gradcheck():
    logits = randn(2, 7, seed=1).double().requires_grad_()
    targets, labels = randn(2, 7, seed=2).double(), torch.tensor([3, 6])
    for loss, (_, reference) in ROWS.items():
        other = targets if has_targets(loss) else labels
        torch.autograd.gradcheck(lambda z, f=reference, o=other: f(z, o, cap=4.0), logits)
    torch.autograd.gradcheck(lambda z: ops.cosine_loss_reference(z, targets), logits)


def test_references_are_torchs_own():
    logits, targets = problem("kl", 4, 50)
    kl = torch.nn.functional.kl_div(
        logits.log_softmax(-1), targets.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(ops.kl_rows_reference(logits, targets), kl)
    onehot = torch.eye(50)[:4]
    cosine = 1 - torch.nn.functional.cosine_similarity(logits, onehot)
    found = ops.cosine_onehot_rows_reference(logits, torch.arange(4))
    torch.testing.assert_close(found, cosine)
    quadratic = [
        d @ (torch.diag(p) - torch.outer(p, p)) @ d / 2
        for p, d in zip(targets.softmax(-1), logits - targets, strict=True)
    ]
    found = ops.fisher_rows_reference(logits, targets)
    torch.testing.assert_close(found, torch.stack(quadratic), rtol=1e-4, atol=1e-5)


# --- registration and errors ----------------------------------------------------------------------


def registered():
    logits, targets = problem("kl", 3, 20)
    labels = torch.tensor([1, 5, 19])
    states, head = randn(3, 8, seed=1), randn(20, 8, seed=2)
    factors, upstream = randn(3, 2, seed=3), randn(3, seed=4)
    heads = (1.0, 0.0)
    return {
        "kl_rows": (alignment._kl_rows, (logits, targets, 2.0, 0.0, 3.0)),
        "fisher_rows": (alignment._fisher_rows, (logits, targets, 2.0, 3.0)),
        "cosine_onehot_rows": (alignment._cosine_onehot_rows, (logits, labels, 3.0)),
        "cross_entropy_rows": (alignment._cross_entropy_rows, (logits, labels, 0.0)),
        "head_kl": (alignment._head_kl, (states, head, states, head, *heads, 0.0, 999, True)),
        "head_fisher": (alignment._head_fisher, (states, 2 * states, head, *heads, 999, False)),
        "head_cosine_onehot": (
            alignment._head_cosine_onehot,
            (states, head, labels, 0.0, 999, True),
        ),
        "head_cross_entropy": (
            alignment._head_cross_entropy,
            (states, head, labels, 0.0, 999, False),
        ),
        "cosine_rows": (alignment._cosine_rows, (states, 2 * states + 1)),
        "cosine_rows_backward": (
            alignment._cosine_rows_backward,
            (upstream, factors, states, 2 * states + 1),
        ),
    }


@pytest.mark.parametrize("name", registered())
def test_registered_ops_pass_opcheck(name):
    torch.library.opcheck(*registered()[name])


def test_mutated_arguments_are_named():
    for name, (op, _) in registered().items():
        mutated = [a.name for a in op._opoverload._schema.arguments if a.is_write]
        assert mutated == (["logits"] if name.endswith("_rows") and "cosine_rows" != name else [])


@pytest.mark.parametrize("name", ["head", "cosine"])
def test_second_derivatives_are_refused(name):
    states, head, labels = head_problem("cross_entropy", 3)
    states.requires_grad_()
    losses = (
        ops.head_cross_entropy(states, head, labels)
        if name == "head"
        else ops.cosine_loss(states, head[:3])
    )
    with pytest.raises(NotImplementedError, match="no second derivative; call backward without"):
        torch.autograd.grad(losses.sum(), states, create_graph=True)


Z, Y, X, H = torch.zeros(3, 5), torch.zeros(3).long(), torch.zeros(3, 4), torch.zeros(5, 4)
GRAD = torch.zeros(3, 5, requires_grad=True)
ERRORS = {
    "logits dtype": (
        lambda: ops.kl_rows_(Z.double(), Z),
        TypeError,
        "logits: expected dtype float32, got torch.float64",
    ),
    "targets dtype": (
        lambda: ops.kl_rows_(Z.clone(), Z.double()),
        TypeError,
        "targets: expected dtype float32, float16, bfloat16, got torch.float64",
    ),
    "targets shape": (
        lambda: ops.fisher_rows_(Z.clone(), Z[:2]),
        ValueError,
        r"targets: expected shape \[3, 5\], got \[2, 5\]",
    ),
    "dimensions": (
        lambda: ops.kl_rows_(torch.zeros(5), Z),
        ValueError,
        r"logits: expected 2 dimensions, got shape \[5\]",
    ),
    "columns apart": (
        lambda: ops.kl_rows_(Z.T.contiguous().T, Z),
        ValueError,
        r"logits: expected contiguous rows, got strides \[1, 3\]",
    ),
    "rows overlap": (
        lambda: ops.kl_rows_(Z[:1].expand(3, 5), Z.clone()),
        ValueError,
        "logits: rows overlap, their stride is 0 for 5 columns",
    ),
    "same memory": (
        lambda: ops.kl_rows_(Z, Z),
        ValueError,
        "targets: shares its memory with logits",
    ),
    "logits gradient": (
        lambda: ops.cross_entropy_rows_(GRAD, Y),
        ValueError,
        "logits: requires a gradient, which this op does not form; pass logits.detach()",
    ),
    "temperature": (
        lambda: ops.kl_rows_(Z.clone(), Z, temperature=0.0),
        ValueError,
        "temperature: expected a positive number, got 0.0",
    ),
    "no temperature": (
        lambda: ops.head_kl(X, H, X, H, temperature=float("nan")),
        ValueError,
        "temperature: expected a positive number, got nan",
    ),
    "cap": (
        lambda: ops.fisher_rows_(Z.clone(), Z, cap=-1.0),
        ValueError,
        "cap: expected a positive number or None, got -1.0",
    ),
    "target cap": (
        lambda: ops.kl_rows_(Z.clone(), Z, target_cap=0.0),
        ValueError,
        "target_cap: expected a positive number or None, got 0.0",
    ),
    "labels dtype": (
        lambda: ops.cross_entropy_rows_(Z.clone(), Y.int()),
        TypeError,
        "labels: expected dtype int64, got torch.int32",
    ),
    "labels shape": (
        lambda: ops.cosine_onehot_rows_(Z.clone(), Y[:2]),
        ValueError,
        r"labels: expected shape \[3\], got \[2\]",
    ),
    "labels range": (
        lambda: ops.head_cross_entropy(X, H, Y + 5),
        ValueError,
        "labels: expected tokens from 0 to 4, got 5 to 5",
    ),
    "head dtype": (
        lambda: ops.head_kl(X, H.double(), X, H),
        TypeError,
        "head: expected float32, float16 or bfloat16, got torch.float64",
    ),
    "states shape": (
        lambda: ops.head_kl(X[0], H, X, H),
        ValueError,
        r"states: expected a matrix, got shape \[4\]",
    ),
    "head shape": (
        lambda: ops.head_cosine_onehot(X, H[:, :3], Y),
        ValueError,
        r"head: expected shape \[5, 4\], got \[5, 3\]",
    ),
    "teacher rows": (
        lambda: ops.head_kl(X, H, X[:2], H),
        ValueError,
        r"teacher_states: expected shape \[3, 4\], got \[2, 4\]",
    ),
    "teacher vocabulary": (
        lambda: ops.head_kl(X, H, X, torch.zeros(6, 4)),
        ValueError,
        r"teacher_head: expected shape \[5, 4\], got \[6, 4\]",
    ),
    "targets of the lens": (
        lambda: ops.head_fisher(X, X[:, :3], H),
        ValueError,
        r"targets: expected shape \[3, 4\], got \[3, 3\]",
    ),
    "head gradient": (
        lambda: ops.head_kl(X, H.clone().requires_grad_(), X, H),
        ValueError,
        "head: requires a gradient, which this op does not form; pass head.detach()",
    ),
    "budget": (
        lambda: ops.head_kl(X, H, X, H, chunk_bytes=0),
        ValueError,
        "chunk_bytes: expected a positive number of bytes, got 0",
    ),
    "cosine shape": (
        lambda: ops.cosine_loss(X, X[:2]),
        ValueError,
        r"targets: expected shape \[3, 4\], got \[2, 4\]",
    ),
    "cosine dtype": (
        lambda: ops.cosine_loss(X.double(), X),
        TypeError,
        "states: expected dtype float32, float16, bfloat16, got torch.float64",
    ),
    "cosine gradient": (
        lambda: ops.cosine_loss(X, X.clone().requires_grad_()),
        ValueError,
        "targets: requires a gradient",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    call, kind, words = ERRORS[case]
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_devices_must_agree():
    with pytest.raises(ValueError, match="head: lies on cpu, states on cuda:0"):
        ops.head_cross_entropy(X.cuda(), H, Y.cuda())
    with pytest.raises(ValueError, match="targets: lies on another device"):
        ops.kl_rows_(Z.cuda(), Z)
