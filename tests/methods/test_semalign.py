# SPDX-License-Identifier: Apache-2.0
"""SemAlign end to end: from rows to what the student has learned, against the models' own outputs.

Its parts have tests of their own: bases and map, targets, layer maps, objectives, the Trainer. How
it goes on after a kill is in test_resume, what it refuses on the command line in test_bad_input.
"""

import json
from dataclasses import replace

import model_zoo as zoo
import pytest
import torch
from safetensors.torch import load_file
from semantics import byte_level

from pkt_ext import artifact
from pkt_ext.errors import InputError
from pkt_ext.lora import merge
from pkt_ext.methods import semalign
from pkt_ext.methods.semalign import SemAlignConfig
from pkt_ext.methods.semalign import align as run_semalign
from pkt_ext.methods.semalign_inputs import prepare

ROWS = [
    {"id": f"r{i}", "prompt": f"{i} + {i} =", "completion": f"It is {2 * i}, I say."}
    for i in range(8)
]
HELD = [
    {"id": f"h{i}", "prompt": f"{i} + 1 =", "completion": f"It is {i + 1}, of course."}
    for i in range(3)
]
OTHER = [{"prompt": "Once upon", "completion": " a time there was a king."}]
CONFIG = SemAlignConfig(
    objective="geometry",
    steps=4,
    batch=4,
    learning_rate=5e-3,
    device="cpu",
    prompt_format="published",
    map_cache="none",
    gradient_checkpointing=False,
)
PAIRS = [
    ("llama_gqa", "llama_gqa", "cosine"),
    ("llama_gqa", "llama_gqa", "geometry"),
    ("qwen3", "qwen3", "fisher"),
    ("gemma2", "gemma2", "fisher"),
    ("gpt_neox", "gpt_neox", "geometry"),
    ("gpt2", "gpt2", "cosine"),
    ("phi3_gqa", "phi3_gqa", "fisher"),
    ("olmo2", "mistral", "geometry"),
    ("opt_post_norm", "gemma3", "geometry"),
]


class Place:
    """Saved models, and runs on them."""

    def __init__(self, folder, large="llama_gqa", small="llama_gqa", **sizes):
        self.folder, self.out = folder, folder / "out"
        self.teacher = zoo.build(large, **(zoo.TEACHER | sizes.get("teacher", {})))
        self.student = zoo.build(small, **(zoo.STUDENT | sizes.get("student", {})))
        zoo.save(self.teacher, folder / "teacher")
        zoo.save(self.student, folder / "student")

    def run(self, config=CONFIG, *, out=None, rows=ROWS, holdout=HELD, **options):
        return run_semalign(
            self.folder / "teacher", self.folder / "student", rows, out or self.out, config,
            holdout=holdout, progress=False, **options,
        )  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One pair for all runs that only read it."""
    return Place(
        tmp_path_factory.mktemp("semalign"), teacher=dict(layers=5), student=dict(layers=3)
    )


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def steered(place, out):
    """The student with its adapter, by PEFT alone."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load(place.folder / "student"), out).eval()


def behaviour(model, teacher, rows=HELD):
    """(KL from the teacher, agreement) by the models' own logits, in plain loops in float64."""
    tokens, kl, same, count = zoo.tokenizer(), 0.0, 0, 0
    for row in rows:
        prompt = f"<|user|>\n{row['prompt']}\n\n<|assistant|>\n"
        ids = tokens(prompt + row["completion"] + "\n\n")["input_ids"] + [tokens.eos_token_id]
        start = len(tokens(prompt)["input_ids"])
        ids = torch.tensor([ids])
        with torch.no_grad():
            theirs, ours = (
                m(ids).logits[0, start - 1 : -1, :259].double() for m in (teacher, model)
            )
        log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        count += len(log_p)
    return kl / count, same / count


@pytest.mark.parametrize(("large", "small", "objective"), PAIRS, ids=["-".join(p) for p in PAIRS])
def test_from_rows_to_a_steered_student(tmp_path, large, small, objective):
    place = Place(tmp_path, large, small)
    config = replace(CONFIG, objective=objective, budget="8GiB")
    report = place.run(config, unrelated=OTHER)
    assert artifact.verify(place.out) == [] and artifact.read(place.out)["kind"] == "adapter"
    assert not place.out.with_name("out.progress").exists()
    assert json.loads((place.out / "report.json").read_text())["pairs"] == report["pairs"]

    assert len(report["attribution"]) == 3 and min(report["attribution"][:-1]) > 0
    phases = report["losses"]
    assert [p["block"] for p in phases] == [p["student"] for p in report["pairs"]]
    for phase in phases:
        assert len(phase["losses"]) == len(phase["layer_losses"]) == 4
    # what the report says of the student is what its own logits say, before and after
    before, after = behaviour(place.student, place.teacher), None
    model = steered(place, place.out)
    after = behaviour(model, place.teacher)
    for (kl, agreement), found in ((before, report["before"]), (after, report["after"])):
        assert found["kl"] == pytest.approx(kl, rel=1e-4, abs=1e-6)
        assert found["agreement"] == pytest.approx(agreement)
        assert len(found["cka"]) == len(phases) and all(-1 < c <= 1 + 1e-9 for c in found["cka"])
        assert found["perplexity"] > 1
    assert after != before and report["before"]["perplexity"] != report["after"]["perplexity"]
    if objective != "cosine":
        assert after[0] < before[0]
    # and what is merged is the same
    merge(place.folder / "student", place.out, tmp_path / "merged", progress=False)
    kl, _ = behaviour(load(tmp_path / "merged"), place.teacher)
    assert kl == pytest.approx(after[0], rel=1e-4)


# --- what is trained ------------------------------------------------------------------------------


def factors(out):
    """{module path: its product B A} of a published adapter."""
    tensors = load_file(out / "adapter_model.safetensors")
    names = {name.rpartition(".lora_")[0] for name in tensors}
    return {
        name.removeprefix("base_model.model."): tensors[f"{name}.lora_B.weight"]
        @ tensors[f"{name}.lora_A.weight"]
        for name in names
    }


def test_pairs_train_their_blocks_alone(shared, tmp_path):
    config = replace(CONFIG, objective="cosine", critical=1, interpolate=False)
    report = shared.run(config, out=tmp_path / "out")
    best = max(range(5), key=lambda block: report["attribution"][block])
    (pair,) = report["pairs"]
    ell = [max(1, 5 * k // 3) - 1 for k in (1, 2, 3)]
    assert pair["student"] == next(k for k in range(3) if ell[k] >= best)
    assert pair["teacher"] == [{"block": ell[pair["student"]], "weight": 1.0}]
    found = factors(tmp_path / "out")
    paths = {f"model.layers.{pair['student']}.{name}" for name in (
        "mlp.up_proj", "mlp.down_proj", "self_attn.v_proj", "self_attn.o_proj"
    )}  # fmt: skip
    assert found.keys() == paths and all(delta.abs().max() > 0 for delta in found.values())


def test_between_two_teacher_blocks(shared, tmp_path):
    """A4, 5 to 3 blocks: u = 5 k / 3."""
    report = shared.run(
        replace(CONFIG, objective="cosine", critical=5, steps=1), out=tmp_path / "out"
    )
    weights = [
        [(s["block"], pytest.approx(s["weight"])) for s in p["teacher"]] for p in report["pairs"]
    ]
    assert weights == [[(0, 1 / 3), (1, 2 / 3)], [(2, 2 / 3), (3, 1 / 3)], [(4, 1.0)]]


@pytest.mark.parametrize("pairing", ["published", "attribution", "similarity"])
def test_the_frontier_has_one_source_a_block_in_order(shared, tmp_path, pairing):
    report = shared.run(replace(CONFIG, pairing=pairing, steps=1), out=tmp_path / "out")
    assert [pair["student"] for pair in report["pairs"]] == [0, 1, 2]
    sources = [pair["teacher"][0]["block"] for pair in report["pairs"]]
    assert sources == sorted(set(sources))
    if pairing == "published":
        assert sources == [0, 2, 4]
    elif pairing == "attribution":
        ranked = sorted(range(5), key=lambda block: -report["attribution"][block])
        assert sources == sorted(ranked[:3])
    assert report["resolved"]["pairing"] == pairing


def test_a_later_phase_leaves_earlier_blocks_as_they_are(shared, tmp_path, monkeypatch):
    """And trains on what the trained blocks before it give: their outputs are not the student's."""
    seen = []
    train = semalign.Steering._train

    def watch(self, number, phase, parameters, prefix, show):
        before = {n: p.clone() for n, p in self.model.named_parameters()}
        found = train(self, number, phase, parameters, prefix, show)
        changed = {n for n, p in self.model.named_parameters() if not torch.equal(p, before[n])}
        seen.append((phase.block, changed, prefix and prefix[1].read().clone()))
        return found

    monkeypatch.setattr(semalign.Steering, "_train", watch)
    shared.run(out=tmp_path / "out")
    for number, (block, changed, _) in enumerate(seen):
        assert block == number and changed
        assert all(name.startswith(f"model.layers.{block}.") for name in changed)
    assert seen[0][2] is None
    model = steered(shared, tmp_path / "out").get_base_model()
    ids = zoo.tokenizer()(f"<|user|>\n{ROWS[0]['prompt']}\n\n<|assistant|>\nIt is 0")["input_ids"]
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    for block, _, prefix in seen[1:]:
        torch.testing.assert_close(prefix[: len(ids)], states[block][0], rtol=1e-4, atol=1e-5)


def test_a_block_itself(shared, tmp_path):
    config = replace(CONFIG, objective="cosine", critical=1, train="block", learning_rate=1e-3)
    report = shared.run(config, out=tmp_path / "out")
    assert artifact.read(tmp_path / "out")["kind"] == "model"
    (block,) = (pair["student"] for pair in report["pairs"])
    new, old = load(tmp_path / "out"), shared.student
    changed = {
        name
        for (name, p), (_, q) in zip(new.named_parameters(), old.named_parameters(), strict=True)
        if not torch.equal(p, q)
    }
    own = {n for n, _ in old.named_parameters() if n.startswith(f"model.layers.{block}.")}
    assert changed == own
    kl, _ = behaviour(new, shared.teacher)
    assert report["after"]["kl"] == pytest.approx(kl, rel=1e-4)
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("objective", ["finetune", "distillation"])
def test_baselines_train_every_block_as_many_steps(shared, tmp_path, objective):
    report = shared.run(replace(CONFIG, objective=objective), out=tmp_path / "out")
    (phase,) = report["losses"]
    assert len(phase["losses"]) == 3 * 4 and "layer_losses" not in phase
    assert len(factors(tmp_path / "out")) == 3 * 4
    assert report["pairs"] == [] and report["map"] is None and report["attribution"] is None
    assert artifact.read(tmp_path / "out")["paradigm"] is None
    model = steered(shared, tmp_path / "out")
    kl, _ = behaviour(model, shared.teacher)
    assert report["after"]["kl"] == pytest.approx(kl, rel=1e-4)
    if objective == "distillation":
        assert report["after"]["kl"] < report["before"]["kl"]


@pytest.mark.parametrize("objective", ["geometry", "fisher"])
@pytest.mark.parametrize("family", ["llama_gqa", "gemma2", "gpt_neox"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path, family, objective):
    place = Place(tmp_path, family, family, teacher=zoo.STUDENT)
    report = place.run(replace(CONFIG, objective=objective, steps=1))
    for phase in report["losses"]:
        assert abs(phase["layer_losses"][0]) < 2e-6 and abs(phase["output_losses"][0]) < 2e-6
    assert report["before"]["kl"] == pytest.approx(0, abs=1e-9)
    assert report["before"]["agreement"] == 1
    assert report["before"]["cka"] == pytest.approx([1.0] * 2)


# --- what goes in ---------------------------------------------------------------------------------


def test_two_tokenizers(tmp_path):
    """The student's ids are the teacher's in another order, with a few tokens of its own."""
    place, config = Place(tmp_path), replace(CONFIG, positions="supervised")
    whole = place.run(config, out=tmp_path / "same")
    tokens, generator = zoo.tokenizer(), torch.Generator().manual_seed(5)
    order = torch.cat([torch.arange(3), 3 + torch.randperm(261, generator=generator)])
    content = json.loads(tokens.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    place_of = {int(old): new for new, old in enumerate(order)}
    content["model"]["vocab"] = {token: place_of[i] for token, i in vocabulary.items()}
    from tokenizers import Tokenizer

    tokens._tokenizer = Tokenizer.from_str(json.dumps(content))
    with torch.no_grad():
        for matrix in (place.student.lm_head.weight, place.student.model.embed_tokens.weight):
            matrix.copy_(matrix[order].clone())
    zoo.save(place.student, tmp_path / "student", tokens=tokens)
    report = place.run(config)
    assert report["shared_tokens"] == whole["shared_tokens"] == 259
    # only what follows the answer stays alone: a row's last positions
    assert 0 < whole["positions"] - report["positions"] <= 4 * len(ROWS + HELD)
    assert report["attribution"] == pytest.approx(whole["attribution"], rel=1e-5)
    assert report["losses"][0]["layer_losses"][0] == pytest.approx(
        whole["losses"][0]["layer_losses"][0], abs=0.05
    )
    assert report["after"]["kl"] < report["before"]["kl"]


def test_two_families_with_tokenizers_of_their_own(tmp_path):
    """The KL is that of the same text, over the tokens of both: in plain loops, in float64."""
    place = Place(tmp_path, "gemma2", "qwen3")
    tokens = byte_level(added=("It is", ", of"), special=("<pad>", "<|endoftext|>"))
    zoo.save(place.student, tmp_path / "student", tokens=tokens)
    report = place.run(replace(CONFIG, learning_rate=1e-3))
    assert report["resolved"]["positions"] == "supervised"  # though geometry wants them all
    with pytest.raises(InputError, match="only supervised positions are paired; leave"):
        place.run(replace(CONFIG, positions="all"), out=tmp_path / "all")
    sides = (place.teacher, zoo.tokenizer()), (place.student, tokens)
    words = [tokenizer.get_vocab() for _, tokenizer in sides]
    both = sorted(words[0].keys() & words[1].keys())  # and the end, whatever it is called
    ids = [
        [*(known[word] for word in both), tokenizer.eos_token_id]
        for known, (_, tokenizer) in zip(words, sides, strict=True)
    ]
    assert report["shared_tokens"] == len(ids[0]) == 258
    kl, count = 0.0, 0
    for row in HELD:
        prompt, found = f"<|user|>\n{row['prompt']}\n\n<|assistant|>\n", []
        for (model, tokenizer), own in zip(sides, ids, strict=True):
            read = tokenizer(prompt + row["completion"])["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([read])).logits[0].double()[:, own]
            ends = range(1, len(read) + 1)
            texts = [tokenizer.decode(read[:end], skip_special_tokens=True) for end in ends]
            found.append(dict(zip(texts, logits.log_softmax(-1), strict=True)))
        for text in found[0].keys() & found[1].keys():
            if text.startswith(prompt):
                log_p, log_q = (log[text] for log in found)
                kl, count = kl + float((log_p.exp() * (log_p - log_q)).sum()), count + 1
    assert report["before"]["kl"] == pytest.approx(kl / count, rel=1e-4)
    assert report["after"]["kl"] < report["before"]["kl"]


def test_where_the_layer_loss_looks(shared, tmp_path):
    """Geometry relates all tokens behind the first; an answer of one has no geometry."""
    short = [{"prompt": row["prompt"], "completion": "x"} for row in ROWS]
    config = replace(CONFIG, steps=1, prompt_format="plain")  # one token and the end
    found = shared.run(config, out=tmp_path / "all", rows=short)
    assert found["losses"][0]["layer_losses"][0] > 0.01
    models = shared.folder / "teacher", shared.folder / "student"
    job = prepare(models, (None, None), short, HELD, None, config)
    for sample, pair in zip(job.rows.student, job.layer_positions, strict=True):
        assert all(side.tolist() == list(range(1, len(sample.input_ids))) for side in pair)
    config = replace(config, positions="supervised")
    found = shared.run(config, out=tmp_path / "supervised", rows=short)
    assert found["losses"][0]["layer_losses"][0] == 0


def test_rows_are_held_out_where_none_are_given(shared, tmp_path):
    report = shared.run(replace(CONFIG, steps=1, hold_out=0.25), out=tmp_path / "out", holdout=None)
    assert report["rows"] == {"trained": 6, "held_out": 2, "unrelated": 0}
    assert report["before"]["kl"] > 0 and report["before"]["perplexity"] is None
    report = shared.run(replace(CONFIG, steps=1, hold_out=0), out=tmp_path / "none", holdout=None)
    assert report["rows"]["held_out"] == 0 and report["before"]["kl"] is None


@pytest.mark.parametrize("train", ["lora", "block"])
def test_models_in_memory_are_left_as_they_were(shared, tmp_path, train):
    teacher, student, config = shared.teacher, shared.student, replace(CONFIG, train=train)
    student.train()
    student.lm_head.weight.requires_grad_(False)

    def seen():
        tensors = [(n, p, p.clone(), p.requires_grad) for n, p in student.named_parameters()]
        return tensors, [(name, m.training) for name, m in student.named_modules()]

    before, modes = seen()
    try:
        report = run_semalign(
            teacher, student, ROWS, tmp_path / "out", config, holdout=HELD, progress=False,
            teacher_tokenizer=zoo.tokenizer(), student_tokenizer=zoo.tokenizer(),
        )  # fmt: skip
        after, modes_after = seen()
    finally:
        student.eval()
        student.lm_head.weight.requires_grad_(True)
    assert modes_after == modes
    for (name, one, value, grad), (other, two, now, wants) in zip(before, after, strict=True):
        assert name == other and one is two and torch.equal(value, now) and grad == wants
    again = shared.run(config, out=tmp_path / "folders")
    assert again["losses"] == report["losses"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(shared, tmp_path, dtype):
    report = shared.run(replace(CONFIG, dtype=dtype), out=tmp_path / "out")
    assert report["after"]["kl"] < report["before"]["kl"]
    assert {t.dtype for t in load_file(tmp_path / "out/adapter_model.safetensors").values()} == {
        torch.float32
    }


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(objective="magic"), "objective is 'magic'; choose"),
        (dict(objective="finetune", map="frames"), "leave map out"),
        (dict(objective="cosine", pairing="similarity"), "add --schedule frontier"),
        (dict(micro_batch=3, batch=4), "micro_batch 3 does not divide batch 4"),
        (dict(modules="up,nose"), "modules is 'up,nose'"),
        (dict(temperature=0.0), "temperature is 0.0; give a positive number"),
        (dict(beta=-1.0), "beta is -1.0; give 0 or more"),
        (dict(hold_out=1.0), "hold_out is 1.0"),
        (dict(steps=0), "steps is 0; give at least 1"),
    ],
)
def test_options_that_cannot_be(options, says):
    with pytest.raises(InputError, match=says):
        SemAlignConfig(**options)


# --- on from an interruption ----------------------------------------------------------------------


def weights(out):
    return (out / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("moment", ["attribution", "targets", "phase 0", "phase 1", "write"])
def test_it_goes_on_from_where_it_was(shared, tmp_path, monkeypatch, moment):
    config = replace(CONFIG, dropout=0.1)
    whole = shared.run(config, out=tmp_path / "whole")

    def stop(*_, **__):
        raise RuntimeError("stopped here")

    with monkeypatch.context() as patch:
        if moment == "write":
            patch.setattr(semalign, "_write", stop)
        else:
            record = semalign.Progress.record

            def watch(self, step, **facts):
                record(self, step, **facts)
                if step == moment:
                    stop()

            patch.setattr(semalign.Progress, "record", watch)
        with pytest.raises(RuntimeError) as error:
            shared.run(config, out=tmp_path / "out")
    assert f"kept in {tmp_path / 'out'}.progress" in error.value.__notes__[0]
    again = shared.run(config, out=tmp_path / "out")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    for key in ("pairs", "attribution", "losses", "before", "after"):
        assert again[key] == whole[key]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_damaged_targets_are_made_again(shared, tmp_path, monkeypatch):
    whole = shared.run(out=tmp_path / "whole")

    def stop(*_, **__):
        raise RuntimeError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(semalign, "_write", stop)
        with pytest.raises(RuntimeError):
            shared.run(out=tmp_path / "out")
    path = tmp_path / "out.progress" / "layer-0000.activations"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    again = shared.run(out=tmp_path / "out")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert again["after"] == whole["after"]
