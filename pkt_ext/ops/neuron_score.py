# SPDX-License-Identifier: Apache-2.0
"""How much every neuron of a block raises the log-probability of a token, for S samples at once.

A neuron's vector enters the residual stream and is read through the frozen final norm and the head
(the logit lens). With sigma frozen, logits are affine in the contribution m_i, so that, p being the
distribution without the neuron and e_iv = E_v . (gamma o v_i) / sigma,

    gain_i = m_i (e_iy - mu_i) - log(1 + sum_v p_v g(m_i (e_iv - mu_i))),     mu_i = sum_v p_v e_iv,

with g(x) = exp(x) - 1 - x >= 0. The first term costs two thin products for a whole block; it is an
upper bound, so the best k neurons need the second term, a product with the whole head, for little
more than k of them. Nothing cancels: the difference of two rounded log-probabilities, as published,
keeps a handful of distinct values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import linear

from pkt_ext.ops._lens import Lens, base_of, first_order
from pkt_ext.ops._neuron_corrections import Corrections
from pkt_ext.ops._workers import spans
from pkt_ext.ops.published_lens import PublishedLens, four_decimals

MODES = ("all", "top", "first-order")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class NeuronGains(NamedTuple):
    """What neurons add to the log-probability of each sample's target, in nats."""

    scores: torch.Tensor  # float32: [S, n]; the best [S, k], descending, in mode "top"
    indices: torch.Tensor | None  # int64 [S, k]: their neurons, in mode "top"
    evaluations: torch.Tensor  # int64 [S]: neurons for which the whole head was read


@torch.no_grad()
def neuron_log_prob_gain(
    contributions: torch.Tensor,
    vectors: torch.Tensor,
    head: torch.Tensor,
    residual: torch.Tensor,
    scale: torch.Tensor,
    targets: torch.Tensor,
    *,
    mode: str = "all",
    k: int | None = None,
    gain: torch.Tensor | None = None,
    lens_bias: torch.Tensor | None = None,
    head_bias: torch.Tensor | None = None,
    layernorm: bool = False,
    softcap: float | None = None,
    compat: str | None = None,
) -> NeuronGains:
    """log p(y | x + m_i v_i) - log p(y | x) for every neuron i, read through norm and head.

    The lens: logits = head (gain * (x - mean(x) if layernorm) / scale + lens_bias) + head_bias,
    then softcap * tanh(logits / softcap); `scale` stays what it is whatever is added to x. What is
    shared by all samples, a product of neurons and head, is computed once for all; its results are
    reduced tile by tile, so extra memory is O(S (n + V)) and one tile, never neurons x vocabulary.

    First-order terms, p and log p are computed in float64; products with the head in float32 (on
    the tensor cores, for a 16-bit head on a GPU, with two 16-bit parts of every neuron: 2^-17 of
    its largest weight), torch's precision settings permitting. A sum of non-negative terms is all
    that they enter, so a score is off by about 1e-6 of its correction and 2^-24 of itself. Our part
    has equal bits on any thread count; torch's products need not. A NaN or infinity in an operand
    makes every score it touches NaN or infinite. A contribution of 0 scores exactly 0. Waits for
    the device.

    Modes:
        "all":         exact scores of all neurons.
        "top":         the best k of each sample, exactly: corrections are computed in the order of
                       the bound, until no bound reaches the k-th best exact score. A score that is
                       NaN is an error here. Equal scores: the lowest index first.
        "first-order": the bound alone; never reads the head for a neuron.
        Soft-capped logits are not affine: their first order is no bound, and "top" evaluates all.

    Args:
        contributions: [S, n] m: the neurons' activations at the position that predicts the target.
        vectors:   [d, n] float32, float16 or bfloat16, any strides: a down or o projection as
                   stored; a Conv1D's [n, d] is passed as its transpose.
        head:      [V, d] float32, float16 or bfloat16, any strides; tied: the embedding.
        residual:  [S, d] x: what the block's neurons are added to.
        scale:     [S] sigma, positive: root mean square of the model's own final hidden state (with
                   its epsilon), or its standard deviation for a LayerNorm.
        targets:   [S] int64 y.
        mode:      "all", "top" or "first-order".
        k:         for "top", 1 to n.
        gain:      [d] gamma of the final norm (Gemma: 1 + weight); None: ones.
        lens_bias: [d] of the final norm; None: zeros.
        head_bias: [V]; None: zeros.
        layernorm: the final norm subtracts the mean.
        softcap:   of the final logits; None: none.
        compat:    "published": the released scores of float16 models. `scale` is then what
                   `published_scale` gives, of which the square root divides; lens input and logits
                   are rounded to float16, softmax, logarithm and difference are float16, the
                   difference is rounded to 4 decimals. Ties, which abound, come lowest index
                   first, where the released code's order is arbitrary. See `published_lens` for
                   what stands in for half products on a CPU.
    Raises:
        ValueError: shapes or devices differ, a target that is no token, a scale that is not
            positive, an unknown mode or k, options that the published code does not have, or a NaN
            among the scores of mode "top".
        TypeError:  a dtype not listed above.
    Source: Yu and Ananiadou, EMNLP 2024 (log probability increase); METHODS L1 and L2.
    """
    lens = Lens(vectors, head, gain, layernorm, softcap)
    _check(contributions, lens, residual, scale, targets, lens_bias, head_bias)
    _check_mode(mode, k, contributions.shape[1])
    if compat is not None:
        _check_compat(compat, mode, lens, lens_bias, head_bias)
    if contributions.numel() == 0:
        return _every_score(contributions.float(), mode, k)
    if compat is not None:
        scores = _published(contributions, lens, residual, scale, targets)
        return _every_score(scores, mode, k)
    strengths = contributions.double() / scale.double()[:, None]
    base = base_of(lens, residual, scale, targets, lens_bias, head_bias)
    first, centres, settled = first_order(lens, base, strengths)
    if mode == "first-order":
        return NeuronGains(first.float(), None, torch.zeros_like(targets))
    corrections = Corrections(lens, base.tokens, strengths, centres)
    if mode == "top" and softcap is None:
        return _top(first, corrections, k)
    scores = torch.empty_like(first, dtype=torch.float32)
    for rows in spans(first.shape[1], corrections.panel_rows):
        index = torch.arange(rows.start, rows.stop, device=first.device)
        taken = corrections.of(index, torch.ones_like(first[:, rows], dtype=torch.bool))
        scores[:, rows] = settled[:, rows] - taken
    return _every_score(scores, mode, k)


@torch.no_grad()
def neuron_log_prob_gain_reference(
    contributions: torch.Tensor,
    vectors: torch.Tensor,
    head: torch.Tensor,
    residual: torch.Tensor,
    scale: torch.Tensor,
    targets: torch.Tensor,
    *,
    gain: torch.Tensor | None = None,
    lens_bias: torch.Tensor | None = None,
    head_bias: torch.Tensor | None = None,
    layernorm: bool = False,
    softcap: float | None = None,
) -> torch.Tensor:
    """Plain torch in float64, neuron by neuron as the definition says; [S, n]."""
    lens = Lens(vectors.double(), head.double(), gain, layernorm, softcap)

    def log_prob(rows: torch.Tensor, sigma: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        normed = lens.through_norm(rows) / sigma
        normed = normed if lens_bias is None else normed + lens_bias.double()
        logits = linear(normed, lens.head, None if head_bias is None else head_bias.double())
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits.log_softmax(-1)[..., target]

    scores = torch.empty(contributions.shape, dtype=torch.float64, device=contributions.device)
    samples = zip(contributions.double(), residual.double(), scale.double(), targets, strict=True)
    for row, (m, x, sigma, target) in zip(scores, samples, strict=True):
        before = log_prob(x, sigma, target)
        for part in spans(len(m), 64):
            added = x + (m[part] * lens.vectors[:, part]).T
            row[part] = log_prob(added, sigma, target) - before
    return scores


def published_scale(final: torch.Tensor) -> torch.Tensor:
    """The released code's "final_var" of final hidden states [S, d]: float32 [S].

    It is a standard deviation, whose root then divides. For its formula in float32 arithmetic pass
    `(published_scale(final) + 1e-6).sqrt()` as the `scale` of `neuron_log_prob_gain`.
    """
    return (final.float().var(-1, unbiased=False) + 1e-5).sqrt()


# --- the best ------------------------------------------------------------------------------------


def _top(first: torch.Tensor, corrections: Corrections, k: int) -> NeuronGains:
    """The best k by exact score: in the bound's order, in rounds, until no bound is good enough."""
    bounds = first.float()
    _refuse_nan(bounds)
    scores = torch.full_like(bounds, -torch.inf)
    done = torch.zeros_like(bounds, dtype=torch.bool)
    missing = torch.full_like(bounds[:, 0], -torch.inf)
    size = min(bounds.shape[1], k + max(k // 8, 16))
    while True:
        open_bounds = bounds.masked_fill(done | (bounds < missing[:, None]), -torch.inf)
        best = open_bounds.topk(size, dim=1).indices
        wanted = torch.zeros_like(done).scatter_(1, best, True)
        wanted &= ~done & (bounds >= missing[:, None])
        neurons = wanted.any(0).nonzero()[:, 0]
        if len(neurons) == 0:
            break
        needed = wanted[:, neurons]
        found = (first[:, neurons] - corrections.of(neurons, needed)).float()
        _refuse_nan(found)
        scores[:, neurons] = torch.where(needed, found, scores[:, neurons])
        done |= wanted
        missing = scores.topk(k, dim=1).values[:, -1]
        size = min(bounds.shape[1], max(k // 4, 64))
    return NeuronGains(*_best(scores, k), done.sum(1))


def _every_score(scores: torch.Tensor, mode: str, k: int | None) -> NeuronGains:
    evaluations = scores.new_full((len(scores),), scores.shape[1], dtype=torch.int64)
    if mode != "top":
        return NeuronGains(scores, None, evaluations)
    _refuse_nan(scores)
    return NeuronGains(*_best(scores, k), evaluations)


def _best(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k].contiguous(), indices[:, :k].contiguous()


# --- as published ---------------------------------------------------------------------------------


def _published(
    contributions: torch.Tensor,
    lens: Lens,
    residual: torch.Tensor,
    scale: torch.Tensor,
    targets: torch.Tensor,
) -> torch.Tensor:
    """The released arithmetic, sample by sample."""
    published = PublishedLens(lens.head, lens.gain)
    contributions, residual = contributions.float(), residual.float()
    roots, tokens = torch.rsqrt(scale.float() + 1e-6), targets.tolist()
    bases = published.inputs(residual, roots[:, None])
    surveys = published.surveys(bases, tokens)
    gains = [
        published.gains(
            *(contributions[i], lens.vectors, residual[i], roots[i], token),
            before=published.log_probs(bases[i], token),
            survey=surveys[i],
        )
        for i, token in enumerate(tokens)
    ]
    return four_decimals(torch.stack(gains))


# --- checks ---------------------------------------------------------------------------------------


def _check(contributions, lens: Lens, residual, scale, targets, lens_bias, head_bias) -> None:
    operands = ("vectors", lens.vectors, "d, n"), ("head", lens.head, "V, d")
    for name, tensor, words in operands:
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}")
        if tensor.ndim != 2 or (name == "head" and tensor.numel() == 0):
            raise ValueError(f"{name}: expected [{words}], got shape {list(tensor.shape)}")
    (width, count), vocab = lens.vectors.shape, len(lens.head)
    samples = len(contributions) if contributions.ndim else 0
    wanted = {
        "contributions": (contributions, [samples, count]),
        "head": (lens.head, [vocab, width]),
        "residual": (residual, [samples, width]),
        "scale": (scale, [samples]),
        "targets": (targets, [samples]),
        "gain": (lens.gain, [width]),
        "lens_bias": (lens_bias, [width]),
        "head_bias": (head_bias, [vocab]),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if list(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {list(tensor.shape)}")
        if tensor.device != lens.vectors.device:
            raise ValueError(f"{name}: lies on {tensor.device}, vectors on {lens.vectors.device}")
        if name != "targets" and not tensor.is_floating_point():
            raise TypeError(f"{name}: expected floating point, got {tensor.dtype}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected dtype int64, got {targets.dtype}")
    if samples and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
        raise ValueError(f"targets: expected tokens from 0 to {vocab - 1}, got {targets.tolist()}")
    if not (scale > 0).all():
        raise ValueError(f"scale: expected positive numbers, got {scale.tolist()}")
    if lens.softcap is not None and not lens.softcap > 0:
        raise ValueError(f"softcap: expected a positive number or None, got {lens.softcap}")


def _check_mode(mode: str, k: int | None, count: int) -> None:
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == "top" and (k is None or not 1 <= k <= count):
        raise ValueError(f"k: expected 1 to {count}, the number of neurons, got {k}")
    if mode != "top" and k is not None:
        raise ValueError(f"k: mode {mode!r} takes none, got {k}")


def _check_compat(compat: str, mode: str, lens: Lens, lens_bias, head_bias) -> None:
    if compat != "published":
        raise ValueError(f"compat: expected 'published' or None, got {compat!r}")
    if mode == "first-order":
        raise ValueError("compat: the published code has no first-order scores; use another mode")
    extras = {"lens_bias": lens_bias, "head_bias": head_bias, "softcap": lens.softcap}
    named = [name for name, value in extras.items() if value is not None]
    named += ["layernorm"] if lens.layernorm else []
    if named:
        raise ValueError(f"compat: the published code has no {', '.join(named)}; leave it out")
    if lens.head.dtype != torch.float16:
        raise TypeError(f"head: the published code runs in float16, got {lens.head.dtype}")


def _refuse_nan(scores: torch.Tensor) -> None:
    bad = scores.isnan().any(1).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(
            f"scores of sample {bad[0]} are NaN: look for a NaN or an infinity in its operands"
        )
