# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: hub layouts against transformers' own loading, laziness, every refusal's words."""

import ctypes
import errno
import json
import os
import shutil
import sys

import huggingface_hub
import model_zoo
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from pkt_ext.attribution.sensitivity import sensitivity
from pkt_ext.errors import InputError
from pkt_ext.models.anatomy import describe
from pkt_ext.streaming import files
from pkt_ext.streaming.checkpoint import Checkpoint

IDS = torch.tensor([[1, 7, 100, 42, 9, 200, 5]])


@pytest.fixture
def llama(tmp_path):
    """A small Llama's folder, in one file."""
    return model_zoo.save(model_zoo.build("llama"), tmp_path / "llama")


@pytest.fixture
def sharded(tmp_path):
    """The same in several shards with an index."""
    folder = model_zoo.save(model_zoo.build("llama"), tmp_path / "sharded", max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def rewrite(folder, change):
    """Apply `change(tensors) -> tensors` to the folder's only safetensors file."""
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    return folder


def edit(path, change):
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


def filled(checkpoint, dtype=torch.float32):
    """The skeleton with all its parameters loaded."""
    model = checkpoint.skeleton(dtype)
    weights = checkpoint.load([n for n, _ in model.named_parameters()], dtype)
    for name, weight in weights.items():
        owner, _, leaf = name.rpartition(".")
        parameter = torch.nn.Parameter(weight)
        tied = model.get_parameter(name)
        for other, p in list(model.named_parameters(remove_duplicate=False)):
            if p is tied and other != name:
                path, _, attribute = other.rpartition(".")
                setattr(model.get_submodule(path), attribute, parameter)
        setattr(model.get_submodule(owner), leaf, parameter)
    return model


def same_as_transformers(folder, **options):
    """Our model of `folder` computes bit for bit what transformers' does."""
    theirs = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    ours = filled(Checkpoint.open(folder))
    assert not ours.training
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs.eval()(IDS).logits)
    return ours


@pytest.mark.parametrize("family", model_zoo.FAMILIES)
def test_every_family_single_sharded_and_loaded(family, tmp_path):
    model = model_zoo.build(family)
    with torch.no_grad():
        expected = model(IDS).logits
    model_zoo.save(model, tmp_path / "one")
    model_zoo.save(model, tmp_path / "many", max_shard_size="20KB")
    for source in (tmp_path / "one", str(tmp_path / "many"), model):
        checkpoint = Checkpoint.open(source)
        ours = filled(checkpoint)
        with torch.no_grad():
            assert torch.equal(ours(IDS).logits, expected)
        names = [name for name, _ in model.named_parameters()]
        assert checkpoint.bytes_of(names) == 4 * sum(p.numel() for p in model.parameters())
        assert checkpoint.shape(names[0]) == tuple(model.get_parameter(names[0]).shape)
        assert checkpoint.dtype == torch.float32
        assert describe(ours) == describe(model)


def test_skeleton_is_on_meta_with_real_buffers_and_in_eval(llama):
    model = Checkpoint.open(llama).skeleton(torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert not any(module.training for module in model.modules())


def test_load_reads_one_block_only(sharded, monkeypatch):
    checkpoint = Checkpoint.open(sharded)
    model = checkpoint.skeleton(torch.float32)
    read, real = [], files.Files.tensor

    def counting(self, stored):
        read.append(stored.key)
        return real(self, stored)

    monkeypatch.setattr(files.Files, "tensor", counting)
    names = [n for n, _ in model.named_parameters() if n.startswith("model.layers.1.")]
    loaded = checkpoint.load(names, torch.float32)
    assert sorted(read) == sorted(names) == sorted(loaded)


def test_a_file_larger_than_memory(tmp_path):
    """Safetensors' own mapping of it is refused where memory is not overcommitted at will."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    config = model_zoo.config("llama")
    config.vocab_size = memory // (4 * config.hidden_size)  # embedding and head take it all, each
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    last = "model.norm.weight"
    shapes[last] = shapes.pop(last)  # behind the others
    content = torch.arange(config.hidden_size, dtype=torch.float32)
    write_sparse(tmp_path / "model.safetensors", shapes, content)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.skeleton(torch.float32)
    assert checkpoint.load([last], torch.float32)[last].equal(content)


def write_sparse(path, shapes, content):
    """Float32 tensors of which only the last has content; the rest is a hole in the file."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(end - 4 * content.numel(), os.SEEK_CUR)
        file.write(content.numpy().tobytes())


def test_tensors_that_are_not_aligned(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "odd")
    path = tmp_path / "odd" / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    path.write_bytes(
        (size + 3).to_bytes(8, "little") + content[8 : 8 + size] + b"   " + content[8 + size :]
    )
    one, other = Checkpoint.open(llama), Checkpoint.open(tmp_path / "odd")
    names = [n for n, _ in one.skeleton(torch.float32).named_parameters()]
    other.skeleton(torch.float32)
    found, truth = other.load(names, torch.float32), one.load(names, torch.float32)
    assert all(found[name].equal(truth[name]) for name in names)


def test_load_casts_and_keeps_order(llama):
    checkpoint = Checkpoint.open(llama)
    checkpoint.skeleton(torch.float32)
    names = ["model.norm.weight", "model.embed_tokens.weight"]
    loaded = checkpoint.load(names, torch.float16)
    assert list(loaded) == names
    truth = load_file(llama / "model.safetensors")
    assert torch.equal(loaded[names[1]], truth[names[1]].half())


def test_writes_to_a_loaded_tensor_stay_with_it(llama):
    checkpoint = Checkpoint.open(llama)
    checkpoint.skeleton(torch.float32)
    before = load_file(llama / "model.safetensors")["model.norm.weight"]
    checkpoint.load(["model.norm.weight"], torch.float32)["model.norm.weight"].zero_()
    again = checkpoint.load(["model.norm.weight"], torch.float32)["model.norm.weight"]
    assert torch.equal(again, before)


TABLE = "model.embed_tokens.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_file_and_of_a_model(dtype, llama):
    truth = load_file(llama / "model.safetensors")[TABLE]
    numbers = torch.tensor([7, 0, 263, 7])
    for source in (llama, hf.AutoModelForCausalLM.from_pretrained(llama)):
        checkpoint = Checkpoint.open(source)
        checkpoint.skeleton(dtype)
        for index in (slice(3, 9), slice(None), slice(4, 4), numbers, numbers[:0]):
            rows = checkpoint.rows(TABLE, index, dtype)
            assert rows.dtype == dtype and torch.equal(rows, truth[index].to(dtype))
            rows.fill_(5)  # a copy: neither file nor model changes
        assert torch.equal(checkpoint.load([TABLE], torch.float32)[TABLE], truth)
        for index in (slice(0, 265), slice(-1, 3), slice(5, 4), slice(0, 9, 2)):
            with pytest.raises(IndexError, match="has 264 rows, slice"):
                checkpoint.rows(TABLE, index, dtype)
        for number in (-1, 264):
            with pytest.raises(IndexError, match=f"has 264 rows, {number} to {number} were"):
                checkpoint.rows(TABLE, torch.tensor([number]), dtype)
        with pytest.raises(TypeError, match=r"int64 \[K\] expected, got torch.int32 \[1\]"):
            checkpoint.rows(TABLE, torch.tensor([1], dtype=torch.int32), dtype)
        with pytest.raises(ValueError, match=r"model.norm.weight is \[32\], not a matrix"):
            checkpoint.rows("model.norm.weight", slice(0, 1), dtype)


class Made(TorchDispatchMode):
    """The elements of the largest tensor made, views aside."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        aliases = any(result.alias_info for result in function._schema.returns)
        if isinstance(out, torch.Tensor) and not aliases:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("index", [slice(100, 105), torch.tensor([4, 200, 3, 3, 9])])
def test_rows_makes_nothing_as_large_as_the_table(index, llama):
    checkpoint = Checkpoint.open(llama)
    checkpoint.skeleton(torch.float32)
    with Made() as made:
        assert checkpoint.rows(TABLE, index, torch.float16).shape == (5, 32)
    assert made.largest == 5 * 32


def test_what_load_gives_without_memory_of_its_own(llama):
    model = hf.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    for source, dtype, other in (
        (llama, torch.float32, torch.bfloat16),
        (model, torch.bfloat16, torch.float32),
    ):
        checkpoint = Checkpoint.open(source)
        checkpoint.skeleton(dtype)
        assert checkpoint.is_mapped(TABLE, dtype) and checkpoint.is_mapped(TABLE, dtype, "cpu")
        assert not checkpoint.is_mapped(TABLE, other)
        assert not checkpoint.is_mapped(TABLE, dtype, "cuda")


def test_dtype_is_the_checkpoints(tmp_path):
    model = model_zoo.build("llama").to(torch.bfloat16)
    folder = model_zoo.save(model, tmp_path / "bf16")
    assert Checkpoint.open(folder).dtype == torch.bfloat16
    edit(folder / "config.json", lambda c: c.pop("dtype"))
    assert Checkpoint.open(folder).dtype == torch.bfloat16


def test_tokenizer(llama, tmp_path):
    tokens = Checkpoint.open(llama).tokenizer()
    assert tokens("ab").input_ids == [1, *model_zoo.tokenizer(bos=False)("ab").input_ids]
    for path in llama.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match="no usable tokenizer .* into its folder"):
        Checkpoint.open(llama).tokenizer()


# --- layouts as they are on the Hub ---------------------------------------------------------------


def test_gpt2_without_prefix_and_with_mask_buffers(tmp_path):
    folder = model_zoo.save(model_zoo.build("gpt2"), tmp_path / "gpt2")

    def change(tensors):
        tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()}
        assert "lm_head.weight" not in tensors
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 128, 128).tril()
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        return tensors

    same_as_transformers(rewrite(folder, change))


def test_gpt_neox_with_embed_out_and_old_buffers(tmp_path):
    folder = model_zoo.save(model_zoo.build("gpt_neox"), tmp_path / "neox")

    def change(tensors):
        head = "embed_out.weight" if "embed_out.weight" in tensors else "lm_head.weight"
        tensors["embed_out.weight"] = tensors.pop(head)
        for i in range(2):
            name = f"gpt_neox.layers.{i}.attention"
            tensors[f"{name}.bias"] = torch.ones(1, 1, 128, 128).tril()
            tensors[f"{name}.masked_bias"] = torch.tensor(-1e9)
            tensors[f"{name}.rotary_emb.inv_freq"] = torch.ones(1)
        return tensors

    same_as_transformers(rewrite(folder, change))


@pytest.mark.parametrize("family", ["opt", "opt_post_norm"])
def test_opt_of_the_base_model(family, tmp_path):
    folder = model_zoo.save(model_zoo.build(family), tmp_path / "opt")
    same_as_transformers(
        rewrite(folder, lambda t: {k.removeprefix("model."): v for k, v in t.items()})
    )


def test_llama_with_rotary_tables_per_layer(llama):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    same_as_transformers(rewrite(llama, lambda t: t | extra))


VISION = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)
MULTIMODAL = {
    "gemma3": lambda: hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            text_config=model_zoo.config("gemma3").to_dict(),
            vision_config=VISION,
            mm_tokens_per_image=4,
        )
    ),
    # tied by its own configuration although its text configuration is not
    "mistral": lambda: hf.Mistral3ForConditionalGeneration(
        hf.Mistral3Config(
            text_config=model_zoo.config("mistral"), vision_config=hf.PixtralVisionConfig(**VISION)
        )
    ),
    "llama": lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config=model_zoo.config("llama"),
            vision_config=hf.CLIPVisionConfig(**VISION, projection_dim=16),
        )
    ),
}


@pytest.mark.parametrize("layout", ["hub", "nested"])
@pytest.mark.parametrize("family", MULTIMODAL)
def test_text_model_of_a_multimodal_checkpoint(family, layout, tmp_path):
    with torch.random.fork_rng(devices=[]):
        model = MULTIMODAL[family]()
    model = model_zoo.randomize(model, 3).eval()
    folder = model_zoo.save(model, tmp_path / "outer")  # in the Hub's layout
    tied = model.config.tie_word_embeddings
    if layout == "nested":
        weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
        assert "model.language_model.layers.0.mlp.up_proj.weight" in weights
        rewrite(
            folder, lambda _: {k: v for k, v in weights.items() if not tied or "lm_head" not in k}
        )
    else:
        keys = load_file(folder / "model.safetensors")
        assert "language_model.model.layers.0.mlp.up_proj.weight" in keys
        assert ("language_model.lm_head.weight" in keys) == (not tied)
    checkpoint = Checkpoint.open(folder)
    ours = filled(checkpoint)
    assert describe(ours).tied == tied
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(ours(IDS).logits, expected)
        # and from the loaded multimodal model itself
        assert torch.equal(filled(Checkpoint.open(model))(IDS).logits, expected)


def test_tied_head_stored_too(tmp_path):
    folder = model_zoo.save(model_zoo.build("llama_tied"), tmp_path / "tied")
    table = "model.embed_tokens.weight"
    rewrite(folder, lambda t: t | {"lm_head.weight": t[table].clone()})
    assert describe(same_as_transformers(folder)).tied


def test_tied_head_stored_alone(tmp_path):
    folder = model_zoo.save(model_zoo.build("llama_tied"), tmp_path / "tied")

    def change(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        return tensors

    rewrite(folder, change)
    assert describe(same_as_transformers(folder)).tied


def test_tied_by_name_but_other_values_is_untied(tmp_path):
    folder = model_zoo.save(model_zoo.build("llama_tied"), tmp_path / "tied")
    rewrite(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1})
    assert not describe(same_as_transformers(folder)).tied


# --- refusals -------------------------------------------------------------------------------------


def refused(source, words, **options):
    with pytest.raises(InputError, match=words) as caught:
        checkpoint = Checkpoint.open(source, **options)
        model = checkpoint.skeleton(torch.float32)
        checkpoint.load([n for n, _ in model.named_parameters()], torch.float32)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_missing_folder(tmp_path):
    refused(tmp_path / "nowhere", "nowhere: no such folder; pass a checkpoint's folder or a Hub id")


def test_file_instead_of_folder(llama):
    refused(llama / "config.json", "is a file; pass the folder that holds config.json")


def test_revision_of_a_folder(llama):
    refused(llama, "a revision applies to Hub ids only", revision="main")


def test_no_config(llama):
    (llama / "config.json").unlink()
    refused(llama, "no config.json; pass the folder")
    (llama / "adapter_config.json").write_text("{}")
    refused(llama, "looks like an adapter: pass the model, or make one with pkt merge")


def test_broken_config(llama):
    (llama / "config.json").write_text("{")
    refused(llama, r"config.json: unusable \(JSONDecodeError: .*\); download it again")
    (llama / "config.json").write_text("[]")
    refused(llama, r"config.json: unusable")


def test_no_safetensors(llama):
    (llama / "model.safetensors").unlink()
    refused(llama, "no model.safetensors and no model.safetensors.index.json; download")


def test_bin_only_prints_the_command(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    refused(llama, f"only a .bin checkpoint.*run: pkt convert {llama} llama-safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated(llama, keep):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(llama, r"llama/model.safetensors: truncated or corrupt safetensors \(.*download")


def test_corrupt_header(llama):
    path = llama / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:20] = b"not json at "
    path.write_bytes(data)
    refused(llama, "truncated or corrupt safetensors")


def test_truncated_after_open(llama):
    checkpoint = Checkpoint.open(llama)
    checkpoint.skeleton(torch.float32)
    path = llama / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 8)
    words = rf"changed since this run opened it \({size} bytes then, {size - 8} now\); leave it"
    with pytest.raises(InputError, match=f"llama/model.safetensors: {words}"):
        checkpoint.load([TABLE], torch.float32)
    with pytest.raises(InputError, match=words):
        checkpoint.rows(TABLE, slice(0, 3), torch.float32)


def test_replaced_after_open(llama):
    checkpoint = Checkpoint.open(llama)
    checkpoint.skeleton(torch.float32)
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(0, 0))
    with pytest.raises(InputError, match=r"changed since this run opened it \(same size\)"):
        checkpoint.load([TABLE], torch.float32)


def test_vanished_after_open(sharded):
    checkpoint = Checkpoint.open(sharded)
    checkpoint.skeleton(torch.float32)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    shard = index["weight_map"][TABLE]
    (sharded / shard).unlink()
    with pytest.raises(InputError, match=f"{shard}: No such file or directory; put it back or"):
        checkpoint.load([TABLE], torch.float32)


def vanish(path):
    path.unlink()


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def replace(path):
    path.with_suffix(".new").write_bytes(path.read_bytes())
    os.replace(path.with_suffix(".new"), path)


@pytest.mark.parametrize(
    "damage, words",
    [
        (vanish, "No such file or directory; put it back"),
        (cut, "changed since this run opened it .* start again"),
        (replace, "changed since this run opened it .same size.; leave it alone"),
    ],
)
def test_damage_while_a_pass_is_under_way(damage, words, tmp_path, monkeypatch):
    """The shard of the last block is damaged when the first block is read."""
    model = model_zoo.build("llama", layers=3)
    folder = model_zoo.save(model, tmp_path / "model", max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shard = index["model.layers.2.mlp.up_proj.weight"]
    assert shard not in {file for key, file in index.items() if "layers.0" in key}
    load = Checkpoint.load

    def loading(self, names, *args):
        names = list(names)
        loaded = load(self, names, *args)
        if any(name.startswith("model.layers.0.") for name in names):
            damage(folder / shard)
        return loaded

    monkeypatch.setattr(Checkpoint, "load", loading)
    with pytest.raises(InputError, match=f"{shard}: {words}"):
        sensitivity(folder, [{"input_ids": IDS, "labels": IDS}])


@pytest.mark.skipif(sys.platform != "linux", reason="madvise is Linux's")
def test_cut_short_while_mapped(llama):
    checkpoint = Checkpoint.open(llama)
    checkpoint.skeleton(torch.float32)
    loaded = checkpoint.load([TABLE], torch.float32)
    checkpoint.populate(loaded)
    os.truncate(llama / "model.safetensors", 100)  # touching the tensor now would be SIGBUS
    words = (
        r"llama/model.safetensors: cannot be read \(Bad address\): it was cut short while in use"
    )
    with pytest.raises(InputError, match=words):
        checkpoint.populate(loaded)


def test_populate_on_an_older_kernel(monkeypatch):
    asked = []

    def madvise(start, length, advice):
        asked.append((start, length, advice))
        ctypes.set_errno(errno.EINVAL)
        return -1 if advice == 22 else 0

    monkeypatch.setattr(files, "_madvise", madvise)
    tensor = torch.arange(5000, dtype=torch.int16)[7:]
    with Made() as touched:
        files.populate(tensor, "a file")
    page = os.sysconf("SC_PAGESIZE")
    assert [advice for *_, advice in asked] == [3, 22] and touched.largest == 1
    for start, length, _ in asked:
        assert start % page == 0 and start <= tensor.data_ptr() < start + page
        assert start + length == tensor.data_ptr() + tensor.nbytes
    with pytest.raises(ValueError, match=r"\(3, 2\) is not contiguous"):
        files.populate(torch.ones(2, 3).T, "a file")
    files.populate(torch.empty(0), "a file")
    files.populate(torch.empty(3, device="meta"), "a file")
    assert len(asked) == 2


def test_missing_shard(sharded):
    next(sharded.glob("model-00002-*")).unlink()
    refused(sharded, "model-00002-.*: named in model.safetensors.index.json but missing; download")


def test_shard_without_its_tensor(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    refused(sharded, "model-00002-.*: lacks .*which model.safetensors.index.json places there")


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/evil", "a/../../x", "a\\b", ""])
def test_index_that_leaves_the_folder(sharded, name):
    def change(index):
        index["weight_map"]["model.norm.weight"] = name

    edit(sharded / "model.safetensors.index.json", change)
    refused(sharded, "leads out of the folder; do not use this checkpoint")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_broken_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    refused(sharded, "not a valid index .*; download it again")


def test_shape_of_another_model(llama):
    edit(llama / "config.json", lambda c: c.update(intermediate_size=64))
    refused(
        llama,
        r"proj.weight is \[32, 48\], the configuration says \[32, 64\]; they are of different",
    )


def test_missing_and_unexpected_tensors_are_listed(llama):
    def change(tensors):
        tensors["model.extra.weight"] = tensors.pop("model.layers.1.mlp.down_proj.weight")
        return tensors

    rewrite(llama, change)
    refused(
        llama,
        "does not fit LlamaForCausalLM: not in the checkpoint: model.layers.1.mlp.down_proj.weight"
        "; not in the model: model.extra.weight",
    )


def test_untied_head_must_be_there(llama):
    rewrite(llama, lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"})
    refused(llama, "not in the checkpoint: lm_head.weight$")


def test_two_tensors_for_one_parameter(llama):
    rewrite(llama, lambda t: t | {"norm.weight": t["model.norm.weight"].clone()})
    refused(llama, "both .*norm.weight are model.norm.weight; remove one")


def test_quantised_by_dtype_alone(llama):
    rewrite(llama, lambda t: t | {"model.norm.weight": t["model.norm.weight"].to(torch.int8)})
    refused(llama, "model.norm.weight is stored as int8, and no quantization_config says")
    rewrite(llama, lambda t: t | {"model.norm.weight": torch.ones(32, dtype=torch.float8_e4m3fn)})
    refused(llama, "stored as float8_e4m3fn, and no quantization_config says how; use the unquan")


@pytest.mark.parametrize(
    "kind, words",
    [("mixtral", "mixture of experts"), ("t5", "encoder-decoder"), ("mamba", "state-space")],
)
def test_other_architectures_before_anything_is_built(kind, words, llama):
    hf.AutoConfig.for_model(kind).save_pretrained(llama)
    refused(llama, f"'{kind}': an? .*{words}.*supported are dense decoders: Llama 2/3, Mistral")


def test_repository_code_is_never_run(llama):
    (llama / "code.py").write_text("raise SystemExit('ran')")
    change = dict(model_type="mine", auto_map={"AutoConfig": "code.MyConfig"})
    edit(llama / "config.json", lambda c: c.update(change))
    refused(llama, "'mine': an architecture that is not supported; supported are")


def test_offloaded_and_adapted_models():
    model = model_zoo.build("llama")
    model.model.norm.to("meta")
    with pytest.raises(InputError, match="model.norm.weight is offloaded; pass the .* folder"):
        Checkpoint.open(model)
    with pytest.raises(InputError, match="got Linear: merge the adapter first"):
        Checkpoint.open(torch.nn.Linear(2, 2))


def test_load_before_bind(llama):
    with pytest.raises(RuntimeError, match="skeleton"):
        Checkpoint.open(llama).load(["model.norm.weight"], torch.float32)


# --- the Hub --------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An offline Hub cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache, name, commit="a" * 40, branch="main", **options):
    """Put a small Llama into the cache as `name`."""
    root = cache / f"models--{name.replace('/', '--')}"
    folder = model_zoo.save(model_zoo.build("llama"), root / "snapshots" / commit, **options)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / branch).write_text(commit)
    return folder


def test_cached_id_offline(cache):
    folder = put(cache, "someone/tiny", max_shard_size="30KB")
    checkpoint = Checkpoint.open("someone/tiny")
    assert checkpoint.name == "someone/tiny" and checkpoint.folder.samefile(folder)
    filled(checkpoint)
    put(cache, "someone/tiny", "b" * 40, "other")
    assert Checkpoint.open("someone/tiny", revision="other").folder.name == "b" * 40
    refused("someone/tiny", "tiny at revision gone is no folder here", revision="gone")


def test_uncached_id_offline(cache):
    refused("someone/absent", r"not in the local cache \(HF_HOME\).*hf download someone/absent")
    refused("bad--/..", "neither a folder nor a valid Hub id")


def test_cached_without_weights(cache):
    (put(cache, "someone/tiny") / "model.safetensors").unlink()
    refused("someone/tiny", "no model.safetensors .* run: pkt convert someone/tiny tiny-safetens")


@pytest.mark.parametrize(
    "error, words",
    [
        ("GatedRepoError", "is gated; accept its licence at https://huggingface.co/a/b"),
        ("RepositoryNotFoundError", "neither a folder here nor a model on the Hub"),
        ("RevisionNotFoundError", "a/b at revision x has no such revision"),
        ("HfHubHTTPError", "could not be fetched: broken"),
    ],
)
def test_hub_errors(error, words, monkeypatch):
    kind = getattr(huggingface_hub.errors, error)

    def fail(*args, **kwargs):
        raised = kind.__new__(kind)  # its constructor wants a live response
        Exception.__init__(raised, "broken")
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused("a/b", words, revision="x")
