# SPDX-License-Identifier: Apache-2.0
"""`pkt plan`: what it says, from what little, and whether a run then takes as much."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import model_zoo
import pytest
import torch
import typer
from fake_hub import RANGE

from pkt_ext import artifact, cli, training_needs
from pkt_ext.errors import InputError
from pkt_ext.finetune import FinetuneConfig, finetune
from pkt_ext.methods import alignment_needs, semalign_budget, semalign_needs
from pkt_ext.methods.laten import LatenConfig, align
from pkt_ext.methods.seeking import SeekingConfig, extract
from pkt_ext.methods.semalign_config import SemAlignConfig
from pkt_ext.plan import plan, text
from pkt_ext.plan.common import duration, figure
from pkt_ext.probe import _pace, probe
from pkt_ext.streaming import checkpoint as checkpoint_module
from pkt_ext.streaming import needs
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import parse_bytes
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.needs import CONTEXT

MIB = 2**20
SIZE = r"[\d.]+ [MG]iB"  # the process that runs the tests may be a large one
ROWS = [{"prompt": f"{i} and {i}?", "completion": "so much " * (1 + i)} for i in range(5)]
SMALL = SeekingConfig(rank=4, max_length=32, device="cpu", prompt_format="plain")
QUIET = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SEVERAL = Path(__file__).parent / "several.py"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return model_zoo.save_pair(tmp_path_factory.mktemp("pair"), ROWS)


@pytest.fixture
def still(monkeypatch):
    """The process stays as large as it is, whatever is imported."""
    for where in (needs, training_needs, alignment_needs, semalign_needs, semalign_budget):
        monkeypatch.setattr(where, "resident_bytes", lambda: 300 * MIB)
    monkeypatch.setattr(training_needs, "TRAINER", 0)


@pytest.fixture
def no_weights(monkeypatch):
    """Reading a tensor is an error."""

    def read(*_, **__):
        raise AssertionError("a tensor was read")

    for name in ("load", "rows"):
        monkeypatch.setattr(checkpoint_module.Checkpoint, name, read)


def argv(pair, *more):
    models = [f"--{who}={pair / who}" for who in ("teacher", "student")]
    return ["plan", *models, "--device=cpu", "--rank=4", "--max-length=32", *more]


def test_options_are_those_of_the_verbs():
    commands = typer.main.get_command(cli.app).commands
    own = {p.name: p for p in commands["plan"].params}
    extra = {"method", "teacher", "student", "samples", "data", "train_dtype", "probe", "json"}
    extraction, laten, semalign = (
        {f.name for f in fields(c)} for c in (SeekingConfig, LatenConfig, SemAlignConfig)
    )
    training = {"batch", "load_in_4bit", "gradient_checkpointing"}
    assert own.keys() - extra - {"config"} <= extraction | training | laten | semalign
    for verb, names in (
        ("seeking", extraction),
        ("finetune", training),
        # but for what has another default or meaning there
        ("laten", laten - {"max_length", "dtype", "schedule"}),
        ("semalign", semalign - {"max_length", "dtype", "modules", "steps"}),
    ):
        for parameter in commands[verb].params:
            if parameter.name in own.keys() & names - {"device"}:
                assert own[parameter.name].opts == parameter.opts
                assert own[parameter.name].help == parameter.help


def test_the_table(pair, capsys):
    assert cli.run(argv(pair, "--budget=8GiB", "--samples=3")) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "seeking, 3 rows of up to 32 tokens, 8.0 GiB of memory (cpu)"
    assert max(len(line) for line in lines[3:]) <= 106
    phases = "prepare record forward tail backward reduce outer write in".split()
    table = [line.split()[0] for line in lines if re.match(r"  \w+ .*(MiB|GiB)", line)]
    assert [word for word in table if word in phases] == phases
    for words in (
        rf"extract \(pkt seeking\): {SIZE} at most; the smallest --budget that works is {SIZE}",
        r"4 rows at a time; the blocks are mapped from the files, which is page cache, the next",
        r"times are estimates, from one block with 3 x 32 tokens on this .*FLOP/s forward",
        r"weights at the rate the files give now",
        rf"finetune \(pkt finetune\): {SIZE} at most; the smallest --budget that works is",
        r"8 rows at a time of a batch of 64, float32: process .*, adapter .*, optimizer ",
        r"a step is [\d.]+ .FLOP, about",
        r"disk: start 1 MiB, with 1 MiB beside it until it is complete adapter 1 MiB, merged",
    ):
        assert re.search(words, " ".join(out.split())), words


def test_json_and_nothing_else(pair, no_weights, capsys):
    assert cli.run(argv(pair, "--json", "--no-probe", "--budget=8GiB", "--samples=2")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == 1 and found["budget"] == 2**33 and found["rates"] is None
    assert found["teacher"]["blocks"] == 3 and found["student"]["blocks"] == 2
    parameters = sum(p.numel() for p in model_zoo.pair("llama_gqa")[0].parameters())
    assert found["teacher"]["parameters"] == parameters
    assert found["teacher"]["stored_bytes"] == 4 * parameters
    extraction = found["extract"]
    assert extraction["seconds"] is None and extraction["blocks_resident"] == 3
    peak = max(phase["bytes"] for phase in extraction["phases"].values())
    assert extraction["predicted_bytes"] == peak >= 100 * MIB
    for facts in extraction["phases"].values():
        assert facts["bytes"] == sum(facts["parts"].values()) and facts["seconds"] is None
    for name in ("read_bytes", "flops"):
        assert extraction[name] == sum(p[name] for p in extraction["phases"].values()) > 0
    assert found["finetune"]["fits"] and found["finetune"]["micro_batch"] == 8
    assert text(found)


def test_options_can_stand_in_a_file(pair, tmp_path, capsys):
    (tmp_path / "plan.yaml").write_text(
        f"teacher: {pair / 'teacher'}\nstudent: {pair / 'student'}\nsamples: 2\nrank: 2\n"
        "max-length: 16\nbudget: 4GiB\nprobe: false\njson: true\nembeddings: false\ndevice: cpu\n"
    )
    assert cli.run(["plan", f"--config={tmp_path / 'plan.yaml'}", "--samples=3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["longest"], found["budget"]) == (3, 16, 2**32)
    assert "outer" not in found["extract"]["phases"]


@pytest.mark.parametrize(
    "more, says",
    [
        (["--method=tea"], "method is 'tea'; known is seeking, laten, semalign"),
        (["--rate=0.1", "--steps=3"], "--rate, --steps: no option of pkt plan --method seeking"),
        (["--student="], "--student is missing"),
        (["--samples=0"], "samples is 0; give at least 1"),
        (["--budget=1MiB"], r"1 MiB of memory is too little: the smallest --budget that works is"),
        (["--budget=1MiB", "--json"], rf"smallest --budget that works is {SIZE}"),
        (["--budget=lots"], "no amount of memory"),
        (["--rank=1000"], "rank 1000 is larger than a side"),
        (["--device=tpu"], "device 'tpu' cannot be used here"),
        (["--data=absent.jsonl"], "absent.jsonl"),
        (["--batch=0"], "batch is 0"),
        (["--train-dtype=int8"], "dtype is 'int8'"),
    ],
)
def test_refusals(pair, capsys, more, says):
    assert cli.run(argv(pair, "--no-probe", *more)) == 2
    out, err = capsys.readouterr()
    assert not out and re.search(says, err) and err.count("\n") == 1


def test_vocabularies_are_compared_by_size_where_there_is_no_tokenizer(pair, tmp_path):
    other = model_zoo.save(
        model_zoo.build("llama_gqa", **model_zoo.STUDENT | {"vocab": 300}), tmp_path / "other"
    )
    with pytest.raises(InputError, match="264 rows.*300 rows.*--vocabulary shared"):
        plan(pair / "teacher", other, SMALL, timed=False, samples=1)
    shared = plan(
        pair / "teacher", other, replace(SMALL, vocabulary="shared"), timed=False, samples=1
    )
    assert "outer" in shared["extract"]["phases"]


def test_a_process_of_several_is_refused(pair, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="pkt plan runs in one process"):
        plan(pair / "teacher", pair / "student", SMALL)


def test_a_hub_id_costs_headers(pair, serve, tmp_path, capsys):
    folder = model_zoo.save(
        model_zoo.build("llama_gqa", vocab=4096, hidden=128, ffn=512, layers=4), tmp_path / "big"
    )
    hub = serve(folder)
    more = ["--vocabulary=shared", "--budget=8GiB", "--json", "--teacher=someone/model"]
    assert cli.run(argv(pair, *more)) == 0
    found = json.loads(capsys.readouterr().out)
    weights = (folder / "model.safetensors").stat().st_size
    assert hub.bytes_of(".safetensors") <= RANGE < weights
    assert {name for _, name in hub.requests()} <= {"config.json", "model.safetensors"}
    teacher = found["teacher"]
    assert teacher["to_download"] == teacher["stored_bytes"] > 0.99 * (weights - RANGE)
    assert found["rates"]["read"] is None and found["rates"]["forward"]["flops"] > 0
    assert f"{-(-teacher['to_download'] // MIB)} MiB of it to be downloaded" in text(found)
    assert "reading the weights not counted" in " ".join(text(found).split())


def test_a_training_that_does_not_fit_is_said(pair, still, monkeypatch):
    monkeypatch.setattr(
        training_needs.TrainingNeeds, "peak", lambda self, rows: (5000 + 100 * rows) * MIB
    )
    for budget, size in (("5600MiB", 4), ("2GiB", None)):
        config = replace(SMALL, budget=budget)
        found = plan(pair / "teacher", pair / "student", config, samples=1, timed=False)
        assert found["finetune"]["fits"] == (size is not None)
        assert found["finetune"]["micro_batch"] == size
        assert found["finetune"]["smallest_budget"] >= 5108 * MIB
    says = "does not fit into 2.0 GiB; the smallest --budget that works is 5.0 GiB"
    assert says in text(found)


def test_a_device_that_is_not_here(pair, no_weights):
    config = replace(SMALL, device="cuda", budget="8GiB")
    found = plan(pair / "teacher", pair / "student", config, samples=2, timed=False)
    assert found["device"].startswith("cuda")
    extraction = found["extract"]
    assert extraction["phases"]["prepare"]["bytes"] == CONTEXT
    assert extraction["phases"]["backward"]["parts"]["weights"] > 0
    assert found["finetune"]["parts"]["process"] == CONTEXT
    assert found["finetune"]["fits"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to ask")
def test_a_device_that_is_not_here_cannot_be_asked(pair):
    with pytest.raises(InputError, match="no device 'cuda' here .*: --budget 8GiB"):
        plan(pair / "teacher", pair / "student", replace(SMALL, device="cuda"))


def test_no_times_where_memory_is_short_or_a_weight_is_nan(pair, tmp_path, monkeypatch, caplog):
    teacher = model_zoo.pair("llama_gqa")[0]
    with torch.no_grad():
        teacher.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    damaged = model_zoo.save(teacher, tmp_path / "damaged")
    found = plan(damaged, pair / "student", replace(SMALL, budget="8GiB"), samples=1)
    assert found["rates"] is None and "mlp.up_proj.weight holds NaN" in caplog.text
    monkeypatch.setattr("pkt_ext.probe.available_bytes", lambda device: 1000)
    found = plan(pair / "teacher", pair / "student", replace(SMALL, budget="8GiB"), samples=1)
    assert found["rates"] is None and found["finetune"]["step_seconds"] is None
    assert "estimates" not in text(found)


def test_time_is_for_each_sample_and_each_operation():
    """5 ms a sample and 1 GFLOP/s, from 1 x 16 and 2 x 64 tokens of 1 MFLOP each."""
    few, many = 0.005 + 0.016, 2 * 0.005 + 0.128
    found = _pace(few, many, 16_000_000, 128_000_000, 2)
    assert (found.fixed, found.flops) == pytest.approx((0.005, 1e9))
    assert found.seconds(2, 128e6) == pytest.approx(many)
    slower = _pace(few, many, 16_000_000, 128_000_000, 2, most=0.98e9)
    assert slower.flops == 0.98e9 and slower.fixed < 0.005
    assert slower.seconds(2, 128e6) == pytest.approx(many)
    for seconds in (0.01, 0.13):  # of noise: more tokens in no more time, or in more than in all
        found = _pace(0.01, seconds, 16_000_000, 128_000_000, 1)
        assert found.fixed == 0 and found.seconds(1, 128e6) == pytest.approx(seconds)


def test_mapped_blocks_are_read_again_where_the_cache_is_small(pair, monkeypatch):
    def reads():
        found = plan(
            pair / "teacher", pair / "student", replace(SMALL, budget="4GiB"), timed=False
        )["extract"]
        return [found["phases"][name]["read_bytes"] for name in ("forward", "backward")]

    once, nothing = reads()
    assert once > 0 == nothing
    monkeypatch.setattr("pkt_ext.plan.seeking.available_bytes", lambda device: once - 1)
    assert reads() == [once, once]


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "gemma2"])
def test_a_probe_is_of_the_block_and_leaves_no_trace(family, pair, tmp_path, monkeypatch):
    model = StreamedModel(Checkpoint.open(model_zoo.save(model_zoo.build(family), tmp_path / "m")))
    monkeypatch.setattr("pkt_ext.probe._SECONDS", 1e9)  # however busy the machine is
    found = probe(model, (3, 48))
    assert found.shape == (3, 48)
    assert min(found.forward.flops, found.backward.flops, found.read) > 0
    assert found.window is None and found.factor is None
    assert all(p.is_meta for p in model.model.parameters())
    assert "forward" not in vars(model.blocks[0])
    monkeypatch.setattr("pkt_ext.probe._SECONDS", 0.0)  # nothing but what was tried is affordable
    assert probe(model, (3, 128)).shape == (1, 64)


def test_a_run_takes_what_was_planned(pair, still, tmp_path):
    """The same function predicts both; what is read and spilled is what was said."""
    config = replace(SMALL, budget="4GiB", micro_batch=2, dtype="bfloat16")
    data = pair / "rows.jsonl"
    found = plan(pair / "teacher", pair / "student", config, data=data, timed=False)
    report = extract(
        pair / "teacher", pair / "student", data, tmp_path / "out", config, progress=False
    )
    planned, memory = found["extract"], report["memory"]
    assert found["samples"] == report["samples"]
    assert memory.items() >= planned["allotment"].items()
    assert memory["predicted_bytes"] == planned["predicted_bytes"]
    read = {name: phase["read_bytes"] for name, phase in planned["phases"].items()}
    head = 4 * model_zoo.VOCAB * model_zoo.TEACHER["hidden"]
    assert report["bytes_read"] == read["forward"] + read["tail"] + read["backward"] + head
    assert report["spilled_bytes"] == planned["written_bytes"] > 0
    start = sum(
        (tmp_path / "out" / folder / "adapter_model.safetensors").stat().st_size
        for folder in ("start", "delta")
    )
    assert found["disk"]["start"] <= start < 1.5 * found["disk"]["start"]
    least = f"{planned['smallest_budget'] // MIB}MiB"
    again = plan(
        pair / "teacher", pair / "student", replace(config, budget=least), data=data, timed=False
    )
    assert again["extract"]["predicted_bytes"] <= parse_bytes(least)


def test_a_training_takes_what_was_planned(pair, still, tmp_path):
    config = replace(SMALL, budget="4GiB", max_length=24)
    training = FinetuneConfig(batch=4, gradient_checkpointing=False)
    found = plan(pair / "teacher", pair / "student", config, training, samples=2, timed=False)
    extract(pair / "teacher", pair / "student", ROWS, tmp_path / "init", config, progress=False)
    trained = replace(
        training, max_steps=1, max_length=24, budget="4GiB", device="cpu", prompt_format="plain"
    )
    report = finetune(
        pair / "student", tmp_path / "init", ROWS, tmp_path / "adapter", trained, progress=False
    )
    planned = found["finetune"]
    assert report["predicted_bytes"] == planned["predicted_bytes"]
    assert report["micro_batch"] == planned["micro_batch"] == 4
    assert report["trainable_parameters"] == planned["trainable_parameters"]
    written = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert found["disk"]["adapter"] <= written < 1.5 * found["disk"]["adapter"]


def test_what_is_merged_is_as_large_as_was_said(pair):
    found = plan(pair / "teacher", pair / "student", SMALL, samples=1, timed=False)
    student = model_zoo.pair("llama_gqa")[1]
    assert found["disk"]["merged"] == 4 * sum(p.numel() for p in student.parameters())


def test_times_add_up(pair):
    found = plan(pair / "teacher", pair / "student", replace(SMALL, budget="8GiB"), samples=3)
    seconds = {name: p["seconds"] for name, p in found["extract"]["phases"].items()}
    known = {name for name, value in seconds.items() if value is not None}
    assert known == {"forward", "tail", "backward", "reduce", "outer"}
    assert found["extract"]["seconds"] == pytest.approx(sum(seconds[name] for name in known))
    rates, forward = found["rates"], found["extract"]["phases"]["forward"]
    computing = 3 * 3 * rates["forward"]["fixed"] + forward["flops"] / rates["forward"]["flops"]
    slower = max(computing, forward["read_bytes"] / rates["read"])
    assert forward["seconds"] == pytest.approx(slower)
    exact = plan(
        pair / "teacher", pair / "student", replace(SMALL, svd="exact", budget="8GiB"), samples=3
    )
    assert exact["extract"]["phases"]["reduce"]["seconds"] is None
    assert "cutting and factoring not counted" in " ".join(text(exact).split())


@pytest.mark.parametrize(
    "seconds, shown",
    [(None, "-"), (0.04, "0.0 s"), (12.3, "12 s"), (100, "1.7 min"), (9000, "2.5 h"),
     (200_000, "2.3 d")],
)  # fmt: skip
def test_durations(seconds, shown):
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    "value, shown",
    [(0, "-"), (999, "999 "), (1500, "1.5 K"), (13.02e9, "13.0 G"), (999.6e9, "1.0 T"),
     (123e15, "123 P"), (5e18, "5000 P")],
)  # fmt: skip
def test_counts(value, shown):
    assert figure(value) == shown


# --- LaTen ----------------------------------------------------------------------------------------

LATEN = LatenConfig(rate=0.25, rows=3, max_length=32, device="cpu", prompt_format="plain")


def laten_argv(pair, *more):
    models = [f"--{who}={pair / who}" for who in ("teacher", "student")]
    return ["plan", "--method=laten", *models, "--device=cpu", "--max-length=32", *more]


def test_the_table_of_laten(pair, no_weights, capsys):
    more = ["--budget=8GiB", "--samples=5", "--rate=0.25", "--rows=3", "--keep-checkpoints"]
    assert cli.run(laten_argv(pair, *more)) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == (
        "laten, 5 rows to locate by, 3 a step, of up to 32 tokens, 8.0 GiB of memory (cpu)"
    )
    assert max(len(line) for line in lines[3:]) <= 106
    for words in (
        rf"pkt laten: {SIZE} at most; the smallest --budget that works is {SIZE}",
        r"8 attention and 12 FFN neurons in each of 2 blocks",
        r"teacher: 4 rows at a time; the blocks are mapped from the files, which is page cache, ",
        rf"locate \(teacher\) +{SIZE} +{SIZE} .* locate \(student\) .* align +{SIZE} .* write ",
        r"times are not estimated",
        r"disk: delta 1 MiB, hypernetwork 1 MiB, every step's 1 MiB, with 1 MiB beside it until",
    ):
        assert re.search(words, " ".join(out.split())), words


def test_the_document_of_laten(pair, no_weights, capsys):
    more = ["--budget=8GiB", "--samples=5", "--rate=0.25", "--rows=3", "--json"]
    assert cli.run(laten_argv(pair, *more)) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["method"], found["budget"]) == (1, "laten", 2**33)
    assert (found["samples"], found["rows"], found["longest"]) == (5, 3, 32)
    stages = found["stages"]
    assert list(stages) == ["locate (teacher)", "locate (student)", "align", "write"]
    assert found["predicted_bytes"] == max(stage["bytes"] for stage in stages.values())
    for stage in stages.values():
        assert stage["bytes"] == sum(stage["parts"].values())
        assert stage["bytes"] == max(phase["bytes"] for phase in stage["phases"].values())
    for name in ("read_bytes", "flops"):
        assert found[name] == sum(stage[name] for stage in stages.values()) > 0
    d_t, d_s = model_zoo.TEACHER["hidden"], model_zoo.STUDENT["hidden"]
    # four types of two blocks: what each neuron takes forward, and back by three products
    neurons = 5 * 2 * 2 * (8 + 12)
    alone = alignment_flops(pair, replace(LATEN, rows=1)) - alignment_flops(pair, LATEN) / 3
    assert alone * 3 / 2 == neurons * (6 * d_t * d_s + 4 * d_t**2)


def alignment_flops(pair, config) -> int:
    found = plan(pair / "teacher", pair / "student", config, method="laten", samples=5)
    return found["stages"]["align"]["flops"]


@pytest.mark.parametrize(
    "more, says",
    [
        (["--rank=4", "--batch=2"], "--batch, --rank: no option of pkt plan --method laten"),
        (["--data=rows.jsonl"], "--method laten takes --samples"),
        (["--rate=0"], "rate is 0"),
        (["--steps=9", "--samples=8"], "9 steps need as many rows to locate by"),
        (["--blocks=3"], "blocks is 3; one of the models has 2"),
        (["--budget=1MiB"], rf"1 MiB of memory is too little: the smallest .* works is {SIZE}"),
    ],
)
def test_refusals_of_laten(pair, capsys, more, says):
    assert cli.run(laten_argv(pair, *more)) == 2
    out, err = capsys.readouterr()
    assert not out and re.search(says, err) and err.count("\n") == 1


def test_laten_on_a_device_that_is_not_here(pair, no_weights):
    config = replace(LATEN, device="cuda", budget="8GiB")
    found = plan(pair / "teacher", pair / "student", config, method="laten", samples=2)
    stages = found["stages"]
    assert all(stage["parts"]["process"] == CONTEXT for stage in stages.values())
    student = model_zoo.pair("llama_gqa")[1]
    assert stages["align"]["parts"]["weights"] == 4 * sum(p.numel() for p in student.parameters())
    assert "save" not in stages["align"]["phases"]
    assert stages["locate (teacher)"]["phases"]["forward"]["parts"]["weights"] > 0


@pytest.mark.parametrize(
    "family, again",
    [("gemma2", True), ("gemma3", False), ("gpt2", True), ("opt", False), ("phi3_gqa", True)],
)
def test_an_alignment_of_any_family(family, again, pair, tmp_path):
    student = model_zoo.save(model_zoo.build(family, **model_zoo.STUDENT), tmp_path)
    config = replace(LATEN, budget="8GiB", dtype="bfloat16", gradient_checkpointing=again)
    found = plan(pair / "teacher", student, config, method="laten", samples=1)
    align = found["stages"]["align"]
    # logits of every position, in bfloat16 and float32, and a gradient of them
    assert align["phases"]["rows"]["parts"]["activations"] > 31 * model_zoo.VOCAB * (2 + 2 * 4)
    head = 2 * 31 * model_zoo.VOCAB * model_zoo.STUDENT["hidden"]
    assert align["flops"] > 3 * 3 * head  # of 3 rows: forward, backward, and as the student is


def test_a_laten_run_takes_what_was_planned(pair, still, tmp_path, monkeypatch):
    """A budget that is too small is refused before a pass; the smallest one named does."""

    def run(budget):
        return align(
            pair / "teacher", pair / "student", ROWS[:3], ROWS, tmp_path / "out",
            replace(LATEN, budget=budget), progress=False,
        )  # fmt: skip

    with monkeypatch.context() as patch:
        patch.setattr("pkt_ext.methods.laten.locate_in", None)
        with pytest.raises(InputError, match=rf"too little: .* works is {SIZE} \(to align: ") as no:
            run("100MiB")
        assert not list(tmp_path.iterdir())
    least = re.search(rf"works is ({SIZE})", str(no.value))[1]
    report = run(least)
    planned = plan(
        pair / "teacher", pair / "student", replace(LATEN, budget="8GiB", steps=3), method="laten",
        samples=3,
    )  # fmt: skip
    assert report["align_predicted_bytes"] <= parse_bytes(least)
    assert report["align_predicted_bytes"] <= planned["stages"]["align"]["bytes"]
    for name in ("delta", "hypernetwork"):
        written = (tmp_path / "out" / f"{name}.safetensors").stat().st_size
        assert 0 < planned["disk"][name] <= written + 4096
        assert written < 1.5 * planned["disk"][name]
    artifact.read(tmp_path / "out", kind="delta")


# --- SemAlign -------------------------------------------------------------------------------------

SEMALIGN = SemAlignConfig(
    objective="geometry", steps=2, batch=2, micro_batch=2, max_length=32, device="cpu",
    prompt_format="plain", map_cache="none", hold_out=0.4,
)  # fmt: skip


def semalign_plan(pair, config=SEMALIGN, samples=5, student=None):
    student = student or pair / "student"
    return plan(pair / "teacher", student, config, method="semalign", samples=samples)


def semalign_argv(pair, *more):
    models = [f"--{who}={pair / who}" for who in ("teacher", "student")]
    return ["plan", "--method=semalign", *models, "--device=cpu", "--max-length=32", *more]


def test_the_table_of_semalign(pair, no_weights, capsys):
    assert cli.run(semalign_argv(pair, "--budget=8GiB", "--samples=5", "--critical=1")) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "semalign (cosine), 5 rows of up to 32 tokens, 8.0 GiB of memory (cpu)"
    assert max(len(line) for line in lines[3:]) <= 108
    for words in (
        rf"pkt semalign: {SIZE} at most; the smallest --budget that works is {SIZE}",
        r"at most 1 phases? of 5 steps, LoRA on a block; which blocks are critical is not known",
        r"1 row held out map: 32 MiB of the heads at a time",
        r"attribution: 4 rows at a time; the blocks are mapped from the files, which is page cache",
        rf"map +{SIZE} .* attribution +{SIZE} .* targets +{SIZE} .* train +{SIZE} ",
        rf"train: {SIZE} in block 0, {SIZE} in block 1, {SIZE} to look at held-out rows",
        r"for 264 shared tokens: the tokenizers are not looked at; times are not estimated",
        r"disk: output 1 MiB, with 1 MiB beside it until it is complete: targets 1 MiB, .* merged",
    ):
        assert re.search(words, " ".join(out.split())), words


def test_the_document_of_semalign(pair, no_weights, capsys):
    more = ["--budget=8GiB", "--samples=5", "--objective=fisher", "--pairing=similarity", "--json"]
    assert cli.run(semalign_argv(pair, *more)) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["method"], found["budget"]) == (1, "semalign", 2**33)
    assert (found["samples"], found["held_out"], found["longest"]) == (5, 1, 32)
    assert (found["phases"], found["steps"], found["shared_tokens"]) == (2, 50, model_zoo.VOCAB)
    stages = found["stages"]
    names = ["map", "attribution", "compare teacher", "compare student", "targets", "train"]
    assert list(stages) == names
    assert found["predicted_bytes"] == max(stage["bytes"] for stage in stages.values())
    for stage in stages.values():
        assert stage["bytes"] == sum(stage["parts"].values())
        assert stage["bytes"] == max(phase["bytes"] for phase in stage["phases"].values())
    for name in ("read_bytes", "flops"):
        assert found[name] == sum(stage[name] for stage in stages.values()) > 0
    assert set(stages["train"]["phases"]) == {"block 0", "block 1", "rows", "look", "save", "write"}
    flops = stages["train"]["phase_flops"]
    # three products with the head for states, lens and output; teacher's logits; two ways back
    row = 2 * 31 * model_zoo.VOCAB * (5 * model_zoo.STUDENT["hidden"] + model_zoo.TEACHER["hidden"])
    assert flops["block 0"] > flops["block 1"] > 50 * 4 * row
    assert flops["block 1"] < 2 * 50 * 4 * row


def test_what_is_trained_is_what_is_planned(pair, no_weights):
    """By the schedule: blocks, their parameters in float32, two moments of each."""
    student = model_zoo.pair("llama_gqa")[1]
    block = sum(p.numel() for p in student.model.layers[0].parameters())
    for changes, counted, held in (
        ({}, 16 * (80 + 80 + 48 + 64), 2),
        ({"schedule": "pairs", "critical": 1, "modules": "up"}, 16 * (32 + 48), 1),
        ({"train": "block"}, block, 2),
        ({"objective": "distillation", "modules": "up"}, 2 * 16 * (32 + 48), 1),
    ):
        config = replace(SEMALIGN, **changes)
        phases = semalign_plan(pair, config)["stages"]["train"]["phases"]
        first = phases.get("block 0") or phases["all blocks"]
        assert first["parts"]["optimizer"] == 8 * counted
        last = phases.get("block 1") or first
        assert last["parts"]["trained"] == 4 * held * counted


@pytest.mark.parametrize(
    "more, says",
    [
        (["--rate=0.1", "--vocabulary=shared"], "--rate, --vocabulary: no option of pkt plan "
                                                "--method semalign"),
        (["--data=rows.jsonl"], "--method semalign takes --samples"),
        (["--objective=finetune", "--pairing=similarity"], "pairing is similarity, but the base"),
        (["--critical=0"], "critical is 0"),
        (["--budget=1MiB"], rf"1 MiB of memory is too little: the smallest .* works is {SIZE}"),
    ],
)  # fmt: skip
def test_refusals_of_semalign(pair, capsys, more, says):
    assert cli.run(semalign_argv(pair, *more)) == 2
    out, err = capsys.readouterr()
    assert not out and re.search(says, err) and err.count("\n") == 1


def test_semalign_on_a_device_that_is_not_here(pair, no_weights):
    found = semalign_plan(pair, replace(SEMALIGN, device="cuda", budget="8GiB", max_length=16))
    stages = found["stages"]
    assert all(stage["parts"]["process"] == CONTEXT for stage in stages.values())
    student = model_zoo.pair("llama_gqa")[1]
    training = stages["train"]["phases"]["block 1"]["parts"]
    assert training["weights"] == 4 * sum(p.numel() for p in student.parameters())
    assert training["heads"] == 4 * model_zoo.VOCAB * model_zoo.TEACHER["hidden"]
    assert "save" not in stages["train"]["phases"]
    assert stages["targets"]["phases"]["forward"]["parts"]["weights"] > 0


def test_semalign_of_hub_ids_costs_headers(pair, serve, capsys):
    hub = serve(pair / "student")
    more = ["--budget=24GiB", "--device=cuda", "--json", "--student=someone/model"]
    assert cli.run(semalign_argv(pair, *more)) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name for _, name in hub.requests()} <= {"config.json", "model.safetensors"}
    assert hub.bytes_of(".safetensors") <= RANGE
    assert found["student"]["to_download"] > 0 == found["teacher"]["to_download"]


@pytest.mark.parametrize(
    "family, changes",
    [
        ("gemma3", {"objective": "geometry"}),  # blocks of two kinds take turns
        ("gpt2", {"objective": "cosine", "train": "block", "dtype": "bfloat16"}),
        ("opt_post_norm", {"objective": "fisher", "gradient_checkpointing": False}),
        ("phi3_gqa", {"objective": "geometry", "dropout": 0.1, "positions": "all"}),
        ("qwen3", {"objective": "fisher", "output": "none"}),
    ],
)
def test_a_steering_of_any_family(family, changes, pair, tmp_path):
    """Of as many blocks as there are, or of fewer, with what the others add."""
    took = []
    for layers in (3, 8):
        sizes = model_zoo.STUDENT | {"layers": layers}
        student = model_zoo.save(model_zoo.build(family, **sizes), tmp_path / str(layers))
        config = replace(SEMALIGN, budget="8GiB", **changes)
        found = semalign_plan(pair, config, samples=4, student=student)
        phases = found["stages"]["train"]["phases"]
        took.append([phases[f"block {n}"]["parts"]["activations"] for n in range(layers)])
    few, many = took
    hidden = 2 * 32 * 32 * (2 if changes.get("dtype") else 4)
    assert few[-1] > hidden
    assert many[-1] <= few[0] + 2 * hidden
    if changes.get("output") == "none":  # what follows the block does not run
        assert len(set(many)) == 1
    else:
        assert many[0] - many[3] >= 3 * hidden  # what goes into each block is kept


def test_a_semalign_run_takes_what_was_planned(pair, still, tmp_path, monkeypatch):
    """A budget that is too small is refused before anything; the smallest one named does."""
    from pkt_ext.methods import semalign

    out, place = tmp_path / "out", tmp_path / "out.progress"

    def run(budget):
        return semalign.align(
            pair / "teacher", pair / "student", ROWS, out, replace(SEMALIGN, budget=budget),
            progress=False,
        )  # fmt: skip

    with monkeypatch.context() as patch:
        patch.setattr(semalign, "build_map", None)
        with pytest.raises(
            InputError, match=rf"too little: .* works is {SIZE} \(to build the map\)"
        ) as no:
            run("100MiB")
        least = parse_bytes(re.search(rf"works is ({SIZE})", str(no.value))[1])
        with pytest.raises(InputError, match="the smallest --budget that works is"):
            run(str(int(0.8 * least)))
        assert not list(tmp_path.iterdir())
    planned = semalign_plan(pair, replace(SEMALIGN, budget="8GiB"))

    written = {}

    def stop(*_):  # what lies beside the output is all there
        kinds = {"targets": "[lo]*.activations", "observed": "[!lop]*.activations",
                 "prefix": "prefix*", "learned": "phase*"}  # fmt: skip
        for name, kind in kinds.items():
            written[name] = sum(file.stat().st_size for file in place.glob(kind))
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(semalign, "_write", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            run(str(least))
    for name, size in written.items():
        assert 0 < size <= planned["disk"][name] + 4096, name
    spaces = []
    monkeypatch.setattr(artifact, "_check_space", lambda out, planned: spaces.append(planned))
    report = run(str(least))
    assert 0 < spaces[0] <= planned["disk"]["output"] + written["prefix"] + 8192
    assert report["budget"] == least
    assert report["train_predicted_bytes"] <= least
    assert report["train_predicted_bytes"] <= planned["stages"]["train"]["bytes"]
    assert report["passes"]["map"]["chunk_bytes"] <= 2**25
    size = (out / "adapter_model.safetensors").stat().st_size
    assert planned["disk"]["output"] <= size < 1.5 * planned["disk"]["output"] + 4096


def test_the_map_is_made_of_smaller_pieces_where_memory_is_short(pair, still):
    stages = []
    for budget in ("8GiB", "480MiB"):
        found = semalign_plan(pair, replace(SEMALIGN, budget=budget))
        stages.append(found["stages"]["map"])
        assert found["stages"]["map"]["bytes"] <= found["budget"]
    whole, pieces = (stage["chunk_bytes"] for stage in stages)
    assert whole == 2**25 > pieces
    assert stages[0]["bytes"] - stages[1]["bytes"] == 6 * (whole - pieces)


# --- predicted against measured -------------------------------------------------------------------
# Models whose weights, heads and scores outweigh the interpreter, a few short rows of data.


@pytest.fixture(scope="module")
def start():
    """start(argv) -> what a `pkt` command in a process of its own has printed."""
    with subprocess.Popen(
        [sys.executable, SEVERAL], env=QUIET, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip

        def run(arguments):
            process.stdin.write(json.dumps({"argv": arguments, "size": 1}) + "\n")
            process.stdin.flush()
            found = json.loads(process.stdout.readline())
            assert found["codes"] == [0], found
            return found["out"][0]

        yield run
        process.stdin.close()


def make_pair(folder, family, dtype, teacher, student, *, tokens=None, rows=3):
    for who, sizes in (("teacher", teacher), ("student", student)):
        model = model_zoo.build(family, layers=2, heads=8, **sizes)
        model_zoo.save(model.to(getattr(torch, dtype)), folder / who, tokens=tokens)
    rows = [{"prompt": f"{i}?", "completion": "so much " * (8 + i)} for i in range(rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"--{who}={folder / who}" for who in ("teacher", "student")]


@pytest.mark.parametrize(
    "family, stored, teacher, student",
    [
        ("llama_gqa", "bfloat16", dict(hidden=1024, ffn=2816, vocab=32000), dict(hidden=256)),
        ("gpt2", "float16", dict(hidden=1024, ffn=4096, vocab=50257), dict(hidden=512)),
        ("gemma2", "bfloat16", dict(hidden=768, ffn=3072, vocab=65536), dict(hidden=256)),
        ("qwen3", "bfloat16", dict(hidden=1024, ffn=3072, vocab=65536), dict(hidden=256)),
        ("gpt_neox", "float16", dict(hidden=1024, ffn=4096, vocab=50304), dict(hidden=256)),
    ],
)
def test_within_15_percent_of_the_measured_peak(family, stored, teacher, student, start, tmp_path):
    student |= {"ffn": 512, "vocab": teacher["vocab"]}
    models = make_pair(tmp_path, family, stored, teacher, student)
    options = [*models, f"--data={tmp_path / 'rows.jsonl'}", "--device=cpu", "--dtype=float32",
               "--svd=fast", "--rank=4", "--prompt-format=plain", "--budget=16GiB"]  # fmt: skip
    planned = json.loads(start(["plan", *options, "--json", "--no-probe"]))["extract"]
    start(["seeking", *options, f"--out={tmp_path / 'out'}", "-q"])
    memory = json.loads((tmp_path / "out" / "report.json").read_text())["memory"]
    measured = memory["peak_bytes"]
    assert measured > 450 * MIB  # a third and more is not the interpreter's
    assert memory["predicted_bytes"] == pytest.approx(measured, rel=0.15)
    assert planned["predicted_bytes"] == pytest.approx(measured, rel=0.15)


def test_a_training_within_15_percent(tmp_path):
    sizes = dict(hidden=768, ffn=2048, vocab=32000)
    models = make_pair(tmp_path, "llama_gqa", "bfloat16", sizes, sizes)
    out = tmp_path / "out"
    options = ["--device=cpu", "--budget=16GiB", "--prompt-format=plain", "--max-steps=1",
               "--batch=2", f"--data={tmp_path / 'rows.jsonl'}", f"--out={out}", "-q"]  # fmt: skip
    command = [sys.executable, "-m", "pkt_ext", "finetune", models[1], *options]
    subprocess.run(command, check=True, env=QUIET)
    report = json.loads((out / "report.json").read_text())
    assert report["peak_bytes"] > 600 * MIB
    assert report["predicted_bytes"] == pytest.approx(report["peak_bytes"], rel=0.15)


@pytest.mark.parametrize(
    ("family", "stored", "mode"),
    [("llama_gqa", "bfloat16", "first-order"), ("gpt2", "float16", "top")],
)
def test_laten_within_15_percent(family, stored, mode, start, tmp_path):
    """Student weights converted and held, a hypernetwork with its moments, logits of 32k tokens."""
    sizes = dict(ffn=2048, vocab=32000)
    models = make_pair(
        tmp_path, family, stored, dict(hidden=1024) | sizes, dict(hidden=768) | sizes
    )
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    start(["laten", *models, f"--locate={rows}", f"--align={rows}", f"--out={out}", "--steps=2",
           "--rows=2", "--device=cpu", "--dtype=float32", f"--mode={mode}", "-q",
           "--prompt-format=plain", "--budget=16GiB"])  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["align_peak_bytes"] > 600 * MIB
    assert report["align_predicted_bytes"] == pytest.approx(report["align_peak_bytes"], rel=0.15)
    for cost in report["passes"].values():
        assert cost["predicted_bytes"] == pytest.approx(cost["peak_bytes"], rel=0.15)


@pytest.mark.parametrize(
    ("family", "stored", "options"),
    [
        ("gpt2", "float16", ["--objective=fisher", "--dtype=float32", "--batch=2"]),
        ("gemma2", "bfloat16", ["--objective=cosine", "--batch=4", "--train=block"]),
    ],
)
def test_semalign_within_10_percent(family, stored, options, tmp_path):
    """A student converted, or mapped and written to; the teacher's head; logits of 32k tokens."""
    sizes = dict(ffn=768, vocab=32000)
    models = make_pair(
        tmp_path, family, stored, dict(hidden=384) | sizes, dict(hidden=320) | sizes,
        tokens=model_zoo.tokenizer(size=32000), rows=6,
    )  # fmt: skip
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pkt_ext", "semalign", *models, f"--out={out}", "--steps=2",
               f"--data={tmp_path / 'rows.jsonl'}", "--micro-batch=2", "--hold-out=0.3", "-q",
               "--device=cpu", "--map-cache=none", "--prompt-format=plain",
               "--budget=16GiB"]  # fmt: skip
    subprocess.run([*command, *options], check=True, env=QUIET)
    report = json.loads((out / "report.json").read_text())
    assert report["train_peak_bytes"] > 500 * MIB
    assert report["train_predicted_bytes"] == pytest.approx(report["train_peak_bytes"], rel=0.1)
    costs = report["passes"]
    assert costs["map"]["peak_bytes"] < costs["map"]["predicted_bytes"]  # of any head of this width
    for name in ("attribution", "targets"):
        cost = costs[name]
        assert cost["predicted_bytes"] == pytest.approx(cost["peak_bytes"], rel=0.1)
