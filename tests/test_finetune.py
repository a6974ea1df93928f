# SPDX-License-Identifier: Apache-2.0
import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import model_zoo as zoo
import pytest
import torch
from safetensors.torch import load_file

from pkt_ext import artifact, baselines, lora, settings
from pkt_ext import finetune as module
from pkt_ext.adapter import Factor, matrix_shape
from pkt_ext.errors import InputError, ResourceError
from pkt_ext.finetune import FinetuneConfig, finetune
from pkt_ext.models.anatomy import describe
from pkt_ext.streaming.budget import parse_bytes

ROOT = Path(__file__).resolve().parents[1]
IDS = torch.tensor([[1, 40, 50, 60, 70, 80], [1, 9, 33, 200, 12, 5]])
ROWS = [{"prompt": f"what is {i}", "completion": f"it is {chr(97 + i)}"} for i in range(12)]
QUICK = FinetuneConfig(
    max_steps=4, batch=4, micro_batch=4, learning_rate=1e-2, dropout=0.0, max_length=64, rank=2,
    alpha=2, device="cpu", gradient_checkpointing=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A student folder, its Seeking start, and rows on disk."""
    return make_shop(tmp_path_factory.mktemp("shop"), "llama_gqa")


def make_shop(folder, family, chat=False, **sizes):
    student = zoo.build(family, seed=2, **sizes)
    zoo.save(student, folder / "student", tokens=zoo.tokenizer(chat=chat))
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for path, rank in baselines.targets(student, QUICK).items():
        target = student.get_submodule(path)
        out, size = lora_shape(target)
        A, B = torch.randn(rank, size, generator=generator), torch.randn(out, rank)
        factors[path] = Factor(0.3 * A, 0.3 * B, isinstance(target, torch.nn.Embedding))
    with artifact.publish(
        folder / "init", kind="init", run={"method": "seeking"}, report={}
    ) as staging:
        for name, content in (("start", factors), ("delta", negated(factors))):
            lora.write_adapter(
                staging / name, content, alpha_over_rank=1.0, dropout=0.05, base_model="student",
                init=True,
            )  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def lora_shape(target):
    """(B's rows, A's columns) of a module's factors."""
    out, size = matrix_shape(target)
    return (size, out) if isinstance(target, torch.nn.Embedding) else (out, size)


def negated(factors):
    return {path: factor.negated() for path, factor in factors.items()}


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(IDS).logits


def with_adapter(shop, adapter):
    from peft import PeftModel

    return PeftModel.from_pretrained(load(shop / "student"), adapter)


def run(shop, out, adapter="init", config=QUICK, **options):
    adapter = shop / adapter if adapter else None
    return finetune(shop / "student", adapter, shop / "rows.jsonl", out, config, **options)


def test_seeking_start(shop, tmp_path):
    """From a start to an ordinary adapter on the unmodified student, and the loss falls."""
    config = replace(QUICK, max_steps=30)
    report = run(shop, tmp_path / "out", config=config)
    assert artifact.verify(tmp_path / "out") == []
    record = artifact.read(tmp_path / "out", kind="adapter")
    assert record["config"]["batch"] == 4 and record["inputs"]["data"]["name"] == "rows.jsonl"
    assert report["init"] == "seeking" and report["steps"] == 30 and report["samples"] == 12
    assert len(report["losses"]) == 30
    assert sum(report["losses"][-5:]) < 0.7 * sum(report["losses"][:5])
    assert json.loads((tmp_path / "out" / "report.json").read_text())["losses"] == report["losses"]
    rates = report["learning_rates"]
    assert max(rates) == pytest.approx(1e-2) and rates[-1] < 1e-3
    assert (
        logits(with_adapter(shop, tmp_path / "out")).sub(logits(load(shop / "student"))).abs().max()
        > 0.1
    )


@pytest.mark.parametrize(
    "adapter, init", [("init", "gaussian"), (None, "gaussian"), (None, "pissa")]
)
def test_starts_at_the_students_function(shop, tmp_path, adapter, init):
    """Whatever it starts from: with a rate of nothing, the adapter changes nothing."""
    config = replace(QUICK, max_steps=1, learning_rate=1e-12, init=init)
    report = run(shop, tmp_path / "out", adapter, config)
    before = logits(load(shop / "student"))
    torch.testing.assert_close(
        logits(with_adapter(shop, tmp_path / "out")), before, atol=2e-5, rtol=0
    )
    assert report["init"] == ("seeking" if adapter else init)
    one, _ = lora.read_adapter(shop / "init" / "start")
    two, read = lora.read_adapter(tmp_path / "out")
    doubled = 1 if (adapter, init) == (None, "gaussian") else 2
    assert {m: doubled * f.rank for m, f in one.items()} == {m: f.rank for m, f in two.items()}
    assert report["trainable_parameters"] == sum(f.A.numel() + f.B.numel() for f in one.values())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama_tied"])
def test_pissa_is_the_best_rank_r_part(family):
    student = zoo.build(family)
    factors, given, frozen = baselines.new_factors(student, replace(QUICK, init="pissa", alpha=4))
    assert frozen and len(factors) == sum(1 for _ in baselines.targets(student, QUICK))
    anatomy = describe(student)
    assert not anatomy.tied or anatomy.head not in factors
    for path, factor in factors.items():
        target = student.get_submodule(path)
        weight = target.weight.detach()
        transposed = type(target).__name__ == "Conv1D"
        delta = factor.delta(given.scale[path], transposed=transposed)
        rest = torch.linalg.matrix_norm(weight - delta)
        best = torch.linalg.svdvals(weight)[factor.rank :].square().sum().sqrt()
        torch.testing.assert_close(rest, best, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(factor.A.norm(), factor.B.norm(), rtol=1e-3, atol=0)


def test_trains_on_an_ordinary_adapter(shop, tmp_path):
    """Its factors stay ordinary, of the rank they had, and training starts where they were."""
    run(shop, tmp_path / "first")
    still = replace(QUICK, max_steps=1, learning_rate=1e-12, dropout=None)
    report = run(shop, tmp_path / "second", tmp_path / "first", still)
    one, config = lora.read_adapter(tmp_path / "first")
    two, again = lora.read_adapter(tmp_path / "second")
    assert config == again and report["init"] == "adapter"
    for path, factor in one.items():
        torch.testing.assert_close(factor.A, two[path].A, atol=1e-9, rtol=0)
        torch.testing.assert_close(factor.B, two[path].B, atol=1e-9, rtol=0)


def test_the_loss_is_that_of_the_rows(shop, tmp_path):
    """The reported loss is the mean token loss of the whole batch, whatever the micro-batch."""
    from transformers import AutoTokenizer

    from pkt_ext import data

    config = replace(QUICK, batch=12, micro_batch=12, max_steps=3)
    report = run(shop, tmp_path / "whole", config=config)
    parts = run(shop, tmp_path / "parts", config=replace(config, micro_batch=3))
    assert report["losses"] == pytest.approx(parts["losses"], rel=1e-4)
    one, _ = lora.read_adapter(tmp_path / "whole")
    two, _ = lora.read_adapter(tmp_path / "parts")
    assert max((f.B - two[m].B).abs().max() for m, f in one.items()) < 1e-3
    student, total, count = load(shop / "student"), 0.0, 0
    tokenizer = AutoTokenizer.from_pretrained(shop / "student")
    for s in data.encode(data.read_rows(ROWS), tokenizer, max_length=64, stage="train").samples:
        targets = int((s.labels[1:] != data.IGNORED).sum())
        with torch.no_grad():
            total += student(s.input_ids[None], labels=s.labels[None]).loss.item() * targets
        count += targets
    assert report["losses"][0] == pytest.approx(total / count, rel=1e-4)


def test_equal_runs_give_equal_bytes(shop, tmp_path):
    config = replace(QUICK, dropout=0.1)
    for name in ("a", "b"):
        run(shop, tmp_path / name, config=config)
    one, two = (tmp_path / n / "adapter_model.safetensors" for n in "ab")
    assert one.read_bytes() == two.read_bytes()
    run(shop, tmp_path / "c", config=replace(config, seed=2))
    assert one.read_bytes() != (tmp_path / "c" / "adapter_model.safetensors").read_bytes()


def test_a_loaded_student_is_given_back(shop, tmp_path):
    student = load(shop / "student").train()
    student.gradient_checkpointing_enable()
    student.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = {name: p.clone() for name, p in student.state_dict().items()}
    config = replace(QUICK, gradient_checkpointing=True)
    finetune(student, shop / "init", ROWS, tmp_path / "out", config)
    assert student.state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in student.state_dict().items())
    assert student.training and student.model.gradient_checkpointing
    assert not hasattr(student, "peft_config")
    frozen = [n for n, p in student.named_parameters() if not p.requires_grad]
    assert frozen == ["model.layers.0.mlp.up_proj.weight"]
    run(shop, tmp_path / "other")  # from the folder, without checkpointing: the same adapter
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("out", "other"))
    assert all(torch.allclose(tensor, two[name], atol=1e-5) for name, tensor in one.items())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama_tied"])
def test_families(family, tmp_path):
    """Conv1D, fused and tied students, gradient checkpointing on."""
    shop = make_shop(tmp_path, family)
    report = run(shop, tmp_path / "out", config=replace(QUICK, gradient_checkpointing=True))
    assert report["losses"][-1] < report["losses"][0]
    lora.merge(shop / "student", tmp_path / "out", tmp_path / "merged")
    merged, loaded = load(tmp_path / "merged"), with_adapter(shop, tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(loaded), atol=2e-5, rtol=1e-4)


def test_a_student_in_four_bits(tmp_path):
    """Trains beside weights kept in NF4; what it leaves is for the student as stored."""
    shop = make_shop(tmp_path, "llama_gqa", hidden=64, ffn=128)  # NF4 scales groups of 64
    config = replace(QUICK, load_in_4bit=True, max_steps=20)
    report = run(shop, tmp_path / "out", config=config)
    assert sum(report["losses"][-5:]) < 0.8 * sum(report["losses"][:5])
    full = run(shop, tmp_path / "full", config=replace(config, load_in_4bit=False, max_steps=1))
    first = report["losses"][0]  # near the full student's, and not it
    assert first == pytest.approx(full["losses"][0], rel=0.1) and first != full["losses"][0]
    start, _ = lora.read_adapter(shop / "init" / "start")
    trained, _ = lora.read_adapter(tmp_path / "out")
    assert trained.keys() == start.keys()
    for path, factor in start.items():  # the frozen half is the start's, to the bit
        assert torch.equal(trained[path].A[factor.rank :], -factor.A)
        assert torch.equal(trained[path].B[:, factor.rank :], factor.B)
    adapted = logits(with_adapter(shop, tmp_path / "out"))
    assert (adapted - logits(load(shop / "student"))).abs().max() > 0.1


def test_micro_batch_shrinks_until_it_fits(shop, tmp_path, monkeypatch):
    tried, train = [], module._run_trainer

    def crowded(model, encoded, config, micro_batch, *rest):
        tried.append(micro_batch)
        if micro_batch > limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.")
        return train(model, encoded, config, micro_batch, *rest)

    monkeypatch.setattr(module, "_run_trainer", crowded)
    limit, config = 2, replace(QUICK, batch=6, micro_batch=None)
    assert run(shop, tmp_path / "out", config=config)["micro_batch"] == 2
    assert tried == [6, 3, 2]
    limit = 0
    with pytest.raises(ResourceError, match="out of memory"):
        run(shop, tmp_path / "full", config=config)
    assert not (tmp_path / "full").exists()


def test_budget_chooses_the_micro_batch(shop, tmp_path):
    config = replace(QUICK, micro_batch=None, batch=8, max_steps=1)
    with pytest.raises(
        InputError, match=r"smallest --budget that works is [\d.]+ [MG]iB"
    ) as caught:
        run(shop, tmp_path / "none", config=replace(config, budget="1MiB"))
    assert not (tmp_path / "none").exists()
    least = parse_bytes(re.search(r"works is ([\d.]+ [MG]iB)", str(caught.value))[1]) // 2**20
    report = run(shop, tmp_path / "out", config=replace(config, budget=f"{least + 200}MiB"))
    assert report["micro_batch"] == 8
    assert report["predicted_bytes"] <= report["budget"] == (least + 200) * 2**20
    assert 0 < report["peak_bytes"] <= report["budget"]


def test_a_tighter_budget_takes_fewer_rows(shop, tmp_path, monkeypatch):
    from pkt_ext import training_needs

    # an imaginary student of 100 MiB a row in 1000 MiB
    monkeypatch.setattr(
        training_needs.TrainingNeeds, "peak", lambda self, rows: (1000 + 100 * rows) * 2**20
    )
    config = replace(QUICK, micro_batch=None, batch=12, max_steps=1)
    for budget, expected in (("1100MiB", 1), ("1400MiB", 4), ("1650MiB", 6), ("3000MiB", 6)):
        out = tmp_path / budget
        report = run(shop, out, config=replace(config, budget=budget))
        assert report["micro_batch"] == expected
        assert report["predicted_bytes"] == (1000 + 100 * expected) * 2**20
    with pytest.raises(InputError, match="1.1 GiB"):
        run(shop, tmp_path / "small", config=replace(config, budget="1099MiB"))


def test_memory_short_while_attaching(shop, tmp_path, monkeypatch):
    """What PEFT had put on the student by then is taken off before the next try."""
    from pkt_ext import attached

    fill, calls = attached._fill, []

    def crowded(model, factors, name):
        calls.append(name)
        if len(calls) == fail:  # both adapters' layers are on the student
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.")
        fill(model, factors, name)

    run(shop, tmp_path / "calm", config=replace(QUICK, micro_batch=2))
    student, fail = load(shop / "student"), 2
    before = {name: p.clone() for name, p in student.state_dict().items()}
    monkeypatch.setattr(attached, "_fill", crowded)
    config = replace(QUICK, micro_batch=None)
    report = finetune(student, shop / "init", ROWS, tmp_path / "out", config)
    assert report["micro_batch"] == 2 and len(calls) == 4
    one, two = (tmp_path / n / "adapter_model.safetensors" for n in ("calm", "out"))
    assert one.read_bytes() == two.read_bytes()
    calls.clear()
    fail = 1
    with pytest.raises(ResourceError, match="out of memory"):
        finetune(student, shop / "init", ROWS, tmp_path / "full", replace(QUICK, micro_batch=4))
    assert calls == ["default"] and not hasattr(student, "peft_config")
    assert student.state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in student.state_dict().items())


def test_nan_stops_the_run(shop, tmp_path):
    with pytest.raises(InputError, match="at step .* lower --learning-rate"):
        run(shop, tmp_path / "out", config=replace(QUICK, learning_rate=1e30))
    student = load(shop / "student")
    with torch.no_grad():
        student.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="at step 1"):
        finetune(student, shop / "init", ROWS, tmp_path / "out", QUICK)
    assert list(tmp_path.iterdir()) == []


def test_bad_input(shop, tmp_path, monkeypatch):
    for changes, words in [
        ({"batch": 0}, "batch is 0"),
        ({"micro_batch": 3}, "does not divide"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"schedule": "zigzag"}, "zigzag"),
        ({"init": "olora"}, "olora"),
        ({"dropout": 1.0}, "dropout"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
    ]:
        with pytest.raises(InputError, match=words):
            replace(QUICK, **changes)
    out = tmp_path / "out"
    with pytest.raises(InputError, match="rank 40 is larger"):
        run(shop, out, None, replace(QUICK, init="pissa", rank=40))
    with pytest.raises(InputError, match="none of the 12 rows keeps a token"):
        run(shop, out, config=replace(QUICK, max_length=4))
    with pytest.raises(InputError, match="no such folder"):
        run(shop, out, "nowhere")
    with pytest.raises(InputError, match="run pkt finetune on it"):
        run(shop, out, "init/start")
    with pytest.raises(InputError, match="no config.json|no such folder"):
        finetune(tmp_path, shop / "init", ROWS, out, QUICK)
    with pytest.raises(InputError, match="no module|another model"):
        finetune(zoo.build("gpt2"), shop / "init", ROWS, out, QUICK, tokenizer=zoo.tokenizer())
    with pytest.raises(InputError, match="the student knows 40"):
        finetune(zoo.build("llama", vocab=40), None, ROWS, out, QUICK, tokenizer=zoo.tokenizer())
    if not torch.cuda.is_available():
        for device in ("cuda", "cuda:0"):
            with pytest.raises(InputError, match="--device cpu"):
                run(shop, out, config=replace(QUICK, device=device))
    for device in ("tpu", "", "meta"):
        with pytest.raises(InputError, match="--device cpu"):
            run(shop, out, config=replace(QUICK, device=device))
    with monkeypatch.context() as two_cards:
        two_cards.setattr(settings, "find_device", torch.device)
        for device in ("cuda", "cuda:0"):
            assert settings.trainer_device(device).type == "cuda"
        with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES=1 and"):
            run(shop, out, config=replace(QUICK, device="cuda:1"))
    find = module.importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util,
        "find_spec",
        lambda n, *a: None if n == "bitsandbytes" else find(n, *a),
    )
    with pytest.raises(InputError, match=r"pip install 'pkt_ext\[quant\]'"):
        run(shop, out, config=replace(QUICK, load_in_4bit=True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="one process"):
        run(shop, out)
    assert not out.exists()


# --- attach with trainers as they are -------------------------------------------------------------


def trainer_for(shop, folder, steps, **options):
    from transformers import Trainer, TrainingArguments

    model = lora.attach(shop / "student", shop / "init", dtype=torch.float32)
    samples = [{"input_ids": row, "labels": row} for row in torch.randint(3, 250, (16, 12),
               generator=torch.Generator().manual_seed(0))]  # fmt: skip
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, seed=5,
        report_to="none", use_cpu=True, save_steps=2, disable_tqdm=True, logging_steps=1, **options
    )  # fmt: skip
    return model, Trainer(model, arguments, train_dataset=samples, eval_dataset=samples)


def test_trainer_resumes_to_the_bit(shop, tmp_path):
    """Four steps at once, or two, a checkpoint, a new process' worth of objects, and two more."""
    whole, trainer = trainer_for(shop, tmp_path / "whole", 4, lr_scheduler_type="constant")
    trainer.train()
    assert [log["loss"] for log in trainer.state.log_history[:2]]
    _, trainer = trainer_for(shop, tmp_path / "parts", 2, lr_scheduler_type="constant")
    trainer.train()
    parts, trainer = trainer_for(shop, tmp_path / "parts", 4, lr_scheduler_type="constant")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    moved = 0
    start = lora.attach(shop / "student", shop / "init", dtype=torch.float32)
    for (name, one), (_, two), (_, zero) in zip(
        whole.named_parameters(), parts.named_parameters(), start.named_parameters(), strict=True
    ):
        assert torch.equal(one, two), name
        assert one.requires_grad == two.requires_grad == (".default" in name)
        moved += not torch.equal(one, zero)
    assert moved == sum(p.requires_grad for p in start.parameters())
    # what the Trainer itself saved is the ordinary adapter
    trainer.save_model(tmp_path / "saved")
    ordinary = with_adapter(shop, tmp_path / "saved")
    torch.testing.assert_close(logits(ordinary), logits(parts), atol=2e-5, rtol=1e-4)


def test_load_best_model_at_end(shop, tmp_path):
    options = dict(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    model, trainer = trainer_for(shop, tmp_path / "run", 4, **options)
    trainer.train()
    saved, _ = lora.read_adapter(trainer.state.best_model_checkpoint)
    lora.export(model, tmp_path / "out")
    now, _ = lora.read_adapter(tmp_path / "out")
    assert all(torch.equal(f.A, now[m].A) and torch.equal(f.B, now[m].B) for m, f in saved.items())


@pytest.mark.parametrize("name", ["train_with_trainer", "train_with_sft_trainer"])
def test_examples(name, shop, tmp_path, monkeypatch):
    """Run as written, stop after two steps, run again: it resumes, and the adapter loads."""
    if "sft" in name:
        pytest.importorskip("trl")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(chat(row)) + "\n" for row in ROWS))
    chatty = make_shop(tmp_path, "llama_gqa", chat=True)
    for out, steps in (("first", "2"), ("second", "4")):
        if out == "second":  # --out must be new; the progress of the first run is taken over
            (tmp_path / "first-progress").rename(tmp_path / "second-progress")
        arguments = [chatty / "student", chatty / "init", rows, tmp_path / out, steps]
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    state = json.loads((tmp_path / "second-progress/checkpoint-4/trainer_state.json").read_text())
    assert state["global_step"] == 4
    student, adapted = load(chatty / "student"), with_adapter(chatty, tmp_path / "second")
    assert (logits(adapted) - logits(student)).abs().max() > 1e-3


def chat(row):
    return {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    }


def test_the_recipes_of_the_docs(shop, tmp_path, monkeypatch):
    """The Python of docs/training.md, as written, in a folder with a student and its start."""
    text = (ROOT / "docs" / "training.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student").symlink_to(shop / "student")
    (tmp_path / "start").symlink_to(shop / "init")
    run(shop, tmp_path / "adapter")
    names, found = {}, []
    for block in blocks:
        exec(block, names)
        found.append(logits(names["model"]))
    adapted, attached, stock = found
    before = logits(load(shop / "student"))
    assert (adapted - before).abs().max() > 1e-3
    torch.testing.assert_close(attached, before, atol=2e-5, rtol=0)
    torch.testing.assert_close(stock, before, atol=1e-3, rtol=0)
    assert artifact.verify("exported") == []
