# SPDX-License-Identifier: Apache-2.0
"""What one block of a model takes: bytes and operations, by running its own code on fake tensors.

A fake tensor has a shape, a dtype and a device but no values, so a 70B block is measured in a
tenth of a second, whatever its architecture, and every tensor the block makes is seen to come and
go. Only what happens inside a kernel is not seen; `budget` adds that.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from pkt_ext.models import capture
from pkt_ext.models.anatomy import matmul_modules
from pkt_ext.streaming.blocks import StreamedModel


@dataclass(frozen=True)
class Footprint:
    """One block's share of a pass over one micro-batch. Bytes are beyond weights and arguments."""

    parameters: int
    weights: int  # bytes of the parameters in the model's dtype
    forward: int  # peak bytes of the forward without a graph, its output included
    backward: int  # peak bytes of forward with graph and backward, the input's gradient included
    forward_flops: int
    backward_flops: int  # of the backward alone, without the forward before it
    scoring_flops: int  # the gradients of the matrices


class Tracker(TorchDispatchMode):
    """Bytes of the storages that operations make inside, while they live.

    Args:
        given: tensors (in any nesting) that were there before; views of them cost nothing.
    Attributes:
        live, peak: bytes now, and at most so far.
    """

    def __init__(self, given=()):
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()
        for tensor in tree_leaves(given):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor, free=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return result

    def _add(self, tensor: torch.Tensor, free: bool = False) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = 0 if free else storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@dataclass(frozen=True, eq=False)
class Recording:
    """How a model calls its blocks with a micro-batch."""

    calls: list[tuple[tuple, dict]]  # by block, every argument but the hidden states
    kept: int  # bytes of the arguments, equal ones counted once
    peak: int  # bytes while they are made, first hidden states included


def record(stream: StreamedModel, shape: tuple[int, int]) -> Recording:
    """Run the model up to its first block on (B, T) tokens, with zeros of no size as weights."""
    ids = torch.zeros(shape, dtype=torch.int64, device=stream.device)
    with stream.resident(_hollow(stream, stream.first_names)), torch.no_grad():
        with Tracker(given=list(stream.model.buffers())) as tracker:
            _, calls = stream.record(ids)
    tensors = {id(t): t for t in tree_leaves(calls) if isinstance(t, torch.Tensor)}
    distinct: list[torch.Tensor] = []
    for tensor in tensors.values():
        # the pass keeps one of equal tensors, and one of equal rows; see Pass._intern
        row = tensor[:1] if tensor.ndim and (tensor == tensor[:1]).all() else tensor
        same = (d for d in distinct if d.shape == row.shape and d.dtype == row.dtype)
        if not any(torch.equal(d, row) for d in same):
            distinct.append(row)
    kept = sum(t.numel() * t.element_size() for t in distinct)
    return Recording(calls, kept, tracker.peak)


def measure(
    stream: StreamedModel, shape: tuple[int, int], *, scored: bool = True
) -> list[Footprint]:
    """Every block's footprint with a micro-batch of (B, T) tokens; no weight is read.

    Args:
        scored: whether the blocks' parameters are scored on the way, which holds on to the inputs
                of their modules.
    """
    recording = record(stream, shape)
    known: dict[tuple, Footprint] = {}
    found = []
    for block, names, call in zip(stream.blocks, stream.block_names, recording.calls, strict=True):
        shapes = tuple((name, p.shape) for name, p in block.named_parameters())
        key = shapes, tuple(map(_signature, tree_leaves(call)))
        if key not in known:
            known[key] = _measure_block(stream, block, names, call, shape, scored)
        found.append(known[key])
    return found


def _measure_block(stream, block: nn.Module, names, call, shape, scored: bool) -> Footprint:
    with FakeTensorMode() as mode, _fake_buffers(block, mode):
        args, kwargs = tree_map(
            lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x, call
        )
        like = {"dtype": stream.dtype, "device": stream.device}
        hidden = torch.empty(*shape, stream.embedding.embedding_dim, **like)
        gradient = torch.empty_like(hidden)
        weights = {
            name: torch.empty(meta.shape, **like) for name, meta in stream.parameters(names).items()
        }
        count = sum(w.numel() for w in weights.values())
        given = (args, kwargs, hidden, gradient, list(weights.values()), list(block.buffers()))
        with stream.resident(weights):
            with torch.no_grad(), Tracker(given) as forward:
                block(hidden, *args, **kwargs)
            with Tracker(given) as both:
                scoring = _backward(block, hidden, gradient, args, kwargs, scored)
            # counted apart: the counter takes operations to pieces, which makes more tensors
            with torch.no_grad(), count_flops() as flops:
                block(hidden, *args, **kwargs)
            forward_flops = flops.get_total_flops()
            with count_flops() as flops:
                _backward(block, hidden, gradient, args, kwargs, scored=False)
    return Footprint(
        parameters=count,
        weights=count * stream.dtype.itemsize,
        forward=forward.peak,
        backward=both.peak,
        forward_flops=forward_flops,
        backward_flops=flops.get_total_flops() - forward_flops,
        scoring_flops=scoring,
    )


def _backward(block, hidden, gradient, args, kwargs, scored: bool) -> int:
    """Forward with graph and backward, as a pass runs them; the operations that scoring takes."""
    hidden = hidden.detach().requires_grad_()
    matrices, flops, small = set(matmul_modules(block)), 0, []

    def receive(call: capture.Call) -> None:  # holds what the scorer holds: see its `backward`
        nonlocal flops
        if call.name in matrices:
            flops += 2 * call.input.numel() * call.grad_output.shape[-1]
        else:
            small.append(call)

    watching = capture.gradients(block, receive) if scored else nullcontext()
    with watching, torch.enable_grad():
        output = block(hidden, *args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        torch.autograd.backward(output, gradient)
    return flops


def _hollow(stream: StreamedModel, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Zeros in the shapes of these parameters that take no memory: one element, repeated."""
    zero = torch.zeros((), dtype=stream.dtype, device=stream.device)
    return {name: zero.expand(meta.shape) for name, meta in stream.parameters(names).items()}


@contextmanager
def _fake_buffers(block: nn.Module, mode: FakeTensorMode):
    """Let a block's buffers (GPT-2's causal mask) be fake inside."""
    held = [
        (module, key, buffer)
        for module in block.modules()
        for key, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        for module, key, buffer in held:
            module._buffers[key] = mode.from_tensor(buffer)
        yield
    finally:
        for module, key, buffer in held:
            module._buffers[key] = buffer


def _signature(leaf) -> object:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype
    return leaf if isinstance(leaf, int | float | str | bool | None) else type(leaf)


def count_flops() -> FlopCounterMode:
    """A counter of operations, attention on the CPU included."""
    ops = torch.ops.aten
    on_cpu = {  # torch knows the attention kernels of GPUs only
        ops._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
            q, k, v
        ),
        ops._scaled_dot_product_flash_attention_for_cpu_backward: lambda dy, q, k, v, *_, **__: (
            sdpa_backward_flop_count(dy, q, k, v)
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=on_cpu)
