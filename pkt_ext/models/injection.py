# SPDX-License-Identifier: Apache-2.0
"""Sparse changes of a frozen model's weights, differentiable, while a context lasts.

A change adds n rows to a projection's [out, in] weight (up, v) or n columns (down, o):

    rows:     y[..., index] += x @ values^T          columns:  y += x[..., index] @ values

The dense delta is never made: what training keeps is [n, D] values and one activation a module.
Source: LaTen's injection, METHODS L7.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pkt_ext.errors import InputError
from pkt_ext.models.anatomy import Anatomy, describe

ROW_ROLES, COLUMN_ROLES = ("up", "v"), ("down", "o")

# (block, role) -> (index int64 [n], values [n, D]): rows or columns of that projection, and what is
# added to each. D is the projection's input size for rows, its output size for columns.
Deltas = Mapping[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, eq=False)
class Change:
    """What is added to some rows, or to some columns, of one module's weight [out, in]."""

    module: str  # its path in the model
    rows: bool  # else columns
    index: torch.Tensor  # int64 [n], of the whole module: a fused one has all its parts' rows
    values: torch.Tensor  # [n, in] of rows, [n, out] of columns


def changes(anatomy: Anatomy, deltas: Deltas) -> dict[tuple[int, str], Change]:
    """Find the module of every change and check that it fits.

    Raises:
        InputError: a block or role that is not there, another shape, an index outside the matrix or
            twice in it; names block and role.
    """
    found = {}
    for (block, role), (index, values) in deltas.items():
        where = f"delta of block {block}, {role}"
        if not 0 <= block < len(anatomy.blocks):
            raise InputError(f"{where}: the model has {len(anatomy.blocks)} blocks")
        if role not in ROW_ROLES + COLUMN_ROLES:
            known = ", ".join(ROW_ROLES + COLUMN_ROLES)
            raise InputError(f"{where}: unknown role; rows or columns of {known} can be changed")
        part = next(p for p in anatomy.projections[block] if p.role == role)
        rows = role in ROW_ROLES
        count, width = part.shape if rows else part.shape[::-1]
        if index.dtype != torch.int64 or index.ndim != 1:
            raise InputError(
                f"{where}: index int64 [n] expected, got {index.dtype} {[*index.shape]}"
            )
        if values.shape != (len(index), width) or not values.is_floating_point():
            raise InputError(
                f"{where}: values [{len(index)}, {width}] expected, got {[*values.shape]}; "
                "it is for another model"
            )
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < count:
            raise InputError(
                f"{where}: the matrix has {count} {'rows' if rows else 'columns'}, the index runs "
                f"from {int(index.min())} to {int(index.max())}; it is for another model"
            )
        if len(index.unique()) != len(index):
            raise InputError(f"{where}: an index occurs twice; add its values up first")
        if rows and part.rows is not None:
            index = part.rows.index().to(index.device)[index]
        path = f"{anatomy.blocks[block]}.{part.module}"
        found[block, role] = Change(path, rows, index, values)
    return found


def value_rows(
    index: torch.Tensor, values: torch.Tensor, anatomy: Anatomy
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of v for attention neurons, which are columns of o: differentiable in `values`.

    Neuron (h, j) = h * head_dim + j reads row (h // (heads / kv_heads)) * head_dim + j of v. Query
    heads that share a key-value head meet in one row: their values are averaged.

    Args:
        index:  int64 [n], of neurons.
        values: [n, D], one for every neuron.
    Returns:
        index int64 [m], ascending, without repetition; values [m, D].
    """
    rows, place, counts = value_row_numbers(index, anatomy).unique(
        return_inverse=True, return_counts=True
    )
    sums = values.new_zeros(len(rows), values.shape[1]).index_add(0, place, values)
    return rows, sums / counts[:, None].to(values.dtype)


def value_row_numbers(index: torch.Tensor, anatomy: Anatomy) -> torch.Tensor:
    """The row of v that each attention neuron reads: int64 [n] -> int64 [n], repetitions kept."""
    head, place = index // anatomy.head_dim, index % anatomy.head_dim
    return head // (anatomy.heads // anatomy.kv_heads) * anatomy.head_dim + place


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """No parameter requires grad inside; afterwards those do that did."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def injected(
    model,
    deltas: Deltas,
    *,
    anatomy: Anatomy | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> Iterator[None]:
    """Let `model` compute with the deltas added to its weights, which stay as they are.

    Gradients reach the values and the input, not the model's parameters: those are frozen inside.
    Forward hooks do it, so it holds for whatever calls the model: autocast, gradient checkpointing
    without re-entry (with re-entry, the first block's values would get no gradient). Biases are
    added once, by the module itself.

    Args:
        model:   a causal language model of a supported family.
        deltas:  see `Deltas`; values that require grad get one.
        anatomy: of the model, where it is known.
        dtype:   that the products are computed in, if the module's output has no higher one; what
                 they add is rounded once, to the output's dtype. None: the output's dtype, faster
                 on a GPU, and as published: values below 6e-8 are then zero in float16.
    Raises:
        InputError: see `changes`.
    """
    with added(model, changes(anatomy or describe(model), deltas).values(), dtype):
        yield


@contextmanager
def added(model, found: Iterable[Change], dtype: torch.dtype | None) -> Iterator[None]:
    """`injected` of changes that are known to fit."""
    with frozen(model), ExitStack() as stack:
        for change in found:
            module = model.get_submodule(change.module)
            hook = _Adder(change, module.weight.device, dtype)
            stack.callback(module.register_forward_hook(hook).remove)
        yield


class _Adder:
    """The forward hook that adds one change to a module's output."""

    def __init__(self, change: Change, device: torch.device, dtype: torch.dtype | None):
        self.rows, self.dtype = change.rows, dtype
        self.index, self.values = change.index.to(device), change.values.to(device)

    def __call__(self, module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(self.dtype or output.dtype, output.dtype)
        x, values = args[0], self.values.to(dtype)
        with torch.autocast(output.device.type, enabled=False):
            if self.rows:
                added = F.linear(x.to(dtype), values)
                return output.index_add(-1, self.index, added.to(output.dtype))
            return output + (x.index_select(-1, self.index).to(dtype) @ values).to(output.dtype)
