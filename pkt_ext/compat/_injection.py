# SPDX-License-Identifier: Apache-2.0
"""Neurons taken out of a model's projections, and deltas put into them, by published module names.

A delta is attached to its module as published: a plain attribute `delta`, which the modified
model's forward adds, and which no checkpoint holds. On a stock model a forward hook adds it. With
`fix`, outside autograd, the weights themselves are changed instead, and changed back before the
next attribution.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.functional import linear

from pkt_ext.compat._positions import returns_flows
from pkt_ext.errors import InputError
from pkt_ext.models.anatomy import Anatomy, Projection

ROLES = {  # published module name -> role
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
_BY_COLUMN = {"o", "down"}  # whose neurons are columns


@dataclass(frozen=True)
class Place:
    """One projection of one block, and which of its neurons are meant."""

    module: nn.Module
    projection: Projection
    dim: int  # of [out, in] along which neurons are counted
    neurons: torch.Tensor  # int64 [n], on the weight's device

    @property
    def stored_as(self) -> torch.Tensor:
        """Which rows or columns of the module's own matrix [out, in] they are: int64 [n]."""
        rows = self.projection.rows
        if self.dim == 1 or rows is None:
            return self.neurons
        return rows.index().to(self.neurons.device)[self.neurons]

    def matrix(self) -> torch.Tensor:
        """A view of the module's weight, [out, in], outside autograd."""
        weight = self.module.weight.detach()
        return weight.T if self.projection.transposed else weight


def by_block(neurons: Iterable[Sequence[int]]) -> dict[int, list[int]]:
    """[[block, neuron], ...] -> neurons of each block, blocks in the order that they come in."""
    found: dict[int, list[int]] = {}
    for block, neuron in neurons:
        found.setdefault(int(block), []).append(int(neuron))
    return found


def place(
    model: nn.Module,
    anatomy: Anatomy,
    block: int,
    name: str,
    neurons: list[int],
    *,
    from_end: bool = False,
) -> Place:
    """Where neurons of a block are, in the module of a published name.

    Args:
        from_end: neurons under 0 count from the end.
    Raises:
        ValueError: an unknown name, neurons that the module does not have, or attention neurons in
            a module whose heads are shared.
    """
    if name not in ROLES:
        raise InputError(f"module {name!r}; choose of {', '.join(ROLES)}")
    role = ROLES[name]
    projection = next((p for p in anatomy.projections[block] if p.role == role), None)
    if projection is None:
        raise InputError(f"{type(model).__name__} has no {name}")
    if role in ("k", "v") and anatomy.kv_heads != anatomy.heads:
        raise InputError(
            f"{name} has {anatomy.kv_heads} heads for {anatomy.heads} query heads: attention "
            "neurons have no row of their own in it; leave it out, or use `pkt laten`"
        )
    dim = 1 if role in _BY_COLUMN else 0
    width = projection.shape[dim]
    first = -width if from_end else 0
    if neurons and not first <= min(neurons) <= max(neurons) < width:
        raise InputError(
            f"neurons of block {block} go from {min(neurons)} to {max(neurons)}; "
            f"{name} has {first} to {width - 1}"
        )
    module = model.get_submodule(f"{anatomy.blocks[block]}.{projection.module}")
    index = torch.tensor(neurons, dtype=torch.int64, device=module.weight.device)
    return Place(module, projection, dim, index % width)


def extract(where: Place) -> torch.Tensor:
    """The neurons' rows [n, in] or columns [out, n]: a copy."""
    return where.matrix().index_select(where.dim, where.stored_as)


def dense(where: Place, task: torch.Tensor) -> torch.Tensor:
    """Zeros of the projection's shape with `task` at the neurons; differentiable in `task`.

    Raises:
        ValueError: `task` is not of the neurons' shape.
    """
    wanted = list(where.projection.shape)
    delta = task.new_zeros(wanted, device=where.neurons.device)
    wanted[where.dim] = len(where.neurons)
    if list(task.shape) != wanted:
        raise InputError(
            f"{where.projection.module}: weights of shape {list(task.shape)} for "
            f"{len(where.neurons)} neurons, expected {wanted}"
        )
    return delta.index_copy(where.dim, where.neurons, task.to(delta.device))


def attach(model: nn.Module, where: Place, delta: torch.Tensor) -> None:
    """Hang a delta on its module, which adds it to what it computes from now on.

    Raises:
        InputError: the projection is a part of a larger module, which cannot say whose delta it is.
    """
    if where.projection.rows is not None or where.projection.transposed:
        raise InputError(
            f"{where.projection.module} holds {where.projection.role} among others or transposed; "
            "a delta cannot be attached: inject outside autograd with fix=True, or use `pkt laten`"
        )
    where.module.delta = delta
    # a copied module has its hooks copied
    if not returns_flows(model) and _add_delta not in where.module._forward_hooks.values():
        where.module.register_forward_hook(_add_delta)


def _add_delta(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """A forward hook: what the modified model does itself."""
    delta = vars(module).get("delta")
    if delta is None:
        return output
    return output + linear(args[0], delta.to(dtype=args[0].dtype, device=args[0].device))


# --- merged deltas --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Merged:
    where: Place
    before: torch.Tensor  # the neurons' own weights
    after: torch.Tensor  # what was written over them


_MERGED: WeakKeyDictionary = WeakKeyDictionary()  # model -> [_Merged]


@torch.no_grad()
def merge(model: nn.Module, where: Place, task: torch.Tensor) -> None:
    """Add `task` to the neurons' weights, in float32, rounded once; `put_back` undoes it."""
    before = extract(where)
    after = (before.float() + task.to(before.device).float()).to(before.dtype)
    where.matrix().index_copy_(where.dim, where.stored_as, after)
    # read again: of a neuron that is named twice one was written
    _MERGED.setdefault(model, []).append(_Merged(where, before, extract(where)))


@torch.no_grad()
def put_back(model: nn.Module) -> None:
    """Take every merged delta out again, bit for bit; neurons changed since are left alone."""
    for merged in reversed(_MERGED.pop(model, [])):
        where = merged.where
        matrix, now = where.matrix(), extract(where)
        # as bytes: NaN is not equal to itself
        if now.view(torch.uint8).equal(merged.after.to(now).view(torch.uint8)):
            matrix.index_copy_(where.dim, where.stored_as, merged.before.to(now))
