# SPDX-License-Identifier: Apache-2.0
"""LaTen's translator in the published shape, written anew from its description."""

import torch
from torch import nn


class Knowledge_translator(nn.Module):
    def __init__(self, translate_modules, n_layers, input_dim, output_dim):
        super().__init__()
        pairs = {}
        for name in translate_modules:
            inner = nn.Linear(input_dim, input_dim, bias=False, dtype=torch.float32)
            outer = nn.Linear(input_dim, output_dim, bias=False, dtype=torch.float32)
            pairs[name] = nn.Sequential(inner, nn.ReLU(), outer)
        self.network = nn.ModuleDict(pairs)
        for pair in self.network.values():
            for layer in (pair[0], pair[2]):
                nn.init.normal_(layer.weight, 0, 1e-5)

    def forward(self, x, source_idxs):
        found = {}
        for name, weights in x.items():
            turned = name in ("down_proj", "o_proj")
            vectors = weights.transpose(1, 2) if turned else weights
            inner, _, outer = self.network[name]
            y = outer(inner(vectors.float()).clamp_min(0)).half()
            found[name] = y.transpose(1, 2) if turned else y
        return found
