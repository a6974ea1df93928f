# SPDX-License-Identifier: Apache-2.0
"""The command line: options, files, exit codes, signals. Bad inputs are in test_bad_input."""

import dataclasses
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time

import model_zoo
import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file

from pkt_ext import cli, console, recipes
from pkt_ext.errors import InputError, OutputBusyError, ResourceError
from pkt_ext.finetune import FinetuneConfig
from pkt_ext.methods.laten import LatenConfig
from pkt_ext.methods.seeking import SeekingConfig
from pkt_ext.methods.semalign_config import SemAlignConfig
from pkt_ext.settings import build_config, read_yaml

ROWS = [{"prompt": f"{i} and {i}?", "completion": str(2 * i)} for i in range(4)]
PKT = [sys.executable, "-m", "pkt_ext"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders of a teacher and a student, and a data file."""
    return model_zoo.save_pair(tmp_path_factory.mktemp("pair"), ROWS)


def seeking(pair, out, *more):
    paths = {"teacher": "teacher", "student": "student", "data": "rows.jsonl"}
    given = [f"--{option}={pair / name}" for option, name in paths.items()]
    return ["seeking", *given, f"--out={out}", "--device=cpu", *more]


def options(verb):
    return {p.name: p for p in typer.main.get_command(cli.app).commands[verb].params}


def shown_default(parameter):
    return parameter.help.rpartition("[default: ")[2].removesuffix("]")


@pytest.mark.parametrize(
    ("verb", "config"),
    [
        ("seeking", SeekingConfig),
        ("finetune", FinetuneConfig),
        ("laten", LatenConfig),
        ("semalign", SemAlignConfig),
    ],
)
def test_options_are_the_fields_of_the_configuration(verb, config):
    paths = {"teacher", "student", "adapter", "data", "locate", "align", "holdout", "unrelated"}
    paths |= {"out", "overwrite", "resume", "config"}
    found = options(verb)
    assert found.keys() - paths == {f.name for f in dataclasses.fields(config)}
    for field in dataclasses.fields(config):
        parameter = found[field.name]
        if field.default is not None:
            shown = str(field.default).removesuffix(".0")
            assert shown_default(parameter) == shown, field.name
        assert parameter.default is None


def test_help_is_quick_and_lists_the_verbs():
    start = time.perf_counter()
    done = subprocess.run([*PKT, "--help"], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 2  # about 0.1 s; generous, the machine may be busy
    verbs = "plan seeking laten semalign finetune merge convert transfer demo verify info"
    for verb in verbs.split():
        assert f"\n  {verb} " in done.stdout
    code = (
        "import sys, pkt_ext.cli; pkt_ext.cli.run(['--help']); "
        "print({'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


def test_no_arguments_print_the_help(capsys):
    assert cli.run([]) in (0, 2)
    assert "Commands:" in "".join(capsys.readouterr())


def test_info_says_what_was_built_and_what_runs(capsys):
    assert cli.run(["info"]) == 0
    text = capsys.readouterr().out
    assert cli.run(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts) >= 6
    assert facts["torch"].split("+")[0] == torch.__version__.split("+")[0]
    for key, value in facts.items():
        assert key in text and str(value) in text


def test_seeking_end_to_end_and_verify(pair, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.run(seeking(pair, out, "--rank", "4")) == 0
    assert "windows from teacher blocks" in capsys.readouterr().out
    assert cli.run(["verify", str(out)]) == 0
    assert "every hash matches" in capsys.readouterr().out
    path = out / "start" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert cli.run(["verify", str(out)]) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err


def test_progress_lines_come_with_v_and_not_in_a_blink_without(pair, tmp_path, capfd):
    for switches, shown in (([], False), (["-q"], False), (["-v"], True)):
        out = tmp_path / f"out{switches}"
        assert cli.run(seeking(pair, out, "--rank", "4", *switches)) == 0
        assert ("block 1 of 3" in capfd.readouterr().err) == shown


def test_flags_win_over_the_file_and_published_names_work(pair, tmp_path):
    config = tmp_path / "options.yaml"
    config.write_text("rank: 8\nalpha: 4e0\nmax-length: 64\n")
    out = tmp_path / "out"
    assert cli.run(seeking(pair, out, "--config", str(config), "--r", "4", "-q")) == 0
    found = json.loads((out / "run.json").read_text())["config"]
    assert (found["rank"], found["alpha"], found["max_length"]) == (4, 4.0, 64)
    assert found["dropout"] == SeekingConfig.dropout


def test_everything_can_stand_in_the_file(pair, tmp_path):
    content = {name: str(pair / name) for name in ("teacher", "student")}
    content |= {"data": str(pair / "rows.jsonl"), "out": str(tmp_path / "out"), "rank": 4,
                "embeddings": False}  # fmt: skip
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(content))
    assert cli.run(["seeking", "--config", str(tmp_path / "all.yaml"), "-q"]) == 0
    start = load_file(tmp_path / "out" / "start" / "adapter_model.safetensors")
    assert not any("lm_head" in key for key in start)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("rnak: 3", "unknown option 'rnak'; known are adapter|unknown option 'rnak'; known are al"),
        ("rank: many", "rank is 'many'; expected a whole number"),
        ("rank: 4.5", "rank is 4.5; expected a whole number"),
        ("rank: true", "rank is True; expected a whole number"),
        ("embeddings: 3", "embeddings is 3; expected true or false"),
        ("overwrite: 3", "overwrite is 3; expected true or false"),
        ("alpha: [1]", r"alpha is \[1\]; expected a number"),
        ("svd: best", "svd is 'best'; choose one of converged, fast, exact"),
        ("- rank", "is a list; expected option: value lines"),
        ("rank: [", "is not YAML"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_a_file_that_cannot_be_is_refused(pair, tmp_path, capsys, content, says):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    assert cli.run(seeking(pair, tmp_path / "out", "--config", str(path))) == 2
    assert re.search(says, capsys.readouterr().err)


def test_settings_are_read_by_type(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert read_yaml(path) == {}
    made = build_config(SeekingConfig, {"alpha": "3e-4", "dtype": None, "rank": 2})
    assert made.alpha == 3e-4 and made.dtype is None and made.rank == 2


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (InputError("bad\nrow"), 2, "pkt: error: bad row\n"),
        (OutputBusyError("busy"), 73, "pkt: error: busy\n"),
        (ResourceError("full"), 75, "pkt: error: full\n"),
        (MemoryError(), 75, "out of memory; use a smaller"),
        (torch.OutOfMemoryError("CUDA out of memory"), 75, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 75, "out of memory"),
        (OSError(28, "No space left on device"), 75, "free some space"),
        (PermissionError(13, "Permission denied", "x/y"), 2, "x/y: permission denied"),
        (console._Stopped(2), 130, "interrupted"),
        (console._Stopped(15), 143, "terminated"),
        (ZeroDivisionError("oops"), 1, "internal error: ZeroDivisionError: oops .*--debug"),
    ],
)
def test_exit_codes_and_one_line(monkeypatch, capsys, error, code, says):
    import pkt_ext.build_info

    def fail():
        raise error

    monkeypatch.setattr(pkt_ext.build_info, "info", fail)
    assert cli.run(["info"]) == code
    err = capsys.readouterr().err
    assert re.search(says, err) and err.count("\n") == 1 and "Traceback" not in err


def test_leaving_is_at_once_but_for_what_was_asked_for_at_exit():
    code = """
import atexit, sys
from pkt_ext import console
class Slow:
    def __del__(self):
        print("taken apart")
sys.slow = Slow()
atexit.register(print, "at exit")
print("output", end=" ")
console.leave(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "output at exit\n", "")


def test_debug_shows_the_traceback(tmp_path):
    done = subprocess.run([*PKT, "verify", str(tmp_path / "no"), "--debug"], capture_output=True,
                          text=True)  # fmt: skip
    assert "Traceback" in done.stderr and "no such folder" in done.stderr
    quiet = subprocess.run([*PKT, "verify", str(tmp_path / "no")], capture_output=True, text=True)
    assert quiet.returncode == 2 and len(quiet.stderr.splitlines()) == 1


# Stops in the middle of the pass, says so, and waits there for the signal.
WAITS = """
import sys, time
from pkt_ext import cli, console, verbs
from pkt_ext.methods import windows
def wait(*_):
    print("staged", flush=True)
    time.sleep(60)
windows.Cutter.block = wait
sys.exit(cli.run(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_leave_finished_blocks_and_nothing_else(pair, tmp_path, number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, *seeking(pair, tmp_path / "out", "--rank", "4")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "staged\n", process.communicate()
        assert any(".tmp-" in path.name for path in tmp_path.iterdir())
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code and "Traceback" not in err
    assert f"finished blocks are kept in {tmp_path / 'out.progress'}" in err
    assert [path.name for path in tmp_path.iterdir()] == ["out.progress"]
    assert cli.run(seeking(pair, tmp_path / "out", "--rank", "4")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_writer_is_told_who_is_first(pair, tmp_path, capsys):
    from pkt_ext import artifact

    with artifact.publish(tmp_path / "out", kind="init", run={}, report={}):
        assert cli.run(seeking(pair, tmp_path / "out", "--rank", "4")) == 73
    assert f"process {os.getpid()}" in capsys.readouterr().err


@pytest.fixture
def recipe(pair, tmp_path):
    """A recipe file with the stages asked for."""

    def write(**content):
        base = {name: str(pair / name) for name in ("teacher", "student")}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(base | content))
        return str(path)

    return write


EXTRACT = {"rank": 4, "device": "cpu"}


def test_transfer_extract_equals_the_verb(pair, tmp_path, recipe, capsys):
    path = recipe(extract=EXTRACT | {"data": str(pair / "rows.jsonl")})
    assert cli.run(["transfer", path, "--out", str(tmp_path / "run"), "-q"]) == 0
    assert cli.run(seeking(pair, tmp_path / "verb", "--rank", "4", "-q")) == 0
    name = "start/adapter_model.safetensors"
    assert (tmp_path / "run/init" / name).read_bytes() == (tmp_path / "verb" / name).read_bytes()
    capsys.readouterr()
    assert cli.run(["transfer", path, "--out", str(tmp_path / "run")]) == 0
    assert "kept from an earlier run" in capsys.readouterr().out
    other = recipe(extract=EXTRACT | {"rank": 3, "data": str(pair / "rows.jsonl")})
    assert cli.run(["transfer", other, "--out", str(tmp_path / "run")]) == 2
    assert "another recipe; choose another --out" in capsys.readouterr().err
    assert cli.run(["transfer", other, "--out", str(tmp_path / "run"), "--overwrite"]) == 0
    config = json.loads((tmp_path / "run/init/run.json").read_text())["config"]
    assert config["rank"] == 3


def test_a_transfer_that_fails_at_its_first_stage_leaves_nothing(pair, tmp_path, recipe, capsys):
    """What was wrong can be put right and run again with the same --out."""
    settings = EXTRACT | {"data": str(pair / "rows.jsonl")}
    argv = ["transfer", recipe(extract=settings | {"rank": 1000}), "--out", str(tmp_path / "run")]
    assert cli.run(argv) == 2 and not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    assert cli.run(argv) == 2 and not any((tmp_path / "run").iterdir())
    recipe(extract=settings)
    assert cli.run(argv) == 0 and (tmp_path / "run/init/manifest.json").is_file()


def test_transfer_runs_all_stages_and_each_verb_alone_gives_the_same(pair, tmp_path, recipe):
    data = str(pair / "rows.jsonl")
    train = {"max_steps": 2, "batch": 2, "learning_rate": 0.01, "device": "cpu"}
    path = recipe(extract=EXTRACT | {"data": data}, finetune=train | {"data": data},
                  merge={"dtype": "float32"})  # fmt: skip
    run = tmp_path / "run"
    assert cli.run(["transfer", path, "--out", str(run), "-q"]) == 0
    student, alone = f"--student={pair / 'student'}", tmp_path / "alone"
    assert cli.run(
        ["finetune", student, f"--adapter={run / 'init'}", f"--data={data}", "--max-steps=2",
         "--batch_size=2", "--learning_rate=0.01", "--device=cpu", f"--out={alone}", "-q"]
    ) == 0  # fmt: skip
    merged = tmp_path / "merged"
    argv = ["merge", student, f"--adapter={alone}", f"--out={merged}", "--dtype=float32", "-q"]
    assert cli.run(argv) == 0
    name = "model.safetensors"
    assert (run / "model" / name).read_bytes() == (merged / name).read_bytes()
    base, model = load_file(pair / "student" / name), load_file(merged / name)
    assert base.keys() == model.keys() and not torch.equal(
        *(m["lm_head.weight"] for m in (base, model))
    )
    for folder in ("init", "adapter", "model"):
        assert cli.run(["verify", str(run / folder)]) == 0
    assert cli.run(["merge", student, f"--adapter={run / 'init'}", f"--out={tmp_path / 'x'}"]) == 2


def test_transfer_by_laten(pair, tmp_path, recipe):
    data, run = str(pair / "rows.jsonl"), tmp_path / "run"
    align = {"locate": data, "align": data, "steps": 2, "rows": 2, "rate": 0.2, "device": "cpu"}
    align |= {"learning_rate": 0.1}
    path = recipe(method="laten", align=align, merge={"dtype": "float32"})
    assert cli.run(["transfer", path, "--out", str(run), "-q"]) == 0
    for folder in ("delta", "model"):
        assert cli.run(["verify", str(run / folder)]) == 0
    report = json.loads((run / "model" / "report.json").read_text())
    assert report["selection"]["outside"] == 0 and report["survived"] == pytest.approx(
        1.0, abs=1e-2
    )


def test_transfer_by_semalign(pair, tmp_path, recipe, capfd, no_bars):
    data, run = str(pair / "rows.jsonl"), tmp_path / "run"
    steer = {"data": data, "unrelated": data, "objective": "geometry", "steps": 2, "batch": 2}
    steer |= {"micro_batch": 2, "rank": 4, "device": "cpu", "map_cache": "none"}
    path = recipe(method="semalign", steer=steer, merge={"dtype": "float32"})
    assert cli.run(["transfer", path, "--out", str(run), "-v"]) == 0
    out, err = capfd.readouterr()
    said, merged = out.splitlines()
    assert re.fullmatch(
        rf"{run / 'adapter'}: 2 phases; KL to the teacher on held-out rows [\d.]+ before, [\d.]+ "
        r"after, agreement [\d.]+% and [\d.]+%; [\d.]+ s",
        said,
    )
    assert f"{run / 'model'}: 8 matrices changed" in merged
    assert "block 1: step 2 of 2: loss" in err and "\r" not in err  # lines, no bars
    for folder in ("adapter", "model"):
        assert cli.run(["verify", str(run / folder)]) == 0


def test_a_trained_block_is_a_model_and_nothing_to_merge(pair, tmp_path, recipe, capsys):
    data = str(pair / "rows.jsonl")
    steer = {"data": data, "train": "block", "critical": 1, "steps": 1, "batch": 2}
    steer |= {"micro_batch": 2, "device": "cpu", "map_cache": "none", "hold_out": 0}
    both, run = recipe(method="semalign", steer=steer, merge={}), tmp_path / "run"
    assert cli.run(["transfer", both, "--out", str(run)]) == 2 and not run.exists()
    assert "no adapter to merge; leave merge out" in capsys.readouterr().err
    alone = recipe(method="semalign", steer=steer)
    assert cli.run(["transfer", alone, "--out", str(run), "-q"]) == 0
    assert "1 phase; no rows were held out to look at" in capsys.readouterr().out
    changed, base = (
        load_file(path / "model.safetensors") for path in (run / "adapter", pair / "student")
    )
    assert changed.keys() == base.keys()
    argv = ["merge", f"--student={pair / 'student'}", f"--adapter={run / 'adapter'}"]
    assert cli.run([*argv, f"--out={tmp_path / 'model'}"]) == 2
    assert "it is a complete model, to be loaded as it is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"merge": {}}, "each needs those before it"),
        ({"method": "semalign", "steer": {}}, "steer: data is missing"),
        ({"method": "semalign", "steer": {"data": "absent.jsonl"}}, "absent.jsonl"),
        ({"method": "laten", "extract": {}}, "a recipe of laten: unknown option 'extract'"),
        ({"method": "laten", "align": {"locate": "x"}}, "align: align is missing"),
        ({}, "the recipe has the stages none"),
        ({"extract": {"data": "x", "rnak": 1}}, "extract: unknown option 'rnak'"),
        ({"extract": {"data": "x", "rank": "x"}}, "rank is 'x'; expected a whole number"),
        ({"extract": {"data": "absent.jsonl"}}, "absent.jsonl"),
        ({"extract": {}}, "extract: data is missing"),
        ({"extract": 3}, "extract is a int"),
        (
            {"method": "magic", "extract": {}},
            "method is 'magic'; known is seeking, laten, semalign",
        ),
        ({"stages": {}}, "unknown option 'stages'"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_before_it_starts(
    tmp_path, recipe, capsys, content, says
):
    assert cli.run(["transfer", recipe(**content), "--out", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_shipped_recipes_parse():
    from pathlib import Path

    paths = list((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
    assert paths
    for path in paths:
        content = read_yaml(path, known={"method", "teacher", "student", "out", *recipes.STAGES})
        stages = recipes.METHODS[content["method"]]
        assert content.keys() & recipes.STAGES <= stages.keys()
        for name, stage in stages.items():
            assert (content.get(name) or {}).keys() <= options(stage.verb.__name__).keys()


def test_progress_lines_wait_for_ten_seconds_of_work(monkeypatch):
    now = {"time": 0.0}
    monkeypatch.setattr(console.time, "monotonic", lambda: now["time"])
    throttle = console._Throttle()
    shown = []
    for seconds in (25, 34, 36, 37, 47):  # 25 s of imports before the first line is due
        now["time"] = float(seconds)
        record = logging.LogRecord("pkt_ext", logging.INFO, "", 0, "", (), None)
        shown.append(throttle.filter(record))
    assert shown == [False, False, True, False, True]
    warning = logging.LogRecord("pkt_ext", logging.WARNING, "", 0, "", (), None)
    assert throttle.filter(warning)
