# SPDX-License-Identifier: Apache-2.0
"""Delta files: merged into weights, read back, written as adapters."""

import json
from pathlib import Path

import model_zoo as zoo
import pytest
import torch
from safetensors.torch import load_file, save_file

from pkt_ext import artifact, delta, lora
from pkt_ext.adapter import read_ordinary
from pkt_ext.cli import run
from pkt_ext.errors import InputError
from pkt_ext.models.anatomy import describe
from pkt_ext.models.injection import injected

IDS = torch.tensor([[1, 40, 50, 60, 70, 80], [1, 9, 33, 200, 12, 5]])


def random_deltas(anatomy, *, seed=0, size=0.2):
    """Some rows of up and v, some columns of down and o, of every block, in no order."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for block, projections in enumerate(anatomy.projections):
        for part in projections:
            if part.role in ("up", "down", "v", "o"):
                count, width = part.shape if part.role in ("up", "v") else part.shape[::-1]
                index = torch.randperm(count, generator=generator)[: 3 + block]
                values = size * torch.randn(len(index), width, generator=generator)
                deltas[block, part.role] = index, values
    return deltas


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def load(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def made(family, tmp_path, *, dtype=torch.float32, size=0.2):
    """(student in memory, its folder, deltas, folder of the published delta)."""
    student = zoo.build(family, seed=2).to(dtype)
    folder = zoo.save(student, tmp_path / "student")
    deltas = random_deltas(describe(student), size=size)
    out = tmp_path / "delta"
    delta.publish_delta(out, deltas, describe(student), base_model=str(folder))
    return student, folder, deltas, out


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_merged_computes_what_injected_computes(family, tmp_path):
    student, folder, deltas, out = made(family, tmp_path)
    report = lora.merge(folder, out, tmp_path / "model")
    with injected(student, deltas):
        expected = logits(student)
    torch.testing.assert_close(logits(load(tmp_path / "model")), expected, atol=1e-5, rtol=1e-5)
    count = sum(len(index) for index, _ in deltas.values())
    assert report["selection"] == {"selected": count, "changed": count, "outside": 0}
    assert report["survived"] == pytest.approx(1, abs=1e-5) and report["warnings"] == []
    anatomy = describe(student)
    assert report["modules"].keys() == delta.by_module(deltas, anatomy).keys()
    read = delta.read_delta(out, anatomy)
    assert read.keys() == deltas.keys()
    for key, (index, values) in deltas.items():
        assert torch.equal(read[key][0], index) and torch.equal(read[key][1], values)
    with injected(student, read):
        assert torch.equal(logits(student), expected)


@pytest.mark.parametrize("family", ["phi3_gqa", "gpt_neox", "gpt2"])
def test_exactly_the_selected_rows_and_columns_differ(family, tmp_path):
    """By the weights themselves, and `selection` notices whatever else is changed."""
    student, folder, deltas, out = made(family, tmp_path)
    lora.merge(folder, out, tmp_path / "model")
    merged, anatomy = load(tmp_path / "model"), describe(student)
    selected = 0
    for block, projections in enumerate(anatomy.projections):
        for part in projections:
            name = f"{anatomy.blocks[block]}.{part.module}.weight"
            before, after = (part.matrix(m.get_parameter(name)) for m in (student, merged))
            differ = before != after
            index, _ = deltas.get((block, part.role), (torch.tensor([], dtype=torch.int64), None))
            rows = part.role in ("up", "v")
            assert torch.equal(differ.any(int(rows)).nonzero().flatten(), index.sort().values)
            selected += len(index)
    whole = {"selected": selected, "changed": selected, "outside": 0}
    assert delta.selection(student, merged, deltas) == whole
    index, values = deltas[1, "down"]
    fewer = deltas | {(1, "down"): (index[1:], values[1:])}
    found = delta.selection(student, merged, fewer)
    assert found["changed"] == found["selected"] == selected - 1
    assert found["outside"] == values.shape[1]
    with torch.no_grad():
        merged.get_input_embeddings().weight[3, 5] += 1
    assert delta.selection(student, merged, deltas)["outside"] == 1
    unchanged = delta.selection(student, student, deltas)
    assert unchanged == {"selected": selected, "changed": 0, "outside": 0}


def test_pieces_of_any_size_make_the_same_model(tmp_path, monkeypatch):
    from pkt_ext import merge

    _, folder, _, out = made("gpt2", tmp_path)
    lora.merge(folder, out, tmp_path / "one")
    for size in (40, 1000):
        monkeypatch.setattr(merge, "_PIECE", size)
        monkeypatch.setattr(delta, "_PIECE", size)
        report = lora.merge(folder, out, tmp_path / f"{size}")
        assert report["selection"]["outside"] == 0
        assert report["selection"]["changed"] == report["selection"]["selected"]
        one, other = (load_file(tmp_path / d / "model.safetensors") for d in ("one", f"{size}"))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_up_and_down_may_share_their_index(tmp_path):
    """As they come out of the hypernetwork: slices of one tensor, and values of another."""
    anatomy = describe(zoo.build("llama"))
    index, values = torch.tensor([[5, 2], [7, 0]]), torch.randn(2, 2, 32)
    deltas = {(b, role): (index[b], values[b]) for b in (0, 1) for role in ("up", "down")}
    delta.publish_delta(tmp_path / "out", deltas, anatomy, base_model="student")
    read = delta.read_delta(tmp_path / "out", anatomy)
    for key, content in deltas.items():
        assert all(torch.equal(*pair) for pair in zip(read[key], content, strict=True))


def test_rounding_is_reported_and_float32_is_exact(tmp_path):
    """A bfloat16 student, a delta below its weights' spacing."""
    _, folder, deltas, out = made("llama_gqa", tmp_path, dtype=torch.bfloat16, size=1e-4)
    report = lora.merge(folder, out, tmp_path / "model")
    assert report["survived"] < 0.9 and "--dtype float32 keeps all" in report["warnings"][0]
    assert any(entry["survived"] < 0.9 for entry in report["modules"].values())
    assert report["selection"]["outside"] == 0
    assert load_file(tmp_path / "model" / "model.safetensors")["lm_head.weight"].dtype == (
        torch.bfloat16
    )
    exact = lora.merge(folder, out, tmp_path / "exact", torch.float32)
    assert exact["survived"] == pytest.approx(1, abs=1e-3) and exact["warnings"] == []
    assert exact["selection"]["changed"] == exact["selection"]["selected"]
    student = load(folder)
    with injected(student, deltas):
        expected = logits(student)
    torch.testing.assert_close(logits(load(tmp_path / "exact")), expected, atol=1e-5, rtol=1e-5)


def test_command_line(tmp_path, capsys):
    student, folder, deltas, out = made("llama", tmp_path)
    assert artifact.verify(out) == []
    record = artifact.read(out, kind="delta")
    assert record["paradigm"] == "prepkt" and record["inputs"]["student"]["files"]
    assert str(tmp_path) not in (out / "README.md").read_text()
    paths = {"student": folder, "adapter": out, "out": tmp_path / "model"}
    assert run(["merge", *(f"--{name}={path}" for name, path in paths.items())]) == 0
    assert "8 matrices changed, 100.0% of the delta survived" in capsys.readouterr().out
    assert "sparse delta `delta`" in (tmp_path / "model" / "README.md").read_text()
    report = json.loads((tmp_path / "model" / "report.json").read_text())
    assert report["selection"]["outside"] == 0
    with injected(student, deltas):
        expected = logits(student)
    torch.testing.assert_close(logits(load(tmp_path / "model")), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "gpt_neox", "phi3_gqa", "opt"])
def test_as_an_adapter(family, tmp_path):
    """At full rank PEFT computes what the delta computes; `pkt merge` takes it as any other."""
    from peft import PeftModel

    student, folder, deltas, out = made(family, tmp_path)
    with injected(student, deltas):
        expected = logits(student)
    report = delta.to_adapter(out, folder, tmp_path / "adapter", energy=1.0)
    assert report["energy"] == pytest.approx(1)
    most = max(len(index) for index, _ in deltas.values())
    assert {entry["rank"] for entry in report["modules"].values()} == {most - 1, most}
    loaded = PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)
    lora.merge(folder, tmp_path / "adapter", tmp_path / "model")
    torch.testing.assert_close(logits(load(tmp_path / "model")), expected, atol=1e-4, rtol=1e-4)


def test_adapter_of_a_lower_rank(tmp_path):
    """The energy reported is the share of the squared norm that the factors hold."""
    student, folder, deltas, out = made("llama_gqa", tmp_path)
    anatomy = describe(student)
    for options in ({"rank": 2}, {"energy": 0.6}, {"rank": 99}):
        place = tmp_path / "-".join(map(str, options))
        report = delta.to_adapter(out, student, place, overwrite=True, **options)
        factors, config = lora.read_adapter(place)
        kept = whole = 0.0
        for module, found in delta.by_module(deltas, anatomy).items():
            weight = student.get_submodule(module).weight
            dense = delta.dense_rows(found, False, slice(0, len(weight)), weight.shape[1])
            rest = dense - factors[module].delta(config.scale[module])
            share = 1 - rest.square().sum() / dense.square().sum()
            entry = report["modules"][module]
            assert entry["energy"] == pytest.approx(share.item(), abs=1e-5)
            singular = torch.linalg.svdvals(dense.double()).square()
            shares = (singular.cumsum(0) / singular.sum()).tolist()
            assert entry["energy"] == pytest.approx(shares[entry["rank"] - 1], abs=1e-5)
            if "energy" in options:
                assert entry["energy"] >= 0.6 and (
                    entry["rank"] == 1 or shares[entry["rank"] - 2] < 0.6
                )
            else:
                assert entry["rank"] == min(options["rank"], len(found[0].index))
            kept += entry["energy"] * dense.square().sum().item()
            whole += dense.square().sum().item()
        assert report["energy"] == pytest.approx(kept / whole, abs=1e-6)
        assert json.loads((place / "report.json").read_text())["energy"] == report["energy"]


def test_refusals(tmp_path):
    student, folder, deltas, out = made("llama", tmp_path)
    anatomy = describe(student)
    other = describe(zoo.build("gpt2"))
    narrow = zoo.build("llama", ffn=40)
    with pytest.raises(InputError, match="no projection for .*; the delta was made for another"):
        delta.read_delta(out, other)
    with pytest.raises(InputError, match="values .* expected|the index runs"):
        delta.read_delta(out, describe(zoo.build("llama", hidden=16, heads=2)))
    with pytest.raises(InputError, match="another model"):
        lora.merge(zoo.save(narrow, tmp_path / "narrow"), out, tmp_path / "model")
    with pytest.raises(InputError, match="is the student itself"):
        lora.merge(folder, out, folder, overwrite=True)
    with pytest.raises(InputError, match="the delta is empty"):
        delta.write_delta(tmp_path, {}, anatomy)
    index, values = deltas[0, "up"]
    bad = deltas | {(0, "up"): (index, values / 0)}
    with pytest.raises(InputError, match="up_proj: NaN or infinity"):
        delta.publish_delta(tmp_path / "bad", bad, anatomy, base_model="student")
    assert not (tmp_path / "bad").exists()
    with pytest.raises(InputError, match="of kind 'delta', expected adapter"):
        read_ordinary(out)
    for options, words in [({"rank": 0}, "rank is 0"), ({"energy": 1.5}, "energy is 1.5")]:
        with pytest.raises(InputError, match=words):
            delta.to_adapter(out, folder, tmp_path / "a", **options)
    zero = {key: (index, 0 * values) for key, (index, values) in deltas.items()}
    delta.publish_delta(tmp_path / "zero", zero, anatomy, base_model=str(folder))
    with pytest.raises(InputError, match="zero everywhere"):
        delta.to_adapter(tmp_path / "zero", folder, tmp_path / "a")
    assert lora.merge(folder, tmp_path / "zero", tmp_path / "same")["survived"] == 1.0


def test_damaged_files_are_refused(tmp_path):
    student, folder, _, out = made("llama", tmp_path)
    anatomy, path = describe(student), out / delta.FILE
    sound = path.read_bytes()
    flipped = bytearray(sound)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(InputError, match="damaged"):
        lora.merge(folder, out, tmp_path / "model")
    path.write_bytes(sound)
    name = "model.layers.0.mlp.up_proj.up"

    def published(change) -> Path:
        tensors = load_file(path)
        change(tensors)
        with artifact.publish(
            tmp_path / "again", kind="delta", run={}, report={}, overwrite=True
        ) as staging:
            save_file(tensors, staging / delta.FILE)
        return tmp_path / "again"

    for change, words in [
        (lambda t: t.pop(f"{name}.index"), f"{name} is not an index with float32 values"),
        (lambda t: t.update({f"{name}.values": t[f"{name}.values"].half()}), "not an index"),
        (lambda t: t[f"{name}.values"].fill_(float("nan")), "NaN or infinity"),
        (lambda t: t[f"{name}.index"].fill_(3), "twice"),
        (lambda t: t[f"{name}.index"].add_(-48), "the index runs from -"),
        (lambda t: t.update({"x.index": torch.zeros(1)}), "no projection for x.index"),
        (lambda t: t.clear(), "no deltas in it"),
    ]:
        with pytest.raises(InputError, match=words):
            delta.read_delta(published(change), anatomy)
    with artifact.publish(tmp_path / "none", kind="delta", run={}, report={}):
        pass
    with pytest.raises(InputError, match="damaged"):
        delta.read_delta(tmp_path / "none", anatomy)
