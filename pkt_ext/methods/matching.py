# SPDX-License-Identifier: Apache-2.0
"""A teacher's located neurons, read from its checkpoint and paired with the student's.

The i-th kept block of one goes to the i-th kept block of the other, the j-th best neuron in it to
the j-th best: ranks are matched, nothing is compared (METHODS L3 to L5).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from pkt_ext.attribution.neurons import BlockNeurons, Located
from pkt_ext.errors import InputError
from pkt_ext.methods.hypernetwork import TYPES
from pkt_ext.models.anatomy import Anatomy
from pkt_ext.models.injection import ROW_ROLES, value_row_numbers, value_rows
from pkt_ext.streaming.checkpoint import Checkpoint

# module type -> the half of a block whose neurons it belongs to
KIND = {"up": "ffn", "down": "ffn", "v": "attention", "o": "attention"}
_SLAB = 1024  # rows of a quantised matrix that are looked at for their columns at once


@dataclass(frozen=True, eq=False)
class Places:
    """n student neurons in each of K blocks, in the order of the teacher's that go there."""

    blocks: tuple[int, ...]
    index: torch.Tensor  # int64 [K, n]


@dataclass(frozen=True, eq=False)
class Match:
    """Teacher neurons and the student's that they go to: the j-th best to the j-th best (L4, L5).

    A neuron of v or o is (h, j), counted as a column of o. With grouped queries several may share a
    row of the student's v, see `injection.value_rows`.
    """

    neurons: dict[str, torch.Tensor]  # {type: [K, n, d_t]}, of the hypernetwork's types
    ffn: Places | None  # where up and down go
    attention: Places | None  # where v and o go

    def __post_init__(self):
        for name, vectors in self.neurons.items():
            places = self.places(name)
            if places is None or vectors.shape[:-1] != places.index.shape or not len(vectors):
                there = None if places is None else [*places.index.shape]
                raise InputError(
                    f"{name}: {[*vectors.shape[:-1]]} teacher neurons for {there} places in the "
                    "student (blocks, neurons); they go in pairs: lower the transfer rate"
                )
            if len(places.blocks) != len(places.index):
                raise InputError(f"{name}: {len(places.index)} rows for blocks {places.blocks}")

    def places(self, name: str) -> Places | None:
        """Where neurons of this type go."""
        return getattr(self, KIND[name])


def match_neurons(
    teacher: Checkpoint,
    anatomy: Anatomy,
    theirs: Located,
    ours: Located,
    *,
    types: Iterable[str] = TYPES,
) -> Match:
    """Teacher neurons and the student's places for them, of one located row.

    Where one has more kept blocks than the other, the first k of each are paired.

    Args:
        teacher: bound to its model: `skeleton` was called.
        anatomy: the teacher's.
        theirs, ours: where the teacher's and the student's neurons were located.
        types:   of `hypernetwork.TYPES`.
    Raises:
        InputError: different numbers of neurons in a block.
    """
    types = tuple(types)
    k = {kind: min(len(getattr(theirs, kind)), len(getattr(ours, kind))) for kind in KIND.values()}
    neurons = {
        role: torch.stack(
            [
                read_neurons(teacher, anatomy, role, found)
                for found in getattr(theirs, KIND[role])[: k[KIND[role]]]
            ]
        )
        for role in types
    }
    wanted = {KIND[role] for role in types}
    places = {
        kind: _places(getattr(ours, kind)[: k[kind]]) if kind in wanted else None for kind in k
    }
    return Match(neurons, **places)


def read_neurons(
    checkpoint: Checkpoint, anatomy: Anatomy, role: str, found: BlockNeurons
) -> torch.Tensor:
    """The vectors of some neurons of one block: float32 [n, D], on the CPU.

    Rows of up; rows of v that attention neurons read, repeated where query heads share one;
    columns of down and o.
    """
    part = next(p for p in anatomy.projections[found.block] if p.role == role)
    name = f"{anatomy.blocks[found.block]}.{part.module}.weight"
    index = found.indices
    if role == "v":
        index = value_row_numbers(index, anatomy)
    if role in ROW_ROLES and part.rows is not None:
        index = part.rows.index()[index]
    if (role in ROW_ROLES) != part.transposed:  # rows as they are stored: nothing else is read
        return checkpoint.rows(name, index, torch.float32)
    return _columns(checkpoint, name, index)


def _columns(checkpoint: Checkpoint, name: str, index: torch.Tensor) -> torch.Tensor:
    """Some columns of a matrix as float32 rows, [n, D]."""
    dtype, (count, _) = checkpoint.dtype_of(name), checkpoint.shape(name)
    if dtype.is_floating_point:
        held = checkpoint.load([name], dtype)
        checkpoint.populate(held)
        return held[name].index_select(1, index).T.float().contiguous()
    # quantised: what is stored are codes, which are decoded a slab at a time
    slabs = [slice(first, min(first + _SLAB, count)) for first in range(0, count, _SLAB)]
    found = [checkpoint.rows(name, slab, torch.float32).index_select(1, index) for slab in slabs]
    return torch.cat(found).T.contiguous()


def student_deltas(
    translated: dict[str, torch.Tensor], match: Match, anatomy: Anatomy
) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    """The student's changes from translated neurons {type: [K, n, d_s]}: differentiable.

    See `injection.Deltas`; rows of v that several neurons share get the mean of their values.
    """
    deltas = {}
    for name, values in translated.items():
        places = match.places(name)
        # unbind, not values[k]: its backward stacks once instead of summing K mostly empty tensors
        for block, index, each in zip(places.blocks, places.index, values.unbind(0), strict=True):
            index = index.to(each.device)
            deltas[block, name] = value_rows(index, each, anatomy) if name == "v" else (index, each)
    return deltas


def _places(found: Sequence[BlockNeurons]) -> Places:
    return Places(
        tuple(each.block for each in found), torch.stack([each.indices for each in found])
    )
