# SPDX-License-Identifier: Apache-2.0
"""Modules that behave otherwise for a while, as context managers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pkt_ext.models.versions import as_block_output


@contextmanager
def replaced(
    blocks: Sequence[nn.Module],
    forward: Callable[[int, torch.Tensor, tuple, dict], object],
) -> Iterator[None]:
    """Let `forward(index, hidden, args, kwargs)` stand for every block's forward."""

    def substitute(index: int):
        def run(*args, **kwargs):
            hidden, *rest = args or (kwargs.pop("hidden_states"),)
            return as_block_output(forward(index, hidden, tuple(rest), kwargs))

        return run

    with _given_back(blocks):
        for index, block in enumerate(blocks):
            block.forward = substitute(index)
        yield


@contextmanager
def recomputed(blocks: Sequence[nn.Module], *, random: bool = False) -> Iterator[None]:
    """Let the backward pass compute these blocks anew instead of keeping what they made.

    Args:
        random: they draw random numbers (dropout), which have to be the same ones again.
    """
    with _given_back(blocks):
        for block in blocks:
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=random
            )
        yield


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Nothing in the model is random; each module's mode is given back."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _given_back(blocks: Sequence[nn.Module]) -> Iterator[None]:
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward
