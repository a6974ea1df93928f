# SPDX-License-Identifier: Apache-2.0
"""The released half-precision lens, without a half-precision product for every neuron.

As published, a vector of the residual stream is scaled by rsqrt(final_var + 1e-6) and the norm's
gain, rounded to float16, multiplied with the head in float16, and softmax and logarithm are
float16 too. Half products run at a tenth of a CPU's speed, and nearly every neuron ends where it
began: a logarithm in float16 keeps three digits. So, on a CPU,

  * a vector that rounds to the base's own float16 scores exactly 0 and is not multiplied;
  * the target's logit is torch's own half product, one column of it;
  * the softmax's denominator needs only to be known well enough to say what its logarithm rounds
    to. The likeliest tokens' logits are computed and rounded one by one. The others' are
    sum_v e_v (1 + x + g(x)), x = E_v . shift: the first two terms cost two thin products for all
    neurons, and g(x) = exp(x) - 1 - x is taken from a sample of tokens, drawn in proportion to
    e_v |E_v|^2, which bounds it while |E_v| |shift| <= 1. Six standard errors either way, and
    what a sample of that size can miss, have to round alike;
  * for what is left the head is multiplied in float32 and every logit rounded to float16.

float32 sums in another order than half products do: one logit in a thousand rounds to the
neighbour. On a GPU the half products themselves are used.

Source: LaTen's released scripts (METHODS 3.8), which multiply the head with every neuron.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from pkt_ext.ops._workers import spans

_TOKENS = 512  # computed one by one, and as many in the sample
_FEW = 32  # vectors for which a sample does not pay
_BASES = 16  # surveyed at a time
_ERRORS = 6.0  # standard errors that decide
_ROUNDING = 1e-5  # of a float32 denominator, generously
_LOGITS = {"cpu": 2**22}  # in memory at a time; 2^25 elsewhere
_WIDENED = 2**20  # elements of the head in float32 at a time, 4 MiB


@dataclass(frozen=True)
class _Survey:
    """The softmax's denominator around one base, relative to its likeliest token's part."""

    most: torch.Tensor  # float32 [], that token's logit
    likely: torch.Tensor  # int64 [K], tokens that are computed one by one
    total: torch.Tensor  # float64 [], of the rest
    rounding: torch.Tensor  # float64 [], variance of what rounding logits does to the rest
    centre: torch.Tensor  # float32 [d], the rest's mean row of the head
    drawn: torch.Tensor  # int64 [K], the sample of the rest
    squares: torch.Tensor  # float32 [K], its rows' squared distances from the centre
    mass: torch.Tensor  # float64 [], what one drawn token stands for, times their number
    reach: torch.Tensor  # float32 [], the farthest row's distance from the centre


class PublishedLens:
    """The released lens of one float16 model.

    Args:
        head: [V, d] float16.
        gain: [d] of the final norm, or None.
    """

    def __init__(self, head: torch.Tensor, gain: torch.Tensor | None):
        self.head, self._gain = head.detach(), gain

    def inputs(self, rows: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
        """float32 [..., d] of the residual stream -> what the head is given, float16.

        Args:
            root: rsqrt(final_var + 1e-6), see `published_scale`.
        """
        rows = rows * root
        rows = rows if self._gain is None else rows * self._gain.to(rows.dtype)
        return rows.to(torch.float16)

    def log_probs(self, inputs: torch.Tensor, target: int) -> torch.Tensor:
        """float16 [..., d] -> float16 [...], by torch's half products throughout."""
        return linear(inputs, self.head).softmax(-1)[..., target].log()

    @torch.no_grad()
    def surveys(self, bases: torch.Tensor, targets: Sequence[int]) -> list[_Survey | None]:
        """What `gains` needs to know of head inputs [B, d] float16, for all of them at once.

        None where it would not use it: on a GPU, with a small head.
        """
        if self.head.device.type != "cpu" or len(self.head) < 8 * _TOKENS:
            return [None] * len(bases)
        found = []
        for part in spans(len(bases), _BASES):
            found += self._surveys(bases[part].float(), targets[part])
        return found

    @torch.no_grad()
    def gains(
        self,
        contributions: torch.Tensor,
        vectors: torch.Tensor,
        residual: torch.Tensor,
        root: torch.Tensor,
        target: int,
        *,
        before: torch.Tensor,
        survey: _Survey | None,
    ) -> torch.Tensor:
        """log p(target | x + m_i v_i) - log p(target | x) of a block's neurons: float16 [n].

        Args:
            contributions: [n] float32 m.
            vectors:       [d, n] float16.
            residual:      [d] float32 x.
            root:          see `inputs`.
            before:        the log-probability without a neuron.
            survey:        of the inputs for x, from `surveys`.
        """
        base, found = self.inputs(residual, root), before.expand(len(contributions)).clone()
        size = max(1, _LOGITS.get(self.head.device.type, 2**25) // len(self.head))
        for part in spans(len(contributions), max(size, 1024)):
            added = (contributions[part] * vectors[:, part]).T + residual
            rows = self.inputs(added, root)
            left = (rows != base).any(1).nonzero()[:, 0]
            if survey is not None and len(left) > _FEW:
                values, sure = self._estimates(base, rows[left], target, survey)
                found[part.start + left[sure]] = values[sure]
                left = left[~sure]
            for span in spans(len(left), size):
                some = left[span]
                found[part.start + some] = self._exact(rows[some], target)
        return found - before

    def _exact(self, rows: torch.Tensor, target: int) -> torch.Tensor:
        """Log-probabilities of head inputs [n, d], every logit by itself."""
        if self.head.device.type != "cpu":
            return self.log_probs(rows, target)
        logits = torch.empty(len(rows), len(self.head), dtype=torch.float16)
        for part, head in self._widened():
            logits[:, part] = linear(rows.float(), head)
        logits[:, target] = self._target_logits(rows, target)
        return logits.softmax(-1)[:, target].log()

    def _estimates(
        self, base: torch.Tensor, rows: torch.Tensor, target: int, survey: _Survey
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probabilities float16 [n], which of them no error can change)."""
        shift = rows.float() - base.float()
        second, error = self._second_order(shift, survey)
        alone = linear(rows.float(), self.head[survey.likely].float()).half().float()
        known = (alone - survey.most).exp().sum(1, dtype=torch.float64)
        moved = (shift @ survey.centre).double().exp()  # all of the rest alike
        whole = known + moved * (survey.total + second)
        spread = (error.square() + survey.rounding).sqrt()
        doubt = _ERRORS * moved * spread / whole + _ROUNDING
        logit = self._target_logits(rows, target).float() - survey.most
        log_prob = logit.double() - whole.log()
        low, high = ((log_prob + d).exp().half().log() for d in (-doubt, doubt))
        return low, low == high

    def _second_order(
        self, shift: torch.Tensor, survey: _Survey
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """sum over the rest of e_v g((E_v - centre) . shift), and a standard error of it: [n]."""
        x = linear(shift, self.head[survey.drawn].float() - survey.centre)
        shares = (x.expm1() - x).double() / survey.squares
        error = shares.std(1) / _TOKENS**0.5 + shares.amax(1) / _TOKENS
        # farther than that a token that hardly counts, and is not drawn, could come to lead
        error[shift.norm(dim=1) * survey.reach > 1.0] = torch.inf
        return survey.mass * shares.mean(1), survey.mass * error

    def _surveys(self, bases: torch.Tensor, targets: Sequence[int]) -> list[_Survey]:
        parts = [(bases @ h.T, h.norm(dim=1)) for _, h in self._widened()]
        logits = torch.cat([products for products, _ in parts], 1)
        lengths = torch.cat([norms for _, norms in parts])
        most = logits.amax(1)
        rest = (logits - most[:, None]).exp()
        tokens = rest.topk(_TOKENS).indices
        likely = torch.cat([tokens, torch.tensor(targets)[:, None]], 1)
        rest.scatter_(1, likely, 0.0)
        total = rest.sum(1, dtype=torch.float64)
        pull = sum(rest[:, part] @ head for part, head in self._widened())
        centres = pull / total.float().clamp_min(1e-30)[:, None]
        along = torch.cat([centres @ head.T for _, head in self._widened()], 1)
        found = []
        for i, centre in enumerate(centres):
            squares = (lengths.square() - 2.0 * along[i] + centre @ centre).clamp_min(1e-12)
            steps = (rest[i] * squares).cumsum(0, dtype=torch.float64)
            places = (torch.arange(_TOKENS, dtype=torch.float64) + 0.5) / _TOKENS * steps[-1]
            drawn = torch.searchsorted(steps, places).clamp_max(len(steps) - 1)
            rounding = (rest[i].double() * _half_spacing(logits[i])).square().sum() / 3.0
            found.append(
                _Survey(
                    most[i],
                    likely[i].unique(),
                    total[i],
                    rounding,
                    centre,
                    drawn,
                    squares[drawn],
                    steps[-1],
                    squares.amax().sqrt(),
                )
            )
        return found

    def _target_logits(self, rows: torch.Tensor, target: int) -> torch.Tensor:
        return linear(rows, self.head[target : target + 1])[:, 0]

    def _widened(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, head[rows] in float32), a few at a time."""
        for part in spans(len(self.head), max(1, _WIDENED // self.head.shape[1])):
            yield part, self.head[part].float()


def four_decimals(scores: torch.Tensor) -> torch.Tensor:
    """Python's round(score, 4) of every score, halves to even: float32.

    A float16 or float32 value times 10000 is exact in float64, so nothing is rounded twice.
    """
    return ((scores.double() * 1e4).round() / 1e4).float()


def _half_spacing(values: torch.Tensor) -> torch.Tensor:
    """The distance from each float32 value to the next of float16: float64."""
    exponent = torch.frexp(values).exponent.clamp_min(-13)
    return (exponent - 11).double().exp2()
