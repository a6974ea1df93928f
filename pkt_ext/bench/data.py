# SPDX-License-Identifier: Apache-2.0
"""Random inputs with the structure of the real ones; zeros and plain noise flatter kernels."""

from __future__ import annotations

import math

import torch

from pkt_ext.ops._thin_products import on_threads


class Source:
    """Random tensors of one seed on one device."""

    def __init__(self, seed: int, device: torch.device):
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal, float32."""
        return torch.randn(shape, generator=self._generator, device=self.device)

    def heavy(self, *shape: int) -> torch.Tensor:
        """[N, D] normal with log-normal scales of every element, row and column."""
        values = self.normal(*shape).exp_().mul_(self.normal(*shape))
        for dim in (0, 1):
            scale = [size if axis == dim else 1 for axis, size in enumerate(shape)]
            values *= self.normal(*scale).exp_()
        return values

    def weight(self, rows: int, cols: int) -> torch.Tensor:
        """A linear layer's weight, elementwise."""
        return self.normal(rows, cols).mul_(0.02)

    def output_gradients(
        self, tokens: int, width: int, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Around 1e-4, heavy-tailed, tokens and channels of different scale.

        In float16 2^8 times that and clipped: nobody can train in it otherwise.
        """
        values = self.heavy(tokens, width).mul_(1e-4)
        if dtype == torch.float16:
            values = values.mul_(2.0**8).clamp_(-16.0, 16.0)
        return values.to(dtype)

    def activations(self, tokens: int, width: int) -> torch.Tensor:
        """Normal, one channel in a hundred twenty times larger."""
        values = self.normal(tokens, width)
        values[:, :: max(1, width // max(1, width // 100))] *= 20.0
        return values

    def score(self, rows: int, cols: int) -> torch.Tensor:
        """A sensitivity: non-negative, heavy-tailed, rows and columns of different scale."""
        return self.heavy(rows, cols).abs_()

    def spectrum(self, rows: int, cols: int, kind: str) -> torch.Tensor:
        """A matrix with a given kind of singular values.

        "power": i^-0.3. "spiked": a Marchenko-Pastur bulk, and above it spikes as many as 6 % of
        the shorter side, falling as i^-0.3. "flat": the bulk alone, which nobody can compress.
        """
        if kind == "flat":
            return self.normal(rows, cols)
        small = min(rows, cols)
        if kind == "power":
            values = torch.zeros(rows, cols, device=self.device)
            values.diagonal().copy_(torch.arange(1, small + 1) ** -0.3)
            return self._mixed(self._mixed(values).T).T
        count = max(1, int(0.06 * small))
        fall = (torch.arange(1, count + 1, device=self.device) / count) ** -0.3
        thin = [self.normal(n, count) for n in (rows, cols)]
        with on_threads(1):
            left, right = (torch.linalg.qr(one).Q for one in thin)
        edge = rows**0.5 + cols**0.5  # the bulk's largest singular value
        return self.normal(rows, cols).addmm_(left * (edge * fall), right.T)

    def _mixed(self, values: torch.Tensor) -> torch.Tensor:
        """A random orthogonal matrix times `values`: rows permuted, Hartley transform, signs."""
        order = torch.randperm(len(values), generator=self._generator, device=self.device)
        waves = torch.fft.fft(values[order], dim=0)
        signs = self.normal(len(values), 1).sign() / math.sqrt(len(values))
        return (waves.real - waves.imag) * signs
