# SPDX-License-Identifier: Apache-2.0
"""The logit lens: a residual read through the frozen final norm and the head, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pkt_ext.ops._workers import over_tiles, spans

_WIDE = 1 << 18  # float64 values of an operand converted at a time, 2 MiB
_SPANS = 16  # of the vocabulary, for the softmax sums, at most: whatever the threads


@dataclass(frozen=True)
class Lens:
    """What turns a residual into logits, and the neurons that change it."""

    vectors: torch.Tensor  # [d, n]
    head: torch.Tensor  # [V, d]
    gain: torch.Tensor | None  # [d]
    layernorm: bool
    softcap: float | None

    def through_norm(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., d] as the norm passes it on, but for its scale and bias; in the rows' dtype."""
        if self.layernorm:
            rows = rows - rows.mean(-1, keepdim=True)
        return rows if self.gain is None else rows * self.gain.to(rows.dtype)

    def back_through_norm(self, directions: torch.Tensor) -> torch.Tensor:
        """The adjoint: what a residual is multiplied with, for what the normed one is."""
        if self.gain is not None:
            directions = directions * self.gain.to(directions.dtype)
        return directions - directions.mean(-1, keepdim=True) if self.layernorm else directions


@dataclass(frozen=True)
class Base:
    """The samples without any neuron."""

    tokens: torch.Tensor  # float32 [S, 2, V]: p, log p; [S, 4, V] soft-capped: tanh, its slope
    rise: torch.Tensor  # float64 [S, d]: the target logit's slope in the residual less the centre
    centre: torch.Tensor  # float64 [S, d]: the expected logit's slope
    target: torch.Tensor  # float64 [S, d]: the uncapped target logit's slope
    target_tanh: torch.Tensor  # float64 [S]: of the target's logit; 0 without soft-capping


def base_of(
    lens: Lens,
    residual: torch.Tensor,
    scale: torch.Tensor,
    targets: torch.Tensor,
    lens_bias: torch.Tensor | None,
    head_bias: torch.Tensor | None,
) -> Base:
    """Two passes over the logits, of which the first reads the head.

    The target is left out of the sums that make `rise`, sum_v p_v (E_y - E_v): it stays exact to
    its last digits where the target has nearly all the probability.
    """
    normed = lens.through_norm(residual.double()) / scale.double()[:, None]
    normed = normed if lens_bias is None else normed + lens_bias.double()
    logits, log_total, others, expected = _softmax_sums(lens, normed, targets, head_bias)
    tokens = _token_planes(logits, log_total, lens.softcap)
    capped, slope = _cap(logits.gather(1, targets[:, None]), lens.softcap)
    steepness, tanh = (1.0, torch.zeros_like(capped)) if slope is None else (slope, capped)
    prob = (capped - log_total[:, None]).exp()
    target = lens.head[targets].double()
    rise = others[:, None] * steepness * target - expected
    centre = expected + prob * steepness * target
    directions = (lens.back_through_norm(direction) for direction in (rise, centre, target))
    return Base(tokens, *directions, tanh[:, 0] / (lens.softcap or 1.0))


def _softmax_sums(
    lens: Lens, normed: torch.Tensor, targets: torch.Tensor, head_bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits before the cap [S, V], the logarithm of the softmax's denominator [S]; and without
    the target: the others' probability [S], the expected slope of a logit [S, d]. In float64."""
    vocab = len(lens.head)
    logits = normed.new_empty(len(normed), vocab)

    def sums(span: slice, buffer: torch.Tensor):
        """Largest logit; relative to it the sums with and without the target, and the slopes."""
        top = torch.full_like(normed[:, 0], -torch.inf)
        total, others, slopes = torch.zeros_like(top), torch.zeros_like(top), 0.0
        for part in spans(span.stop, len(buffer), span.start):
            rows = widened(lens.head[part], buffer)
            logits[:, part] = normed @ rows.T
            if head_bias is not None:
                logits[:, part] += head_bias[part].double()
            capped, slope = _cap(logits[:, part], lens.softcap)
            above = torch.maximum(top, capped.amax(1))
            fade, top = (top - above).exp(), above
            weights = (capped - top[:, None]).exp()
            total = total * fade + weights.sum(1)
            inside = (targets >= part.start) & (targets < part.stop)
            weights[inside, targets[inside] - part.start] = 0.0
            others = others * fade + weights.sum(1)
            pull = (weights if slope is None else weights * slope) @ rows
            slopes = slopes * fade[:, None] + pull
        return top, total, others, slopes

    cuts = spans(vocab, max(-(-vocab // _SPANS), float64_rows(lens.head)))
    parts = over_tiles(sums, cuts, float64_buffer(lens.head), normed.device)
    tops, totals, others, slopes = (torch.stack(column) for column in zip(*parts, strict=True))
    top = tops.amax(0)
    share = (tops - top).exp()
    total = (totals * share).sum(0)
    share = share / total
    return (
        logits,
        top + total.log(),
        (others * share).sum(0),
        torch.einsum("ts,tsd->sd", share, slopes),
    )


def _token_planes(logits: torch.Tensor, log_total: torch.Tensor, cap: float | None) -> torch.Tensor:
    """float32 [S, 2 or 4, V]: what a kernel reads of every token."""
    samples, vocab = logits.shape
    tokens = logits.new_empty(samples, 2 if cap is None else 4, vocab, dtype=torch.float32)

    def fill(part: slice, _) -> None:
        capped, slope = _cap(logits[:, part], cap)
        tokens[:, 1, part] = log_probs = capped - log_total[:, None]
        tokens[:, 0, part] = log_probs.exp()
        if slope is not None:
            tokens[:, 2, part] = capped / cap
            tokens[:, 3, part] = slope

    over_tiles(fill, spans(vocab, max(1, _WIDE // samples)), lambda: None, logits.device)
    return tokens


def _cap(logits: torch.Tensor, cap: float | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Capped logits and what a small change of the uncapped ones is multiplied with."""
    if cap is None:
        return logits, None
    tanh = torch.tanh(logits / cap)
    return cap * tanh, 1.0 - tanh * tanh


def capped_change(
    change: torch.Tensor, cap: float, tanh: torch.Tensor, slope: torch.Tensor
) -> torch.Tensor:
    """What soft-capping makes of a logit's change, without a difference of capped logits."""
    moved = torch.tanh(change / cap)
    return cap * moved * slope / (1.0 + tanh * moved)


def first_order(
    lens: Lens, base: Base, strengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(first order, centre, change of the target's logit less the centre), float64 [S, n] each.

    The first and the last are the same unless logits are soft-capped.
    """
    count = len(strengths)
    directions = torch.cat([base.rise, base.centre, base.target])
    if lens.softcap is None:
        directions = directions[: 2 * count]

    def tile(part: slice, rows: torch.Tensor) -> torch.Tensor:
        return directions @ widened(lens.vectors.T[part], rows).T

    cuts = spans(strengths.shape[1], float64_rows(lens.vectors.T))
    buffer = float64_buffer(lens.vectors.T)
    slopes = torch.cat(over_tiles(tile, cuts, buffer, strengths.device), 1)
    first, centres = strengths * slopes[:count], strengths * slopes[count : 2 * count]
    if lens.softcap is None:
        return first, centres, first
    tanh = base.target_tanh[:, None]
    moved = strengths * slopes[2 * count :]
    change = capped_change(moved, lens.softcap, tanh, 1.0 - tanh * tanh)
    return first, centres, change - centres


def float64_rows(matrix: torch.Tensor) -> int:
    """Rows of [N, D] converted at a time."""
    return max(1, min(len(matrix), max(64, _WIDE // matrix.shape[1])))


def float64_buffer(matrix: torch.Tensor) -> Callable[[], torch.Tensor]:
    shape = float64_rows(matrix), matrix.shape[1]
    return lambda: matrix.new_empty(shape, dtype=torch.float64)


def widened(rows: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Rows [r, D] in float64, in the buffer's first ones; float16 goes by way of float32, which
    torch is three times as fast at."""
    return buffer[: len(rows)].copy_(rows.float())
