# SPDX-License-Identifier: Apache-2.0
"""Neuron scores against the definition in float64: exact scores, exact top k, the bound."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pkt_ext.bench.contest import peak_bytes
from pkt_ext.ops import (
    _backend,
    _neuron_corrections,
    neuron_log_prob_gain,
    neuron_log_prob_gain_reference,
    published_scale,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# samples, neurons, width, vocabulary: one of each, below, at and above a tile of 128, primes, a
# depth below and above a step of 32
SHAPES = [
    (1, 1, 1, 1),
    (1, 1, 3, 2),
    (2, 127, 31, 129),
    (3, 128, 32, 128),
    (1, 129, 33, 257),
    (2, 131, 70, 331),
    (5, 11, 40, 60),
]
LENSES = {
    "plain": {},
    "layernorm": {"layernorm": True},
    "softcap": {"softcap": 5.0},
    "gain": {"gain": True},
    "biases": {"gain": True, "lens_bias": True, "head_bias": True, "layernorm": True},
    "everything": {
        "gain": True,
        "lens_bias": True,
        "head_bias": True,
        "layernorm": True,
        "softcap": 2.0,
    },
}


def randn(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(samples, neurons, width, vocab, dtype=torch.float32, strength=2.0, lens="gain"):
    """Operands and options: heavy-tailed contributions, a head whose rows differ in length."""
    options = dict(LENSES[lens])
    for name, size in (("gain", width), ("lens_bias", width), ("head_bias", vocab)):
        if name in options:
            options[name] = 1.0 * (name == "gain") + 0.2 * randn(size, seed=len(name))
    residual = randn(samples, width, seed=3)
    spread = randn(samples, neurons, seed=1).exp()
    operands = {
        "contributions": strength * spread * randn(samples, neurons, seed=2),
        "vectors": randn(width, neurons, seed=4, dtype=dtype) * 0.1,
        "head": (0.3 * randn(vocab, width, seed=5) * (0.5 * randn(vocab, 1, seed=6)).exp()).to(
            dtype
        ),
        "residual": residual,
        "scale": residual.square().mean(1).add(1e-5).sqrt(),
        "targets": torch.arange(samples) * 7 % vocab,
    }
    return operands, options


def on(backend, values):
    return {
        name: value.to(backend.device) if isinstance(value, torch.Tensor) else value
        for name, value in values.items()
    }


def score(backend, operands, options, **mode):
    return neuron_log_prob_gain(**on(backend, operands), **on(backend, options), **mode)


def terms(operands, options):
    """What a score is the difference of: its magnitude and that of its largest logit change."""
    truth = neuron_log_prob_gain_reference(**operands, **options)
    head = operands["head"].double()
    vectors = operands["vectors"].double()
    gain = options.get("gain")
    if gain is not None:
        vectors = vectors * gain.double()[:, None]
    changes = (head.abs() @ vectors.abs()).amax(0)
    return truth, truth.abs() + operands["contributions"].abs() * changes / operands["scale"][
        :, None
    ]


def assert_within_budget(found, operands, options, split=False):
    """2^-21 of the magnitudes that a logit's change is the sum of (2^-16 where the neurons are two
    bfloat16), 2^-23 of the score."""
    truth, magnitude = terms(operands, options)
    allowed = (2.0**-16 if split else 2.0**-21) * magnitude + 1e-9
    excess = (found.cpu().double() - truth).abs() - allowed
    worst = int(excess.argmax())
    assert excess.max() <= 0, (worst, found.flatten()[worst], truth.flatten()[worst])
    return truth


def is_split(backend, dtype):
    return backend.name != "cpu" and dtype == torch.bfloat16


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_matches_reference(backend, shape, dtype):
    operands, options = problem(*shape, dtype=dtype)
    found = score(backend, operands, options)
    assert found.scores.dtype == torch.float32 and found.indices is None
    assert found.evaluations.tolist() == [shape[1]] * shape[0]
    assert_within_budget(found.scores, operands, options, is_split(backend, dtype))


@pytest.mark.parametrize("lens", LENSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_kind_of_lens(backend, lens, dtype):
    operands, options = problem(2, 37, 50, 150, dtype=dtype, lens=lens)
    assert_within_budget(score(backend, operands, options).scores, operands, options)


@pytest.mark.parametrize("shape", [(1, 1, 3, 2), (2, 131, 70, 331), (1, 64, 257, 385)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lens", ["gain", "softcap"])
def test_wgmma_matches_reference(backend, shape, dtype, lens, monkeypatch):
    if not backend.has_wgmma:
        pytest.skip("wgmma needs sm_90a, or its emulation")
    monkeypatch.setattr(_neuron_corrections, "WGMMA", True)
    operands, options = problem(*shape, dtype=dtype, lens=lens)
    found = score(backend, operands, options).scores
    assert_within_budget(found, operands, options, dtype == torch.bfloat16)
    assert found.equal(score(backend, operands, options).scores)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_operands(backend, dtype):
    """A Conv1D's weight, a head stored transposed, off the 16-byte grid, every other column."""
    operands, options = problem(2, 40, 36, 140, dtype=dtype)
    expected = score(backend, operands, options).scores.cpu()
    heads = [
        lambda t: t.T.contiguous().T,
        lambda t: torch.cat([t[:, :1], t], 1)[:, 1:],
        lambda t: torch.stack([t, t], 2)[:, :, 1],
    ]
    for strided in heads:
        odd = operands | {"head": strided(operands["head"])}
        odd |= {"vectors": strided(operands["vectors"])}
        odd |= {"contributions": strided(operands["contributions"])}
        assert not odd["head"].is_contiguous()
        torch.testing.assert_close(
            score(backend, odd, options).scores.cpu(), expected, rtol=1e-5, atol=1e-6
        )


def test_padded_vocabulary_and_tied_head(backend):
    """The embedding's first rows are the head: what lies behind them is not read."""
    operands, options = problem(2, 30, 24, 100, dtype=torch.float16)
    padded = torch.full((128, 24), float("nan"), dtype=torch.float16)
    padded[:100] = operands["head"]
    found = score(backend, operands | {"head": padded[:100]}, options)
    assert found.scores.equal(score(backend, operands, options).scores)


@pytest.mark.parametrize("strength", [0.3, 20.0])
@pytest.mark.parametrize("k", [1, 9, 131])
def test_top_is_exact(backend, k, strength):
    operands, options = problem(3, 131, 60, 300, strength=strength)
    truth = neuron_log_prob_gain_reference(**operands, **options)
    found = score(backend, operands, options, mode="top", k=k)
    assert found.scores.shape == found.indices.shape == (3, k)
    values, indices = truth.sort(dim=1, descending=True, stable=True)
    # neighbours closer than float32 tells may change places
    chosen = truth.gather(1, found.indices.cpu())
    assert (chosen - values[:, :k]).abs().max() <= 2e-6 * truth.abs().max()
    torch.testing.assert_close(found.scores.cpu().double(), chosen, rtol=1e-5, atol=1e-5)
    assert (found.scores.diff(dim=1) <= 0).all()
    assert all(len(set(row)) == k for row in found.indices.tolist())
    assert (found.evaluations >= k).all() and (found.evaluations <= 131).all()


def test_top_evaluates_few():
    operands, options = problem(2, 1500, 64, 1000, strength=0.5)
    found = neuron_log_prob_gain(**operands, **options, mode="top", k=120)
    everything = neuron_log_prob_gain(**operands, **options).scores
    assert found.indices.equal(everything.sort(dim=1, descending=True).indices[:, :120])
    assert (found.evaluations <= 0.15 * 1500).all()


def test_top_reads_on_where_corrections_decide(backend):
    """Neurons of the highest bounds whose corrections throw them out: every round is needed."""
    operands, options = problem(1, 120, 30, 90, strength=0.2)
    operands["contributions"][:, :60] *= 300
    truth = neuron_log_prob_gain_reference(**operands, **options)
    found = score(backend, operands, options, mode="top", k=3)
    assert found.indices.cpu().equal(truth.topk(3).indices)
    bound = score(backend, operands, options, mode="first-order").scores
    assert bound.topk(3).indices.cpu().ne(found.indices.cpu()).any()
    assert found.evaluations > 20


def test_ties_come_lowest_index_first(backend):
    operands, options = problem(1, 40, 20, 50)
    for name in ("contributions", "vectors"):  # neurons in equal fours
        operands[name] = operands[name][:, :10].repeat_interleave(4, dim=1)
    scores = score(backend, operands, options).scores.cpu()[0]
    assert scores.view(10, 4).equal(scores.view(10, 4)[:, :1].expand(10, 4))
    found = score(backend, operands, options, mode="top", k=10)
    order = scores.sort(descending=True, stable=True).indices
    assert found.indices.cpu()[0].equal(order[:10])


@pytest.mark.parametrize("compat", [None, "published"])
def test_takes_parameters_and_inference_tensors(compat):
    operands, options = problem(2, 20, 16, 3000, dtype=torch.float16)
    options["compat"] = compat
    expected = neuron_log_prob_gain(**operands, **options).scores
    with torch.inference_mode():
        inferred = {name: operands[name].clone() for name in ("contributions", "residual")}
    learnt = {name: torch.nn.Parameter(operands[name]) for name in ("vectors", "head")}
    found = neuron_log_prob_gain(**(operands | inferred | learnt), **options).scores
    assert found.equal(expected) and not found.requires_grad
    with torch.inference_mode():
        assert neuron_log_prob_gain(**(operands | learnt), **options).scores.equal(expected)


def test_zero_contributions_score_zero(backend):
    operands, options = problem(2, 20, 16, 40)
    operands["contributions"][:, ::3] = 0.0
    assert (score(backend, operands, options).scores[:, ::3] == 0).all()
    nothing = operands | {"contributions": torch.zeros(2, 20)}
    found = score(backend, nothing, options, mode="top", k=4)
    assert found.indices.tolist() == [[0, 1, 2, 3]] * 2 and (found.scores == 0).all()


@pytest.mark.parametrize("lens", ["plain", "layernorm", "biases"])
def test_first_order_is_an_upper_bound(backend, lens):
    operands, options = problem(3, 131, 40, 200, strength=5.0, lens=lens)
    truth = neuron_log_prob_gain_reference(**operands, **options)
    found = score(backend, operands, options, mode="first-order")
    assert (found.scores.cpu() >= truth - 1e-6 * truth.abs()).all()
    assert found.indices is None and found.evaluations.tolist() == [0, 0, 0]


def test_first_order_is_the_slope(backend):
    for lens in ("everything", "biases"):
        operands, options = problem(2, 50, 30, 80, lens=lens)
        operands["contributions"] *= 1e-5
        truth = neuron_log_prob_gain_reference(**operands, **options)
        found = score(backend, operands, options, mode="first-order").scores.cpu()
        torch.testing.assert_close(found.double(), truth, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0])
def test_small_scores_keep_their_digits(backend, size):
    """Where a difference of float32 log-probabilities has none left; all are distinct."""
    operands, options = problem(1, 200, 40, 150, strength=size)
    truth = neuron_log_prob_gain_reference(**operands, **options)
    found = score(backend, operands, options).scores.cpu()
    linear = score(backend, operands, options, mode="first-order").scores.cpu()
    # float64's own difference of logarithms has 16 digits of about 10
    assert ((found - truth).abs() <= 1e-6 * linear.abs() + 1e-6 * found.abs() + 2e-14).all()
    assert len(found.unique()) == 200


def test_sure_target_keeps_its_digits(backend):
    """p_y = 1 - 1e-9: what is left over comes from the others, not from 1 - p_y."""
    operands, options = problem(1, 60, 32, 100, strength=1.0)
    bias = torch.zeros(100)
    bias[operands["targets"]] = 60.0
    options["head_bias"] = bias
    truth = neuron_log_prob_gain_reference(**operands, **(options | {"head_bias": bias.double()}))
    found = score(backend, operands, options).scores.cpu()
    assert truth.abs().max() < 1e-9
    linear = score(backend, operands, options, mode="first-order").scores.cpu()
    assert (found - truth).abs().max() <= 1e-14 + 1e-5 * linear.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lens", ["plain", "softcap"])
def test_very_large_shifts(backend, dtype, lens):
    """Logits moved by up to 80: exp(x) would overflow beside the largest probabilities."""
    operands, options = problem(1, 30, 20, 140, dtype=dtype, lens=lens)
    operands["head"][1] *= 1 / operands["head"][1].float().norm()
    operands["contributions"] = torch.linspace(-200, 200, 30)[None]
    if lens == "softcap":
        options["softcap"] = 40.0
    truth = assert_within_budget(
        score(backend, operands, options).scores, operands, options, is_split(backend, dtype)
    )
    assert truth.min() < -30


@pytest.mark.parametrize("lens", ["plain", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_that_no_float_holds(backend, lens, dtype):
    operands, options = problem(2, 3, 8, 10, dtype=dtype, lens=lens)
    operands["contributions"] = torch.tensor([[1e6, -1e6, 0.1], [0.2, 3e3, -5e3]])
    if lens == "softcap":
        options["softcap"] = 1e4
    found = score(backend, operands, options).scores.cpu()
    truth = neuron_log_prob_gain_reference(**operands, **options)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-4)
    top = score(backend, operands, options, mode="top", k=2)
    assert top.indices.cpu().equal(truth.topk(2).indices)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["contributions", "vectors", "head", "residual"])
def test_what_is_not_finite_shows(backend, bad, name):
    operands, options = problem(2, 12, 10, 30)
    operands[name][1, 4] = bad
    found = score(backend, operands, options).scores.cpu()
    touched = {
        "contributions": lambda: found[1, 4],
        "vectors": lambda: found[:, 4],
        "head": lambda: found,
        "residual": lambda: found[1],
    }[name]()
    assert not touched.isfinite().any()
    if name == "contributions":
        assert found[0].isfinite().all()
    with pytest.raises(ValueError, match="scores of sample [01] are NaN"):
        score(backend, operands, options, mode="top", k=12)


@pytest.mark.parametrize(
    "mode", [{"mode": "all"}, {"mode": "top", "k": 1}, {"mode": "first-order"}]
)
def test_nothing(backend, mode):
    operands, options = problem(1, 5, 4, 6)
    none = {name: operands[name][:0] for name in ("contributions", "residual", "scale", "targets")}
    found = score(backend, operands | none, options, **mode)
    assert found.scores.shape == (0, mode.get("k", 5)) and found.evaluations.shape == (0,)
    if mode["mode"] != "top":
        empty = {"contributions": torch.zeros(1, 0), "vectors": torch.zeros(4, 0)}
        found = score(backend, operands | empty, options, **mode)
        assert found.scores.shape == (1, 0) and found.evaluations.tolist() == [0]


def test_equal_bits_on_any_thread_count(any_threads):
    operands, options = problem(2, 300, 64, 5000, dtype=torch.bfloat16)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(neuron_log_prob_gain(**operands, **options).scores)
        assert torch.get_num_threads() == threads
    assert found[0].equal(found[1]) and found[0].equal(found[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equal_bits_in_every_run(backend, dtype):
    operands, options = problem(2, 140, 40, 270, dtype=dtype)
    first, second = (score(backend, operands, options).scores for _ in range(2))
    assert first.equal(second)


def test_samples_do_not_mix(backend):
    """All at once or one by one: equal scores."""
    operands, options = problem(4, 50, 30, 140)
    together = score(backend, operands, options).scores.cpu()
    for sample in range(4):
        own = {
            name: operands[name][sample : sample + 1]
            for name in ("contributions", "residual", "scale", "targets")
        }
        alone = score(backend, operands | own, options).scores.cpu()
        torch.testing.assert_close(alone, together[sample : sample + 1], rtol=1e-6, atol=1e-7)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_top_is_the_head_of_all(data):
    samples, neurons = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 200))
    shape = samples, neurons, data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300))
    strength = data.draw(st.sampled_from([0.01, 1.0, 30.0]))
    operands, options = problem(
        *shape, strength=strength, lens=data.draw(st.sampled_from([*LENSES]))
    )
    k = data.draw(st.integers(1, neurons))
    scores = neuron_log_prob_gain(**operands, **options).scores
    found = neuron_log_prob_gain(**operands, **options, mode="top", k=k)
    best = scores.sort(dim=1, descending=True).values[:, :k]
    near = {"rtol": 1e-5, "atol": 1e-5 * max(1.0, strength)}  # products of another shape
    torch.testing.assert_close(found.scores, best, **near)
    torch.testing.assert_close(scores.gather(1, found.indices), found.scores, **near)


def test_ranks_as_float64_does_at_a_real_size():
    """An FFN block of half a thousand neurons before a vocabulary of 32000, 16-bit weights."""
    operands, options = problem(1, 512, 128, 32000, dtype=torch.bfloat16, strength=1.0)
    truth = neuron_log_prob_gain_reference(**operands, **options)[0]
    found = neuron_log_prob_gain(**operands, **options).scores[0]
    ranks = [values.argsort().argsort().double() for values in (truth, found.double())]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] >= 0.9999
    top = neuron_log_prob_gain(**operands, **options, mode="top", k=40)
    assert top.indices[0].equal(truth.topk(40).indices)
    assert top.evaluations <= 0.15 * 512


def test_a_large_vocabulary():
    """152k tokens of 16-bit floats, as a tied head has them."""
    operands, options = problem(1, 24, 16, 151936, dtype=torch.bfloat16, strength=1.0)
    found = neuron_log_prob_gain(**operands, **options, mode="top", k=5)
    truth = neuron_log_prob_gain_reference(**operands, **options)
    assert found.indices.equal(truth.topk(5).indices)


@pytest.mark.parametrize("mode", [{"mode": "all"}, {"mode": "top", "k": 200}])
def test_memory_is_that_of_a_tile(any_threads, mode):
    """Not neurons x vocabulary (240 MB) nor a widened copy of the head (7.7 MB) beside a panel of
    1024 x 1024 (4 MB), buffers and what is linear in either."""
    torch.set_num_threads(1)
    operands, options = problem(1, 2000, 64, 30000, dtype=torch.bfloat16, strength=0.5)
    peak = peak_bytes(
        lambda: neuron_log_prob_gain(**operands, **options, **mode), torch.device("cpu")
    )
    assert peak <= 7e6


# --- as published ---------------------------------------------------------------------------------


def published_problem(samples=2, neurons=150, vocab=400):
    operands, options = problem(samples, neurons, 48, vocab, dtype=torch.float16, strength=0.3)
    operands["scale"] = published_scale(operands["residual"])
    options["gain"] = options["gain"].half()
    return operands, options


def published_by_hand(operands, gain):
    """The released formula, for all neurons of a sample at once."""
    scores = []
    head = operands["head"]
    for m, x, sigma, y in zip(
        *(operands[name] for name in ("contributions", "residual", "scale", "targets")), strict=True
    ):

        def lens(vector, sigma=sigma, y=y):
            vector = (vector * torch.rsqrt(sigma + 1e-6) * gain).to(torch.float16)
            return torch.log(torch.softmax(vector @ head.T, -1)[..., y])

        increase = lens((m * operands["vectors"]).T + x) - lens(x)
        scores.append([round(value.item(), 4) for value in increase])
    return torch.tensor(scores)


def test_published_scores():
    operands, options = published_problem()
    found = neuron_log_prob_gain(**operands, **options, compat="published").scores
    expected = published_by_hand(operands, options["gain"])
    # half precision's step at the logits decides: a product summed in another order may tip it
    half_step = 2.0**-11 * 16
    assert (found - expected).abs().max() <= half_step
    assert (found == expected).float().mean() > 0.95
    assert len(found[0].unique()) < 100  # of 150: ties abound


def test_published_order_within_ties():
    operands, options = published_problem(samples=1)
    scores = neuron_log_prob_gain(**operands, **options, compat="published").scores
    found = neuron_log_prob_gain(**operands, **options, compat="published", mode="top", k=60)
    order = scores.sort(dim=1, descending=True, stable=True)
    assert found.indices.equal(order.indices[:, :60]) and found.scores.equal(order.values[:, :60])
    equal = found.scores.diff(dim=1) == 0
    assert equal.any() and (found.indices.diff(dim=1)[equal] > 0).all()
    assert found.evaluations.item() == 150


def test_published_scores_do_not_depend_on_the_tile(monkeypatch):
    operands, options = published_problem()
    found = []
    for rows in (7, 64, 1000):
        monkeypatch.setattr("pkt_ext.ops.published_lens._LOGITS", {"cpu": 400 * rows})
        gains = neuron_log_prob_gain(**operands, **options, compat="published")
        found.append(gains.scores)
    assert found[0].equal(found[1]) and found[0].equal(found[2])


def test_published_formula_in_float32():
    """Its rsqrt of a standard deviation, in exact arithmetic: another scale is all it takes."""
    operands, options = published_problem()
    sigma = (operands["scale"].double() + 1e-6).sqrt()
    found = neuron_log_prob_gain(**(operands | {"scale": sigma}), **options).scores
    gain, head = options["gain"].double(), operands["head"].double()
    for sample, y in enumerate(operands["targets"]):
        added = operands["contributions"][sample] * operands["vectors"].double()
        x = operands["residual"][sample].double()
        root = torch.rsqrt(operands["scale"][sample].double() + 1e-6)
        rows = torch.cat([x[None], added.T + x]) * root * gain
        log_probs = torch.log_softmax(rows @ head.T, -1)[:, y]
        assert (found[sample] - (log_probs[1:] - log_probs[0])).abs().max() <= 1e-6


def test_published_scale_is_the_root_of_a_variance():
    final = randn(3, 50, seed=1) * 3 + 1
    expected = ((final - final.mean(1, keepdim=True)).square().mean(1) + 1e-5).sqrt()
    torch.testing.assert_close(published_scale(final), expected)
    assert published_scale(final.half()).dtype == torch.float32


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"contributions": torch.ones(2, 6)},
            ValueError,
            r"contributions: expected shape \[2, 5\]",
        ),
        ({"vectors": torch.ones(4, 5, 1)}, ValueError, r"vectors: expected \[d, n\], got shape"),
        (
            {"vectors": torch.ones(4, 5).int()},
            TypeError,
            "vectors: expected float32, float16 or bf",
        ),
        ({"head": torch.ones(7, 3)}, ValueError, r"head: expected shape \[7, 4\], got \[7, 3\]"),
        ({"head": torch.ones(0, 4)}, ValueError, r"head: expected \[V, d\], got shape \[0, 4\]"),
        ({"head": torch.ones(7, 4).double()}, TypeError, "head: expected float32, float16 or bflo"),
        ({"residual": torch.ones(2, 5)}, ValueError, r"residual: expected shape \[2, 4\]"),
        ({"residual": torch.ones(2, 4).long()}, TypeError, "residual: expected floating point"),
        ({"scale": torch.ones(3)}, ValueError, r"scale: expected shape \[2\], got \[3\]"),
        ({"scale": torch.tensor([1.0, 0.0])}, ValueError, "scale: expected positive numbers"),
        ({"scale": torch.tensor([1.0, torch.nan])}, ValueError, "scale: expected positive numb"),
        ({"targets": torch.tensor([0, 7])}, ValueError, "targets: expected tokens from 0 to 6"),
        ({"targets": torch.tensor([-1, 0])}, ValueError, "targets: expected tokens from 0 to 6"),
        ({"targets": torch.tensor([0.0, 1.0])}, TypeError, "targets: expected dtype int64"),
        ({"gain": torch.ones(5)}, ValueError, r"gain: expected shape \[4\], got \[5\]"),
        ({"lens_bias": torch.ones(5)}, ValueError, r"lens_bias: expected shape \[4\]"),
        ({"head_bias": torch.ones(4)}, ValueError, r"head_bias: expected shape \[7\]"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a positive number or None, got 0.0"),
        ({"mode": "best"}, ValueError, "mode: expected one of all, top, first-order, got 'best'"),
        ({"mode": "top"}, ValueError, "k: expected 1 to 5, the number of neurons, got None"),
        ({"mode": "top", "k": 6}, ValueError, "k: expected 1 to 5, the number of neurons, got 6"),
        ({"k": 2}, ValueError, "k: mode 'all' takes none, got 2"),
        ({"compat": "upstream"}, ValueError, "compat: expected 'published' or None"),
        ({"compat": "published"}, TypeError, "head: the published code runs in float16"),
        ({"compat": "published", "layernorm": True}, ValueError, "published code has no layernorm"),
        ({"compat": "published", "mode": "first-order"}, ValueError, "no first-order scores"),
    ],
)
def test_errors_say_what_is_wrong(change, error, words):
    operands, _ = problem(2, 5, 4, 7)
    with pytest.raises(error, match=words):
        neuron_log_prob_gain(**(operands | change))


def lone_terms(shifts, cap, tanh, device):
    """The kernel's terms for one token of probability 1, a neuron a shift."""
    count = len(shifts)
    sums = torch.zeros(1, count, dtype=torch.float64, device=device)
    planes = [1.0, 0.0] + ([tanh, 1.0 - tanh * tanh] if cap else [])
    operands = (
        shifts[:, None].contiguous(),
        torch.tensor(planes)[None, :, None].contiguous(),
        torch.stack([torch.ones(count), torch.zeros(count)])[None],
    )
    operands = [t.to(device) for t in operands]
    with _backend.device_of(sums) as launch:
        _backend._C.neuron_panel(sums, *operands, cap, **launch)
    return sums[0].cpu()


@pytest.mark.parametrize("sign", [1, -1])
def test_terms_keep_their_digits(backend, sign):
    """exp(x) - 1 - x from 1e-12 to 80, at ln(2) / 2 where its formula changes, and beyond 16."""
    shifts = torch.cat([torch.logspace(-12, 1.9, 400), torch.linspace(0.33, 0.36, 100)]) * sign
    x = shifts.double()
    series = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x / 120)))
    truth = torch.where(x.abs() < 1e-3, series, torch.expm1(x) - x)
    found = lone_terms(shifts, 0.0, 0.0, backend.device)
    # a GPU's exp is good to 2^-22, and of 80 it is rounded to 2^-18
    allowed = torch.where(x > 16, 5e-6, 1e-6)
    assert ((found - truth).abs() <= allowed * truth).all()


@pytest.mark.parametrize("tanh", [0.0, 0.9, -0.99])
def test_capped_terms_keep_their_digits(backend, tanh):
    shifts = torch.linspace(-60, 60, 401)
    uncapped = 30 * torch.atanh(torch.tensor(tanh).double())
    change = 30 * (torch.tanh((uncapped + shifts.double()) / 30) - torch.tensor(tanh).double())
    truth = torch.expm1(change)
    found = lone_terms(shifts, 30.0, tanh, backend.device)
    assert ((found - truth).abs() <= 2e-5 * truth.abs() + 1e-9).all()


def panel_call(**change):
    given = {
        "sums": torch.zeros(2, 3, dtype=torch.float64),
        "panel": torch.zeros(3, 5),
        "tokens": torch.zeros(2, 2, 5),
        "neurons": torch.zeros(2, 2, 3),
        "cap": 0.0,
    } | change
    _backend._C.neuron_panel(**given, threads=1, stream=0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"sums": torch.zeros(2, 3)}, TypeError, "sums: expected dtype float64"),
        ({"panel": torch.zeros(4, 5)}, ValueError, r"panel: expected shape \[3, 5\]"),
        ({"panel": torch.zeros(5, 3).T}, ValueError, "panel: expected contiguous rows"),
        ({"tokens": torch.zeros(2, 2, 4)}, ValueError, r"tokens: expected shape \[2, 2, 5\]"),
        ({"cap": 3.0}, ValueError, r"tokens: expected shape \[2, 4, 5\]"),
        ({"tokens": torch.zeros(2, 5, 2).mT}, ValueError, "tokens: expected the last stride to be"),
        ({"neurons": torch.zeros(2, 3, 2)}, ValueError, r"neurons: expected shape \[2, 2, 3\]"),
    ],
)
def test_binding_checks_its_operands(change, error, words):
    panel_call()
    with pytest.raises(error, match=words):
        panel_call(**change)


def test_product_checks_its_operands(emulation):
    def call(**change):
        given = {
            "sums": torch.zeros(1, 3, dtype=torch.float64),
            "weights": torch.zeros(2, 3, 32, dtype=torch.float16),
            "head": torch.zeros(5, 24, dtype=torch.float16),
            "tokens": torch.zeros(1, 2, 5),
            "neurons": torch.zeros(1, 2, 3),
            "cap": 0.0,
            "workspace": torch.empty,
        } | change
        emulation.neuron_product(**given, threads=1, stream=0)

    call()
    with pytest.raises(ValueError, match=r"weights: expected shape \[2, 3, 32\]"):
        call(weights=torch.zeros(2, 3, 24, dtype=torch.float16))
    with pytest.raises(ValueError, match="head: expected rows that are contiguous and start at"):
        call(head=torch.zeros(5, 25, dtype=torch.float16)[:, 1:])
    with pytest.raises(ValueError, match="workspace: expected shape"):
        call(workspace=lambda size: torch.empty(size + 1))
