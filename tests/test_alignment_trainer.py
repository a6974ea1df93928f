# SPDX-License-Identifier: Apache-2.0
"""Students of every sort are aligned block by block, and only what is meant to be trained is."""

import gc
import json
import logging
import os
import runpy
import sys
from pathlib import Path

import model_zoo as zoo
import pytest
import torch
from transformers import TrainingArguments

from pkt_ext.adapter import Factor, matrix_shape
from pkt_ext.alignment_trainer import AlignmentTrainer, collate, supervised, train_phase
from pkt_ext.errors import InputError, NonFiniteError
from pkt_ext.lora import attach_factors
from pkt_ext.models.anatomy import describe
from pkt_ext.models.frontier import Activations, activations, advance
from pkt_ext.objectives import (
    CosineOutput,
    CosineSteering,
    CrossEntropyOutput,
    FisherAlignment,
    Objective,
    OutputDistillation,
    RelationGeometry,
)

ROOT = Path(__file__).resolve().parents[1]
BLOCK, LAYERS = 1, 3
LENGTHS = (9, 4, 12, 6, 7, 5)
PROMPT = 3  # tokens without loss: the second item has 1 supervised row, too few for A10
QUICK = dict(
    block=BLOCK, steps=12, learning_rate=1e-2, batch=6, micro_batch=6, progress=False
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """Every Trainer collects garbage when it starts: half a second with all that is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def teacher():
    return zoo.build("llama_gqa", seed=9, layers=2, hidden=48, ffn=64)


def build(family="llama_gqa", block=BLOCK):
    """(a student of which one block trains, its anatomy)."""
    student = zoo.build(family, seed=3, layers=LAYERS)
    anatomy = describe(student)
    student.requires_grad_(False)
    student.get_submodule(anatomy.blocks[block]).requires_grad_(True)
    return student, anatomy


def make_items(student, anatomy, teacher, block=BLOCK, cached=True):
    """Random states as if mapped, and the teacher's outputs for the same tokens."""
    generator, items = torch.Generator().manual_seed(4), []
    for length in LENGTHS:
        ids = torch.randint(3, zoo.VOCAB, (length,), generator=generator)
        positions = torch.arange(PROMPT - 1, length - 1)
        with torch.no_grad():
            outputs = activations(teacher, describe(teacher), ids[None]).outputs[0]
        items.append(
            {
                "input_ids": ids,
                "positions": positions,
                "labels": ids[positions + 1],
                "layer": torch.randn(len(positions), anatomy.hidden_size, generator=generator),
                "output": outputs[positions],
            }
        )
    if cached:
        hidden = list(advance(student, anatomy, items, block - 1))
        items = [item | {"hidden": states} for item, states in zip(items, hidden, strict=True)]
    return items


def make_objective(name, student, anatomy, teacher, beta=1.0):
    norm = student.get_submodule(anatomy.final_norm) if anatomy.final_norm else None
    head, cap = student.get_submodule(anatomy.head).weight, anatomy.logit_softcap
    teacher_head = teacher.get_output_embeddings().weight
    distillation = OutputDistillation(head, teacher_head, cap=cap)
    return {
        "cosine": lambda: Objective(CosineSteering(), CosineOutput(head, cap=cap), beta),
        "fisher": lambda: Objective(FisherAlignment(norm, head, cap=cap), distillation, beta),
        "geometry": lambda: Objective(RelationGeometry(), distillation, beta),
        "layer": lambda: Objective(CosineSteering()),
        "tokens": lambda: Objective(None, CrossEntropyOutput(head, cap=cap)),
    }[name]()


def weights(student):
    return {name: tensor.clone() for name, tensor in student.state_dict().items()}


def changed(before, student):
    return {
        name for name, new in student.state_dict().items() if not torch.equal(before[name], new)
    }


CASES = [
    ("llama_gqa", "cosine"),
    ("llama_gqa", "layer"),
    ("gpt2", "fisher"),
    ("gpt_neox", "geometry"),
    ("gemma2", "fisher"),
    ("qwen3", "tokens"),
    ("opt_post_norm", "fisher"),
]


@pytest.mark.parametrize("family, name", CASES)
def test_a_phase(family, name, teacher, tmp_path, monkeypatch):
    """Its losses fall; its block changes and nothing else; the student is given back."""
    monkeypatch.chdir(tmp_path)
    student, anatomy = build(family)
    student.train()
    student.get_submodule(anatomy.blocks[0]).eval()
    student.config.use_cache = True
    items = make_items(student, anatomy, teacher)
    objective, before = make_objective(name, student, anatomy, teacher), weights(student)
    modes = [part.training for part in student.modules()]
    report = train_phase(student, anatomy, items, objective, **QUICK)
    path = f"{anatomy.blocks[BLOCK]}."
    names = {name for name in before if name.startswith(path)}
    buffers = {name for name, _ in student.named_buffers()}
    assert changed(before, student) == names - buffers
    parts = {"layer": ["layer_losses"], "tokens": ["output_losses"]}
    expected = parts.get(name, ["layer_losses", "output_losses"])
    assert set(report) == {"losses", "learning_rates", *expected}
    assert all(len(values) == 12 for values in report.values())
    assert report["losses"][-1] < 0.97 * report["losses"][0]
    total = [sum(each) for each in zip(*(report[part] for part in expected), strict=True)]
    assert report["losses"] == pytest.approx(total, rel=1e-5)
    assert max(report["learning_rates"]) == pytest.approx(1e-2)
    assert report["learning_rates"][-1] < 2e-3
    assert [part.training for part in student.modules()] == modes
    assert student.config.use_cache and "forward" not in student.__dict__
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["cosine", "fisher", "geometry"])
def test_the_first_loss_is_that_of_the_rows(name, teacher):
    """One loss over all supervised rows, from the cache as from the tokens, cut up or not."""
    student, anatomy = build()
    items = make_items(student, anatomy, teacher)
    objective = make_objective(name, student, anatomy, teacher, beta=0.5)
    batch, found = collate(items), []
    with torch.no_grad():
        plain = activations(student, anatomy, batch["input_ids"], BLOCK)
    rows = {name: states.flatten(0, 1)[batch["rows"]] for name, states in vars(plain).items()}
    total, parts = objective(batch, **rows)
    for changes in ({}, {"micro_batch": 2}, {"cached": False}):
        student, anatomy = build()
        options = QUICK | {"steps": 3} | changes
        items = make_items(student, anatomy, teacher, cached=options.pop("cached", True))
        objective = make_objective(name, student, anatomy, teacher, beta=0.5)
        report = train_phase(student, anatomy, items, objective, **options)
        assert report["losses"][0] == pytest.approx(total.item(), rel=1e-4)
        for part, value in parts.items():
            plural = part.replace("loss", "losses")
            assert report[plural][0] == pytest.approx(value.item(), rel=1e-4)
        found.append((report["losses"], weights(student)))
    for losses, after in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-4)
        for key, tensor in after.items():
            torch.testing.assert_close(tensor, found[0][1][key], atol=1e-4, rtol=1e-3)


def test_phases_follow_each_other(teacher):
    """Shallow to deep: what a phase left is what the next one starts from."""
    student, anatomy = build(block=0)
    items = make_items(student, anatomy, teacher, cached=False)
    objective = make_objective("tokens", student, anatomy, teacher)
    last = []
    for block in range(LAYERS):
        student.requires_grad_(False)
        student.get_submodule(anatomy.blocks[block]).requires_grad_(True)
        before = weights(student)
        report = train_phase(student, anatomy, items, objective, **QUICK | {"block": block})
        assert all(name.startswith(anatomy.blocks[block]) for name in changed(before, student))
        if last:  # a step further than the last one that was reported
            assert report["losses"][0] < last[-1] * 1.001
        hidden = list(advance(student, anatomy, items, block))
        items = [item | {"hidden": states} for item, states in zip(items, hidden, strict=True)]
        last = report["losses"]


def test_equal_runs_give_equal_bits(teacher):
    found = []
    for seed in (1, 1, 2):
        student, anatomy = build()
        items = make_items(student, anatomy, teacher)
        objective = make_objective("fisher", student, anatomy, teacher)
        model = lora(student, anatomy, dropout=0.3)
        options = QUICK | {"batch": 2, "micro_batch": 1, "seed": seed, "steps": 5}
        torch.manual_seed(len(found))  # whatever was drawn before
        report = train_phase(model, anatomy, items, objective, **options)
        found.append((report, weights(model)))
    (one, first), (two, second), (other, _) = found
    assert one == two and all(torch.equal(first[key], second[key]) for key in first)
    assert one["losses"] != other["losses"]


def test_recomputing_changes_nothing(teacher):
    found = []
    for again in (False, True):
        student, anatomy = build()
        items = make_items(student, anatomy, teacher)
        objective = make_objective("fisher", student, anatomy, teacher)
        options = QUICK | {"gradient_checkpointing": again, "steps": 4}
        found.append(train_phase(student, anatomy, items, objective, **options))
    assert found[0]["losses"] == pytest.approx(found[1]["losses"], rel=1e-4)


@pytest.mark.parametrize(
    "family, dtype",
    [
        ("llama_gqa", torch.bfloat16),
        ("llama_gqa", torch.float16),
        ("gpt2", torch.bfloat16),
        ("qwen3", torch.bfloat16),
        ("gemma2", torch.float16),
    ],
)
def test_half_precision_students(family, dtype, teacher):
    """Small steps are not lost to rounding while they are made: the loss falls as in float32."""
    found = {}
    for precision in (torch.float32, dtype):
        student, anatomy = build(family)
        own = vars(student.to(precision)).keys() | set()
        items = make_items(student, anatomy, teacher)
        objective = make_objective("fisher", student, anatomy, teacher)
        options = QUICK | {"learning_rate": 3e-4}
        found[precision] = train_phase(student, anatomy, items, objective, **options)["losses"]
        assert {p.dtype for p in student.parameters()} == {precision}
        assert all(p.grad is None for p in student.parameters())
        assert vars(student).keys() == own
    fallen = [losses[0] - losses[-1] for losses in found.values()]
    assert fallen[0] > 0 and fallen[1] == pytest.approx(fallen[0], rel=0.1)


def lora(student, anatomy, dropout=0.0, rank=4):
    """A PeftModel with a LoRA on the block's matrices."""
    generator, factors = torch.Generator().manual_seed(1), {}
    for part in anatomy.projections[BLOCK]:
        path = f"{anatomy.blocks[BLOCK]}.{part.module}"
        out, size = matrix_shape(student.get_submodule(path))
        A = torch.randn(rank, size, generator=generator) * size**-0.5
        factors[path] = Factor(A, torch.zeros(out, rank))
    return attach_factors(
        student, factors, dict.fromkeys(factors, 1.0), dropout=dropout, frozen=False
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["llama_gqa", "gpt2"])
def test_lora_students(family, dropout, teacher):
    """Its factors train; with their dropout, in training alone, and without the student's own."""
    student, anatomy = build(family)
    items = make_items(student, anatomy, teacher)
    before, model = weights(student), lora(student, anatomy, dropout)
    objective = make_objective("fisher", student, anatomy, teacher)
    first = evaluate(model, objective, items, anatomy)
    untouched = weights(model)
    report = train_phase(model, anatomy, items, objective, **QUICK | {"steps": 20})
    assert all("lora_" in name for name in changed(untouched, model))
    last = evaluate(model, objective, items, anatomy)
    assert last["eval_loss"] < 0.9 * first["eval_loss"]
    assert (report["losses"][0] == pytest.approx(first["eval_loss"], rel=1e-5)) or dropout
    with model.disable_adapter(), torch.no_grad():
        ids = items[0]["input_ids"][None]
        plain, _ = build(family)
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    assert before.keys() == plain.state_dict().keys()


def arguments(folder, **options):
    quiet = dict(use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no")
    return TrainingArguments(str(folder), **quiet | options)


def evaluate(model, objective, items, anatomy=None, size=4):
    args = arguments("unused", per_device_eval_batch_size=size)
    trainer = AlignmentTrainer(
        model, args, objective=objective, block=BLOCK, anatomy=anatomy, eval_dataset=items
    )
    return trainer.evaluate()


@pytest.mark.parametrize("name", ["cosine", "geometry", "tokens"])
def test_evaluate(name, teacher, tmp_path):
    """The losses of all of the data, in whatever batches, and no graph; an anatomy found out."""
    student, anatomy = build()
    items = make_items(student, anatomy, teacher)
    objective = make_objective(name, student, anatomy, teacher, beta=0.5)
    batch = collate(items)
    with torch.no_grad():
        plain = activations(student, anatomy, batch["input_ids"], BLOCK)
    rows = {name: states.flatten(0, 1)[batch["rows"]] for name, states in vars(plain).items()}
    total, parts = objective(batch, **rows)
    model = lora(student, anatomy)
    for size in (6, 4, 1):
        found = evaluate(model, objective, items, size=size)
        assert found["eval_loss"] == pytest.approx(total.item(), rel=1e-4)
        for part, value in parts.items():
            assert found[f"eval_{part}"] == pytest.approx(value.item(), rel=1e-4)


def test_as_any_trainer(teacher, tmp_path):
    """Epochs, logs, evaluation in between, checkpoints: the Trainer's own."""
    student, anatomy = build()
    items = make_items(student, anatomy, teacher, cached=False)
    objective = make_objective("fisher", student, anatomy, teacher)
    args = arguments(
        tmp_path, num_train_epochs=3, per_device_train_batch_size=2, learning_rate=1e-2,
        gradient_accumulation_steps=2, logging_steps=2, eval_strategy="epoch",
        save_strategy="epoch",
    )  # fmt: skip
    trainer = AlignmentTrainer(
        student, args, objective=objective, block=BLOCK, train_dataset=items, eval_dataset=items
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:  # means over steps
        assert line["loss"] == pytest.approx(line["layer_loss"] + line["output_loss"], rel=1e-5)
    found = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(found) == 3 and found[-1] < found[0]
    saved = type(student).from_pretrained(tmp_path / "checkpoint-6")
    assert all(torch.equal(p, saved.state_dict()[n]) for n, p in student.state_dict().items())


def test_progress_is_lines_off_a_terminal(teacher, caplog, capfd):
    student, anatomy = build()
    items = make_items(student, anatomy, teacher)
    objective = make_objective("layer", student, anatomy, teacher)
    with caplog.at_level(logging.INFO, "pkt_ext"):
        options = QUICK | {"progress": True, "what": "block 1: "}
        train_phase(student, anatomy, items, objective, **options)
    lines = [line for line in caplog.messages if line.startswith("block 1: step ")]
    assert len(lines) == 12 and "step 12 of 12: loss " in lines[-1]
    assert "loss" not in capfd.readouterr().out


@pytest.mark.parametrize("field", ["layer", "output"])
def test_nan_stops_at_once(field, teacher):
    student, anatomy = build()
    items = make_items(student, anatomy, teacher)
    items[2][field][0] = torch.nan
    objective, before = make_objective("fisher", student, anatomy, teacher), weights(student)
    message = rf"^block 1: step 1: the {field} loss \(.*\) is nan; lower --learning-rate"
    with pytest.raises(NonFiniteError, match=message):
        train_phase(student, anatomy, items, objective, **QUICK, what="block 1: ")
    assert not changed(before, student) and "forward" not in student.__dict__


def test_what_cannot_be_trained(teacher, tmp_path, monkeypatch):
    student, anatomy = build()
    items = make_items(student, anatomy, teacher)
    objective = make_objective("fisher", student, anatomy, teacher)

    def refused(message, items=items, objective=objective, **changes):
        with pytest.raises(InputError, match=message):
            train_phase(student, anatomy, items, objective, **QUICK | changes)

    refused("nothing to train on; every row was left out", items=[])
    refused("12 steps of 6 rows, 4 at a time; give at least 1", micro_batch=4)
    refused("0 steps", steps=0)
    refused("a layer loss needs the number of its block", block=None)
    refused("block 3 is not one of the student's 3", block=3)
    refused("layers.1.* cannot be trained: it lies before block 2", block=2)
    for part in (student.lm_head, student.model.norm, student.model.embed_tokens):
        part.requires_grad_(True)
        refused("has to be frozen: losses are read from it")
        part.requires_grad_(False)
    without = [item | {"output": None} for item in items]
    refused("OutputDistillation needs 'output' in every item", items=without)
    student.requires_grad_(False)
    refused("no parameter of the student requires grad")
    args = arguments(tmp_path, gradient_checkpointing=True)
    with pytest.raises(InputError, match="use recompute=True of AlignmentTrainer"):
        AlignmentTrainer(student, args, objective=objective, block=BLOCK)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(InputError, match="runs in one process"):
        AlignmentTrainer(student, arguments(tmp_path), objective=objective, block=BLOCK)


def test_collate():
    items = [
        {"input_ids": [1, 5, 6, 7], "positions": [1, 2], "labels": [6, 7]},
        {"input_ids": [1, 8], "positions": [], "labels": []},
        {"input_ids": [1, 9, 4], "positions": [1], "labels": [4]},
    ]
    items = [item | {"layer": torch.ones(len(item["positions"]), 3)} for item in items]
    batch = collate(items)
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7], [1, 8, 0, 0], [1, 9, 4, 0]]
    assert batch["rows"].tolist() == [1, 2, 9] and batch["segments"].tolist() == [0, 2, 2, 3]
    assert batch["labels"].tolist() == [6, 7, 4] and batch["layer"].shape == (3, 3)
    assert batch["output"] is None and batch["hidden"] is None
    assert {batch[name].dtype for name in ("input_ids", "rows", "segments", "labels")} == {
        torch.int64
    }
    with pytest.raises(InputError, match="lies outside of its 2 tokens"):
        collate([items[0], items[1] | {"positions": [2], "labels": [3]}])
    for odd in (None, torch.zeros(2, 3)):
        with pytest.raises(InputError, match="a row of 'layer' for each position, or none does"):
            collate([items[0], items[2] | {"layer": odd}])


def test_example(tmp_path, monkeypatch):
    """As written, with a shallower teacher whose head is padded: one block has changed."""
    student, anatomy = build()
    zoo.save(student, tmp_path / "student")
    zoo.save(zoo.build("gemma2", layers=1, vocab=zoo.VOCAB + 8), tmp_path / "teacher")
    rows = [{"prompt": f"what is {i}", "completion": f"it is {i} of course"} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    name = "align_with_trainer"
    monkeypatch.setattr(sys, "argv", [name, "student", "teacher", "rows.jsonl", "out", "1", "2"])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    after = type(student).from_pretrained(tmp_path / "out")
    found = changed(weights(student), after)
    assert found and all(name.startswith(anatomy.blocks[1]) for name in found)


def test_a_layer_loss_may_look_elsewhere_than_the_output_loss():
    items = [
        {
            "input_ids": torch.arange(5),
            "positions": [3],
            "labels": [4],
            "layer_positions": [0, 1, 2, 4],
            "layer": torch.randn(4, 6),
        },
        {
            "input_ids": torch.arange(3),
            "positions": [0, 1],
            "labels": [1, 2],
            "layer_positions": [0, 1, 2],
            "layer": torch.randn(3, 6),
        },
    ]
    batch = collate(items)
    assert batch["rows"].tolist() == [3, 5, 6] and batch["segments"].tolist() == [0, 1, 3]
    assert batch["layer_rows"].tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert batch["layer_segments"].tolist() == [0, 4, 7]
    states = torch.randn(2, 5, 6)
    found = supervised(Activations(2 * states, states, 3 * states), batch)
    assert torch.equal(found["after"], states.flatten(0, 1)[batch["layer_rows"]])
    assert torch.equal(found["outputs"], 3 * states.flatten(0, 1)[batch["rows"]])
    objective = Objective(RelationGeometry(), CrossEntropyOutput(torch.randn(9, 6)))
    assert objective.counts(batch) == (2, 3)
    total, parts = objective(batch, **found)
    want = RelationGeometry()(states.flatten(0, 1)[batch["layer_rows"]] - 2 * states.flatten(0, 1)[
        batch["layer_rows"]
    ], batch["layer"], batch["layer_segments"])  # fmt: skip
    torch.testing.assert_close(parts["layer_loss"], want)
