# SPDX-License-Identifier: Apache-2.0
"""Neurons read from the checkpoint against the model's own weights, in every family."""

import model_zoo as zoo
import pytest
import torch

from pkt_ext.attribution.neurons import BlockNeurons, Located
from pkt_ext.errors import InputError
from pkt_ext.methods.matching import match_neurons, read_neurons
from pkt_ext.models.anatomy import describe
from pkt_ext.streaming.checkpoint import Checkpoint


def located(blocks, anatomy, *, n=5, seed=0) -> Located:
    """Random neurons in these (attention, FFN) blocks."""
    generator = torch.Generator().manual_seed(seed)

    def draw(block, width):
        index = torch.randperm(width, generator=generator)[:n]
        return BlockNeurons(block, index, torch.zeros(n))

    attention = tuple(draw(block, anatomy.heads * anatomy.head_dim) for block in blocks[0])
    ffn = tuple(draw(block, anatomy.intermediate_size) for block in blocks[1])
    return Located("row", -1.0, (), (), attention, ffn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_neurons_of_the_checkpoint(family, dtype, tmp_path):
    model = zoo.build(family).to(dtype)
    anatomy = describe(model)
    checkpoint = Checkpoint.open(zoo.save(model, tmp_path / "model"))
    checkpoint.skeleton(torch.float32)
    row = located(((0, 1), (0, 1)), anatomy)
    for block in (0, 1):
        path = anatomy.blocks[block]
        for role, found in (
            ("up", row.ffn[block]),
            ("down", row.ffn[block]),
            ("v", row.attention[block]),
            ("o", row.attention[block]),
        ):
            part = next(p for p in anatomy.projections[block] if p.role == role)
            matrix = part.matrix(model.get_parameter(f"{path}.{part.module}.weight").detach())
            if role == "v":  # one row for every query head, as attention itself repeats them
                heads = matrix.unflatten(0, (anatomy.kv_heads, anatomy.head_dim))
                matrix = heads.repeat_interleave(anatomy.heads // anatomy.kv_heads, 0).flatten(0, 1)
            expected = matrix[found.indices] if role in ("up", "v") else matrix.T[found.indices]
            vectors = read_neurons(checkpoint, anatomy, role, found)
            assert vectors.dtype == torch.float32 and torch.equal(vectors, expected.float())


def test_blocks_and_ranks_are_paired():
    teacher, student = zoo.pair("llama_gqa")
    theirs, ours = describe(teacher), describe(student)
    checkpoint = Checkpoint.open(teacher)
    checkpoint.skeleton(torch.float32)
    row = located(((0, 2), (0, 1, 2)), theirs)
    place = located(((0, 1), (0, 1)), ours, seed=1)
    match = match_neurons(checkpoint, theirs, row, place)
    assert match.neurons.keys() == {"up", "down", "v", "o"}
    assert match.attention.blocks == match.ffn.blocks == (0, 1)
    assert torch.equal(match.ffn.index[1], place.ffn[1].indices)
    assert torch.equal(match.attention.index[0], place.attention[0].indices)
    o = teacher.model.layers[2].self_attn.o_proj.weight.detach()
    assert torch.equal(match.neurons["o"][1, 3], o[:, row.attention[1].indices[3]])
    up = teacher.model.layers[1].mlp.up_proj.weight.detach()  # the third kept block has no partner
    assert torch.equal(match.neurons["up"][1], up[row.ffn[1].indices])
    part = match_neurons(checkpoint, theirs, row, place, types=("up", "down"))
    assert part.neurons.keys() == {"up", "down"} and part.attention is None
    fewer = located(((0, 1), (0, 1)), ours, n=4)
    with pytest.raises(InputError, match="go in pairs"):
        match_neurons(checkpoint, theirs, row, fewer)
