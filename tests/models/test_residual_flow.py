# SPDX-License-Identifier: Apache-2.0
"""What a block adds to the residual stream, seen through its structure, in every family."""

import model_zoo as zoo
import pytest
import torch

from pkt_ext.errors import InputError
from pkt_ext.models.anatomy import describe
from pkt_ext.models.capture import own_values, residual_flow

FAMILIES = [name for name in zoo.FAMILIES if name != "opt_post_norm"]
NORMED = ("gemma2", "gemma3", "olmo2")  # a norm between last projection and residual stream
POSITIONS = torch.tensor([3, 6])


def flows(model, ids, index=1):
    anatomy, found = describe(model), []
    block = model.get_submodule(anatomy.blocks[index])
    with torch.no_grad():
        hidden = model(ids, use_cache=False, output_hidden_states=True).hidden_states
        before = hooks(block)
        with residual_flow(block, anatomy.projections[index], POSITIONS, found.append):
            model(ids, use_cache=False)
    assert hooks(block) == before
    return found, hidden


def hooks(block):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in block.modules())


def ids():
    return torch.randint(3, 200, (2, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_additions_are_the_models_own(family):
    model = zoo.build(family, layers=3)
    (flow,), hidden = flows(model, ids())
    rows = torch.arange(2), POSITIONS
    attention, ffn = flow.attention, flow.ffn
    assert attention.base.equal(hidden[1][rows]) and flow.output.equal(hidden[2][rows])
    parallel = family == "gpt_neox"
    torch.testing.assert_close(
        ffn.base, attention.base if parallel else attention.base + attention.added
    )
    torch.testing.assert_close(flow.output, attention.base + attention.added + ffn.added)
    anatomy = describe(model)
    block = model.get_submodule(anatomy.blocks[1])
    for role, half in (("o", attention), ("down", ffn)):
        projection = next(p for p in anatomy.projections[1] if p.role == role)
        module = block.get_submodule(projection.module)
        bias = 0 if module.bias is None else module.bias
        product = half.neurons @ projection.matrix(module.weight).T + bias
        torch.testing.assert_close(half.output, product)
        assert (half.norm is not None) == (family in NORMED)
        normed = block.get_submodule(half.norm)(half.output) if half.norm else half.output
        torch.testing.assert_close(half.added, normed)


def test_bfloat16_rounds_and_is_not_refused():
    for family in ("llama_bias", "gemma2", "gpt_neox"):
        (flow,), _ = flows(zoo.build(family).to(torch.bfloat16), ids())
        assert flow.attention.added.dtype == torch.bfloat16


def test_padding_and_other_samples_do_not_count():
    model, both = zoo.build("mistral"), ids()
    (flow,), _ = flows(model, both)
    changed = both.clone()
    changed[0, 4:] = 7  # behind the first one's position
    changed[1] = changed[1].flip(0)
    (other,), _ = flows(model, changed)
    assert other.ffn.neurons[0].equal(flow.ffn.neurons[0])
    assert not other.ffn.neurons[1].equal(flow.ffn.neurons[1])


def test_blocks_without_a_residual_stream_are_refused():
    with pytest.raises(InputError, match="OPTDecoderLayer does not add its attention"):
        flows(zoo.build("opt_post_norm"), ids())


def test_large_activations_that_a_block_takes_away_are_rounding():
    """As the last blocks of real models do; the sum's error is that of its terms."""
    model = zoo.build("llama_bias").to(torch.bfloat16)
    layer = model.model.layers[1]
    with torch.no_grad():
        layer.self_attn.o_proj.bias[3] = 4000.0
        layer.mlp.down_proj.bias[3] = -4000.0
    (flow,), _ = flows(model, ids())
    terms = flow.attention.base.float() + flow.attention.added + flow.ffn.added
    error, size = (terms - flow.output).abs().max(), flow.output.abs().max()
    assert error > 4 * torch.finfo(torch.bfloat16).eps * size


@pytest.mark.parametrize("part", ["self_attn.o_proj", "mlp.down_proj"])
def test_a_scaled_contribution_is_refused(part):
    model = zoo.build("llama")
    model.model.layers[1].get_submodule(part.split(".")[0]).register_forward_hook(
        lambda module, args, out: (out[0] * 0.5, *out[1:]) if isinstance(out, tuple) else out * 0.5
    )
    with pytest.raises(InputError, match="LlamaDecoderLayer does not add"):
        flows(model, ids())


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_own_values_are_the_weight_on_oneself_times_ones_value(family):
    model = zoo.build(family, layers=2, attn_implementation="eager")
    anatomy, found, seen = describe(model), [], {}
    block = model.get_submodule(anatomy.blocks[1])
    projection = next(p for p in anatomy.projections[1] if p.role == "v")
    module = block.get_submodule(projection.module)
    handle = module.register_forward_hook(lambda m, a, o: seen.setdefault("v", o))
    with torch.no_grad():
        weights = model(ids(), use_cache=False, output_attentions=True).attentions[1]
        handle.remove()
        before = hooks(block)
        with own_values(block, anatomy.projections[1], POSITIONS, found.append):
            plain = model(ids(), use_cache=False).logits
        assert plain.equal(model(ids(), use_cache=False).logits) and hooks(block) == before
    rows = torch.arange(2), POSITIONS
    chosen = projection.rows.index() if projection.rows else slice(None)
    values = seen["v"][..., chosen][rows].unflatten(-1, (anatomy.kv_heads, anatomy.head_dim))
    own = weights.diagonal(dim1=2, dim2=3)[rows[0], :, rows[1]]  # [B, heads]
    shared = anatomy.heads // anatomy.kv_heads
    expected = (own[..., None] * values.repeat_interleave(shared, 1)).flatten(1)
    torch.testing.assert_close(found[0], expected)
