# SPDX-License-Identifier: Apache-2.0
"""LaTen end to end: what is located, trained and written, against the models' own weights.

How it goes on after a kill is in test_resume, what it refuses on the command line in
test_bad_input.
"""

import json
from dataclasses import replace
from itertools import pairwise

import model_zoo as zoo
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from pkt_ext import artifact, cli, lora
from pkt_ext.data import encode, read_rows
from pkt_ext.delta import read_delta
from pkt_ext.errors import InputError
from pkt_ext.methods import laten
from pkt_ext.methods.hypernetwork import Hypernetwork
from pkt_ext.methods.laten import LatenConfig
from pkt_ext.methods.laten import align as run_laten
from pkt_ext.models.anatomy import describe
from pkt_ext.models.injection import injected

LOCATE = [{"id": f"l{i}", "prompt": f"{i} + {i} =", "completion": f"{2 * i}."} for i in range(5)]
ALIGN = [
    {"id": f"a{i}", "prompt": f"{i} and {i}?", "completion": f"It is {2 * i}"} for i in (4, 7, 9)
]
HELD = [{"id": f"h{i}", "prompt": f"{i} + 1 =", "completion": f"{i + 1}"} for i in range(2)]
CONFIG = LatenConfig(rate=0.2, rows=3, learning_rate=1e-2, device="cpu")
PAIRS = [
    ("llama_gqa", "llama_gqa"),
    ("gpt_neox", "gpt_neox"),
    ("gpt2", "gpt2"),
    ("gemma2", "gemma2"),
    ("qwen3", "qwen3"),
    ("phi3_gqa", "phi3_gqa"),
    ("opt", "llama_tied"),
    ("llama", "olmo2"),
]


class Place:
    """Saved models and rows, and runs on them."""

    def __init__(self, folder, large="llama_gqa", small="llama_gqa", **sizes):
        self.folder, self.out = folder, folder / "out"
        self.teacher = zoo.build(large, **(zoo.TEACHER | sizes.get("teacher", {})))
        self.student = zoo.build(small, **(zoo.STUDENT | sizes.get("student", {})))
        self.write()

    def write(self):
        zoo.save(self.teacher, self.folder / "teacher")
        zoo.save(self.student, self.folder / "student")

    def run(self, config=CONFIG, *, out=None, locate=LOCATE, align=ALIGN, **options):
        return run_laten(
            self.folder / "teacher", self.folder / "student", locate, align, out or self.out,
            config, progress=False, **options,
        )  # fmt: skip

    def deltas(self, out=None):
        return read_delta(out or self.out, describe(self.student))


def files(out) -> dict[str, bytes]:
    """What a run leaves but for times and figures of memory."""
    names = (p.relative_to(out) for p in out.rglob("*.safetensors"))
    return {str(name): (out / name).read_bytes() for name in sorted(names)}


def vectors(model, block, role):
    """Float64 [neurons, D] of one role: rows of up and v, columns of down and o."""
    anatomy = describe(model)
    part = next(p for p in anatomy.projections[block] if p.role == role)
    name = f"{anatomy.blocks[block]}.{part.module}.weight"
    matrix = part.matrix(model.get_parameter(name).detach()).double()
    return matrix if role in ("up", "v") else matrix.T


def value_row(model, neuron):
    """Spelled out: the row of v that column `neuron` of o is fed from."""
    anatomy = describe(model)
    head, place = divmod(neuron, anatomy.head_dim)
    return head * anatomy.kv_heads // anatomy.heads * anatomy.head_dim + place


def expected_deltas(place, report, network):
    """L5, L6, L9 in plain loops, in float64, from the report's neurons."""
    weights = {name: tensor.double() for name, tensor in network.state_dict().items()}
    found = {}
    for kind, roles in (("ffn", ("up", "down")), ("attention", ("v", "o"))):
        theirs, ours = (report["neurons"][who][kind] for who in ("teacher", "student"))
        for i, block in enumerate(ours["blocks"]):
            assert len(ours["neurons"][i]) == report["counts"][kind] <= 10  # none is left out
            for role in roles:
                rows: dict[int, list] = {}
                for one, other in zip(theirs["neurons"][i], ours["neurons"][i], strict=True):
                    one = value_row(place.teacher, one) if role == "v" else one
                    other = value_row(place.student, other) if role == "v" else other
                    vector = vectors(place.teacher, theirs["blocks"][i], role)[one]
                    hidden = (weights[f"{role}.inner.weight"] @ vector).clamp(min=0)
                    rows.setdefault(other, []).append(weights[f"{role}.outer.weight"] @ hidden)
                found[block, role] = {row: sum(v) / len(v) for row, v in rows.items()}
    return found


def logits(model):
    ids = torch.tensor([[1, 40, 50, 60, 70, 80], [1, 9, 33, 200, 12, 5]])
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(("large", "small"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_from_rows_to_a_merged_model(tmp_path, large, small):
    place = Place(tmp_path, large, small)
    report = place.run(replace(CONFIG, export="adapter", budget="8GiB"))
    assert artifact.verify(place.out) == [] and artifact.read(place.out)["kind"] == "delta"
    assert not place.out.with_name("out.progress").exists()
    assert report["budget"] == 2**33 > report["align_predicted_bytes"] > 0

    network = Hypernetwork.load(place.out / "hypernetwork.safetensors")
    deltas, wanted = place.deltas(), expected_deltas(place, report, network)
    assert deltas.keys() == wanted.keys()
    for key, (index, values) in deltas.items():
        assert sorted(index.tolist()) == sorted(wanted[key])
        want = torch.stack([wanted[key][row] for row in index.tolist()])
        assert values.abs().max() > 1e-4  # at the start they are 1e-8
        torch.testing.assert_close(values.double(), want, rtol=1e-4, atol=1e-7)

    merged = lora.merge(tmp_path / "student", place.out, tmp_path / "model")
    count = sum(map(len, wanted.values()))
    assert merged["selection"] == {"selected": count, "changed": count, "outside": 0}
    before = logits(place.student)
    with injected(place.student, deltas):
        after = logits(place.student)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(load(tmp_path / "model")), after, atol=1e-5, rtol=1e-5)

    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load(tmp_path / "student"), tmp_path / "out-adapter")
    assert artifact.verify(tmp_path / "out-adapter") == []
    assert (logits(adapted.eval()) - after).norm() < 0.3 * (after - before).norm()


def test_each_model_reads_with_its_own_tokenizer(tmp_path):
    """A teacher that knows pairs of digits, a student of another family that does not."""
    place = Place(tmp_path, "llama", "gpt2", teacher=dict(vocab=300))
    inner = json.loads(zoo.tokenizer().backend_tokenizer.to_str())
    vocabulary, pairs = inner["model"]["vocab"], [f"{i}{j}" for i in "01" for j in "0123456789"]
    vocabulary |= {pair: len(vocabulary) + n for n, pair in enumerate(pairs)}
    inner["model"]["merges"] = [[*pair] for pair in pairs]
    speaks = [tokenizer_of(inner), zoo.tokenizer()]
    speaks[0].save_pretrained(tmp_path / "teacher")
    speaks[1].save_pretrained(tmp_path / "student")
    rows = [
        {"id": f"t{i}", "prompt": f"{i} + {i} =", "completion": f"{2 * i}"} for i in range(5, 9)
    ]
    report = place.run(align=rows)
    lengths = set()
    for who, model, tokenizer in zip(
        ("teacher", "student"), (place.teacher, place.student), speaks, strict=True
    ):
        found = report["neurons"][who]
        row = next(r for r in rows if r["id"] == found["sample"])
        text = f"<|user|>\n{row['prompt']}\n\n<|assistant|>\n{row['completion']}"
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            expected = model(ids[:, :-1]).logits[0, -1].log_softmax(0)[ids[0, -1]]
        assert found["log_prob"] == pytest.approx(expected.item(), abs=1e-5)
        lengths.add(ids.shape[1])
    assert len(lengths) == 2
    merged = lora.merge(tmp_path / "student", place.out, tmp_path / "model")
    assert merged["selection"]["outside"] == 0 < merged["selection"]["changed"]


def tokenizer_of(inner: dict):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(inner)), bos_token="<s>", eos_token="</s>"
    )


def test_learned_positions_cap_the_length(tmp_path):
    """128 of them; the answer is cut where it is learned, a row whose target is cut is left out."""
    place = Place(tmp_path, "llama", "gpt2")
    long = {"id": "long", "prompt": "x", "completion": "y" * 200}
    report = place.run(replace(CONFIG, steps=2), locate=[*LOCATE, long], align=[*ALIGN, long])
    assert "long" not in report["located_rows"] and report["samples"] == 4
    (dropped,) = report["dropped"]
    assert dropped["id"] == "long" and dropped["reason"].endswith("--max-length 128")


def test_it_trains(tmp_path):
    place = Place(tmp_path)
    rows = [{"prompt": f"{i % 3} + 1 =", "completion": f"{i % 3 + 1}"} for i in range(16)]
    report = place.run(replace(CONFIG, rows=6), locate=rows, align=rows[:3], holdout=rows[:3])
    losses, own, held = (report[k] for k in ("losses", "unedited_losses", "held_out_losses"))
    assert len(losses) == len(own) == len(held) == len(rows)
    assert losses[0] == pytest.approx(own[0], abs=1e-4)  # the start changes nothing yet
    assert max(a - b for a, b in zip(losses[-4:], own[-4:], strict=True)) < -0.05
    assert held[-1] < held[0] - 0.05
    steps = report["steps"]
    assert [s["step"] for s in steps] == list(range(1, 17))
    assert [s["edited"] for s in steps] == losses and [s["unedited"] for s in steps] == own
    rates = [s["learning_rate"] for s in steps]  # a tenth of the steps up, then down
    assert rates[0] == pytest.approx(1e-2 / 25) and max(rates) == pytest.approx(1e-2, rel=0.2)
    assert rates.index(max(rates)) == 1 and all(a > b for a, b in pairwise(rates[1:]))


def test_the_report(tmp_path):
    place = Place(tmp_path)
    empty = {"id": "empty", "prompt": "1", "completion": " . "}
    report = place.run(locate=[*LOCATE, empty], holdout=HELD)
    assert json.loads((place.out / "report.json").read_text()) == json.loads(json.dumps(report))
    for kind in ("attention", "ffn"):
        teacher = report["neurons"]["teacher"][kind]
        assert report["blocks"]["student"][kind] == [0, 1]
        assert (
            report["blocks"]["teacher"][kind]
            == teacher["blocks"]
            == sorted(sorted(range(3), key=lambda block: -teacher["gains"][block])[:2])
        )
    assert report["counts"] == {"attention": 6, "ffn": 9}  # of 32 and 48, rounded down
    assert sorted(report["located_rows"]) == [row["id"] for row in LOCATE]
    assert report["injected_row"] in {row["id"] for row in ALIGN}
    assert report["dropped"] == [{"id": "empty", "reason": "the answer is empty"}]
    assert report["samples"] == 3 and report["dtypes"] == ["float32", "float32"]
    deltas = place.deltas()
    assert report["delta_norms"] == pytest.approx(
        {f"{b}.{role}": values.norm().item() for (b, role), (_, values) in deltas.items()}
    )
    assert set(report["overlap"]) == {"teacher", "student", "teacher and student"}
    for shares in report["overlap"].values():
        assert all(0 <= share <= 1 for share in shares.values())
    assert report["passes"].keys() == {"teacher", "student"} and report["align_peak_bytes"] > 0
    for cost in report["passes"].values():
        assert cost["predicted_bytes"] > 0 < cost["peak_bytes"] and cost["bytes_read"] > 0
    assert report["seconds"].keys() >= {"prepare", "locate teacher", "locate student", "align"}
    run = json.loads((place.out / "run.json").read_text())
    assert (run["kind"], run["paradigm"], run["method"]) == ("delta", "prepkt", "laten")
    assert run["config"]["learning_rate"] == 1e-2 and run["inputs"].keys() >= {"teacher", "student"}
    assert "pkt merge" in (place.out / "README.md").read_text()


def test_a_row_shares_its_neurons_with_itself(tmp_path):
    place = Place(tmp_path, teacher=zoo.STUDENT)
    same = [
        {"id": f"s{i}", **{k: LOCATE[3][k] for k in ("prompt", "completion")}} for i in range(3)
    ]
    overlap = place.run(locate=same, align=same)["overlap"]
    assert set(overlap["teacher"].values()) == {1.0}
    assert overlap["teacher and student"] == overlap["student"]  # the very same model


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One pair for runs that only differ in their options, and the plain one."""
    place = Place(tmp_path_factory.mktemp("laten"))
    place.report = place.run(holdout=HELD)
    return place


def test_every_scored_and_the_best_alone_are_the_same(shared, tmp_path):
    report = shared.run(replace(CONFIG, mode="all"), out=tmp_path / "out", holdout=HELD)
    assert files(tmp_path / "out") == files(shared.out)
    assert report["losses"] == shared.report["losses"]
    report = shared.run(replace(CONFIG, mode="first-order"), out=tmp_path / "first", holdout=HELD)
    assert report["blocks"] == shared.report["blocks"]  # blocks are never scored to first order
    for who in ("teacher", "student"):
        one, two = (set(r["neurons"][who]["ffn"]["neurons"][0]) for r in (report, shared.report))
        assert len(one & two) >= 5


def test_random_neurons_are_a_baseline(shared, tmp_path):
    config = replace(CONFIG, neurons="random")
    report = shared.run(config, out=tmp_path / "out", holdout=HELD)
    assert report["counts"] == shared.report["counts"]
    assert report["blocks"] == shared.report["blocks"]
    theirs = report["neurons"]["student"]["ffn"]["neurons"]
    assert theirs != shared.report["neurons"]["student"]["ffn"]["neurons"]
    assert all(len(set(block)) == 9 and max(block) < 48 for block in theirs)
    shared.run(config, out=tmp_path / "again", holdout=HELD)
    assert files(tmp_path / "again") == files(tmp_path / "out")
    shared.run(replace(config, seed=1), out=tmp_path / "other", holdout=HELD)
    assert files(tmp_path / "other") != files(tmp_path / "out")


@pytest.mark.parametrize("modules", ["up,down,o", "v", "down"])
def test_modules_can_be_left_out(shared, tmp_path, modules):
    """The first is what the Qwen port moves."""
    report = shared.run(replace(CONFIG, modules=modules, steps=2), out=tmp_path / "out")
    roles = set(modules.split(","))
    assert {role for _, role in shared.deltas(tmp_path / "out")} == roles
    assert (report["counts"]["ffn"] == 0) == roles.isdisjoint({"up", "down"})
    network = load_file(tmp_path / "out" / "hypernetwork.safetensors")
    assert {name.split(".")[0] for name in network} == roles


def test_fewer_blocks(shared, tmp_path):
    report = shared.run(replace(CONFIG, blocks=1, steps=2), out=tmp_path / "out")
    for blocks in report["blocks"].values():
        assert len(blocks["attention"]) == len(blocks["ffn"]) == 1
    assert len(shared.deltas(tmp_path / "out")) == 4


def test_a_deeper_student(tmp_path):
    """As many blocks as the teacher has, the student's best ones, in order."""
    place = Place(tmp_path, student=dict(layers=4))
    report = place.run(replace(CONFIG, steps=2))
    for kind, role in (("attention", "o"), ("ffn", "down")):
        assert report["blocks"]["teacher"][kind] == [0, 1, 2]
        ours = report["blocks"]["student"][kind]
        assert len(ours) == 3 and ours == [b for b, name in place.deltas() if name == role]


def test_equal_runs_leave_equal_bytes(shared, tmp_path, any_threads):
    torch.manual_seed(5)
    argv = ["laten", *(f"--{who}={shared.folder / who}" for who in ("teacher", "student"))]
    for name, rows in (("locate", LOCATE), ("align", ALIGN), ("holdout", HELD)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        argv.append(f"--{name}={path}")
    argv += ["--rate=0.2", "--rows=3", "--lr=1e-2", "--device=cpu", "-q"]
    assert cli.run([*argv, f"--out={tmp_path / 'out'}"]) == 0
    assert files(tmp_path / "out") == files(shared.out)
    assert cli.run(["verify", str(tmp_path / "out")]) == 0
    torch.set_num_threads(1 if torch.get_num_threads() > 1 else 2)
    shared.run(out=tmp_path / "threads", holdout=HELD)
    one, other = (shared.deltas(out) for out in (shared.out, tmp_path / "threads"))
    assert one.keys() == other.keys()
    for key, (index, values) in one.items():
        assert torch.equal(index, other[key][0])
        torch.testing.assert_close(values, other[key][1], rtol=1e-3, atol=1e-6)


def test_micro_batches_of_the_passes_change_no_neuron(shared, tmp_path):
    report = shared.run(replace(CONFIG, micro_batch=1), out=tmp_path / "out", holdout=HELD)
    assert report["losses"] == pytest.approx(shared.report["losses"], abs=1e-4)
    assert report["blocks"] == shared.report["blocks"]


# --- which step -----------------------------------------------------------------------------------

MANY = [{"id": f"m{i}", "prompt": f"{i} + {i} =", "completion": f"{2 * i}"} for i in range(8)]
EVERY = replace(CONFIG, keep_checkpoints=True, learning_rate=0.03)


@pytest.fixture(scope="module")
def wild(shared, tmp_path_factory):
    """A run whose held-out loss falls and rises again, and its folder."""
    out = tmp_path_factory.mktemp("wild") / "out"
    return shared.run(EVERY, out=out, locate=MANY, holdout=HELD), out


def test_the_best_step_held_out_is_injected(shared, wild, tmp_path):
    report, out = wild
    held, best = report["held_out_losses"], report["injected_step"]
    assert held[best - 1] == min(held) and 1 < best < len(MANY) == len(held)
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == [f"hypernetwork-{step:04}.safetensors" for step in range(1, 9)]
    kept = [load_file(out / "checkpoints" / name) for name in names]
    chosen = load_file(out / "hypernetwork.safetensors")
    equal = [all(torch.equal(chosen[key], step[key]) for key in chosen) for step in kept]
    assert [n for n, same in enumerate(equal, 1) if same] == [best]
    assert artifact.verify(out) == []
    # the held-out loss is that of what would be injected, by the model's own forward
    samples = encode(read_rows(HELD), zoo.tokenizer(), max_length=99, stage="train").samples
    with injected(shared.student, shared.deltas(out)), torch.no_grad():
        losses = [
            shared.student(s.input_ids[None], labels=s.labels[None]).loss.item() for s in samples
        ]
    assert held[best - 1] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_a_repeated_run_stops_at_the_same_step(shared, tmp_path, monkeypatch):
    config, rows = replace(EVERY, patience=1), dict(locate=MANY, holdout=HELD)
    report = shared.run(config, out=tmp_path / "whole", **rows)

    def stop(*_, **__):
        raise RuntimeError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(laten, "write_delta", stop)
        with pytest.raises(RuntimeError) as error:
            shared.run(config, out=tmp_path / "out", **rows)
    (note,) = error.value.__notes__
    assert f"kept in {tmp_path / 'out'}.progress" in note
    monkeypatch.setattr(laten.Alignment, "step", stop)
    again = shared.run(config, out=tmp_path / "out", **rows)
    assert len(again["losses"]) == len(report["losses"]) < len(MANY)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("patience", [1, 2])
def test_it_stops_where_nothing_gets_better(shared, wild, tmp_path, patience):
    whole = wild[0]["held_out_losses"]
    best, stop = 0, len(whole)
    for step, loss in enumerate(whole):
        best = step if loss < whole[best] else best
        if step - best >= patience:
            stop = step + 1
            break
    assert stop < len(whole)
    report = shared.run(
        replace(EVERY, patience=patience), out=tmp_path / "out", locate=MANY, holdout=HELD
    )
    assert report["held_out_losses"] == whole[:stop]
    assert report["losses"] == wild[0]["losses"][:stop]
    assert report["injected_step"] == best + 1
    assert len(list((tmp_path / "out" / "checkpoints").iterdir())) == stop


def test_the_step_asked_for_wins(shared, wild, tmp_path):
    """Over the best one held out, and over stopping before it."""
    last = len(MANY)
    assert wild[0]["injected_step"] != last
    config = replace(EVERY, inject_step=last, patience=1)
    report = shared.run(config, out=tmp_path / "out", locate=MANY, holdout=HELD)
    assert report["injected_step"] == last == len(report["steps"])
    chosen, kept = (
        load_file(tmp_path / "out" / name)
        for name in ("hypernetwork.safetensors", f"checkpoints/hypernetwork-{last:04}.safetensors")
    )
    assert all(torch.equal(chosen[key], kept[key]) for key in chosen)


def test_without_rows_held_out_it_is_the_last(shared, tmp_path):
    report = shared.run(replace(CONFIG, steps=3), out=tmp_path / "out")
    assert report["injected_step"] == 3 == len(report["losses"])
    assert report["held_out_losses"] == [] and not (tmp_path / "out" / "checkpoints").exists()
    assert len(report["located_rows"]) == 3


# --- other ways to give a model -------------------------------------------------------------------


def test_the_published_ranking(tmp_path):
    """Of a pair of Llamas in float16: scores of 4 decimals, the lower neuron first among equals."""
    place = Place(tmp_path, "llama", "llama_gqa")
    place.teacher, place.student = place.teacher.half(), place.student.half()
    place.write()
    config = replace(CONFIG, rate=0.5, steps=2, modules="up,down")
    report = place.run(replace(config, compat="published"))
    exact = place.run(config, out=tmp_path / "exact")
    assert report["dtypes"] == ["float16", "float16"]
    for who in ("teacher", "student"):
        found = report["neurons"][who]["ffn"]
        for scores, neurons in zip(found["scores"], found["neurons"], strict=True):
            ranks = [(-score, neuron) for score, neuron in zip(scores, neurons, strict=True)]
            assert ranks == sorted(ranks)
        flat = torch.tensor(found["scores"]).flatten()
        torch.testing.assert_close(flat, flat.mul(1e4).round() / 1e4, rtol=0, atol=1e-6)
        assert found["scores"] != exact["neurons"][who]["ffn"]["scores"]
    assert all(values.isfinite().all() for _, values in place.deltas().values())
    with pytest.raises(InputError, match="computes in float16, not bfloat16"):
        place.run(replace(config, compat="published", dtype="bfloat16"), out=tmp_path / "no")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(tmp_path, dtype):
    place = Place(tmp_path)
    report = place.run(replace(CONFIG, dtype=dtype), holdout=HELD)
    assert report["dtypes"] == [dtype, dtype]
    network = load_file(place.out / "hypernetwork.safetensors")
    assert {tensor.dtype for tensor in network.values()} == {torch.float32}
    assert report["losses"][-1] < report["unedited_losses"][-1]


def test_models_in_memory_are_left_as_they_were(shared, tmp_path):
    teacher, student = shared.teacher, shared.student
    student.train()
    student.model.layers[0].eval()
    student.lm_head.weight.requires_grad_(False)
    models = teacher, student

    def seen():
        return [
            (name, p.detach().clone(), p.requires_grad, p.grad)
            for model in models
            for name, p in model.named_parameters()
        ], [(module.training, len(module._forward_hooks)) for m in models for module in m.modules()]

    before, modes = seen()
    config = dict(progress=False, holdout=HELD, student_tokenizer=zoo.tokenizer())
    try:
        report = run_laten(
            teacher, student, LOCATE, ALIGN, tmp_path / "out", CONFIG,
            teacher_tokenizer=zoo.tokenizer(), **config,
        )  # fmt: skip
        after, modes_after = seen()
    finally:
        student.eval()
        student.lm_head.weight.requires_grad_(True)
    assert modes_after == modes
    for (name, one, flag, grad), (_, other, flag_after, grad_after) in zip(
        before, after, strict=True
    ):
        assert torch.equal(one, other), name
        assert flag == flag_after and grad is None and grad_after is None, name
    assert files(tmp_path / "out") == files(shared.out)
    assert report["losses"] == shared.report["losses"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_models_in_memory_leave_no_progress(shared, tmp_path, monkeypatch):
    def stop(*_):
        raise RuntimeError("stopped here")

    monkeypatch.setattr(laten, "write_delta", stop)
    tokens = dict(teacher_tokenizer=zoo.tokenizer(), student_tokenizer=zoo.tokenizer())
    with pytest.raises(RuntimeError) as error:
        run_laten(
            shared.teacher, shared.student, LOCATE, ALIGN, tmp_path / "out",
            replace(CONFIG, steps=1), progress=False, **tokens,
        )  # fmt: skip
    assert not hasattr(error.value, "__notes__") and list(tmp_path.iterdir()) == []


def test_a_student_of_four_bits_is_refused_on_a_cpu(shared, tmp_path):
    """Before anything is located in: no gradient passes through it there. A teacher may be one."""
    import transformers

    for name in ("teacher", "student"):
        settings = transformers.BitsAndBytesConfig(load_in_4bit=True)
        packed = transformers.AutoModelForCausalLM.from_pretrained(
            shared.folder / name, quantization_config=settings, device_map={"": "cpu"}
        )
        zoo.save(packed, tmp_path / name)
    with pytest.raises(InputError, match=r"quantised \(bitsandbytes fp4\).* use the unquantised"):
        run_laten(shared.folder / "teacher", tmp_path / "student", LOCATE, ALIGN,
                  tmp_path / "out", CONFIG, progress=False)  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student", "teacher"]
    config = replace(CONFIG, steps=1, dtype="float32")
    report = run_laten(tmp_path / "teacher", shared.folder / "student", LOCATE, ALIGN,
                       tmp_path / "out", config, progress=False)  # fmt: skip
    assert report["counts"] == {"attention": 6, "ffn": 9}
