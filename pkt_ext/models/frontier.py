# SPDX-License-Identifier: Apache-2.0
"""A student in memory, run from a cached hidden state: the blocks before the frontier do not run.

The model's own forward makes masks and rotary tables, so every family is run as transformers runs
it. Tokens are right-padded and need no attention mask: causality hides the padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from pkt_ext.errors import InputError
from pkt_ext.models.anatomy import Anatomy
from pkt_ext.models.replaced import in_eval_mode, recomputed, replaced


@dataclass(frozen=True)
class Activations:
    """What passed the frontier, in the model's dtype; None where it was not asked for."""

    before: torch.Tensor | None  # [B, T, D], what the block was given
    after: torch.Tensor | None  # [B, T, D], what came out of it
    outputs: torch.Tensor | None  # [B, T, D], what the head would be given


def activations(
    model,
    anatomy: Anatomy,
    input_ids: torch.Tensor,
    block: int | None = None,
    hidden: torch.Tensor | None = None,
    *,
    outputs: bool = True,
    recompute: bool = False,
) -> Activations:
    """Run a student up to its head, which is not run, from one of its blocks on.

    Args:
        model:     a causal language model, or a PeftModel around one.
        anatomy:   of the student as it was before anything was attached to it.
        input_ids: int64 [B, T] on the model's device, right-padded.
        block:     from 0; None: the model as a whole, no block looked at.
        hidden:    [B, T, D], what this block is given, any float dtype and device; the blocks
            before do not run. None: they do.
        outputs:   False stops behind the block, without the blocks after it.
        recompute: let the backward pass compute anew the blocks that run.
    Returns:
        Activations, with a graph where anything that ran requires grad.
    Raises:
        InputError: no such block, a hidden state of another shape, or a model that calls its
            blocks in a way that we do not know.
    """
    student = unwrapped(model)
    blocks = [student.get_submodule(path) for path in anatomy.blocks]
    shape = torch.Size([*input_ids.shape, anatomy.hidden_size])
    check_block(anatomy, block)
    _check(block, hidden, shape, outputs)
    found: list[torch.Tensor] = []

    def pass_on(_, given: torch.Tensor, *rest):
        return given

    def watch(_, given: torch.Tensor, args: tuple, kwargs: dict):
        if given.shape != shape:
            raise InputError(
                f"{type(student).__name__} calls its blocks in a way that is not supported; "
                "install a transformers version from pkt_ext's constraints"
            )
        given = given if hidden is None else hidden.to(given)
        result = run(given, *args, **kwargs)
        found.extend((given, result[0] if isinstance(result, tuple) else result))
        if not outputs:
            raise _Stop
        return result

    skipped = blocks[:block] if hidden is not None else []
    last = None
    with recomputed(blocks[len(skipped) :] if recompute else [], random=True):
        run = blocks[block or 0].forward
        with (
            replaced(skipped, pass_on),
            replaced([] if block is None else [blocks[block]], watch),
        ):
            try:
                last = student.base_model(
                    input_ids=input_ids, use_cache=False, return_dict=True
                ).last_hidden_state
            except _Stop:
                pass
    before, after = found or (None, None)
    return Activations(before, after, last)


def advance(
    model,
    anatomy: Anatomy,
    items: Sequence[Mapping],
    block: int,
    *,
    micro_batch: int = 8,
) -> Iterator[torch.Tensor]:
    """What comes out of a block for every item: what the next phase keeps as its `hidden`.

    One block is run where the items have their own `hidden`, else all up to this one. The model is
    in eval mode meanwhile, and no graph is made.

    Args:
        items: each a mapping with `input_ids` int64 [T] and, unless None or absent, `hidden`
            [T, D], what `block` is given.
        block: from 0.
    Yields:
        [T, D] on the model's device, in its dtype, one for each item in order.
    Raises:
        InputError: as `activations`.
    """
    device = next(model.parameters()).device
    for start in range(0, len(items), micro_batch):
        some = [items[i] for i in range(start, min(start + micro_batch, len(items)))]
        ids, hidden = padded(some)
        with torch.no_grad(), in_eval_mode(model):
            after = activations(model, anatomy, ids.to(device), block, hidden, outputs=False).after
        for row, item in zip(after, some, strict=True):
            yield row[: len(item["input_ids"])]


def padded(items: Sequence[Mapping]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(input_ids int64 [B, T], hidden [B, T, D] or None), right-padded with zeros.

    Raises:
        InputError: some items have a hidden state and others have not, or one of another length.
    """
    ids = [torch.as_tensor(item["input_ids"]) for item in items]
    states = [item.get("hidden") for item in items]
    tokens = pad_sequence(ids, batch_first=True)
    if all(state is None for state in states):
        return tokens, None
    if any(state is None or len(state) != len(row) for state, row in zip(states, ids, strict=True)):
        raise InputError("every item needs a hidden state for each of its tokens, or none does")
    return tokens, pad_sequence(states, batch_first=True)


def unwrapped(model) -> nn.Module:
    """The student inside a PeftModel; a plain one as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_block(anatomy: Anatomy, block: int | None) -> None:
    """Raise InputError where there is no such block."""
    count = len(anatomy.blocks)
    if block is not None and not 0 <= block < count:
        raise InputError(f"block {block} is not one of the student's {count}, 0 to {count - 1}")


def _check(block: int | None, hidden, shape: torch.Size, outputs: bool) -> None:
    if block is None and (hidden is not None or not outputs):
        raise InputError("a hidden state, or an end before the head, needs a block")
    if hidden is not None and hidden.shape != shape:
        raise InputError(
            f"the hidden state is {list(hidden.shape)}, the tokens need {list(shape)}; it was "
            "made for other rows or another student"
        )


class _Stop(Exception):
    """Ends a forward behind the block that is looked at."""
