# SPDX-License-Identifier: Apache-2.0
"""A norm taken apart computes what its module does, and is linear with its scale frozen."""

import model_zoo as zoo
import pytest
import torch
from torch import nn

from pkt_ext.errors import InputError
from pkt_ext.models.anatomy import describe
from pkt_ext.models.norms import read_norm
from pkt_ext.streaming.checkpoint import Checkpoint

FAMILIES = [name for name in zoo.FAMILIES if name != "opt_post_norm"]  # it has no final norm


def final_norm(model):
    path = describe(model).final_norm
    return model.get_submodule(path), path


@pytest.mark.parametrize("family", FAMILIES)
def test_is_what_the_module_computes(family):
    model = zoo.build(family)
    module, path = final_norm(model)
    skeleton = Checkpoint.open(model).skeleton(torch.float32)  # its parameters are on meta
    norm = read_norm(skeleton.get_submodule(path), path)
    assert norm == read_norm(module, path)
    x = torch.randn(5, 32, dtype=torch.float64).float() * torch.tensor(
        [[1e-3], [1], [7], [50], [1]]
    )
    bias = norm.bias(module)
    assert (bias is None) == (module._parameters.get("bias") is None)
    ours = norm.frozen(x, norm.scale(x)[:, None], norm.gain(module)) + (0 if bias is None else bias)
    torch.testing.assert_close(ours, module(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_frozen_is_linear(family):
    module, path = final_norm(zoo.build(family))
    norm, gain = read_norm(module, path), None
    one, two = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    for gain in (norm.gain(module), None):
        both = norm.frozen(one + 2 * two, 0.7, gain)
        parts = norm.frozen(one, 0.7, gain) + 2 * norm.frozen(two, 0.7, gain)
        torch.testing.assert_close(both, parts, rtol=1e-5, atol=1e-5)


class _L1Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x):
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


class _Scaled(nn.RMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "module",
    [
        _L1Norm(),
        _Scaled(8, eps=1e-5),
        nn.RMSNorm(8),  # eps is the input dtype's
        nn.LayerNorm(8, elementwise_affine=False),
        nn.PReLU(8),
    ],
)
def test_others_are_refused_by_name(module):
    with pytest.raises(InputError, match=rf"model\.norm \({type(module).__name__}\) is neither"):
        read_norm(module, "model.norm")
