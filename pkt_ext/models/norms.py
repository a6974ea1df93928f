# SPDX-License-Identifier: Apache-2.0
"""What a norm computes, taken apart: with its scale frozen it is linear in its input.

    y = gain * (x - mean(x)) / scale + bias,    scale = sqrt(mean((x - mean(x))^2) + eps)

RMS norms leave the mean out and have no bias. Gemma stores the gain less 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from pkt_ext.errors import InputError


@dataclass(frozen=True)
class Norm:
    """One norm over the last axis; its parameters stay in its module."""

    centred: bool  # LayerNorm: the mean is subtracted
    eps: float
    offset: float  # what is added to the stored weight

    def scale(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [...]: what the norm divides by, in x's dtype."""
        return (self._centre(x).square().mean(-1) + self.eps).sqrt()

    def frozen(
        self, x: torch.Tensor, scale: torch.Tensor | float, gain: torch.Tensor | None
    ) -> torch.Tensor:
        """The norm of x [..., D] without its bias, where it divides by `scale` [..., 1]."""
        y = self._centre(x) / scale
        return y if gain is None else y * gain

    def gain(self, module: nn.Module) -> torch.Tensor | None:
        """fp32 [D], a copy; None where there is none."""
        return _copy(module, "weight", self.offset)

    def bias(self, module: nn.Module) -> torch.Tensor | None:
        """fp32 [D], a copy; None where there is none."""
        return _copy(module, "bias", 0.0)

    def _centre(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x


def read_norm(module: nn.Module, where: str) -> Norm:
    """How `module` normalises; its parameters may be on meta.

    Structure and attributes say so, and a trial run of the module has to agree.

    Args:
        where: its path, for the message.
    Raises:
        InputError: it computes something else.
    """
    own = {n: p.shape for n, p in module.named_parameters()}
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    if "weight" in own and eps is not None and own.keys() <= {"weight", "bias"}:
        generator = torch.Generator().manual_seed(0)
        # so small that eps counts
        x = torch.randn(own["weight"], generator=generator) * eps**0.5 + eps**0.5
        trial = {n: torch.randn(shape, generator=generator) for n, shape in own.items()}
        nothing = {n: torch.zeros(shape) for n, shape in own.items()}
        offset = 1.0 if functional_call(module, nothing, (x,)).any() else 0.0
        norm = Norm(isinstance(module, nn.LayerNorm), float(eps), offset)
        ours = norm.frozen(x, norm.scale(x), trial["weight"] + offset) + trial.get("bias", 0.0)
        if torch.allclose(ours, functional_call(module, trial, (x,)), rtol=1e-4, atol=1e-5):
            return norm
    raise InputError(
        f"{where} ({type(module).__name__}) is neither LayerNorm nor RMSNorm; no neurons can be "
        "located in this model, choose another"
    )


def _copy(module: nn.Module, name: str, offset: float) -> torch.Tensor | None:
    parameter = module._parameters.get(name)
    return None if parameter is None else parameter.detach().float() + offset
