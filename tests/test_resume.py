# SPDX-License-Identifier: Apache-2.0
"""A run that is killed at any moment, repeated, ends with the same bytes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import model_zoo
import pytest

from pkt_ext import artifact, cli
from pkt_ext.errors import NonFiniteError
from pkt_ext.methods import laten, locating, semalign
from pkt_ext.methods.alignment import Alignment
from pkt_ext.methods.steering import Steering
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.passes import Pass
from pkt_ext.streaming.progress import Progress

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


def test_a_float16_scale_that_an_overflow_lowered_stays_low(place, tmp_path, monkeypatch):
    """A resumed run that tried the larger one again would flush other gradients to zero."""
    monkeypatch.setattr("pkt_ext.streaming.passes._LARGEST", (4, -18))
    scaled, half = Pass._backward_scaled, "--dtype=float16"

    def overflow(self, index):
        if index == 1 and self._target == 0:
            raise NonFiniteError("an overflow", "0")
        return scaled(self, index)

    with monkeypatch.context() as patch:
        assert cli.run(arguments(place, tmp_path / "calm", half)) == 0
        patch.setattr(Pass, "_backward_scaled", overflow)
        assert cli.run(arguments(place, tmp_path / "whole", half)) == 0
        interrupted(place, tmp_path / "out", monkeypatch, 0, half)
        assert cli.run(arguments(place, tmp_path / "out", half)) == 0
    names = "calm", "whole", "out"
    reports = (json.loads((tmp_path / name / "report.json").read_text()) for name in names)
    calm, whole, out = (report["block_scores"] for report in reports)
    assert whole[0] != calm[0] and out == whole


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


# --- pkt laten ------------------------------------------------------------------------------------


def laten_arguments(place, out, *more):
    files = [f"--{name}={place / 'rows.jsonl'}" for name in ("locate", "align", "holdout")]
    return ["laten", f"--teacher={place / 'teacher'}", f"--student={place / 'student'}", *files,
            f"--out={out}", "--rate=0.2", "--rows=2", "--lr=1e-2", "--device=cpu",
            "--keep-checkpoints", "--export=adapter", "-q", *more]  # fmt: skip


def tensors(out) -> dict[str, bytes]:
    """Of the delta, its hypernetworks and the adapter beside it."""
    folders = out, out.with_name(f"{out.name}-adapter")
    return {
        f"{number}/{path.relative_to(folder)}": path.read_bytes()
        for number, folder in enumerate(folders)
        for path in sorted(folder.rglob("*.safetensors"))
    }


@pytest.fixture(scope="module")
def delta(place, tmp_path_factory):
    """The output of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("delta") / "out"
    assert cli.run(laten_arguments(place, out)) == 0
    assert len(tensors(out)) == 1 + 1 + len(ROWS) + 1
    return out


def test_laten_killed_at_any_moment_leaves_the_same_bytes(place, tmp_path):
    (((code, operations),),) = attempts([[laten_arguments(place, tmp_path / "whole"), [None]]])
    assert code == 0
    whole = tensors(tmp_path / "whole")
    rng, commands = random.Random(3), []
    for number in range(6):
        kills = [rng.randrange(operations // 4, operations)]
        if number < 2:  # in the cleaning up
            kills = [operations - 3 - 5 * number]
        elif number == 5:
            kills = [operations // 2, *kills]
        commands.append([laten_arguments(place, tmp_path / f"out-{number}"), [*kills, None]])
    interrupted = 0
    for number, (*killed, last) in enumerate(attempts(commands)):
        codes = [code for code, _ in killed]
        interrupted += -9 in codes
        assert last[0] == (2 if 0 in codes else 0), (commands[number], codes, last)
        out = tmp_path / f"out-{number}"
        assert tensors(out) == whole, commands[number]
        assert artifact.verify(out) == [] == artifact.verify(tmp_path / f"out-{number}-adapter")
        left = {p.name for p in tmp_path.iterdir() if p.name.startswith(out.name)}
        assert left == {out.name, f"{out.name}-adapter"}
    assert interrupted >= 5


def stop(*_, **__):
    raise RuntimeError("stopped here")


def stopped_before(name):
    """Just before this step is noted, its files written."""

    def patch(patch):
        record = Progress.record
        patch.setattr(
            Progress,
            "record",
            lambda s, step, **f: stop() if step == name else record(s, step, **f),
        )

    return patch


def half_removed(self):
    if self.found:
        (self.folder / "journal.jsonl").unlink()
        stop()


# where it stops -> (how, optimiser steps that the repeated command takes, models it locates in)
MOMENTS = {
    "the teacher's neurons are written": (stopped_before("locate teacher"), 5, 2),
    "the student's neurons are written": (stopped_before("locate student"), 5, 1),
    "a step is written": (stopped_before("align-0003"), 3, 0),
    "a step is noted, not its held-out loss": (stopped_before("held-0002"), 3, 0),
    "the last step is noted": (stopped_before("held-0005"), 0, 0),
    "everything is trained": (lambda p: p.setattr(laten, "write_delta", stop), 0, 0),
    "the delta is published": (lambda p: p.setattr(laten, "to_adapter", stop), 0, 0),
    "it cleans up": (lambda p: p.setattr(Progress, "remove", half_removed), 0, 0),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_laten_goes_on_where_it_stopped(place, delta, tmp_path, monkeypatch, capsys, moment):
    out, (interrupt, steps, passes) = tmp_path / "out", MOMENTS[moment]
    with monkeypatch.context() as patch:
        interrupt(patch)
        assert cli.run(laten_arguments(place, out)) == 1
    published = moment in ("the delta is published", "it cleans up")
    # before anything is noted, nothing is kept
    kept = moment != "the teacher's neurons are written"
    assert out.with_name("out.progress").exists() == kept and out.exists() == published
    says = f"what is finished is kept in {out}.progress: the same command goes on from there"
    assert (says in capsys.readouterr().err) == (kept and not published)
    taken, located, step, locate = [], [], Alignment.step, locating.locate
    monkeypatch.setattr(Alignment, "step", lambda *a: taken.append(1) or step(*a))
    monkeypatch.setattr(locating, "locate", lambda *a, **k: located.append(1) or locate(*a, **k))
    assert cli.run(laten_arguments(place, out)) == 0
    assert (len(taken), len(located)) == (steps, passes)
    assert tensors(out) == tensors(delta)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out-adapter"]
    report, whole = (json.loads((o / "report.json").read_text()) for o in (out, delta))
    assert report.keys() == whole.keys()
    for key in ("blocks", "neurons", "overlap", "steps", "held_out_losses", "injected_step"):
        assert report[key] == whole[key]


@pytest.mark.parametrize(
    ("victim", "steps"),
    [
        ("located-student.safetensors", 5),
        ("hypernetwork-0002.safetensors", 5),  # the optimiser's state of step 1 is gone
        ("hypernetwork-0003.safetensors", 3),
        ("optimizer-1.safetensors", 3),  # of step 3: that of step 2 is still there
        ("optimizer-0.safetensors", 2),  # of step 2: nobody needs it
    ],
)
def test_laten_does_again_what_is_damaged(place, delta, tmp_path, monkeypatch, victim, steps):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped_before("held-0003")(patch)
        assert cli.run(laten_arguments(place, out)) == 1
    path = out.with_name("out.progress") / victim
    path.write_bytes(path.read_bytes()[:-1])
    taken, step = [], Alignment.step
    monkeypatch.setattr(Alignment, "step", lambda *a: taken.append(1) or step(*a))
    assert cli.run(laten_arguments(place, out)) == 0
    assert len(taken) == steps and tensors(out) == tensors(delta)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda place: ["--rate=0.3"], "config.rate was 0.2, is 0.3"),
        (lambda place: rewrite_rows(place), "inputs.align"),
        (lambda place: touch_teacher(place), "inputs.teacher"),
    ],
)
def test_the_progress_of_another_laten_is_refused(
    place, tmp_path, monkeypatch, capsys, change, says
):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped_before("align-0002")(patch)
        assert cli.run(laten_arguments(tmp_path, out)) == 1
    more = change(tmp_path)
    capsys.readouterr()
    assert cli.run(laten_arguments(tmp_path, out, *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and "another run" in line and "--no-resume" in line
    assert cli.run(laten_arguments(tmp_path, out, *more, "--no-resume")) == 0


def test_a_budget_of_laten_may_change_on_the_way(place, delta, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped_before("locate student")(patch)
        assert cli.run(laten_arguments(place, out, "--budget=2GiB")) == 1
    assert cli.run(laten_arguments(place, out, "--budget=3GiB")) == 0
    assert tensors(out) == tensors(delta)


# --- pkt semalign ---------------------------------------------------------------------------------

HELD = [{"prompt": f"{i} + 1 =", "completion": f"{i + 1}"} for i in range(2)]


def semalign_arguments(place, out, *more):
    held = place / "held.jsonl"
    if not held.exists():
        held.write_text("".join(json.dumps(row) + "\n" for row in HELD))
    files = [f"--{name}={held}" for name in ("holdout", "unrelated")]
    return ["semalign", f"--teacher={place / 'teacher'}", f"--student={place / 'student'}",
            f"--data={place / 'rows.jsonl'}", *files, f"--out={out}", "--objective=geometry",
            "--pairing=similarity", "--steps=2", "--batch=2", "--micro-batch=2", "--rank=4",
            "--lr=1e-2", "--dropout=0.1", "--map-cache=none", "--device=cpu", "-q",
            *more]  # fmt: skip


def learned(out) -> bytes:
    return (out / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def steered(place, tmp_path_factory):
    """The output of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("steered") / "out"
    assert cli.run(semalign_arguments(place, out)) == 0
    return out


def test_semalign_killed_at_any_moment_leaves_the_same_bytes(place, tmp_path):
    (((code, operations),),) = attempts([[semalign_arguments(place, tmp_path / "whole"), [None]]])
    assert code == 0
    whole = learned(tmp_path / "whole")  # of one thread, as the attempts are
    rng, commands = random.Random(5), []
    for number in range(6):
        kills = [rng.randrange(operations // 4, operations)]
        if number < 2:  # in the cleaning up
            kills = [operations - 3 - 4 * number]
        elif number == 5:  # at a time, and again
            kills = [rng.uniform(0.3, 1.5), *kills]
        commands.append([semalign_arguments(place, tmp_path / f"out-{number}"), [*kills, None]])
    interrupted = 0
    for number, (*killed, last) in enumerate(attempts(commands)):
        codes = [code for code, _ in killed]
        interrupted += any(code < 0 for code in codes)
        assert last[0] == (2 if 0 in codes else 0), (commands[number], codes, last)
        out = tmp_path / f"out-{number}"
        assert learned(out) == whole, commands[number]
        assert artifact.verify(out) == []
        assert {p.name for p in tmp_path.iterdir() if p.name.startswith(out.name)} == {out.name}
    assert interrupted >= 4


def interrupted_by(number):
    """As Ctrl-C or a scheduler does it, when the first phase is noted."""

    def patch(patch):
        record = Progress.record

        def note(self, step, **facts):
            record(self, step, **facts)
            if step == "phase 0":
                os.kill(os.getpid(), number)

        patch.setattr(Progress, "record", note)

    return patch


# where it stops -> (how, its exit code, phases that the repeated command trains)
SEMALIGN_MOMENTS = {
    "the attribution is written": (stopped_before("attribution"), 1, 2),
    "the blocks are compared": (stopped_before("similarity"), 1, 2),
    "the targets are written": (stopped_before("targets"), 1, 2),
    "a phase is written": (stopped_before("phase 1"), 1, 1),
    "everything is trained": (lambda p: p.setattr(semalign, "write_adapter", stop), 1, 0),
    "it cleans up": (lambda p: p.setattr(Progress, "remove", half_removed), 1, 0),
    "Ctrl-C": (interrupted_by(signal.SIGINT), 130, 1),
    "SIGTERM": (interrupted_by(signal.SIGTERM), 143, 1),
}


@pytest.mark.parametrize("moment", SEMALIGN_MOMENTS)
def test_semalign_goes_on_where_it_stopped(place, steered, tmp_path, monkeypatch, capsys, moment):
    out, (interrupt, code, phases) = tmp_path / "out", SEMALIGN_MOMENTS[moment]
    with monkeypatch.context() as patch:
        interrupt(patch)
        assert cli.run(semalign_arguments(place, out)) == code
    published = moment == "it cleans up"
    kept = moment != "the attribution is written"  # nothing was finished before
    assert out.with_name("out.progress").exists() == kept and out.exists() == published
    says = f"what is finished is kept in {out}.progress: the same command goes on from there"
    assert (says in capsys.readouterr().err) == (kept and not published)
    trained, train = [], Steering._train
    monkeypatch.setattr(Steering, "_train", lambda *a: trained.append(1) or train(*a))
    assert cli.run(semalign_arguments(place, out)) == 0
    assert len(trained) == phases and learned(out) == learned(steered)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    report, whole = (json.loads((o / "report.json").read_text()) for o in (out, steered))
    assert report.keys() == whole.keys()
    for key in ("attribution", "pairs", "losses", "before", "after", "rows", "positions"):
        assert report[key] == whole[key]


@pytest.mark.parametrize(
    ("victim", "phases"),
    [
        ("phase-0000.safetensors", 2),
        ("output.activations", 2),
        ("layer-0001.activations", 2),
        ("seen-0000.activations", 2),
        ("prefix-0001.activations", 1),  # nobody needs it
    ],
)
def test_semalign_does_again_what_is_damaged(place, steered, tmp_path, monkeypatch, victim, phases):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped_before("phase 1")(patch)
        assert cli.run(semalign_arguments(place, out)) == 1
    path = out.with_name("out.progress") / victim
    path.write_bytes(path.read_bytes()[:-1])
    trained, train = [], Steering._train
    monkeypatch.setattr(Steering, "_train", lambda *a: trained.append(1) or train(*a))
    assert cli.run(semalign_arguments(place, out)) == 0
    assert len(trained) == phases and learned(out) == learned(steered)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda place: ["--rank=3"], "config.rank was 4, is 3"),
        (lambda place: ["--lr=1e-3"], "config.learning_rate was 0.01, is 0.001"),
        (lambda place: rewrite_rows(place), "inputs.data"),
        (lambda place: touch_teacher(place), "inputs.teacher"),
    ],
)
def test_the_progress_of_another_semalign_is_refused(
    place, tmp_path, monkeypatch, capsys, change, says
):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped_before("similarity")(patch)
        assert cli.run(semalign_arguments(tmp_path, out)) == 1
    more = change(tmp_path)
    capsys.readouterr()
    assert cli.run(semalign_arguments(tmp_path, out, *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and "another run" in line and "--no-resume" in line
    assert cli.run(semalign_arguments(tmp_path, out, *more, "--no-resume")) == 0
    assert not out.with_name("out.progress").exists()


def test_phases_in_half_precision_are_the_same_after_an_interruption(place, tmp_path, monkeypatch):
    """They were rounded when they were kept: what the next phase is given is what it was."""
    options = ["--dtype=bfloat16", "--train=block"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert cli.run(semalign_arguments(place, whole, *options)) == 0
    with monkeypatch.context() as patch:
        stopped_before("phase 1")(patch)
        assert cli.run(semalign_arguments(place, out, *options)) == 1
    assert cli.run(semalign_arguments(place, out, *options)) == 0
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, out)]
    assert weights[0] == weights[1]
