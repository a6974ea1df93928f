# SPDX-License-Identifier: Apache-2.0
"""New adapters to compare a transferred one with: LoRA's usual start, and PiSSA."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pkt_ext.adapter import AdapterConfig, Factor, matrix_shape
from pkt_ext.errors import InputError
from pkt_ext.models.anatomy import describe

INITS = ("gaussian", "pissa")


def new_factors(model, config) -> tuple[dict[str, Factor], AdapterConfig, bool]:
    """A LoRA or PiSSA start on the matrices, and with the ranks, that a Seeking start has.

    gaussian: A ~ N(0, 1/r^2), B = 0 (an embedding: the other way round), as PEFT's `gaussian`.
    pissa: eta B A = the best rank-r part of W, sqrt of the singular values in either factor
    (Meng et al., NeurIPS 2024, arXiv 2404.02948); the minus half freezes the rest, W - eta B A.
    """
    scale = config.alpha / config.rank
    generator = torch.Generator().manual_seed(config.seed)
    factors = {}
    for path, rank in targets(model, config).items():
        module = model.get_submodule(path)
        weight = module.weight.detach()
        embedding = isinstance(module, torch.nn.Embedding)
        if embedding or type(module).__name__ == "Conv1D":
            weight = weight.T
        if config.init == "pissa":
            from pkt_ext.ops.low_rank import lora_factors

            if rank > min(weight.shape):
                raise InputError(f"rank {rank} is larger than a side of {path}; lower --rank")
            B, A = lora_factors(weight.float(), rank, split="sqrt", seed=config.seed)
            factors[path] = Factor(A / scale**0.5, B / scale**0.5, embedding)
            continue
        factors[path] = _gaussian(module, rank, config.rank, generator)
    given = AdapterConfig(dict.fromkeys(factors, scale), 0.05, model.name_or_path, {})
    return factors, given, config.init == "pissa"


def gaussian_factors(model, ranks: Mapping[str, int], seed: int) -> dict[str, Factor]:
    """A ~ N(0, 1/r^2), B = 0 for some modules of a model, by path: {module path: rank}."""
    generator = torch.Generator().manual_seed(seed)
    return {
        path: _gaussian(model.get_submodule(path), rank, rank, generator)
        for path, rank in ranks.items()
    }


def _gaussian(module, rank: int, spread: int, generator: torch.Generator) -> Factor:
    out, size = matrix_shape(module)
    if isinstance(module, torch.nn.Embedding):
        return Factor(torch.zeros(rank, out), torch.randn(size, rank, generator=generator), True)
    drawn = torch.randn(rank, size, generator=generator) / spread
    return Factor(drawn, torch.zeros(out, rank))


def targets(model, config) -> Mapping[str, int]:
    """{module path: rank}: every projection, a fused module with the rank of all its parts."""
    anatomy = describe(model)
    found: dict[str, int] = {}
    for block, projections in zip(anatomy.blocks, anatomy.projections, strict=True):
        for projection in projections:
            path = f"{block}.{projection.module}"
            found[path] = found.get(path, 0) + config.rank
    if config.embeddings and not anatomy.tied:
        found |= {anatomy.embedding: config.rank, anatomy.head: config.rank}
    return found
