# SPDX-License-Identifier: Apache-2.0
"""The second term of neuron scores, which takes a product of neurons and the whole head."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pkt_ext.ops import _backend
from pkt_ext.ops._lens import Lens, capped_change, float64_buffer, float64_rows, widened
from pkt_ext.ops._thin_products import on_threads
from pkt_ext.ops._workers import over_tiles, spans

# A panel of products: neurons by tokens. A CPU's core keeps it in the caches, a GPU wants it large.
_PANEL = {"cpu": (1024, 1024), "cuda": (4096, 8192)}
WGMMA = False  # the product's kernel for sm_90a, until a card has verified it; tests and bench do


class Corrections:
    """log(1 + sum_v p_v g(x_iv)) for neurons asked for, by panels of neurons and tokens."""

    def __init__(
        self, lens: Lens, tokens: torch.Tensor, strengths: torch.Tensor, centres: torch.Tensor
    ):
        self._lens, self._tokens = lens, tokens
        self._strengths, self._centres = strengths, centres
        self._cap = lens.softcap or 0.0  # none
        with _backend.device_of(lens.head) as launch:
            self._fused = _backend._C.neuron_product_takes(lens.head, **launch, wgmma=WGMMA)
        self.panel_rows, self._panel_tokens = _PANEL[lens.head.device.type]

    def of(self, neurons: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """float64 [S, r] for neurons [r]; those that a sample does not want [S, r] are 0."""
        weights = self._weights(neurons)
        strengths, centres = (
            torch.where(wanted, t[:, neurons], 0.0) for t in (self._strengths, self._centres)
        )
        sums = strengths.new_zeros(strengths.shape)
        for part in spans(len(neurons), self.panel_rows):
            own = [weights[part], strengths[:, part], centres[:, part]]
            sums[:, part] = self._multiplied(*own) if self._fused else self._by_panels(*own)
        found = torch.log1p(sums)
        # soft-capped, the sum can near -1, where log1p loses it; 1e-7 of 1.5 at most before
        pairs = (found.isinf() | (sums < -0.5)).nonzero()
        for some in spans(len(pairs), self._panel_tokens):
            samples, places = pairs[some].T
            found[samples, places] = self._beyond(samples, neurons[places])
        return found

    def _weights(self, neurons: torch.Tensor) -> torch.Tensor:
        """[r, d] in float32: what the head multiplies."""
        with on_threads(1):  # too short to wait for others
            return self._lens.through_norm(self._lens.vectors.T[neurons].float())

    def _beyond(self, samples: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
        """log sum_v p_v exp(x_iv) of pairs [P] whose sum no float holds, in float64."""
        weights = self._weights(neurons).double()
        strengths, centres = (
            t[samples, neurons][:, None] for t in (self._strengths, self._centres)
        )

        def tile(part: slice, buffer: torch.Tensor) -> torch.Tensor:
            rows = widened(self._lens.head[part], buffer)
            planes = self._tokens[samples][:, :, part].double()
            shifts = strengths * (weights @ rows.T)
            if self._lens.softcap is not None:
                shifts = capped_change(shifts, self._lens.softcap, planes[:, 2], planes[:, 3])
            return torch.logsumexp(planes[:, 1] + shifts - centres, 1)

        head = self._lens.head
        cuts = spans(len(head), float64_rows(head))
        return torch.stack(over_tiles(tile, cuts, float64_buffer(head), head.device)).logsumexp(0)

    def _by_panels(self, weights, strengths, centres) -> torch.Tensor:
        """Products by torch, in float32; a head of another type is converted tile by tile."""
        head, count = self._lens.head, len(weights)
        values = torch.stack([strengths, centres], 1).float()
        size = min(self._panel_tokens, len(head))
        tiles = list(spans(len(head), size))
        sums = strengths.new_zeros(len(tiles), *strengths.shape)

        def tile(number: int, space: tuple[torch.Tensor, torch.Tensor | None]) -> None:
            part, (panel, widened) = tiles[number], space
            tokens = part.stop - part.start
            rows = head[part] if widened is None else widened[:tokens].copy_(head[part])
            products = panel[: count * tokens].view(count, tokens)
            torch.mm(weights, rows.T, out=products)
            with _backend.device_of(head) as launch:
                operands = (products, self._tokens[:, :, part], values, self._cap)
                _backend._C.neuron_panel(sums[number], *operands, **launch)

        def space() -> tuple[torch.Tensor, torch.Tensor | None]:
            panel = weights.new_empty(count * size)
            if head.dtype == torch.float32:
                return panel, None
            return panel, weights.new_empty(size, head.shape[1])

        over_tiles(tile, range(len(tiles)), space, head.device)
        return sums.sum(0)

    def _multiplied(self, weights, strengths, centres) -> torch.Tensor:
        """Products on the tensor cores, which reduce them: no panel at all."""
        head, width = self._lens.head, weights.shape[1]
        sums = strengths.new_zeros(strengths.shape)
        # a power of two brings a neuron's largest weight near 2^12, where float16 is at its finest
        exponents = 12 - torch.frexp(weights.abs().amax(1))[1]
        grown = torch.ldexp(weights, exponents[:, None])
        parts = head.new_zeros(2, len(weights), -(-width // 32) * 32)
        parts[0, :, :width] = grown
        parts[1, :, :width] = grown - parts[0, :, :width].float()
        values = torch.stack([torch.ldexp(strengths, -exponents), centres], 1).float()
        with _backend.device_of(head) as launch:
            for tokens, rows in _aligned(head, self._panel_tokens):
                _backend._C.neuron_product(
                    sums,
                    parts,
                    rows,
                    self._tokens[:, :, tokens],
                    values,
                    self._cap,
                    lambda size: torch.empty(size, device=head.device),
                    **launch,
                    wgmma=WGMMA,
                )
        return sums


def _aligned(head: torch.Tensor, size: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """The head whole if its rows are contiguous on 16 bytes, else copies of rows that are."""
    if head.stride(1) == 1 and head.stride(0) % 8 == 0 and head.data_ptr() % 16 == 0:
        yield slice(0, len(head)), head
        return
    width = head.shape[1]
    buffer = head.new_empty(min(size, len(head)), -(-width // 8) * 8)
    for part in spans(len(head), size):
        rows = buffer[: part.stop - part.start, :width]
        yield part, rows.copy_(head[part])
