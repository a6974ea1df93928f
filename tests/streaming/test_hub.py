# SPDX-License-Identifier: Apache-2.0
"""Headers without weights, from a server that plays the Hub."""

import json

import huggingface_hub
import model_zoo
import pytest
import torch
import transformers as hf
from fake_hub import RANGE
from safetensors.torch import save_file

from pkt_ext.errors import InputError
from pkt_ext.streaming.checkpoint import Checkpoint

SIZES = dict(vocab=4096, hidden=128, ffn=512, layers=4)  # 6 MB in float32


@pytest.mark.parametrize("shards", [1, 5])
def test_headers_only(shards, serve, tmp_path):
    model = model_zoo.build("llama_gqa", **SIZES)
    options = {} if shards == 1 else {"max_shard_size": "1600KB"}
    folder = model_zoo.save(model, tmp_path / "model", **options)
    hub = serve(folder)
    checkpoint = Checkpoint.open("someone/model", headers_only=True)
    names = [name for name, _ in checkpoint.skeleton(torch.float32).named_parameters()]
    local = Checkpoint.open(folder, headers_only=True)
    local.skeleton(torch.float32)
    assert checkpoint.bytes_of(names) == local.bytes_of(names) > 5_000_000
    for name in names:
        assert checkpoint.shape(name) == local.shape(name)
        assert checkpoint.dtype_of(name) == local.dtype_of(name)
        assert checkpoint.is_mapped(name, torch.float32)
    weights = [request for request in hub.requests() if request[1].endswith(".safetensors")]
    files = [path.name for path in folder.glob("*.safetensors")]
    assert len(files) == shards and sorted(weights) == sorted(("GET", file) for file in files)
    assert hub.bytes_of(".safetensors") <= shards * RANGE
    small = {"config.json"} | ({"model.safetensors.index.json"} if shards > 1 else set())
    assert {name for _, name in hub.requests()} == {*files, *small}
    assert not list(tmp_path.glob("cache1/**/*.safetensors"))
    for read in (
        lambda: checkpoint.load(names[:1], torch.float32),
        lambda: checkpoint.rows(names[0], slice(0, 1), torch.float32),
    ):
        with pytest.raises(RuntimeError, match="only headers were fetched; open it without"):
            read()
    assert checkpoint.tokenizer()("ab").input_ids == local.tokenizer()("ab").input_ids
    assert hub.bytes_of(".safetensors") <= shards * RANGE
    assert list(Checkpoint.open(folder, headers_only=True).skeleton(torch.float32).parameters())


def test_headers_of_a_quantised_checkpoint(serve, tmp_path):
    """Its matrices' own shapes are in no header: the configuration's are taken."""
    plain = model_zoo.save(model_zoo.build("llama_gqa", **SIZES), tmp_path / "plain")
    settings = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    model = hf.AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=settings, device_map={"": "cpu"}
    )
    folder = model_zoo.save(model, tmp_path / "model")
    hub = serve(folder)
    checkpoint = Checkpoint.open("someone/model", headers_only=True)
    names = [name for name, _ in checkpoint.skeleton(torch.float32).named_parameters()]
    local = Checkpoint.open(folder)
    local.skeleton(torch.float32)
    assert [checkpoint.shape(name) for name in names] == [local.shape(name) for name in names]
    assert checkpoint.bytes_of(names) == local.bytes_of(names)
    assert checkpoint.quantisation == local.quantisation and checkpoint.quantisation.double
    assert hub.bytes_of(".safetensors") <= RANGE


def test_long_header_takes_a_second_request(serve, tmp_path):
    folder = model_zoo.save(model_zoo.build("llama", **SIZES), tmp_path / "model")
    extra = {f"layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(1) for i in range(2000)}
    tensors = model_zoo.build("llama", **SIZES).state_dict() | extra
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    hub = serve(folder)
    Checkpoint.open("someone/model", headers_only=True).skeleton(torch.float32)
    assert RANGE < hub.bytes_of(".safetensors") < 5 * RANGE
    assert hub.requests().count(("GET", "model.safetensors")) == 2


def test_what_is_cached_is_not_asked_for(serve, tmp_path):
    """The whole checkpoint was downloaded: headers and weights come from the disk."""
    folder = model_zoo.save(model_zoo.build("llama"), tmp_path / "model", max_shard_size="30KB")
    hub = serve(folder)
    Checkpoint.open("someone/model")
    hub.given.clear()
    checkpoint = Checkpoint.open("someone/model", headers_only=True)
    checkpoint.skeleton(torch.float32)
    assert hub.bytes_of(".safetensors") == 0
    name = "model.norm.weight"
    assert checkpoint.load([name], torch.float32)[name].shape == (32,)
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # restored by `serve`
    hub.given.clear()
    Checkpoint.open("someone/model", headers_only=True).skeleton(torch.float32)
    assert not hub.given


def test_tied_head_stored_too_counts_as_tied(serve, tmp_path):
    folder = model_zoo.save(model_zoo.build("llama_tied"), tmp_path / "model")
    tensors = dict(model_zoo.build("llama_tied").state_dict())
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    assert "lm_head.weight" in tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    serve(folder)
    model = Checkpoint.open("someone/model", headers_only=True).skeleton(torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def refused(words):
    with pytest.raises(InputError, match=words) as caught:
        Checkpoint.open("someone/model", headers_only=True)
    assert "\n" not in str(caught.value)


def test_refusals(serve, tmp_path):
    folder = model_zoo.save(model_zoo.build("llama"), tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(b"\xff" * 100)
    serve(folder)
    refused("someone/model/model.safetensors: no valid safetensors header")
    weights.unlink()
    serve(folder)
    refused("no model.safetensors and no model.safetensors.index.json; where the .* pkt convert")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    serve(folder)
    refused("model-00001-of-00001.safetensors is named in model.safetensors.index.json but not")


@pytest.mark.parametrize(
    "status, error, words",
    [
        (403, {"X-Error-Code": "GatedRepo"}, "is gated; accept its licence at https://huggingface"),
        (404, {"X-Error-Code": "RepoNotFound"}, "neither a folder here nor a model on the Hub"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "has no such revision; check --revision"),
        (500, {}, "someone/model could not be fetched: .*500|cannot be reached"),
    ],
)
def test_what_the_hub_refuses(status, error, words, serve, tmp_path):
    """At the first request, and when only the headers are asked for."""
    folder = model_zoo.save(model_zoo.build("llama"), tmp_path / "model")
    hub = serve(folder)
    hub.status, hub.error = status, error
    refused(words)
    hub.status, hub.error = 200, {}
    inner = hub.answer

    def answer(path, wanted):
        if path.endswith(".safetensors"):
            hub.status, hub.error = status, error
        return inner(path, wanted)

    hub.answer = answer
    refused(words)


def test_offline_and_unreachable(serve, tmp_path, monkeypatch):
    folder = model_zoo.save(model_zoo.build("llama"), tmp_path / "model")
    hub = serve(folder)
    huggingface_hub.snapshot_download("someone/model", allow_patterns=["config.json"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    words = "is no folder here, not in the local cache .* hf download someone/model"
    refused(words)  # the configuration is cached, the headers are not
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    hub.server.shutdown()
    hub.server.server_close()
    refused(words)
