# SPDX-License-Identifier: Apache-2.0
"""Gains of blocks and neurons as LaTen's scripts score them, or as they should be scored.

As published: float16 lens and logits, divided by the root of a standard deviation, differences of
neurons rounded to 4 decimals. A model of another dtype, on which the published code crashes, gets
the same formulas in float32. Corrected (`fix`): float32 throughout, the model's own final norm,
bias and soft cap, no rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import linear

from pkt_ext import ops
from pkt_ext.compat import notices
from pkt_ext.compat._positions import Half, Position
from pkt_ext.errors import InputError
from pkt_ext.models.anatomy import Anatomy, Projection
from pkt_ext.models.norms import read_norm
from pkt_ext.ops._workers import over_tiles
from pkt_ext.ops.published_lens import PublishedLens, four_decimals
from pkt_ext.streaming.readout import soft_capped

_LOGITS = 2**25  # of float32, in memory at a time


def projection_of(anatomy: Anatomy, block: int, role: str) -> Projection:
    """One projection of a block."""
    return next(p for p in anatomy.projections[block] if p.role == role)


class Scorer:
    """Scores what flows at the last positions of prompts.

    Args:
        model:   a causal language model, resident.
        anatomy: of it.
        fix:     correct what the published code gets wrong.
    Raises:
        InputError: without `fix`, a final norm or head that the published formulas do not have.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, *, fix: bool):
        self.model, self.anatomy, self.fix = model, anatomy, fix
        head = model.get_output_embeddings()
        self.head, self.head_bias = head.weight.detach(), head.bias
        self.norm = self.gain = self.bias = None
        if path := anatomy.final_norm:
            module = model.get_submodule(path)
            self.norm = read_norm(module, path)
            self.gain, self.bias = self.norm.gain(module), self.norm.bias(module)
        centred = self.norm is None or self.norm.centred
        if not fix and (centred or anatomy.logit_softcap or head.bias is not None):
            raise InputError(
                f"{type(model).__name__} is not of Llama's kind, which the published formulas are "
                "for; pass fix=True"
            )
        self.lens: PublishedLens | None = None
        if not fix and self.head.dtype == torch.float16:
            # the stored gain times float32: what the published code multiplies
            self.lens = PublishedLens(self.head, self.gain)
        elif not fix:
            notices.once(
                "laten.dtype",
                "the published code crashes on models that are not float16; its formulas are "
                f"evaluated in float32 for this one ({self.head.dtype})",
            )

    def block_gains(self, position: Position) -> tuple[list[float], list[float]]:
        """What attention and FFN of every block do for the target, in nats."""
        ends = [half.base.float() + half.added.float() for half in _halves(position)]
        after = self._log_probs(position, torch.stack(ends)).unflatten(0, (2, -1))
        attention, ffn = (after - self._bases(position)).tolist()
        return attention, ffn

    @torch.no_grad()
    def best(
        self,
        positions: Sequence[Position],
        role: str,
        blocks: Sequence[int],
        count: int,
        *,
        top: bool,
    ) -> list[list[int]]:
        """The best neurons of each block, best first, or the worst, worst first.

        Equal scores come as torch's unstable sort leaves them on the CPU, as published; with `fix`
        the lower index first.
        """
        if not self.fix and blocks:
            self._score(positions, role, blocks)
            scores = torch.stack([self.scores(positions, role, b).cpu() for b in blocks])
            return torch.argsort(scores, descending=top)[:, :count].tolist()
        found = []
        for block in blocks:
            width = projection_of(self.anatomy, block, role).shape[1]
            if top and len(positions) == 1 and 0 < count < width:
                order = self._gains(positions, role, block, count).indices[0]
            else:
                scores = self.scores(positions, role, block)
                order = scores.sort(descending=top, stable=True).indices[:count]
            found.append(order.tolist())
        return found

    @torch.no_grad()
    def scores(self, positions: Sequence[Position], role: str, block: int) -> torch.Tensor:
        """Of a block's neurons, over all positions: float32 [K].

        Args:
            role: "o" (attention) or "down" (FFN).
        """
        if not positions:
            return torch.zeros(projection_of(self.anatomy, block, role).shape[1])
        if self.fix:
            return self._gains(positions, role, block).scores.sum(0)
        if role == "o":  # each prompt's overwrite the last one's
            positions = positions[-1:]
        return sum(self._published(p, role, block) for p in positions)  # in the published order

    def _score(self, positions: Sequence[Position], role: str, blocks: Sequence[int]) -> None:
        """Have the published scores of these blocks remembered; on a CPU one block a thread."""
        if self.lens is None:
            return
        for position in positions[-1:] if role == "o" else positions:
            self._bases(position)
            self._surveys(position)
            work = lambda block, _, p=position: self._published(p, role, block)  # noqa: E731
            over_tiles(work, blocks, lambda: None, self.head.device)

    def _published(self, position: Position, role: str, block: int) -> torch.Tensor:
        """float32 [K] of one prompt, 4 decimals; remembered with the position."""
        known = position.known.get((role, block))
        if known is None:
            if self.lens is None:
                known = self._gains([position], role, block).scores[0]
            else:
                half = _half(position, role, block)
                known = self.lens.gains(
                    half.neurons.float() / half.scale,
                    self._vectors(half, role, block),
                    half.base.float(),
                    self._root(position),
                    position.target,
                    before=self._bases(position)[_number(role)][block],
                    survey=self._surveys(position)[_number(role)][block],
                )
            known = position.known[role, block] = four_decimals(known)
        return known

    def _gains(
        self, positions: Sequence[Position], role: str, block: int, k: int | None = None
    ) -> ops.NeuronGains:
        """Of all neurons, or the best k, without rounding."""
        halves = [_half(position, role, block) for position in positions]
        return ops.neuron_log_prob_gain(
            torch.stack([half.neurons.float() / half.scale for half in halves]),
            self._vectors(halves[0], role, block),
            self.head,
            torch.stack([half.base.float() for half in halves]),
            torch.stack([self._sigma(position) for position in positions]),
            torch.tensor([p.target for p in positions], device=self.head.device),
            mode="all" if k is None else "top",
            k=k,
            gain=self.gain,
            lens_bias=self.bias,
            head_bias=self.head_bias,
            layernorm=self.norm is not None and self.norm.centred,
            softcap=self.anatomy.logit_softcap,
        )

    def _vectors(self, half: Half, role: str, block: int) -> torch.Tensor:
        """[D, K], the columns of o or down; behind a norm, with its gain."""
        projection = projection_of(self.anatomy, block, role)
        path = f"{self.anatomy.blocks[block]}.{projection.module}.weight"
        vectors = projection.matrix(self.model.get_parameter(path).detach())
        if half.norm is None:
            return vectors
        module = self.model.get_submodule(half.norm)
        norm = read_norm(module, half.norm)
        return norm.frozen(vectors.T.float(), 1.0, norm.gain(module)).T

    def _bases(self, position: Position) -> torch.Tensor:
        """Log-probabilities without any addition: [2, L], attention and FFN; remembered."""
        if "bases" not in position.known:
            rows = torch.stack([half.base.float() for half in _halves(position)])
            position.known["bases"] = self._log_probs(position, rows).unflatten(0, (2, -1))
        return position.known["bases"]

    def _surveys(self, position: Position) -> tuple[list, list]:
        """What the lens knows around every block's bases; remembered."""
        if "surveys" not in position.known:
            rows = torch.stack([half.base.float() for half in _halves(position)])
            inputs = self.lens.inputs(rows, self._root(position))
            found = self.lens.surveys(inputs, [position.target] * len(rows))
            position.known["surveys"] = found[: len(rows) // 2], found[len(rows) // 2 :]
        return position.known["surveys"]

    @torch.no_grad()
    def _log_probs(self, position: Position, rows: torch.Tensor) -> torch.Tensor:
        """Of the position's target, for float32 rows [R, D] of its residual stream: [R]."""
        size = max(1, _LOGITS // len(self.head))
        parts = rows.split(size)
        if self.lens is not None:
            inputs = [self.lens.inputs(part, self._root(position)) for part in parts]
            return torch.cat([self.lens.log_probs(part, position.target) for part in inputs])
        return torch.cat([self._float_log_probs(position, part) for part in parts])

    def _float_log_probs(self, position: Position, rows: torch.Tensor) -> torch.Tensor:
        inputs = rows / self._sigma(position)
        if self.norm is not None:
            inputs = self.norm.frozen(rows, self._sigma(position), self.gain)
        inputs = inputs if self.bias is None else inputs + self.bias
        step = max(1, 2**24 // self.head.shape[1])  # of the head in float32
        logits = torch.cat([linear(inputs, part.float()) for part in self.head.split(step)], 1)
        logits = logits if self.head_bias is None else logits + self.head_bias.float()
        return soft_capped(logits, self.anatomy.logit_softcap).log_softmax(1)[:, position.target]

    def _sigma(self, position: Position) -> torch.Tensor:
        """What the residual stream is divided by: float32 []."""
        final = position.final.float()
        if not self.fix:
            return 1.0 / self._root(position)
        return final.new_ones(()) if self.norm is None else self.norm.scale(final)

    def _root(self, position: Position) -> torch.Tensor:
        """What the published code multiplies with: float32 []."""
        return torch.rsqrt(ops.published_scale(position.final) + 1e-6)


def _number(role: str) -> int:
    """0 attention, 1 FFN."""
    return 0 if role == "o" else 1


def _half(position: Position, role: str, block: int) -> Half:
    return (position.attention, position.ffn)[_number(role)][block]


def _halves(position: Position) -> list[Half]:
    return [*position.attention, *position.ffn]
