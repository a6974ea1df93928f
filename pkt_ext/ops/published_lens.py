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

import torch
from torch.nn.functional import linear

from pkt_ext.ops._workers import spans

_TOKENS = 512  # computed one by one, and as many in the sample
_FEW = 32  # vectors for which a sample does not pay
_ERRORS = 6.0  # standard errors that decide
_ROUNDING = 1e-5  # of a float32 denominator, generously
_LOGITS = {"cpu": 2**23}  # in memory at a time; 2^25 elsewhere
_KEPT_HEAD = 2**28  # elements of a head that is kept in float32, 1 GiB


class PublishedLens:
    """The released lens of one float16 model.

    Args:
        head: [V, d] float16.
        gain: [d] of the final norm, or None.
    """

    def __init__(self, head: torch.Tensor, gain: torch.Tensor | None):
        self.head, self._gain = head.detach(), gain
        self._wide: torch.Tensor | None = None  # the head in float32
        self._squares: torch.Tensor | None = None  # [V], its rows' squared lengths

    def prepare(self) -> None:
        """Make what all neurons share, so that `gains` may run on several threads."""
        if self._on_cpu and len(self.head) >= 8 * _TOKENS:
            self._row_squares()

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
    def gains(
        self,
        contributions: torch.Tensor,
        vectors: torch.Tensor,
        residual: torch.Tensor,
        root: torch.Tensor,
        target: int,
        *,
        before: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """log p(target | x + m_i v_i) - log p(target | x) of a block's neurons: float16 [n].

        Args:
            contributions: [n] float32 m.
            vectors:       [d, n] float16.
            residual:      [d] float32 x.
            root:          see `inputs`.
            before:        the log-probability without a neuron, if it is known.
        """
        base, count = self.inputs(residual, root), len(contributions)
        before = self.log_probs(base, target) if before is None else before
        found = before.expand(count).clone()
        size = max(1, _LOGITS.get(self.head.device.type, 2**25) // len(self.head))
        for part in spans(count, max(size, 1024)):
            added = (contributions[part] * vectors[:, part]).T + residual
            found[part] = self._near(base, found[part], self.inputs(added, root), target, size)
        return found - before

    def _near(
        self, base: torch.Tensor, found: torch.Tensor, rows: torch.Tensor, target: int, size: int
    ) -> torch.Tensor:
        """Log-probabilities of head inputs [n, d], given those of the base; `size` at a time."""
        left = (rows != base).any(1).nonzero()[:, 0]
        if self._on_cpu and len(left) > _FEW and len(self.head) >= 8 * _TOKENS:
            values, sure = self._estimates(base, rows[left], target)
            found[left[sure]] = values[sure]
            left = left[~sure]
        for part in spans(len(left), size):
            some = left[part]
            found[some] = self._exact(rows[some], target)
        return found

    def _exact(self, rows: torch.Tensor, target: int) -> torch.Tensor:
        if not self._on_cpu:
            return self.log_probs(rows, target)
        logits = torch.empty(len(rows), len(self.head), dtype=torch.float16)
        for part, head in self._wide_parts():
            logits[:, part] = linear(rows.float(), head)
        logits[:, target] = self._target_logits(rows, target)
        return logits.softmax(-1)[:, target].log()

    def _estimates(
        self, base: torch.Tensor, rows: torch.Tensor, target: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probabilities float16 [n], which of them no error can change)."""
        shift = rows.float() - base.float()
        logits = torch.cat([head @ base.float() for _, head in self._wide_parts()])
        most = logits.amax()
        rest = (logits - most).exp()  # of every token, relative to the likeliest
        likely = torch.cat([rest.topk(_TOKENS).indices, torch.tensor([target])]).unique()
        rest[likely] = 0.0
        total = rest.sum(dtype=torch.float64)
        pull = sum(rest[part] @ head for part, head in self._wide_parts())
        centre = pull / total.float().clamp_min(1e-30)
        moved = (shift @ centre).double().exp()  # of all of the rest alike
        second, error = self._second_order(shift, rest, centre)

        alone = linear(rows.float(), self.head[likely].float()).half().float()
        known = (alone - most).exp().sum(1, dtype=torch.float64)
        whole = known + moved * (total + second)
        rounding = (rest.double() * _half_spacing(logits)).square().sum() / 3.0
        doubt = _ERRORS * moved * (error.square() + rounding).sqrt() / whole + _ROUNDING
        log_prob = (self._target_logits(rows, target).float() - most).double() - whole.log()
        low, high = ((log_prob + d).exp().half().log() for d in (-doubt, doubt))
        return low, low == high

    def _second_order(
        self, shift: torch.Tensor, rest: torch.Tensor, centre: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """sum_v rest_v g((E_v - centre) . shift), and a standard error of it: float64 [n] each."""
        along = torch.cat([head @ centre for _, head in self._wide_parts()])
        squares = (self._row_squares() - 2.0 * along + centre @ centre).clamp_min(1e-12)
        steps = (rest * squares).cumsum(0, dtype=torch.float64)
        places = (torch.arange(_TOKENS, dtype=torch.float64) + 0.5) / _TOKENS * steps[-1]
        drawn = torch.searchsorted(steps, places).clamp_max(len(rest) - 1)
        x = linear(shift, self.head[drawn].float() - centre)
        shares = (x.expm1() - x).double() / squares[drawn]
        error = shares.std(1) / _TOKENS**0.5 + shares.amax(1) / _TOKENS
        # farther than that a token that hardly counts, and is not drawn, could come to lead
        error[shift.norm(dim=1) * squares.amax().sqrt() > 1.0] = torch.inf
        return steps[-1] * shares.mean(1), steps[-1] * error

    def _target_logits(self, rows: torch.Tensor, target: int) -> torch.Tensor:
        return linear(rows, self.head[target : target + 1])[:, 0]

    def _row_squares(self) -> torch.Tensor:
        if self._squares is None:
            self._squares = torch.cat([h.square().sum(1) for _, h in self._wide_parts()])
        return self._squares

    def _wide_parts(self):
        """(rows, head[rows] in float32) of the whole head; a small one is widened only once."""
        if self._wide is None and self.head.numel() <= _KEPT_HEAD:
            self._wide = self.head.float()
        if self._wide is not None:
            yield slice(0, len(self.head)), self._wide
            return
        for part in spans(len(self.head), max(1, 2**22 // self.head.shape[1])):
            yield part, self.head[part].float()

    @property
    def _on_cpu(self) -> bool:
        return self.head.device.type == "cpu"


def four_decimals(scores: torch.Tensor) -> torch.Tensor:
    """Python's round(score, 4) of every score, halves to even: float32.

    A float16 or float32 value times 10000 is exact in float64, so nothing is rounded twice.
    """
    return ((scores.double() * 1e4).round() / 1e4).float()


def _half_spacing(values: torch.Tensor) -> torch.Tensor:
    """The distance from each float32 value to the next of float16: float64."""
    exponent = torch.frexp(values).exponent.clamp_min(-13)
    return (exponent - 11).double().exp2()
