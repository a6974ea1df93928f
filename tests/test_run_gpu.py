# SPDX-License-Identifier: Apache-2.0
"""benchmarks/run_gpu.sh with stand-ins for everything that needs a GPU: what it records."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Calls go into a list; `python -m venv DIR` makes a python like this one in DIR.
PYTHON = f"""
[[ "$*" == -c* || $1 == - ]] || echo "${{0#"$PWD/"}} $*" >>"$CALLS"
case "$*" in
  "-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip"*) while [[ $1 != -c ]]; do shift; done; grep '^torch==' "$2" >>"$PINS" ;;
  *torch.__version__*) echo 2.99.0+cu130 ;;
  "-m pytest"*) echo "$TESTS"; [[ $TESTS != *failed* ]] ;;
  "-m pkt_ext bench"*) while (($#)); do [[ $1 != --json ]] || echo "{{}}" >"$2"; shift; done ;;
  *is_available*) ;;
  *) exec {sys.executable} "$@" ;;
esac"""
SANITIZER = """case "$*" in
  --version) echo "Version 2026.1" ;;
  *memcheck*) echo "5 passed in 1s"; echo "========= ERROR SUMMARY: 0 errors" ;;
  *racecheck*) echo "5 passed in 1s"; echo "========= RACECHECK SUMMARY: $RACES"; exit 99 ;;
  *initcheck*) echo "========= Error: device not supported"; exit 1 ;;
  *synccheck*) echo "5 skipped in 1s"; echo "========= ERROR SUMMARY: 0 errors" ;;
esac"""
ERRORS = "12 hazards displayed (1 error, 11 warnings)"
WARNINGS = "13 hazards displayed (0 errors, 13 warnings)"


@pytest.fixture
def run(tmp_path):
    """run(tests=..., races=...) -> the finished process: the script in a tree of its own, its
    stand-ins first on PATH."""

    def executable(path: str, script: str) -> None:
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / path).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / path).chmod(0o755)

    def call(*options, card="NVIDIA H200", tests="7 passed, 2 deselected in 1s", races=WARNINGS,
             sanitizer=True, fresh=False):  # fmt: skip
        executable("bin/nvidia-smi", f'echo "{card}"; [[ -n "{card}" ]]')
        executable("bin/python3" if fresh else "tree/venv/bin/python", PYTHON)
        executable("bin/ncu", 'echo "ncu $*" >>"$CALLS"')
        if sanitizer:
            executable("bin/compute-sanitizer", SANITIZER)
        (tmp_path / "tree/benchmarks").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "benchmarks/run_gpu.sh", tmp_path / "tree/benchmarks")
        shutil.copy(ROOT / "constraints.txt", tmp_path / "tree")
        environment = os.environ | {
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            "CUDA_HOME": str(tmp_path),
            "PYTHON": "python3",
            "TESTS": tests,
            "RACES": races,
            "CALLS": str(tmp_path / "calls"),
            "PINS": str(tmp_path / "pins"),
        }
        command = [tmp_path / "tree/benchmarks/run_gpu.sh", "--results", tmp_path / "results"]
        command += [*options, *([] if fresh else ["--venv", "venv"])]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    return call


def recorded(folder: Path) -> dict:
    path = next(folder.glob("results/nvidia-h200/*-sanitizer.json"))
    return json.loads(path.read_text())["outcomes"]


def outcomes(folder: Path) -> dict:
    return {name: entry["outcome"] for name, entry in recorded(folder).items()}


def figures(folder: Path) -> list[Path]:
    return [p for p in folder.glob("results/**/*.json") if "sanitizer" not in p.name]


def test_without_a_gpu_it_says_so_in_one_line(run, tmp_path):
    done = run(card="")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no NVIDIA GPU" in done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("fresh", [False, True], ids=["given", "fresh"])
def test_the_environment_gets_what_is_run_in_it(run, tmp_path, fresh):
    done = run("--size", "small", fresh=fresh, sanitizer=False)
    assert done.returncode == 0, done.stderr
    venv = "build/gpu-venv" if fresh else "venv"
    made = ["python3 -m venv", f"{venv}/bin/python -m pip install --quiet -c constraints.txt torch"]
    expected = made if fresh else []
    expected += [
        f"{venv}/bin/python -m {what}"
        for what in (
            "pip install --quiet -c PINS setuptools cmake ninja pybind11",
            "pip install --quiet -c PINS --no-build-isolation -e .[dev]",
            "pytest -q -p no:cacheprovider tests/ops tests/streaming/test_on_cuda.py -k cuda",
            "pkt_ext bench --device cuda --size small",
        )
    ]
    calls = re.sub(r"-c /\S+/constraints.txt", "-c PINS", (tmp_path / "calls").read_text())
    calls = [call.removeprefix(f"{tmp_path}/bin/") for call in calls.splitlines()]
    assert len(calls) == len(expected)
    assert all(call.startswith(start) for call, start in zip(calls, expected, strict=True)), calls
    pins = (tmp_path / "pins").read_text().splitlines()  # the torch that is there is not replaced
    assert pins[-2:] == ["torch==2.99.0+cu130"] * 2


def test_a_sanitizers_errors_fail_after_the_timing(run, tmp_path):
    done = run(races=ERRORS)
    assert done.returncode == 1, done.stderr
    assert recorded(tmp_path)["racecheck"] == {
        "outcome": "failed",
        "detail": "5 passed in 1s; 1 errors, 11 warnings",
        "errors": 1,
        "warnings": 11,
    }
    assert len(figures(tmp_path)) == 1


def test_its_warnings_are_counted(run, tmp_path):
    done = run()
    assert done.returncode == 0, done.stderr
    found = recorded(tmp_path)["racecheck"]
    assert (found["outcome"], found["errors"], found["warnings"]) == ("passed", 0, 13)


def test_hazards_of_no_known_severity_are_errors(run, tmp_path):
    assert run(races="2 hazards displayed").returncode == 1
    assert recorded(tmp_path)["racecheck"]["errors"] == 2


def test_no_tool_passes_that_showed_nothing(run, tmp_path):
    assert run().returncode == 0
    assert outcomes(tmp_path) == {
        "tests": "passed",
        "memcheck": "passed",
        "racecheck": "passed",
        "initcheck": "not available",
        "synccheck": "not available",
    }


def test_real_shapes_are_profiled(run, tmp_path):
    assert run("--ncu", sanitizer=False).returncode == 0
    profile = (tmp_path / "calls").read_text().splitlines()[-1]
    assert profile.startswith("ncu") and "--kernel-id ::regex:3pkt:1 " in profile
    assert profile.endswith("-m pkt_ext bench --device cuda --size default")


def test_missing_tools_leave_the_figures(run, tmp_path):
    done = run(sanitizer=False)
    assert done.returncode == 0, done.stderr
    assert set(list(outcomes(tmp_path).values())[1:]) == {"not available"}
    assert len(figures(tmp_path)) == 1


@pytest.mark.parametrize("tests", ["3 failed, 4 passed in 1s", "9 skipped in 1s", "no module"])
def test_kernels_whose_tests_did_not_pass_are_not_timed(run, tmp_path, tests):
    assert run(tests=tests, sanitizer=False).returncode == 1
    assert outcomes(tmp_path)["tests"] == "failed" and figures(tmp_path) == []
