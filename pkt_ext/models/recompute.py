# SPDX-License-Identifier: Apache-2.0
"""A block's forward run again for its backward, without the product that nothing looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.pytorch_utils import Conv1D

from pkt_ext.models.anatomy import matmul_modules


class Recomputation:
    """Runs blocks with a graph whose own output is of no interest.

    The first block of a kind is watched. If its backward saves no tensor after the block's last
    matrix product (`residual + down_proj(x)`: the sum needs neither), the others of the kind do not
    compute that product; its gradient is the same, bit for bit. A block that scales or normalises
    what the product gives is always run whole. Weights must not require grad.
    """

    def __init__(self):
        self._last: dict[tuple, str | None] = {}

    def __call__(self, block: nn.Module, run: Callable[[], object]) -> object:
        """`run()`, which calls the block; the values it returns may not have been computed."""
        kind = type(block), *((name, type(module)) for name, module in block.named_modules())
        if kind not in self._last:
            output, self._last[kind] = _watch(block, run)
            return output
        with _left_out(block, self._last[kind]):
            return run()


def _watch(block: nn.Module, run: Callable[[], object]) -> tuple[object, str | None]:
    """(what `run` returns, the matrix product after which nothing is saved)."""
    saved, last = 0, (None, -1)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += 1
        return tensor

    def leave(name: str) -> None:
        nonlocal last
        last = name, saved

    with ExitStack() as stack:
        for name, module in matmul_modules(block).items():
            handle = module.register_forward_hook(lambda *_, name=name: leave(name))
            stack.callback(handle.remove)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = run()
    name, count = last
    return output, name if count == saved else None


@contextmanager
def _left_out(block: nn.Module, name: str | None) -> Iterator[None]:
    if name is None:
        yield
        return
    module = block.get_submodule(name)
    # Conv1D stores [in, out]
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    module.forward = lambda x: _Unevaluated.apply(x, weight)
    try:
        yield
    finally:
        del module.forward


class _Unevaluated(torch.autograd.Function):
    """x [..., in] -> [..., out] of no value, with the gradient of x W^T."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return x.new_empty(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (weight,) = ctx.saved_tensors
        return (gradient.flatten(0, -2) @ weight).unflatten(0, gradient.shape[:-1]), None
