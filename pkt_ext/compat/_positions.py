# SPDX-License-Identifier: Apache-2.0
"""What flows through a model at the last position of a prompt, of which alone the scores are made.

Of the published modified model, which returns eight tensors a block, only the last positions are
read; a stock model is watched in its own forward. Nothing becomes a Python list, and one forward
serves blocks, FFN and attention neurons for as long as the weights stay what they are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import nn

from pkt_ext.compat._weights import state_of
from pkt_ext.models.anatomy import Anatomy
from pkt_ext.models.capture import Addition, Flow, own_values, residual_flow
from pkt_ext.models.norms import read_norm

_STRIPPED = '." )\n,]'  # off the end of an answer, as published
_KEPT = 16  # prompts whose positions are remembered, by model
_FIELDS = 8  # a block's, of the modified model


class EmptyAnswerError(ValueError, IndexError):
    """An answer of punctuation alone; the published code raises IndexError."""


@dataclass(frozen=True, eq=False)
class Half:
    """What attention, or the FFN, of one block adds to the residual stream."""

    base: torch.Tensor  # [D]
    added: torch.Tensor  # [D]
    neurons: torch.Tensor  # [K], what goes into o or down; of o as published: see `positions`
    norm: str | None = None  # path of the norm between that and the stream
    scale: float = 1.0  # what that norm divides by


@dataclass(frozen=True, eq=False)
class Position:
    """The last position before a prompt's last token."""

    target: int
    final: torch.Tensor  # [D], out of the last block
    attention: tuple[Half, ...]  # by block
    ffn: tuple[Half, ...]
    known: dict = field(default_factory=dict)  # what has been computed of it


@torch.no_grad()
def positions(
    owner,
    prompts: Sequence[str],
    answers: Sequence[str],
    anatomy: Anatomy,
    *,
    fix: bool,
    empty: bool = False,
) -> list[Position]:
    """One `Position` for each prompt.

    Args:
        owner: has `model`, `tokenizer` and `device`.
        fix:   attention's neurons are what all source positions give them; as published it is
               what the last one takes from itself.
        empty: an answer may be empty: the prompt's own last token is then the target.
    Raises:
        EmptyAnswerError: an answer is empty once its punctuation is gone.
        ValueError: prompt and answer are less than two tokens.
    """
    found = []
    remembered = _remembered(owner.model)
    for prompt, answer in zip(prompts, answers, strict=False):  # as published
        stripped = answer.rstrip(_STRIPPED)
        if not stripped and not empty:
            raise EmptyAnswerError(
                f"the answer {answer!r} is empty without its punctuation: no token to attribute"
            )
        tokens = owner.tokenizer.encode(prompt + stripped)
        if len(tokens) < 2:
            raise ValueError(f"{prompt + stripped!r} is {len(tokens)} token(s); two are needed")
        key = (fix, *tokens)
        position = remembered.get(key)
        if position is None:
            position = _forward(owner, tokens, anatomy, fix)
            remembered.put(key, position)
        found.append(position)
    return found


def returns_flows(model: nn.Module) -> bool:
    """Whether it is a modified model: its third output has eight tensors for each block."""
    if type(model).__module__.startswith("transformers."):
        return False
    if model not in _MODIFIED:
        token = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
        with torch.no_grad():
            outputs = model(token, use_cache=True)
        third = outputs[2] if len(outputs) > 2 else None
        blocks = third if isinstance(third, tuple | list) else ()
        first = blocks[0] if blocks else None
        _MODIFIED[model] = isinstance(first, tuple | list) and len(first) == _FIELDS
    return _MODIFIED[model]


_MODIFIED: WeakKeyDictionary = WeakKeyDictionary()  # model -> bool


def _forward(owner, tokens: list[int], anatomy: Anatomy, fix: bool) -> Position:
    model = owner.model
    context = torch.tensor([tokens[:-1]], device=owner.device)
    if returns_flows(model):
        blocks = model(context, use_cache=True)[2]
        return _of_modified(blocks[: len(anatomy.blocks)], tokens[-1], fix)
    flows: dict[int, Flow] = {}
    own: dict[int, torch.Tensor] = {}
    place = torch.tensor([len(tokens) - 2], device=owner.device)
    with ExitStack() as stack:
        for index, path in enumerate(anatomy.blocks):
            seen = model.get_submodule(path), anatomy.projections[index], place
            if not fix:
                keep_own = lambda values, index=index: own.update({index: values[0]})  # noqa: E731
                stack.enter_context(own_values(*seen, keep_own))
            keep_flow = lambda flow, index=index: flows.update({index: flow})  # noqa: E731
            stack.enter_context(residual_flow(*seen, keep_flow))
        model(context, use_cache=False)
    attention, ffn = [], []
    for index, path in enumerate(anatomy.blocks):
        flow = flows[index]
        attention.append(_half(model, path, flow.attention, own.get(index)))
        ffn.append(_half(model, path, flow.ffn))
    return Position(tokens[-1], flow.output[0], tuple(attention), tuple(ffn))


def _half(
    model: nn.Module, block: str, addition: Addition, own: torch.Tensor | None = None
) -> Half:
    path, scale = None, 1.0
    if addition.norm is not None:
        path = f"{block}.{addition.norm}"
        scale = float(read_norm(model.get_submodule(path), path).scale(addition.output.float()))
    neurons = addition.neurons[0] if own is None else own
    return Half(addition.base[0], addition.added[0], neurons, path, scale)


def _of_modified(blocks: Sequence[Sequence[torch.Tensor]], target: int, fix: bool) -> Position:
    """Of what the modified model returns: copies, so that no other position is kept."""
    attention, ffn = [], []
    for entered, attended, residual, ffn_output, left, subvalues, coefficients, _ in blocks:
        by_source = subvalues[0]  # [H, T, hd]
        neurons = by_source.float().sum(1) if fix else by_source[:, -1].clone()
        attention.append(Half(_last(entered), _last(attended), neurons.flatten()))
        added = _last(ffn_output)
        if fix and added.equal(_last(left)):  # the Qwen port's has the residual in it
            added = _last(left).float() - _last(residual).float()
        ffn.append(Half(_last(residual), added, _last(coefficients)))
    return Position(target, _last(left), tuple(attention), tuple(ffn))


def _last(tensor: torch.Tensor) -> torch.Tensor:
    """[1, T, K] -> [K]"""
    return tensor[0, -1].clone()


# --- what is remembered ---------------------------------------------------------------------------


class _Remembered:
    """Positions of one model, by tokens, while its weights have one state; None: never."""

    def __init__(self, state: tuple | None):
        self.state = state
        self._found: OrderedDict[tuple, Position] = OrderedDict()

    def get(self, key: tuple) -> Position | None:
        if key in self._found:
            self._found.move_to_end(key)
        return self._found.get(key)

    def put(self, key: tuple, position: Position) -> None:
        if self.state is not None:
            self._found[key] = position
        while len(self._found) > _KEPT:
            self._found.popitem(last=False)


_POSITIONS: WeakKeyDictionary = WeakKeyDictionary()  # model -> _Remembered


def _remembered(model: nn.Module) -> _Remembered:
    state = _state(model)
    known = _POSITIONS.get(model)
    if known is None or state is None or known.state != state:
        known = _POSITIONS[model] = _Remembered(state)
    return known


def _state(model: nn.Module) -> tuple | None:
    """What changes with the weights, edits through `.data` included; None with a delta attached."""
    if any("delta" in vars(module) for module in model.modules()):
        return None
    return (model.training, *state_of(model))
