# SPDX-License-Identifier: Apache-2.0
"""Anatomy of every family: full cover, roles proven by what they do in the model, refusals."""

import model_zoo
import pytest
import torch
import transformers as hf
from accelerate import init_empty_weights

from pkt_ext.errors import InputError
from pkt_ext.models.anatomy import SUPPORTED, Rows, check_config, describe, matmul_modules

ROLES = {"q", "k", "v", "o", "gate", "up", "down"}
UNGATED = ("gpt", "opt")


@pytest.fixture(params=model_zoo.FAMILIES)
def model(request):
    return model_zoo.build(request.param)


def projection(anatomy, role, block=0):
    return next(p for p in anatomy.projections[block] if p.role == role)


def test_every_matmul_weight_is_covered_exactly_once(model):
    anatomy = describe(model)
    assert len(anatomy.blocks) == len(anatomy.projections) == 2
    for path, projections in zip(anatomy.blocks, anatomy.projections, strict=True):
        modules = matmul_modules(model.get_submodule(path))
        assert {p.module for p in projections} == modules.keys()
        for name, module in modules.items():
            numbers = torch.arange(module.weight.numel()).reshape(module.weight.shape)
            parts = [p.matrix(numbers) for p in projections if p.module == name]
            shapes = [p.shape for p in projections if p.module == name]
            assert [tuple(part.shape) for part in parts] == shapes
            covered = torch.cat([part.flatten() for part in parts]).sort().values
            assert torch.equal(covered, numbers.flatten())


def test_every_parameter_has_a_place(model):
    anatomy = describe(model)
    places = [
        *anatomy.blocks,
        anatomy.embedding,
        anatomy.head,
        anatomy.final_norm,
        anatomy.position_embedding,
    ]
    prefixes = tuple(f"{place}." for place in places if place)
    assert all(name.startswith(prefixes) for name, _ in model.named_parameters())
    assert model.get_submodule(anatomy.embedding) is model.get_input_embeddings()
    assert model.get_submodule(anatomy.head) is model.get_output_embeddings()


@pytest.mark.parametrize("family", model_zoo.FAMILIES)
def test_sizes_and_outer_parts(family):
    anatomy = describe(model_zoo.build(family, layers=3, hidden=24, ffn=40, heads=2))
    gqa = family in ("llama_gqa", "llama_bias", "mistral", "qwen2", "qwen2_tied", "olmo2")
    wide = family in ("llama_wide_heads", "qwen3", "gemma2", "gemma3")
    gqa = gqa or wide or family == "phi3_gqa"
    assert anatomy.model_type in SUPPORTED
    assert len(anatomy.blocks) == 3
    assert (anatomy.hidden_size, anatomy.intermediate_size) == (24, 40)
    assert anatomy.vocab_size == model_zoo.VOCAB
    assert (anatomy.heads, anatomy.kv_heads) == (2, 1 if gqa else 2)
    assert anatomy.head_dim == (16 if wide else 12)
    assert anatomy.tied == (family in model_zoo.TIED)
    assert anatomy.logit_softcap == (5.0 if family == "gemma2" else None)
    assert (anatomy.final_norm is None) == (family == "opt_post_norm")
    assert (anatomy.position_embedding is not None) == family.startswith(("gpt2", "opt"))
    roles = {p.role for p in anatomy.projections[0]}
    assert roles == (ROLES - {"gate"} if family.startswith(UNGATED) else ROLES)


@pytest.mark.parametrize("family", model_zoo.FAMILIES)
def test_same_on_meta(family):
    real = model_zoo.build(family)
    with init_empty_weights(include_buffers=False):
        empty = hf.AutoModelForCausalLM.from_config(model_zoo.config(family))
    empty.tie_weights()
    assert describe(empty) == describe(real)


# --- roles by what they do ------------------------------------------------------------------------

POSITIONS = 3


def probe(model, part, where, change):
    """How the input of `where` moves when `change` is applied to one output row of `part`.

    Sample b changes the part's b-th row; returns (before, after), each [B, T, width of `where`].
    """
    block = model.get_submodule(describe(model).blocks[0])
    rows = part.rows.index() if part.rows else torch.arange(part.shape[0])
    ids = torch.tensor([[5, 77, 200]]).expand(len(rows), POSITIONS)
    seen = []

    def read(module, args):
        seen.append(args[0].detach().reshape(len(rows), POSITIONS, -1))

    def write(module, args, output):
        if not seen_before:
            return output
        changed = output.detach().reshape(len(rows), POSITIONS, -1).clone()
        change(changed, torch.arange(len(rows)), rows)
        return changed.reshape(output.shape)

    seen_before = []
    hooks = [
        block.get_submodule(where.module).register_forward_pre_hook(read),
        block.get_submodule(part.module).register_forward_hook(write),
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
        seen_before.append(True)
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def moved(before, after):
    return (after - before).abs() > 1e-5


def add_at(position):
    def change(values, samples, rows):
        values[samples, position, rows] += 2.0

    return change


def columns(anatomy, heads):
    """[len(heads), width of o]: which columns of o's input belong to these lists of heads."""
    mask = torch.zeros(len(heads), anatomy.heads, anatomy.head_dim, dtype=torch.bool)
    for i, group in enumerate(heads):
        mask[i, group] = True
    return mask.flatten(1)


def test_query_rows_are_queries_in_head_order(model):
    anatomy = describe(model)
    q, o = projection(anatomy, "q"), projection(anatomy, "o")
    before, after = probe(model, q, o, add_at(0))
    assert not moved(before, after).any()  # the first token sees itself only, whatever its query
    change = moved(*probe(model, q, o, add_at(POSITIONS - 1)))
    assert not change[:, :-1].any()
    assert change[:, -1].any(dim=1).all()
    if not model.config.model_type.startswith("olmo2"):  # its norm mixes the heads
        own = columns(anatomy, [[r // anatomy.head_dim] for r in range(q.shape[0])])
        assert not (change[:, -1] & ~own).any()


def test_key_rows_are_keys_in_head_order(model):
    anatomy = describe(model)
    k, o = projection(anatomy, "k"), projection(anatomy, "o")
    change = moved(*probe(model, k, o, add_at(0)))
    assert not change[:, 0].any()  # one key only: its value cannot matter
    assert change[:, 1:].any(dim=2).any(dim=1).all()
    if not model.config.model_type.startswith("olmo2"):
        group = anatomy.heads // anatomy.kv_heads
        head = [r // anatomy.head_dim for r in range(k.shape[0])]
        own = columns(anatomy, [[h * group + i for i in range(group)] for h in head])
        assert not (change & ~own[:, None]).any()


def test_value_rows_are_values_in_order(model):
    anatomy = describe(model)
    v, o = projection(anatomy, "v"), projection(anatomy, "o")
    before, after = probe(model, v, o, add_at(0))
    group = anatomy.heads // anatomy.kv_heads
    for row in range(v.shape[0]):
        head, dim = divmod(row, anatomy.head_dim)
        expected = torch.zeros(anatomy.heads, anatomy.head_dim)
        expected[head * group : (head + 1) * group, dim] = 2.0
        difference = (after - before)[row, 0].reshape(anatomy.heads, anatomy.head_dim)
        torch.testing.assert_close(difference, expected, atol=1e-5, rtol=0)


def test_up_and_gate_rows_reach_their_column_of_down(model):
    anatomy = describe(model)
    down = projection(anatomy, "down")
    for role in ("up", "gate"):
        for part in (p for p in anatomy.projections[0] if p.role == role):
            change = moved(*probe(model, part, down, add_at(1)))
            own = torch.eye(part.shape[0], dtype=torch.bool)
            assert not change[:, [0, 2]].any()
            assert not (change[:, 1] & ~own).any()
            assert (change[:, 1] & own).sum() >= 0.9 * part.shape[0]  # an activation may be flat


@pytest.mark.parametrize("family", [f for f in model_zoo.FAMILIES if not f.startswith(UNGATED)])
def test_up_is_linear_and_gate_is_not(family):
    model = model_zoo.build(family)
    parts = {p.role: p for p in describe(model).projections[0]}

    def double(values, samples, rows):
        values[samples, :, rows] *= 2

    diagonal = torch.arange(parts["up"].shape[0])
    before, after = probe(model, parts["up"], parts["down"], double)
    torch.testing.assert_close(after[diagonal, :, diagonal], 2 * before[diagonal, :, diagonal])
    before, after = probe(model, parts["gate"], parts["down"], double)
    ratio = after[diagonal, :, diagonal] / before[diagonal, :, diagonal]
    assert ((ratio - 2).abs() > 0.01).float().mean() > 0.9


# --- rows -----------------------------------------------------------------------------------------


def test_rows_of_a_group_and_of_a_chunk():
    matrix = torch.arange(24.0).reshape(12, 2)
    grouped = Rows(start=1, length=2, groups=3, stride=4)
    assert grouped.count == 6
    assert grouped.index().tolist() == [1, 2, 5, 6, 9, 10]
    assert torch.equal(grouped.select(matrix), matrix[[1, 2, 5, 6, 9, 10]])
    assert torch.equal(grouped.select(matrix[:, 0]), matrix[[1, 2, 5, 6, 9, 10], 0])
    chunk = Rows(start=3, length=4)
    assert (chunk.count, chunk.index().tolist()) == (4, [3, 4, 5, 6])
    assert chunk.select(matrix).data_ptr() == matrix[3].data_ptr()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, words",
    [
        ("mixtral", "mixture of experts"),
        ("qwen2_moe", "mixture of experts"),
        ("qwen3_moe", "mixture of experts"),
        ("deepseek_v3", "mixture of experts"),
        ("gpt_oss", "mixture of experts"),
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("mamba", "state-space or hybrid"),
        ("mamba2", "state-space or hybrid"),
        ("falcon_h1", "state-space or hybrid"),
        ("gemma3n_text", "share keys and values"),
        ("gemma3", "multimodal model; pass its folder or hub id"),
        ("bloom", "not supported"),
        ("falcon", "not supported"),
        ("cohere", "not supported"),
    ],
)
def test_other_families_are_refused_by_name(kind, words):
    with pytest.raises(InputError) as caught:
        check_config(hf.AutoConfig.for_model(kind))
    message = str(caught.value)
    assert message.startswith(f"model type '{kind}'") and words in message
    assert all(name in message for name in SUPPORTED.values())


@pytest.mark.parametrize(
    "family, settings, words",
    [
        (
            "llama",
            dict(quantization_config=dict(quant_method="gptq", bits=4)),
            "quantised with GPTQ",
        ),
        ("llama", dict(quantization_config=dict(quant_method="awq", bits=4)), "quantised with AWQ"),
        ("llama", dict(quantization_config=dict(quant_method="fp8")), "quantised with FP8"),
        ("gemma3", dict(use_bidirectional_attention=True), "attention is bidirectional"),
        ("gpt2", dict(add_cross_attention=True), "cross-attention"),
    ],
)
def test_variants_of_supported_families(family, settings, words):
    config = model_zoo.config(family)
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(InputError, match=words):
        check_config(config)


def test_a_4bit_student_can_be_described():
    config = model_zoo.config("llama")
    config.quantization_config = dict(quant_method="bitsandbytes", load_in_4bit=True)
    check_config(config)


def test_models_that_do_not_fit():
    with pytest.raises(InputError, match="no language-model head; load it with AutoModelForCausal"):
        describe(model_zoo.build("llama").model)
    with pytest.raises(InputError, match="got Linear"):
        describe(torch.nn.Linear(2, 2))
    narrow = model_zoo.build("opt", word_embed_proj_dim=16)
    with pytest.raises(InputError, match="project_in.weight lie outside blocks, embedding"):
        describe(narrow)
    wrong = model_zoo.build("llama_gqa")
    wrong.config.num_key_value_heads = 4
    with pytest.raises(InputError, match=r"q_proj has 32|k_proj has 16 rows, its parts have \[32"):
        describe(wrong)
    renamed = model_zoo.build("llama")
    renamed.model.layers[1].mlp.sideways = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="role of model.layers.1.mlp.sideways is unknown"):
        describe(renamed)
    short = model_zoo.build("llama")
    short.model.layers[0].mlp.gate_proj = torch.nn.Linear(32, 47)
    with pytest.raises(InputError, match=r"gate of model.layers.0 is \(47, 32\), .* \(48, 32\)"):
        describe(short)
    odd = model_zoo.build("llama")
    odd.config.num_hidden_layers = 5
    with pytest.raises(InputError, match="0 lists of 5 equal blocks were found"):
        describe(odd)


def test_an_adapted_model_is_refused():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model_zoo.build("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(InputError, match="got PeftModel.*merge the adapter first"):
        describe(adapted)
