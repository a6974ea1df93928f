# SPDX-License-Identifier: Apache-2.0
"""What differs between transformers 4.46 and 5; every test here runs under both."""

from types import SimpleNamespace

import model_zoo as zoo
import pytest
import torch
import transformers as hf

from pkt_ext.models.replaced import replaced
from pkt_ext.models.versions import DTYPE, dtype_of, from_config, key_renamer, long_rope


@pytest.mark.parametrize("loaded", ["eager", "sdpa"])
def test_a_skeleton_has_the_attention_that_transformers_chooses(loaded):
    model = zoo.build("llama", attn_implementation=loaded)
    again = from_config(hf.AutoModelForCausalLM, model.config, torch.bfloat16)
    assert again.config._attn_implementation == "sdpa" and again.dtype == torch.bfloat16
    assert model.config._attn_implementation == loaded


@pytest.mark.parametrize("dtype, name", [(torch.float16, "float16"), (None, "None")])
def test_the_dtype_that_a_configuration_names(dtype, name, tmp_path):
    zoo.config("llama", **{DTYPE: dtype}).save_pretrained(tmp_path)
    found = dtype_of(hf.AutoConfig.from_pretrained(tmp_path))
    assert str(found).removeprefix("torch.") == name


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_blocks_that_pass_their_input_on(family):
    model = zoo.build(family)
    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    seen = []

    def pass_on(index, hidden, args, kwargs):
        seen.append(hidden)
        return hidden

    with torch.no_grad(), replaced(list(stacks[0]), pass_on):
        logits = model(torch.arange(10).view(2, 5), use_cache=False).logits
    assert logits.shape == (2, 5, zoo.VOCAB)
    assert len(seen) == 2 and seen[0].equal(seen[1])


@pytest.mark.parametrize("stored", [False, True])
def test_keys_with_and_without_the_prefix(stored):
    whole, bare = zoo.build("gpt2"), zoo.build("gpt2").transformer
    rename = key_renamer(whole, whole.state_dict(), stored=stored)
    name = "transformer.h.0.mlp.c_fc.weight"
    for key in ("h.0.mlp.c_fc.weight", name):
        assert rename(key)[0] == name
    rename = key_renamer(bare, bare.state_dict(), stored=stored)
    assert rename(name)[0] == "h.0.mlp.c_fc.weight"
    assert rename("h.7.nothing") == ("h.7.nothing", None)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, None),
        ({"rope_parameters": {"rope_type": "default"}}, None),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 128),
        (
            {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 32}},
            32,
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 128),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, None),
        (
            {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 64},
            64,
        ),
    ],
)
def test_where_rotary_frequencies_change(settings, expected):
    assert long_rope(SimpleNamespace(max_position_embeddings=128, **settings)) == expected
