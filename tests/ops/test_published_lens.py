# SPDX-License-Identifier: Apache-2.0
"""The released half-precision lens against half products of every neuron."""

import pytest
import torch

from pkt_ext.ops import published_lens, published_scale
from pkt_ext.ops.published_lens import PublishedLens, four_decimals

STEP = 2.0**-7  # between float16 logarithms of probabilities under e^-8


def problem(*, vocab=5000, size=48, neurons=300, strength=0.3, spread=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    head, gain = (randn(vocab, size) * spread).half(), (1 + 0.2 * randn(size)).half()
    contributions = (randn(neurons) * strength).half().float()
    vectors, residual = (randn(size, neurons) * 0.1).half(), randn(size).half().float()
    root = torch.rsqrt(published_scale(randn(1, size)[0]) + 1e-6)
    return head, gain, (contributions, vectors, residual, root, 17)


def gains(lens, contributions, vectors, residual, root, target):
    base = lens.inputs(residual, root)
    (survey,) = lens.surveys(base[None], [target])
    known = {"before": lens.log_probs(base, target), "survey": survey}
    return lens.gains(contributions, vectors, residual, root, target, **known)


def by_hand(head, gain, contributions, vectors, residual, root, target):
    """As released: every neuron times the head, in float16."""

    def log_prob(x):
        logits = torch.nn.functional.linear((x * root * gain).half(), head)
        return logits.softmax(-1)[..., target].log()

    return log_prob((contributions * vectors).T + residual) - log_prob(residual)


def check(found, truth, share=0.99):
    """The same scores, but for a logit in a thousand that rounds the other way."""
    assert found.dtype == truth.dtype == torch.float16
    assert (found - truth).abs().max() <= STEP
    assert (found == truth).float().mean() >= share


@pytest.mark.parametrize("strength", [0.003, 0.03, 0.3, 3.0])
@pytest.mark.parametrize("vocab", [400, 5000])
def test_equals_half_products(vocab, strength):
    head, gain, rest = problem(vocab=vocab, strength=strength)
    truth = by_hand(head, gain, *rest)
    check(gains(PublishedLens(head, gain), *rest), truth)
    assert len(truth.unique()) > 1


@pytest.mark.parametrize("spread", [0.02, 1.0, 4.0])
def test_flat_and_peaked_distributions(spread):
    """From every token alike, to one token with nearly all the probability."""
    head, gain, rest = problem(spread=spread)
    lens = PublishedLens(head, gain)
    x, root = rest[2:4]
    target = int(lens.log_probs(lens.inputs(x, root), slice(None)).argmax())
    rest = (*rest[:4], target)
    check(gains(lens, *rest), by_hand(head, gain, *rest))


def test_few_are_multiplied_with_the_head(monkeypatch):
    head, gain, rest = problem(strength=0.1)
    lens, counts = PublishedLens(head, gain), []
    exact = lens._exact
    monkeypatch.setattr(lens, "_exact", lambda r, y: counts.append(len(r)) or exact(r, y))
    check(gains(lens, *rest), by_hand(head, gain, *rest))
    assert 0 < sum(counts) < 60  # of 300


def test_the_sample_knows_its_error():
    head, gain, (_, vectors, x, root, target) = problem(spread=0.2)
    head[:, ::2] += 0.3  # what all tokens share moves none of them against the others
    lens = PublishedLens(head, gain)
    base = lens.inputs(x, root)
    (survey,) = lens.surveys(base[None], [target])
    shift = vectors.T.float() * 0.5
    found, error = lens._second_order(shift, survey)
    weights = (head.double() @ base.double() - survey.most).exp()
    weights[survey.likely] = 0.0
    assert survey.total == pytest.approx(weights.sum().item(), rel=1e-4)
    moved = (head.double() - survey.centre) @ shift.double().T
    truth = weights @ (moved.exp() - 1 - moved)
    off = (found - truth).abs()
    assert (off <= 3 * error).all() and off.any()
    assert (error < 0.2 * truth).all()
    assert (off / error).mean() > 0.1  # nor is it a wild overestimate


def test_what_the_sample_leaves_open_is_computed(monkeypatch):
    head, gain, rest = problem()
    monkeypatch.setattr(published_lens, "_ERRORS", 1e9)
    everything = gains(PublishedLens(head, gain), *rest)
    monkeypatch.setattr(published_lens, "_FEW", 1000)
    assert gains(PublishedLens(head, gain), *rest).equal(everything)
    check(everything, by_hand(head, gain, *rest))


def test_rare_tokens_of_great_length_are_in_the_sample():
    """They hardly count until a neuron points at them."""
    head, gain, (m, vectors, x, root, target) = problem(spread=0.05)
    x[0] = -1.0
    head[4000:4010, 0] = 8.0
    vectors[0, :150] = 1.0
    m[:150] = m[:150].abs() * 3
    rest = (m, vectors, x, root, target)
    check(gains(PublishedLens(head, gain), *rest), by_hand(head, gain, *rest))


def test_a_neuron_that_rounding_takes_away_scores_zero():
    head, gain, (m, vectors, x, root, target) = problem()
    m[:200] = 1e-7
    scores = gains(PublishedLens(head, gain), m, vectors, x, root, target)
    assert not scores[:200].any() and scores[200:].any()


@pytest.mark.parametrize("size", ["_WIDENED", "_LOGITS"])
def test_parts_of_the_head_and_of_the_neurons(size, monkeypatch):
    head, gain, rest = problem()
    at_once = gains(PublishedLens(head, gain), *rest)
    little = {"cpu": 7 * len(head)} if size == "_LOGITS" else 333 * 48
    monkeypatch.setattr(published_lens, size, little)
    check(gains(PublishedLens(head, gain), *rest), at_once)


def test_a_survey_of_many_bases_is_each_ones_own(monkeypatch):
    head, gain, _ = problem()
    lens = PublishedLens(head, gain)
    bases = torch.randn(5, 48, generator=torch.Generator().manual_seed(2)).half()
    monkeypatch.setattr(published_lens, "_BASES", 2)
    together = lens.surveys(bases, [3, 4, 5, 6, 7])
    for i, survey in enumerate(together):
        (alone,) = lens.surveys(bases[i : i + 1], [i + 3])
        assert survey.likely.equal(alone.likely) and i + 3 in survey.likely
        torch.testing.assert_close(survey.total, alone.total, rtol=1e-5, atol=0)
        torch.testing.assert_close(survey.centre, alone.centre, rtol=1e-3, atol=1e-5)


def test_a_target_without_probability():
    """log 0 less log 0 is NaN, and some neurons bring it back: as released."""
    head, gain, rest = problem(spread=4.0)
    scores = gains(PublishedLens(head, gain), *rest)
    truth = by_hand(head, gain, *rest)
    assert scores.isnan().any() and scores.isnan().equal(truth.isnan())
    assert scores.nan_to_num().equal(truth.nan_to_num())


def test_nan_in_one_neuron_stays_there():
    head, gain, (m, vectors, x, root, target) = problem()
    clean = gains(PublishedLens(head, gain), m, vectors, x, root, target)
    vectors[3, 5] = float("nan")
    scores = gains(PublishedLens(head, gain), m, vectors, x, root, target)
    others = torch.arange(300) != 5
    assert scores[5].isnan() and not scores[others].isnan().any()
    check(scores[others], clean[others])


def test_four_decimals_is_pythons_round():
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    floats = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    ties = torch.arange(1000) / 32.0  # k / 2^5 has five decimals
    for values in (halves, floats, floats * 1e-4, floats * 1e6, ties):
        expected = torch.tensor([round(v, 4) for v in values.tolist()], dtype=torch.float32)
        found = four_decimals(values)
        assert found.dtype == torch.float32 and found.isnan().equal(expected.isnan())
        assert found.nan_to_num(7.0).equal(expected.nan_to_num(7.0))
