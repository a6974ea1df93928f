# SPDX-License-Identifier: Apache-2.0
"""The demo: its language, its models, its verdicts, and every arm once at a tiny size."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pkt_ext import demo, demo_steering, demo_world
from pkt_ext.demo_world import NEW, OLD, DemoConfig
from pkt_ext.errors import InputError
from pkt_ext.lora import read_adapter, write_adapter

TINY = DemoConfig(
    entities=6, values=3, student=(32, 32, 2), teacher=(48, 48, 3), batch=8, steps=3, rank=4,
    tune_steps=2, tune_batch=4, seed_rows=4, align_steps=2,
)  # fmt: skip


@pytest.fixture
def world():
    return demo_world.make_world(0, TINY)


def tiny(world, shape=TINY.student, seed=0):
    return demo_world.make_model(shape, len(demo_world.make_tokenizer(world)), 16, seed).eval()


# --- the language ---------------------------------------------------------------------------------


def test_world_is_split_in_two_halves():
    for seed in range(5):
        world = demo_world.make_world(seed, DemoConfig())
        facts = world.shared + world.extra
        asked = [fact[:2] for fact in facts]
        assert len(set(asked)) == len(facts) == 48 * 4  # one value for every question
        assert len(world.shared) == len(world.extra)
        assert {v for _, _, v in facts} <= world.values
        assert len(set(world.words)) == len(world.words)
        assert world == demo_world.make_world(seed, DemoConfig())
    assert demo_world.make_world(0, TINY) != demo_world.make_world(1, TINY)


def test_no_teacher_only_fact_is_fine_tuned_on(world):
    """Not in the wording of the fine-tune nor in another, nor by the question alone."""
    tuned = demo_world.make_rows(world.tuned, NEW)
    assert 0 < len(tuned) < len(world.shared)
    hidden = {(e, r) for e, r, _ in world.extra}
    for row in tuned:
        words = row["prompt"].split()
        assert not any(e in words and r in words for e, r in hidden)


def test_every_answer_has_one_value_token(world):
    tokenizer = demo_world.make_tokenizer(world)
    values = torch.tensor(tokenizer.convert_tokens_to_ids(sorted(world.values)))
    rows = demo_world.make_rows(world.shared, OLD + NEW)
    ids, labels = demo_world.padded(rows, tokenizer)
    assert (torch.isin(labels, values).sum(1) == 1).all()
    assert not (ids == tokenizer.unk_token_id).any()
    first = ids[0][ids[0] != tokenizer.pad_token_id]
    entity, relation, value = world.shared[0]
    assert tokenizer.decode(first) == (
        f"<|user|> what {relation} has {entity} <|assistant|> {value} </s>"
    )
    target = labels[0][labels[0] != demo_world.IGNORED]
    assert tokenizer.decode(target) == f"{value} </s>"


class Oracle(torch.nn.Module):
    """Knows the answers to some facts, says "</s>" to all others, and is sure of it."""

    def __init__(self, world, known, tokenizer):
        super().__init__()
        self.tokenizer, self.known = tokenizer, {(e, r): v for e, r, v in known}

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, len(self.tokenizer))
        for b, row in enumerate(input_ids):
            words = self.tokenizer.convert_ids_to_tokens(row)
            answer = next((v for (e, r), v in self.known.items() if {e, r} <= {*words}), "</s>")
            logits[b, :, self.tokenizer.convert_tokens_to_ids(answer)] = 1
        return type("Output", (), {"logits": logits})


def test_measure_tells_the_halves_apart(world):
    tokenizer = demo_world.make_tokenizer(world)
    for known, shared, extra in ((world.shared, 1, 0), (world.extra[:6], 0, 0.5), ((), 0, 0)):
        scores = demo_world.measure(Oracle(world, known, tokenizer), tokenizer, world)
        assert (scores["shared"], scores["extra"]) == (shared, extra)
        assert (scores["shared_old"], scores["extra_old"]) == (shared, extra)


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary(world):
    tokenizer, model = demo_world.make_tokenizer(world), tiny(world)
    model.lm_head.weight.data.zero_()
    scores = demo_world.measure(model, tokenizer, world)
    assert scores["perplexity"] == pytest.approx(len(tokenizer), rel=1e-5)


# --- the models -----------------------------------------------------------------------------------


def test_grown_model_computes_what_the_student_does(world):
    student = tiny(world)
    for name, weight in student.named_parameters():  # gains other than one, or they prove nothing
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    grown = demo_world.grow(student, TINY.teacher, seed=1).eval()
    ids = torch.randint(len(world.words), (4, 9))
    expected, got = student(ids).logits, grown(ids).logits
    assert torch.allclose(got, expected, atol=1e-5), (got - expected).abs().max()
    assert grown.config.hidden_size > student.config.hidden_size
    assert grown.config.num_hidden_layers > student.config.num_hidden_layers
    loss = grown(ids, labels=ids).loss
    loss.backward()  # what was added can learn
    assert grown.model.layers[-1].mlp.down_proj.weight.grad[-1].abs().sum() > 0


def test_shuffled_model_keeps_every_value_and_no_function(world):
    model = tiny(world)
    shuffled = demo_world.shuffle(model, seed=0)
    for ours, theirs in zip(shuffled.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.flatten().sort().values, theirs.flatten().sort().values)
    ids = torch.arange(8)[None]
    assert not torch.allclose(shuffled(ids).logits, model(ids).logits, atol=1e-2)


def test_difference_is_the_truncated_svd_of_the_true_difference(world, tmp_path):
    student, taught = tiny(world), tiny(world, seed=1)
    factors = demo.difference(taught, student, rank=4)
    assert len(factors) == 7 * 2 + 2
    write_adapter(tmp_path, factors, alpha_over_rank=1.0, base_model="student")
    written, config = read_adapter(tmp_path)
    for path, factor in written.items():
        delta = taught.get_submodule(path).weight - student.get_submodule(path).weight
        U, S, Vh = torch.linalg.svd(delta.detach().double(), full_matrices=False)
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        assert torch.allclose(factor.delta(config.scale[path]).double(), best, atol=1e-4), path


# --- the verdict ----------------------------------------------------------------------------------


def made_up(**extra) -> list[dict]:
    """Results of three seeds; `extra` gives teacher-only recalls by arm, a number or three."""
    recalls = {"injected": 0.8} | extra
    results = []
    for seed in range(3):
        arms = {}
        for arm in demo.ARMS:
            recall = recalls.get(arm, 0.08)
            recall = recall[seed] if isinstance(recall, tuple) else recall
            arms[arm] = dict.fromkeys(demo.MEASURES, 1.0) | {"extra": recall}
        knows = {"shared_old": 1.0, "extra_old": 1.0}
        references = dict.fromkeys(demo_world.MODELS, knows)
        references["student"] = {"shared_old": 1.0, "extra_old": 0.08}
        results.append({"seed": seed, "facts": 96, "references": references, "arms": arms})
    return results


def lines(results) -> str:
    return "\n".join(demo.conclusion(demo.summarise(results), demo.judge(results)))


def test_verdict_ranks_when_the_controls_hold():
    text = lines(made_up(seeking=(0.3, 0.35, 0.4), pissa=(0.07, 0.11, 0.09), grown=0.0))
    assert "inconclusive" not in text
    ranked = [line for line in text.splitlines() if line.startswith("  ")]
    assert [float(line.split()[0]) for line in ranked] == [0.8, 0.35, 0.09, *[0.08] * 5, 0.0]
    assert "Seeking: higher" in text and "PiSSA LoRA: no difference" in text
    assert "best-case teacher: lower" in text


@pytest.mark.parametrize("weak", [(0.8, 0.45, 0.8), 0.08])
def test_verdict_is_inconclusive_when_the_positive_control_fails(weak):
    text = lines(made_up(injected=weak, seeking=0.9))
    assert text.startswith("inconclusive") and "positive control, seed 1" in text
    assert "Seeking: higher" not in text  # no ranking


def test_verdict_needs_a_margin_over_gaussian_lora():
    assert "positive control" in lines(made_up(injected=0.8, gaussian=0.6))


def test_verdict_is_inconclusive_when_a_shuffled_teacher_helps():
    assert lines(made_up(shuffled=0.4)).startswith("inconclusive")
    assert not lines(made_up(shuffled=(0.4, 0.04, 0.4))).startswith("inconclusive")


def test_verdict_needs_the_premise():
    for name, half, recall in (
        ("student", "shared_old", 0.8),
        ("student", "extra_old", 0.5),
        ("taught", "extra_old", 0.8),
    ):
        results = made_up()
        results[2]["references"][name] = results[2]["references"][name] | {half: recall}
        text = lines(results)
        assert text.startswith("inconclusive") and f"premise, seed 2: {name}" in text


def test_a_small_or_unsteady_gap_is_no_difference():
    compared = demo.compare(made_up(seeking=0.12), "seeking", "gaussian")
    assert not compared["differs"] and compared["gap"] == pytest.approx(0.04)
    assert not demo.compare(made_up(seeking=(0.9, 0.9, 0.0)), "seeking", "gaussian")["differs"]
    assert demo.compare(made_up(seeking=0.3), "seeking", "gaussian")["differs"]


# --- the whole ------------------------------------------------------------------------------------


def test_demo_runs_every_arm(tmp_path, capsys):
    first = demo.run(tmp_path / "out", 1, config=TINY, cache=tmp_path / "cache")
    printed = capsys.readouterr().out
    assert first["verdict"]["conclusive"] is False and "inconclusive" in printed  # three steps
    for label in demo.ARMS.values():
        assert label in printed
    for label in ("raw student", *demo_steering.OBJECTIVES.values()):
        assert label in printed.partition(demo_steering.LEGEND)[2]
    for expected in demo.EXPECTED:
        assert printed.index(expected) < printed.index("trained student")
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["verdict"]["text"] == first["verdict"]["text"]
    for arm in demo.ARMS:
        scores = written["results"][0]["arms"][arm]
        assert set(scores) == set(demo.MEASURES)
        assert all(math.isfinite(score) for score in scores.values())
        if arm != "raw":
            assert len(written["results"][0]["details"][arm]["losses"]) == TINY.tune_steps
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page  # nothing is fetched
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_trained_models_are_kept_and_damaged_ones_made_again(tmp_path):
    said = []

    class Tick(demo._Progress):
        def __call__(self, message, cost=1):
            said.append(message)

    def models(seed=0, config=TINY) -> Path:
        said.clear()
        world = demo_world.make_world(seed, config)
        return demo_world.models_of(world, seed, config, tmp_path, Tick(99, quiet=True))

    folder = models()
    assert len(said) == len(demo_world.MODELS) and "trained student" in said[0]
    assert models() == folder and len(said) == 1 and "found" in said[0]
    weights = folder / "taught" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert models() == folder and "trained student" in said[0]
    assert weights.read_bytes() == whole
    assert models(config=replace(TINY, steps=2)) != folder != models(seed=1)


def test_arms_start_where_they_should(tmp_path):
    """After one step at a rate of almost nothing every arm but the injected one is the student."""
    config = replace(
        TINY, steps=10, tune_steps=1, tune_rate=1e-12, align_rate=1e-12, steer_rate=1e-12
    )
    world = demo_world.make_world(0, config)
    models = demo_world.models_of(world, 0, config, tmp_path, demo._Progress(1, quiet=True))
    ids = torch.arange(3, 20)[None]
    logits = {}
    for arm in demo.ARMS:
        work = tmp_path / f"work-{arm}"
        work.mkdir()
        folder, _ = demo.transfer(arm, models, world, 0, work, config)
        logits[arm] = demo._load(folder)(ids).logits
    for arm in set(demo.ARMS) - {"raw", "injected"}:
        assert torch.allclose(logits[arm], logits["raw"], atol=1e-4), arm
    taught, moved = demo._load(models / "taught")(ids).logits, logits["injected"]
    assert (moved - taught).norm() < 0.8 * (logits["raw"] - taught).norm()


def test_what_steering_did_is_said():
    def seed(cosine, fisher, geometry, distillation):
        kl = dict(
            student=1.0, cosine=cosine, fisher=fisher, geometry=geometry,
            distillation=distillation, finetune=0.5,
        )  # fmt: skip
        return {key: {"kl": v, "agreement": v / 2} for key, v in kl.items()}

    seeds = [seed(0.5, 0.2, 0.3, 0.4), seed(1.5, 0.1, 0.5, 0.4)]
    cosine, fisher, geometry = demo_steering.conclusion(seeds)
    assert "rose in seeds 1 (+0.00), higher than by logit distillation" in cosine
    assert "fell in every seed (-0.85), lower than by logit" in fisher
    assert fisher.endswith("lower than by fine-tuning")
    assert "fell in every seed (-0.60), not always lower than by logit" in geometry
    head, *rows = demo_steering.table(seeds)
    assert [row[0] for row in rows] == ["raw student", *demo_steering.OBJECTIVES.values()]
    assert rows[2][1:] == ["0.15 ± 0.07", "0.08"]


def test_without_matplotlib_there_is_no_plot(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert demo.plot(made_up()) is None
    page = demo._page([["", "a"], ["b", "0.1"]], [[""], ["c"]], ["fine"], {}, None)
    assert "pip install" in page and "<img" not in page


def test_bad_arguments(tmp_path):
    with pytest.raises(InputError, match="at least 1"):
        demo.run(tmp_path / "out", 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another --out"):
        demo.run(tmp_path / "file", 1)
