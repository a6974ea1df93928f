# SPDX-License-Identifier: Apache-2.0
"""A teacher's located neurons, read from its checkpoint and paired with the student's (L3 to L5).

The i-th kept block of one goes to the i-th kept block of the other, the j-th best neuron in it to
the j-th best: ranks are matched, nothing is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from pkt_ext.attribution.neurons import BlockNeurons, Located
from pkt_ext.methods.alignment import KIND, Match, Places
from pkt_ext.methods.hypernetwork import TYPES
from pkt_ext.models.anatomy import Anatomy
from pkt_ext.models.injection import ROW_ROLES, value_row_numbers
from pkt_ext.streaming.checkpoint import Checkpoint


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
    matrix = checkpoint.load([name], checkpoint.dtype_of(name))[name].detach()
    return matrix.index_select(1, index).T.float().contiguous()


def _places(found: Sequence[BlockNeurons]) -> Places:
    return Places(
        tuple(each.block for each in found), torch.stack([each.indices for each in found])
    )
