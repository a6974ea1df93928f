# SPDX-License-Identifier: Apache-2.0
"""A run that is killed at any moment, repeated, ends with the same bytes."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import model_zoo
import pytest

from pkt_ext import cli
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.passes import Pass

ROWS = [{"prompt": f"{i} + {i} =", "completion": f"{2 * i}" * (1 + i % 3)} for i in range(5)]
KILLED = Path(__file__).parent / "killed.py"


def arguments(place, out, *more):
    return ["seeking", f"--teacher={place / 'teacher'}", f"--student={place / 'student'}",
            f"--data={place / 'rows.jsonl'}", f"--out={out}", "--rank=4", "--device=cpu",
            "--micro-batch=2", *more]  # fmt: skip


def adapters(out) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for folder in ("start", "delta")
        for path in sorted((out / folder).iterdir())
    }


def attempts(commands) -> list[list[list[int]]]:
    done = subprocess.run(
        [sys.executable, KILLED], input=json.dumps(commands), capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    return model_zoo.save_pair(folder, ROWS)


def test_killed_at_twenty_moments_the_bytes_are_the_same(place, tmp_path):
    whole = tmp_path / "whole"
    (((code, operations),),) = attempts([[arguments(place, whole, "-q"), [None]]])
    assert code == 0 and operations > 60
    rng, commands = random.Random(0), []
    for number in range(20):
        if number < 5:  # in the cleaning up, where the output is there already
            kills = [operations - 4 * number]
        elif number < 15:
            kills = [rng.randrange(1, operations)]
        else:  # at a time; more than once
            kills = [rng.uniform(0.05, 0.8), rng.uniform(0.05, 0.5), rng.randrange(1, operations)]
        commands.append([arguments(place, tmp_path / f"out-{number}", "-q"), [*kills, None]])
    interrupted = 0
    for number, (*killed, last) in enumerate(attempts(commands)):
        codes = [code for code, _ in killed]
        interrupted += any(code < 0 for code in codes)
        # an attempt that was done before its kill leaves a finished output, and the next says so
        assert last[0] == (2 if 0 in codes else 0), (commands[number], codes, last)
        assert set(codes) <= {-9, -14, 0, 2}
        out = tmp_path / f"out-{number}"
        assert adapters(out) == adapters(whole), commands[number]
        found = {p.name for p in tmp_path.iterdir() if p.name.split(".")[0] == out.name}
        assert found == {out.name}
    assert interrupted >= 15


def interrupted(place, out, monkeypatch, at, *more):
    """Run until block `at`'s backward, and fail there as a fault of ours would."""
    backward = Pass._backward

    def stop(self, index):
        if index == at:
            raise RuntimeError("stopped here")
        backward(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Pass, "_backward", stop)
        assert cli.run(arguments(place, out, *more)) == 1


def test_finished_blocks_are_not_done_again(place, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert cli.run(arguments(place, tmp_path / "whole")) == 0
    interrupted(place, out, monkeypatch, 0)
    assert f"kept in {out}.progress" in capsys.readouterr().err
    reads, load = [], Checkpoint.load
    monkeypatch.setattr(
        Checkpoint, "load", lambda self, names, *a: reads.append(names) or load(self, names, *a)
    )
    assert cli.run(arguments(place, out)) == 0
    blocks = {name.split(".")[2] for names in reads for name in names if ".layers." in name}
    assert blocks == {"0"}
    assert adapters(out) == adapters(tmp_path / "whole")
    report, whole = (
        json.loads((tmp_path / n / "report.json").read_text()) for n in ("out", "whole")
    )
    for key in ("blocks", "block_scores", "windows", "losses"):
        assert report[key] == whole[key]
    assert not out.with_name("out.progress").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda place: ["--rank=3"], "config.rank was 4, is 3"),
        (lambda place: ["--dtype=bfloat16"], "config.dtype was null"),
        (lambda place: rewrite_rows(place), "inputs.data"),
        (lambda place: touch_teacher(place), "inputs.teacher"),
    ],
)
def test_the_progress_of_another_run_is_refused(place, tmp_path, monkeypatch, capsys, change, says):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    out = tmp_path / "out"
    interrupted(tmp_path, out, monkeypatch, 1)
    more = change(tmp_path)
    capsys.readouterr()
    assert cli.run(arguments(tmp_path, out, *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and "another run" in line and "--no-resume" in line
    assert cli.run(arguments(tmp_path, out, *more, "--no-resume")) == 0


def rewrite_rows(place):
    (place / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    return []


def touch_teacher(place):
    config = json.loads((place / "teacher" / "config.json").read_text())
    (place / "teacher" / "config.json").write_text(json.dumps(config | {"note": 1}))
    return []


def test_a_kill_while_exporting_keeps_the_start(place, tmp_path, monkeypatch):
    out, again = tmp_path / "out", arguments(place, tmp_path / "out", "--export=residual-model")
    with monkeypatch.context() as patch:
        patch.setattr("pkt_ext.methods.seeking.residual_model", lambda *_, **__: 1 / 0)
        assert cli.run(again) == 1
    first = adapters(out)
    assert not (tmp_path / "out-residual-model").exists()
    assert cli.run(again) == 0
    assert adapters(out) == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out-residual-model"]
    assert cli.run(again) == 2


def test_a_budget_may_change_on_the_way(place, tmp_path, monkeypatch):
    assert cli.run(arguments(place, tmp_path / "whole")) == 0
    interrupted(place, tmp_path / "out", monkeypatch, 1, "--budget=2GiB")
    assert cli.run(arguments(place, tmp_path / "out", "--budget=3GiB")) == 0
    assert adapters(tmp_path / "out") == adapters(tmp_path / "whole")


def test_damaged_progress_is_done_again(place, tmp_path, monkeypatch, caplog):
    assert cli.run(arguments(place, tmp_path / "whole")) == 0
    for victim in ("gradient-0001.activations", "factors-1.safetensors"):
        out = tmp_path / victim
        interrupted(place, out, monkeypatch, 0)
        path = out.with_name(f"{victim}.progress") / victim
        path.write_bytes(path.read_bytes()[:-1])
        assert cli.run(arguments(place, out)) == 0
        assert adapters(out) == adapters(tmp_path / "whole")


@pytest.mark.parametrize("fault", ["gone", "truncated"])
def test_a_shard_that_fails_midway_keeps_the_finished_blocks(
    place, tmp_path, monkeypatch, capsys, fault
):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    out, shard = tmp_path / "out", tmp_path / "teacher" / "model.safetensors"
    aside, forward = tmp_path / "aside", Pass._forward

    def damage(self, index, **options):
        if index == 2:
            shutil.copy2(shard, aside)
            if fault == "gone":
                shard.unlink()
            else:
                content = shard.read_bytes()
                shard.unlink()  # a new file: the blocks read so far are mappings of the old one
                shard.write_bytes(content[: len(content) // 2])
        forward(self, index, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Pass, "_forward", damage)
        capsys.readouterr()
        assert cli.run(arguments(tmp_path, out)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(shard) in line and "finished blocks are kept" in line
    shutil.copy2(aside, shard)
    assert cli.run(arguments(tmp_path, out)) == 0
    assert cli.run(arguments(tmp_path, tmp_path / "whole")) == 0
    assert adapters(out) == adapters(tmp_path / "whole")
