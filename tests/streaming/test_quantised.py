# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that transformers and bitsandbytes have quantised; every other way is refused."""

import json
import re
import sys

import bitsandbytes
import model_zoo
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from pkt_ext.attribution.neurons import BlockNeurons, locate
from pkt_ext.attribution.sensitivity import sensitivity
from pkt_ext.errors import InputError
from pkt_ext.merge import residual_model
from pkt_ext.methods import matching
from pkt_ext.methods.seeking import SeekingConfig, extract
from pkt_ext.models.anatomy import describe
from pkt_ext.models.injection import value_row_numbers
from pkt_ext.streaming import quantised
from pkt_ext.streaming.batches import IGNORED, Sample
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import Allotment
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.files import read_config

KINDS = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4 double": dict(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": dict(load_in_8bit=True),
}
RECORDS = {
    "nf4": ("nf4", 4, False, "bitsandbytes nf4"),
    "nf4 double": ("nf4", 4, True, "bitsandbytes nf4 with double quantisation"),
    "fp4": ("fp4", 4, False, "bitsandbytes fp4"),
    "int8": ("int8", 8, False, "bitsandbytes int8"),
}
# 96 is no multiple of the 64 elements that share a scale: down_proj's rows begin inside a group
SIZES = dict(hidden=64, ffn=96, kv_heads=2)


def quantise(folder, kind, **options):
    """Load the ordinary checkpoint `folder` quantised, by transformers."""
    settings = hf.BitsAndBytesConfig(**KINDS[kind], **options)
    return hf.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map={"": "cpu"}
    ).eval()


def dequantised(model):
    """{name: weight} by bitsandbytes' own functions, of every parameter of a quantised model."""
    result = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            value = parameter.data
            if isinstance(parameter, bitsandbytes.nn.Params4bit):
                value = bitsandbytes.functional.dequantize_4bit(value, parameter.quant_state)
            elif isinstance(parameter, bitsandbytes.nn.Int8Params):
                scale = module.state.SCB if parameter.SCB is None else parameter.SCB
                value = bitsandbytes.functional.int8_vectorwise_dequant(value, scale)
            result[f"{path}.{leaf}"] = value
    return result


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """(kind, model as transformers quantised it, its folder)."""
    folder = tmp_path_factory.mktemp("quantised")
    plain = model_zoo.build("llama_gqa", **SIZES).to(torch.bfloat16)
    model = quantise(model_zoo.save(plain, folder / "plain"), request.param)
    return request.param, model, model_zoo.save(model, folder / "model")


def loaded(source, dtype=torch.float32):
    checkpoint = Checkpoint.open(source)
    model = checkpoint.skeleton(dtype)
    return checkpoint, checkpoint.load([n for n, _ in model.named_parameters()], dtype)


def test_weights_are_bitsandbytes_own(made):
    kind, model, folder = made
    truth = dequantised(model)
    assert sum(p.dtype in (torch.uint8, torch.int8) for p in model.parameters()) == 14
    for source in (folder, model):
        for dtype in (torch.float32, torch.bfloat16):
            checkpoint, weights = loaded(source, dtype)
            assert weights.keys() == truth.keys()
            for name, weight in weights.items():
                assert torch.equal(weight, truth[name].to(dtype)), name
                assert checkpoint.shape(name) == tuple(weight.shape)
        record = checkpoint.quantisation
        assert (record.type, record.bits, record.double, str(record)) == RECORDS[kind]
        assert record.method == "bitsandbytes"
    assert Checkpoint.open(folder.parent / "plain").quantisation is None


def test_what_is_stored(made):
    kind, model, folder = made
    checkpoint, weights = loaded(folder)
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert checkpoint.bytes_of(weights) == sum(tensor.nbytes for tensor in stored.values())
    assert checkpoint.dtype_of(name) == (torch.int8 if kind == "int8" else torch.uint8)
    assert not checkpoint.is_mapped(name, torch.bfloat16)
    assert not checkpoint.is_mapped(name, torch.uint8) and not checkpoint.is_mapped(
        name, torch.int8
    )
    assert checkpoint.is_mapped("model.norm.weight", torch.bfloat16)
    checkpoint.populate(weights)  # nothing of it is a mapping any more
    expected = {"nf4": torch.float32, "fp4": torch.float32}.get(kind, torch.bfloat16)
    assert checkpoint.dtype == expected  # what bitsandbytes computes in; int8: the checkpoint's
    assert not hasattr(checkpoint.config, "quantization_config")


@pytest.mark.parametrize("index", [slice(3, 21), torch.tensor([5, 0, 63, 5])])
@pytest.mark.parametrize("matrix", ["mlp.up_proj", "mlp.down_proj"])
def test_rows(matrix, index, made, monkeypatch):
    monkeypatch.setattr(quantised, "_CHUNK", 130)  # two rows of 64 at once
    checkpoint, weights = loaded(made[2])
    name = f"model.layers.1.{matrix}.weight"
    rows = checkpoint.rows(name, index, torch.float32)
    assert torch.equal(rows, dequantised(made[1])[name].float()[index])
    assert torch.equal(rows, weights[name][index])
    with pytest.raises(IndexError, match="97"):
        checkpoint.rows(name, slice(0, 97), torch.float32)


def samples():
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": ids, "labels": ids}
        for ids in (torch.randint(3, 250, (2, length), generator=generator) for length in (9, 5))
    ]


def test_sensitivities_are_those_of_the_dequantised_weights(made, tmp_path):
    _, model, folder = made
    checkpoint = Checkpoint.open(folder)
    plain = hf.AutoModelForCausalLM.from_config(checkpoint.config, dtype=checkpoint.dtype)
    plain.load_state_dict(dequantised(model))
    expected = sensitivity(model_zoo.save(plain, tmp_path / "plain"), samples())
    found = sensitivity(folder, samples())
    assert found.keys() == expected.keys()
    for name, scores in expected.items():
        assert torch.equal(found[name], scores), name


def test_neurons_are_those_of_the_dequantised_weights(made, tmp_path):
    _, model, folder = made
    checkpoint = Checkpoint.open(folder)
    plain = hf.AutoModelForCausalLM.from_config(checkpoint.config, dtype=checkpoint.dtype)
    plain.load_state_dict(dequantised(model))
    target = torch.full((9,), IGNORED)
    target[-1] = 17
    found = [
        locate(
            StreamedModel(Checkpoint.open(source)),
            [Sample("one", torch.arange(20, 29), target)],
            blocks=1,
            attention_neurons=4,
            ffn_neurons=4,
            allotment=Allotment(1),
            show=False,
        )[0].summary()
        for source in (folder, model_zoo.save(plain, tmp_path / "plain"))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("role", ["up", "down", "v", "o"])
def test_what_moves_of_a_neuron_is_of_the_dequantised_weights(made, role, monkeypatch):
    monkeypatch.setattr(matching, "_SLAB", 24)  # several slabs, the last one smaller
    _, model, folder = made
    checkpoint = Checkpoint.open(folder)
    anatomy = describe(checkpoint.skeleton(torch.float32))
    part = next(p for p in anatomy.projections[1] if p.role == role)
    weight = dequantised(model)[f"{anatomy.blocks[1]}.{part.module}.weight"].float()
    chosen = BlockNeurons(1, torch.tensor([13, 2, 31]), torch.zeros(3))  # of the first heads
    vectors = matching.read_neurons(checkpoint, anatomy, role, chosen)
    rows = {"up": weight, "v": weight, "down": weight.T, "o": weight.T}[role]
    place = chosen.indices
    if role == "v":
        place = value_row_numbers(place, anatomy)
    assert vectors.any() and torch.equal(vectors, rows[place])


def test_seeking_from_a_quantised_teacher_for_a_quantised_student(made, tmp_path):
    """What is cut is cut from the dequantised weights; of the student only the shapes are read."""
    _, model, folder = made
    checkpoint = Checkpoint.open(folder)
    plain = hf.AutoModelForCausalLM.from_config(checkpoint.config, dtype=checkpoint.dtype)
    plain.load_state_dict(dequantised(model))
    model_zoo.save(plain, tmp_path / "teacher")
    student = model_zoo.save(model_zoo.build("llama_gqa", layers=1), tmp_path / "student")
    four = model_zoo.save(quantise(student, "nf4"), tmp_path / "four")
    rows = [{"prompt": "What is it?", "completion": " It is this."}]
    for name, teacher, target in (
        ("a", folder, four),
        ("b", tmp_path / "teacher", student),
    ):
        extract(teacher, target, rows, tmp_path / name, SeekingConfig(rank=4))
    files = [tmp_path / name / "start" / "adapter_model.safetensors" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    words = r"four: its weights are quantised \(bitsandbytes nf4\).*merge into the unquantised"
    with pytest.raises(InputError, match=words):
        residual_model(four, tmp_path / "a", tmp_path / "merged")


def test_parts_in_different_files(tmp_path):
    """A shard may end between a matrix and its scales."""
    plain = model_zoo.save(model_zoo.build("llama_gqa", **SIZES), tmp_path / "plain")
    model = quantise(plain, "nf4 double")
    tensors = load_file(model_zoo.save(model, tmp_path / "model") / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    where = {key: f"{i % 2}.safetensors" for i, key in enumerate(tensors)}
    for file in set(where.values()):
        part = {key: tensor for key, tensor in tensors.items() if where[key] == file}
        save_file(part, tmp_path / "model" / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    _, weights = loaded(tmp_path / "model")
    for name, weight in dequantised(model).items():
        assert torch.equal(weights[name], weight.float()), name


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gpt2_stores_its_matrices_the_other_way_round(kind, tmp_path):
    plain = model_zoo.save(model_zoo.build("gpt2", hidden=64, ffn=128), tmp_path / "plain")
    model = quantise(plain, kind)
    truth = dequantised(model)
    checkpoint, weights = loaded(model_zoo.save(model, tmp_path / "model"))
    for name, weight in weights.items():
        matrix = truth[name].float()
        packed = "attn.c_" in name or "mlp.c_" in name
        expected = matrix.T if packed and matrix.ndim == 2 else matrix
        assert torch.equal(weight, expected), name
        assert weight.is_contiguous()
    name = "transformer.h.0.attn.c_proj.weight"  # square: only its module tells
    assert torch.equal(checkpoint.rows(name, slice(2, 9), torch.float32), weights[name][2:9])
    reference = load_file(plain / "model.safetensors")["transformer.h.0.attn.c_proj.weight"]
    assert (weights[name] - reference).abs().mean() < 0.1 * reference.abs().mean()


def test_text_model_of_a_multimodal_checkpoint(tmp_path):
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = hf.LlavaConfig(
        text_config=model_zoo.config("llama_gqa", **SIZES),
        vision_config=hf.CLIPVisionConfig(**vision, image_size=28, patch_size=14),
    )
    plain = model_zoo.randomize(hf.LlavaForConditionalGeneration(config))
    model_zoo.save(plain, tmp_path / "plain")
    model = hf.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "plain",
        quantization_config=hf.BitsAndBytesConfig(**KINDS["nf4 double"]),
        device_map={"": "cpu"},
    )
    checkpoint, weights = loaded(model_zoo.save(model, tmp_path / "model"))
    assert checkpoint.quantisation.double and checkpoint.dtype == torch.bfloat16
    truth = dequantised(model)
    for name, weight in weights.items():
        outer = (
            name if name == "lm_head.weight" else name.replace("model.", "model.language_model.")
        )
        assert torch.equal(weight, truth[outer].float()), name


def test_quantised_head(tmp_path):
    plain = model_zoo.save(model_zoo.build("llama_gqa", **SIZES), tmp_path / "plain")
    model = quantise(plain, "int8", llm_int8_skip_modules=["none"])
    folder = model_zoo.save(model, tmp_path / "model")
    checkpoint, weights = loaded(folder)
    assert checkpoint.dtype_of("lm_head.weight") == torch.int8
    assert torch.equal(weights["lm_head.weight"], dequantised(model)["lm_head.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_has_run(kind, tmp_path):
    """On CPUs with bfloat16 its first forward repacks the weights in place, and rounds scales."""
    plain = model_zoo.build("llama_gqa", hidden=64, ffn=128).to(torch.bfloat16)
    model = quantise(model_zoo.save(plain, tmp_path / "plain"), kind)
    before = {name: weight.clone() for name, weight in loaded(model)[1].items()}
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    if kind != "int8" and bitsandbytes.functional.has_avx512bf16():
        refused(model, r"q_proj.weight .* pass its folder instead \(bitsandbytes repacks a model")
        return
    for name, weight in loaded(model)[1].items():
        assert torch.equal(weight, before[name]), name


# --- what does not fit ----------------------------------------------------------------------------


@pytest.fixture
def nf4(tmp_path):
    plain = model_zoo.save(model_zoo.build("llama_gqa", **SIZES), tmp_path / "plain")
    return model_zoo.save(quantise(plain, "nf4 double"), tmp_path / "nf4")


@pytest.fixture
def int8(tmp_path):
    plain = model_zoo.save(model_zoo.build("llama_gqa", **SIZES), tmp_path / "plain")
    return model_zoo.save(quantise(plain, "int8"), tmp_path / "int8")


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(source, words):
    with pytest.raises(InputError, match=words) as caught:
        checkpoint = Checkpoint.open(source)
        checkpoint.skeleton(torch.float32)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


Q = "model.layers.0.self_attn.q_proj"


def state(tensors, **changes):
    """Change what is stored as JSON beside q_proj."""
    key = f"{Q}.weight.quant_state.bitsandbytes__nf4"
    settings = json.loads(bytes(tensors[key].tolist())) | changes
    tensors[key] = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map", "weight"]
)
def test_a_part_is_missing(part, nf4):
    key = f"{Q}.weight" if part == "weight" else f"{Q}.weight.{part}"
    rewrite(nf4, lambda tensors: tensors.pop(key))
    refused(nf4, f"model.safetensors: lacks {key}, which bitsandbytes needs for {Q}.weight; down")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: state(t, shape=[32, 128]),
        lambda t: state(t, blocksize=128),
        lambda t: state(t, blocksize=-64),
        lambda t: state(t, dtype="float64"),
        lambda t: state(t, nested_blocksize=32),
        lambda t: state(t, nested_offset="0"),
        lambda t: state(t, nested_dtype="float16"),
        lambda t: t.update({f"{Q}.weight.absmax": t[f"{Q}.weight.absmax"][1:]}),
        lambda t: t.update({f"{Q}.weight.absmax": t[f"{Q}.weight.absmax"].float()}),
        lambda t: t.update({f"{Q}.weight.nested_absmax": torch.ones(2)}),
        lambda t: t.update({f"{Q}.weight.nested_quant_map": torch.ones(16)}),
        lambda t: t.update({f"{Q}.weight.quant_map": torch.ones(8)}),
    ],
)
def test_parts_that_do_not_belong_together(change, nf4):
    """Native code would read past their ends."""
    rewrite(nf4, change)
    refused(nf4, rf"bitsandbytes stores for {Q}.weight does not belong to a matrix \[64, 64\]")


def test_damaged_state(nf4):
    key = f"{Q}.weight.quant_state.bitsandbytes__nf4"
    rewrite(nf4, lambda t: t.update({key: torch.full((9,), 123, dtype=torch.uint8)}))
    refused(nf4, f"{key} is damaged .*download the checkpoint again")


def test_packed_for_another_shape(nf4, int8):
    words = r"q_proj.weight is .* the configuration says \[64, 64\]; they are of different models"
    rewrite(nf4, lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][2:].clone()}))
    refused(nf4, words)
    rewrite(int8, lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][2:].clone()}))
    refused(int8, words)


@pytest.mark.parametrize(
    "change",
    [
        {f"{Q}.SCB": torch.ones(63)},
        {f"{Q}.SCB": torch.ones(64, dtype=torch.float64)},
        {f"{Q}.weight_format": torch.tensor(2, dtype=torch.uint8)},
    ],
)
def test_int8_parts_that_do_not_belong_together(change, int8):
    rewrite(int8, lambda tensors: tensors.update(change))
    refused(int8, rf"stores for {Q}.weight does not belong to a matrix \[64, 64\]")


def test_without_bitsandbytes(nf4, monkeypatch):
    quantised.bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused(nf4, r"quantised by bitsandbytes needs it: pip install 'pkt_ext\[quant\]'")
    checkpoint = Checkpoint.open(nf4, headers_only=True)  # to plan, it is not needed
    names = [name for name, _ in checkpoint.skeleton(torch.float32).named_parameters()]
    assert checkpoint.bytes_of(names) < 200_000
    monkeypatch.undo()
    quantised.bitsandbytes.cache_clear()
    assert loaded(nf4)


# --- every other way ------------------------------------------------------------------------------


def configured(tmp_path, **settings):
    """A folder whose config.json says this of quantisation."""
    folder = model_zoo.save(model_zoo.build("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


CARD = "is not read; use the unquantised checkpoint that its model card names as base model"


@pytest.mark.parametrize(
    "method, name",
    [
        ("gptq", "GPTQ"),
        ("awq", "AWQ"),
        ("fp8", "FP8"),
        ("fbgemm_fp8", r"FP8 \(FBGEMM\)"),
        ("compressed-tensors", r"compressed-tensors \(FP8 or integers\)"),
        ("mxfp4", "MXFP4"),
        ("hqq", "HQQ"),
        ("quanto", "quanto"),
        ("torchao", "torchao"),
        ("of-tomorrow", "of-tomorrow"),
        (None, "an unnamed method"),
    ],
)
def test_other_methods_by_name(method, name, tmp_path):
    settings = {"bits": 4} | ({} if method is None else {"quant_method": method})
    folder = configured(tmp_path, quantization_config=settings)
    refused(
        folder, f"^{re.escape(str(folder))}: its weights are quantised with {name}, which {CARD}"
    )


def test_older_names(tmp_path):
    folder = configured(tmp_path, compression_config={"quant_method": "compressed-tensors"})
    refused(folder, f"{CARD}, or undo it once .pip install compressed-tensors.: AutoModelFor")
    assert (
        Checkpoint.open(
            configured(tmp_path / "old", quantization_config={"load_in_4bit": True})
        ).quantisation
        is None
    )  # it says so, but no tensor is


def test_a_mixture_of_experts_is_refused_as_one_first(tmp_path):
    """Undoing its quantisation would not help."""
    folder = configured(tmp_path)
    hf.AutoConfig.for_model("gpt_oss").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "'gpt_oss': a mixture of experts .*supported are dense decoders: Llama 2/3, Mi")


def test_what_is_said_of_fp8_helps(tmp_path):
    """The call that the refusal prints makes a checkpoint that is read."""
    plain = model_zoo.build("llama", hidden=128, ffn=256).to(torch.bfloat16)
    folder = model_zoo.save(plain, tmp_path / "fp8")
    tensors, scaled = load_file(folder / "model.safetensors"), {}
    for key in [key for key in tensors if "proj" in key]:
        size = tensors[key].abs().max().float() / 448
        scaled[key] = (tensors[key].float() / size).to(torch.float8_e4m3fn)
        blocks = [-(-side // 128) for side in tensors[key].shape]
        scaled[f"{key}_scale_inv"] = size.expand(blocks).contiguous()
    save_file(tensors | scaled, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="or undo it once: ") as caught:
        Checkpoint.open(folder)
    call = str(caught.value).partition("or undo it once: ")[2]
    scope = {"transformers": hf, "AutoModelForCausalLM": hf.AutoModelForCausalLM}
    eval(call, scope | {"NAME": folder, "FOLDER": tmp_path / "plain"})
    _, weights = loaded(tmp_path / "plain")
    for key, tensor in tensors.items():
        torch.testing.assert_close(weights[key], tensor.float(), rtol=0.07, atol=2e-3)


def test_gguf(tmp_path):
    words = ": GGUF, which is not read; use the safetensors checkpoint that it was made from"
    file = tmp_path / "model-Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    refused(file, f"model-Q4_K_M.gguf{words}")
    refused(tmp_path, words)
    folder = configured(tmp_path / "with config")
    (folder / "model.safetensors").rename(folder / "model.gguf")
    refused(folder, words)
    (tmp_path / "snapshot").mkdir()
    with pytest.raises(InputError, match=f"someone/model-GGUF{words}"):
        read_config(tmp_path / "snapshot", "someone/model-GGUF")
