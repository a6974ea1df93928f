# SPDX-License-Identifier: Apache-2.0
"""What flows through a block's modules, and the gradients that come back, as context managers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import nn

from pkt_ext.errors import InputError
from pkt_ext.models.anatomy import Projection


@dataclass(frozen=True)
class Call:
    """One call of one module that owns parameters, with the gradient of the loss by its output."""

    name: str  # module path relative to the block
    module: nn.Module
    input: torch.Tensor  # [..., D_in], detached
    grad_output: torch.Tensor  # [..., D_out], same leading dimensions


@contextmanager
def gradients(root: nn.Module, receive: Callable[[Call], None]) -> Iterator[None]:
    """Hand every call of a parameter-owning module below `root` to `receive`, during the backward.

    Run the forward and the backward of `root` inside, with an input that requires grad; parameters
    need not require grad, so none ever gets a `.grad`. A call is handed over as soon as its
    output's gradient exists; then its input is released. A module whose output does not depend on
    the input is never handed over.

    Args:
        root:    a decoder block (any module).
        receive: called with each `Call`; must not change its tensors.
    Raises:
        InputError: a module ran twice in one forward (its gradient would be a sum of two calls),
            takes more than one tensor, or had its input overwritten in place.
    """
    seen: set[str] = set()

    def hook(name: str, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if name in seen or kwargs or len(args) != 1 or not isinstance(output, torch.Tensor):
            raise InputError(
                f"{type(root).__name__}.{name} is called twice in one forward, or with several "
                "arguments, so its gradient cannot be taken; this model is not supported"
            )
        seen.add(name)
        if not output.requires_grad:
            return
        # held in a list so that the activation goes as soon as it is used, not with the graph
        held = [args[0].detach()]
        version = held[0]._version

        def deliver(grad: torch.Tensor) -> None:
            tensor = held.pop()
            if tensor._version != version:
                raise InputError(
                    f"{type(root).__name__}.{name}: its input was overwritten in place during the "
                    "forward; this model is not supported"
                )
            receive(Call(name, module, tensor, grad.detach()))

        output.register_hook(deliver)

    with ExitStack() as stack:
        for name, module in root.named_modules():
            if any(p is not None for p in module._parameters.values()):
                handle = module.register_forward_hook(
                    lambda m, a, k, o, name=name: hook(name, m, a, k, o), with_kwargs=True
                )
                stack.callback(handle.remove)
        yield


@dataclass(frozen=True)
class Addition:
    """What attention, or the FFN, adds to the residual stream: one row a sample, all copies."""

    base: torch.Tensor  # [B, D], the stream that it reads and is scored against
    neurons: torch.Tensor  # [B, K], what goes into its last projection (o or down)
    output: torch.Tensor  # [B, D], what comes out of that, bias included
    added: torch.Tensor  # [B, D], what joins the stream: the output, or a norm of it
    norm: str | None  # module path of that norm, relative to the block


@dataclass(frozen=True)
class Flow:
    """One block's part of the residual stream."""

    attention: Addition
    ffn: Addition  # base: the block's input where both run in parallel
    output: torch.Tensor  # [B, D], of the block


@contextmanager
def residual_flow(
    block: nn.Module,
    projections: Sequence[Projection],
    positions: torch.Tensor,
    receive: Callable[[Flow], None],
) -> Iterator[None]:
    """Hand over what the block adds to the residual stream at one position of each sample.

    Run the forward of `block` inside, hidden states [B, T, D] as its first argument. What follows
    from the structure is seen, not named: a norm is part of a contribution where it is fed with
    the last projection's own output, and the FFN's base is what its first norm is fed with.

    Args:
        projections: the block's, from its anatomy.
        positions:   int64 [B].
    Raises:
        InputError: input, attention and FFN do not add up to the output.
    """
    flow = _ResidualFlow(block, projections, positions)
    with ExitStack() as stack:
        stack.callback(block.register_forward_pre_hook(flow.enter).remove)
        for name, module in block.named_modules():
            own = [p for p in module._parameters.values() if p is not None]
            if own and all(p.ndim == 1 for p in own):
                stack.callback(
                    module.register_forward_hook(
                        lambda m, a, o, name=name: flow.norm(name, a[0], o)
                    ).remove
                )
        modules = {p.role: block.get_submodule(p.module) for p in projections}
        stack.callback(modules["up"].register_forward_pre_hook(flow.up).remove)
        for role in ("o", "down"):
            stack.callback(
                modules[role]
                .register_forward_hook(lambda m, a, o, role=role: flow.project(role, a[0], o))
                .remove
            )
        stack.callback(block.register_forward_hook(lambda m, a, o: receive(flow.leave(o))).remove)
        yield


class _ResidualFlow:
    """The hooks of `residual_flow`."""

    def __init__(self, block: nn.Module, projections, positions: torch.Tensor):
        self._kind, self._positions = type(block).__name__, positions
        self._width = next(p.shape[0] for p in projections if p.role == "down")
        self._normed: list[tuple[weakref.ref, torch.Tensor]] = []  # (output, rows of the input)
        self._outputs: dict[str, weakref.ref] = {}  # role -> of its projection
        self._rows: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # role -> (input, output)
        self._added: dict[str, tuple[torch.Tensor, str]] = {}  # role -> (normed, the norm)

    def enter(self, module: nn.Module, args: tuple) -> None:
        size, length = args[0].shape[:2]
        self._index = torch.arange(size, device=args[0].device) * length + self._positions
        self._input, self._base = self._at(args[0]), None

    def norm(self, name: str, given: torch.Tensor, output: torch.Tensor) -> None:
        if output.shape[-1] != self._width:
            return  # of single heads
        for role, projected in self._outputs.items():
            if projected() is given:
                self._added[role] = self._at(output), name
        self._normed.append((weakref.ref(output), self._at(given)))

    def up(self, module: nn.Module, args: tuple) -> None:
        before = [rows for output, rows in self._normed if output() is args[0]]
        self._base = before[0] if before else self._at(args[0])

    def project(self, role: str, given: torch.Tensor, output: torch.Tensor) -> None:
        self._outputs[role] = weakref.ref(output)
        self._rows[role] = self._at(given), self._at(output)

    def leave(self, output: object) -> Flow:
        hidden = output[0] if isinstance(output, tuple) else output
        attention, ffn = (
            self._addition(r, b) for r, b in (("o", self._input), ("down", self._base))
        )
        flow = Flow(attention, ffn, self._at(hidden))
        between = self._input.float() + attention.added
        ends = between + ffn.added
        parallel = self._base.equal(self._input)
        # a term may be far larger than the sum: blocks take large activations away again
        terms = self._input, self._base, attention.added, ffn.added
        most = torch.stack([term.abs().max() for term in terms]).max().float()
        rounding = 4 * torch.finfo(hidden.dtype).eps * most
        pairs = [(ends, flow.output)] if parallel else [(between, self._base), (ends, flow.output)]
        # NaN is for others to name
        if any((sums - seen).abs().max() > rounding for sums, seen in pairs):
            raise InputError(
                f"{self._kind} does not add its attention and its FFN to a residual stream; no "
                "neurons can be located in this model, choose another"
            )
        return flow

    def _addition(self, role: str, base: torch.Tensor) -> Addition:
        given, output = self._rows[role]
        added, norm = self._added.get(role, (output, None))
        return Addition(base, given, output, added, norm)

    def _at(self, tensor: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] or flattened [B * T, ...] -> the samples' rows."""
        return tensor.reshape(-1, tensor.shape[-1])[self._index]


@contextmanager
def own_values(
    block: nn.Module,
    projections: Sequence[Projection],
    positions: torch.Tensor,
    receive: Callable[[torch.Tensor], None],
) -> Iterator[None]:
    """Hand over what a position puts into o by attending to itself: alpha_{t,t} v_t, by head.

    Attention is linear in its values: it runs once more behind the block's own forward, with every
    other position's value at zero, up to o. So it is exact whatever computes it, and query heads
    that share a value head each have their own part.

    Args:
        projections: the block's, from its anatomy.
        positions:   int64 [B].
        receive:     given [B, heads * head_dim].
    """
    modules = {p.role: (block.get_submodule(p.module), p) for p in projections}
    (values, projection), (last, _) = modules["v"], modules["o"]
    calls: list[tuple[tuple, dict]] = []

    def only_own(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        rows = slice(None) if projection.rows is None else projection.rows.index().to(output.device)
        index = torch.arange(output.shape[1], device=output.device)
        others = (index != positions[:, None])[..., None]  # [B, T, 1]
        output = output.clone()
        output[..., rows] = output[..., rows].masked_fill(others, 0)
        return output

    def take(module: nn.Module, args: tuple) -> None:
        batch = torch.arange(len(positions), device=positions.device)
        receive(args[0].reshape(len(positions), -1, args[0].shape[-1])[batch, positions])
        raise _Taken

    def again(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        calls.append((args, kwargs))

    handle = block.register_forward_hook(again, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    args, kwargs = calls.pop()
    with ExitStack() as stack:
        stack.callback(values.register_forward_hook(only_own).remove)
        stack.callback(last.register_forward_pre_hook(take).remove)
        stack.enter_context(suppress(_Taken))
        block(*args, **kwargs)


class _Taken(Exception):
    """Ends a block's second forward where nothing more is wanted of it."""
