# SPDX-License-Identifier: Apache-2.0
"""Several processes: the result of one, one line said, no process left waiting, kills survived."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import model_zoo
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import distributed

from pkt_ext import cli
from pkt_ext.errors import InputError
from pkt_ext.streaming import ranks
from pkt_ext.streaming.batches import Sample
from pkt_ext.streaming.ranks import World

ROWS = [{"prompt": f"{i} + {i} =", "completion": f"{2 * i}" * (1 + i % 3)} for i in range(5)]
SEVERAL = Path(__file__).parent / "several.py"
FACTORS = ("start/adapter_model.safetensors", "delta/adapter_model.safetensors")
QUIET = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def write_rows(place, rows):
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(place, out, *more):
    return ["seeking", f"--teacher={place / 'teacher'}", f"--student={place / 'student'}",
            f"--data={place / 'rows.jsonl'}", f"--out={out}", "--rank=4", "--device=cpu",
            "--micro-batch=2", *more]  # fmt: skip


def report(out):
    return json.loads((out / "report.json").read_text())


def assert_equal_bytes(out, other):
    for name in FACTORS:
        assert (out / name).read_bytes() == (other / name).read_bytes()


def products(out) -> dict[str, torch.Tensor]:
    tensors = load_file(out / FACTORS[0])
    found = {}
    for name, a in tensors.items():
        for down, up in (("lora_A.weight", "lora_B.weight"), ("embedding_A", "embedding_B")):
            if name.endswith(down):
                found[name] = tensors[name.removesuffix(down) + up].double() @ a.double()
    assert 2 * len(found) == len(tensors)
    return found


def assert_same(out, alone):
    """Same blocks and windows as one process; factors and figures within rounding."""
    ours, theirs = report(out), report(alone)
    assert ours["blocks"] == theirs["blocks"] and ours["samples"] == theirs["samples"]
    assert ours["block_scores"] == pytest.approx(theirs["block_scores"], rel=1e-6)
    assert list(ours["losses"]) == list(theirs["losses"])
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-6)
    assert list(ours["windows"]) == list(theirs["windows"])
    for name, window in ours["windows"].items():
        for key, value in theirs["windows"][name].items():
            near = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            assert window[key] == near, (name, key)
    left, right = products(out), products(alone)
    assert left.keys() == right.keys() and left
    for name, product in left.items():
        assert (product - right[name]).norm() <= 1e-5 * right[name].norm(), name


@pytest.fixture(scope="module")
def start():
    """start(argv, size, ...) -> what became of a command's processes; see several.py."""
    with subprocess.Popen(
        [sys.executable, SEVERAL],
        env=QUIET,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def run(argv, size, **how):
            process.stdin.write(json.dumps({"argv": argv, "size": size} | how) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory, start):
    """A pair, data, and what one process makes of them, `alone`, and what two, `both`."""
    folder = model_zoo.save_pair(tmp_path_factory.mktemp("several"), ROWS)
    for size, name in ((1, "alone"), (2, "both")):
        found = start(arguments(folder, folder / name, "-q"), size)
        assert found["codes"] == [0] * size
    (folder / "seen").write_text(json.dumps(found["seen"]))
    return folder


# --- through the launchers ------------------------------------------------------------------------

TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes=2", "--multi_gpu",
              "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
              "--main_process_port=0"]  # fmt: skip


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_launched(place, tmp_path, launcher):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "pkt_ext", *arguments(place, out)],
        capture_output=True, text=True, env=QUIET, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{out}: ") and "pkt:" not in done.stderr
    assert_same(out, place / "alone")
    each = report(out)["processes"]
    assert [process["samples"] for process in each] == [3, 2]
    assert report(out)["memory"]["peak_bytes"] == max(p["peak_bytes"] for p in each)
    assert not out.with_name("out.progress").exists()


# --- the same result ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "student", "size", "rows", "more"),
    [
        ("llama_tied", "llama_gqa", 2, 3, ()),  # the tied teacher's embedding and head are cut
        ("gpt_neox", "gpt_neox", 2, 4, ("--svd=exact",)),  # one matrix holds q, k and v
        ("gemma2", "gemma2", 3, 3, ("--no-mlp",)),
        ("opt", "opt", 2, 5, ()),
    ],
)
def test_families(tmp_path, start, family, student, size, rows, more):
    model_zoo.save(model_zoo.build(family, **model_zoo.TEACHER), tmp_path / "teacher")
    model_zoo.save(model_zoo.build(student, **model_zoo.STUDENT), tmp_path / "student")
    write_rows(tmp_path, ROWS[:rows])
    for out, count in (("alone", 1), ("out", size)):
        found = start(arguments(tmp_path, tmp_path / out, *more), count)
        assert found["codes"] == [0] * count, found["err"]
    assert_same(tmp_path / "out", tmp_path / "alone")


def test_steering_as_the_only_process(place, tmp_path, start):
    """A launcher's process gets its model wrapped by accelerate, be it the only one."""
    losses = []
    for name, run in (("launched", lambda argv: start(argv, 1)["codes"]), ("plain", cli.run)):
        out = tmp_path / name
        argv = ["semalign", *arguments(place, out, "--batch=2", "--steps=2", "-q")[1:]]
        argv += ["--map-cache=none", "--prompt-format=plain"]
        assert run(argv) in (0, [0])
        losses.append([loss for phase in report(out)["losses"] for loss in phase["losses"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 4


def test_shares_are_balanced_disjoint_and_complete():
    lengths = [5, 9, 2, 7, 7, 3, 8, 1]
    samples = [
        Sample(str(i), torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long))
        for i, n in enumerate(lengths)
    ]
    shares = [[s.id for s in World(rank, 3).share(samples)] for rank in range(3)]
    assert shares == [["1", "4", "2"], ["6", "0", "7"], ["3", "5"]]  # 9 8 7, 7 5 3, 2 1
    assert World().share(samples) is samples


# --- errors ---------------------------------------------------------------------------------------


def said(found, rank=0) -> str:
    """The one line that all processes have printed together, by `rank`."""
    assert not "".join(found["out"])
    assert not any(err for other, err in enumerate(found["err"]) if other != rank)
    (line,) = found["err"][rank].splitlines()
    return line


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--nonsense=1"], "No such option"),
        (["--rank=300"], "largest possible --rank"),
        (["--data=nowhere"], "nowhere"),
    ],
)
def test_what_all_meet_is_said_once(place, tmp_path, start, more, says):
    found = start(arguments(place, tmp_path / "out", *more), 2)
    assert found["codes"] == [2, 2]
    line = said(found)
    assert line.startswith("pkt: error: ") and says in line
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_there(place, start):
    found = start(arguments(place, place / "alone"), 2)
    assert found["codes"] == [2, 2] and "exists" in said(found)


def test_fewer_samples_than_processes(place, tmp_path, start):
    found = start(arguments(place, tmp_path / "out", "--max-length=64"), 6)
    assert found["codes"] == [2] * 6
    assert "6 processes" in said(found) and "5 sample(s)" in said(found)
    assert not list(tmp_path.iterdir())


def test_a_sample_of_one_process_that_overflows(place, tmp_path, start):
    """It is named by the process that has it, or all leave it out and start again."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(path)
    token = 3 + sorted(pre_tokenizers.ByteLevel.alphabet()).index("Z")
    tensors["model.embed_tokens.weight"][token].fill_(65504.0)
    tensors["model.layers.0.mlp.down_proj.weight"].mul_(300)
    save_file(tensors, path, metadata={"format": "pt"})
    argv = arguments(tmp_path, tmp_path / "out", "--dtype=float16")
    write_rows(tmp_path, [*ROWS, {"prompt": "ZZZ", "completion": "Z"}])  # the shortest: dealt last
    found = start(argv, 2)
    assert found["codes"] == [2, 2]
    line = said(found, rank=1)
    assert line.startswith("pkt: process 1: error: ") and "'rows.jsonl:6'" in line
    assert not (tmp_path / "out.progress").exists()
    found = start([*argv, "--nonfinite=skip-sample"], 2)
    assert found["codes"] == [0, 0], found["err"]
    (skipped,) = report(tmp_path / "out")["nonfinite_samples"]
    assert skipped["id"] == "rows.jsonl:6" and skipped["reason"] in line
    shutil.move(tmp_path / "out", tmp_path / "skipped")
    write_rows(tmp_path, ROWS)
    assert start(argv, 2)["codes"] == [0, 0]
    assert_equal_bytes(tmp_path / "out", tmp_path / "skipped")


# --- interrupted ----------------------------------------------------------------------------------


def test_a_fault_of_one_process_ends_all_and_they_go_on_together(place, tmp_path, start):
    whole, out = place / "both", tmp_path / "out"
    found = start(arguments(place, out), 2, fail=[1, 0])
    assert found["codes"] == [1, 1]
    line = said(found, rank=1)
    assert line.startswith("pkt: process 1: internal error: RuntimeError: a fault")
    assert line.endswith(f"kept in {out}.progress: the same command goes on from there")
    for size, was in ((1, "is 1"), (3, "is 3")):
        found = start(arguments(place, out), size)
        assert found["codes"] == [2] * size
        assert "processes was 2" in said(found) and was in said(found)
    again = start(arguments(place, out), 2)
    assert again["codes"] == [0, 0]
    assert_equal_bytes(out, whole)
    for key in ("blocks", "block_scores", "windows", "losses"):
        assert report(out)[key] == report(whole)[key]


def forget_last(folder):
    path = folder / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert '"backward 1"' in lines[-1]
    path.write_text("".join(lines[:-1]))


def damage(folder):
    path = folder / "gradient-0001.activations"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("folder", [".", "rank-1"])
@pytest.mark.parametrize("change", [forget_last, damage])
def test_the_others_go_back_to_where_the_last_one_is(place, tmp_path, start, change, folder):
    out = tmp_path / "out"
    assert start(arguments(place, out), 2, fail=[1, 0])["codes"] == [1, 1]
    change(tmp_path / "out.progress" / folder)
    found = start(arguments(place, out, "-v"), 2)
    assert found["codes"] == [0, 0], found["err"]
    assert_equal_bytes(out, place / "both")


@pytest.mark.parametrize("seed", range(5))
def test_killed_the_bytes_are_the_same(place, tmp_path, start, seed):
    out, rng = tmp_path / "out", random.Random(seed)
    rank, seen = seed % 2, json.loads((place / "seen").read_text())
    # for its first half a run looks at its inputs
    kill = [rank, rng.randrange(seen[rank] // 2, seen[rank])]
    found = start(arguments(place, out, "-q"), 2, kill=kill, spare=seed >= 3)
    assert found["codes"][rank] == -9 and found["codes"][1 - rank] in (-9, 75)
    again = start(arguments(place, out, "-q"), 2)
    assert again["codes"] == [0, 0], again["err"]
    assert_equal_bytes(out, place / "both")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# --- what the launcher says -----------------------------------------------------------------------


def test_an_environment_that_is_incomplete(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.run(arguments(place, tmp_path / "out")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "WORLD_SIZE=2" in line and "torchrun" in line
    monkeypatch.setenv("RANK", "0")  # but no MASTER_ADDR
    assert cli.run(arguments(place, tmp_path / "out")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "do not find each other" in line


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(ranks, "find_device", torch.device)
    assert World(5, 6, 1).device("auto") == World(5, 6, 1).device("cuda") == torch.device("cuda:1")
    assert chosen == [1, 1]
    assert World(5, 6, 1).device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="process 3 of this machine has no GPU, there are 2"):
        World(2, 3, 2).device("auto")
    with pytest.raises(InputError, match="give cuda"):
        World(1, 2, 1).device("cuda:0")
    assert World().device("cuda:0") == torch.device("cuda:0")


def test_the_callers_process_group_is_used_and_stays():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with ranks.join() as world:
            assert world is not ranks.ALONE and (world.rank, world.size) == (0, 1)
        assert distributed.is_initialized()
    finally:
        distributed.destroy_process_group()
    with ranks.join() as world:
        assert world is ranks.ALONE
