# SPDX-License-Identifier: Apache-2.0
"""benchmarks/run_gpu.sh with stand-ins for everything that needs a GPU: what it records."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PYTHON = f"""case "$*" in
  "-m pytest"*) echo "$TESTS"; [[ $TESTS != *failed* ]] ;;
  *"cli bench"*) while [[ $1 != --json ]]; do shift; done; echo "{{}}" >"$2" ;;
  setup.py*|*is_available*) ;;
  *) exec {sys.executable} "$@" ;;
esac"""
SANITIZER = """case "$*" in
  --version) echo "Version 2026.1" ;;
  *memcheck*) echo "5 passed in 1s"; echo "========= ERROR SUMMARY: 0 errors" ;;
  *racecheck*) echo "5 passed in 1s"; echo "========= RACECHECK SUMMARY: 2 hazards displayed"; \
exit $RACES ;;
  *initcheck*) echo "========= Error: device not supported"; exit 1 ;;
  *synccheck*) echo "5 skipped in 1s"; echo "========= ERROR SUMMARY: 0 errors" ;;
esac"""


@pytest.fixture
def run(tmp_path):
    """run(tests=..., races=...) -> the finished process, with its stand-ins first on PATH."""

    def executable(path: str, script: str) -> None:
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / path).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / path).chmod(0o755)

    def call(card="NVIDIA H200", tests="7 passed, 2 deselected in 1s", races=99, sanitizer=True):
        executable("bin/nvidia-smi", f'echo "{card}"; [[ -n "{card}" ]]')
        executable("venv/bin/python", PYTHON)
        if sanitizer:
            executable("bin/compute-sanitizer", SANITIZER)
        environment = os.environ | {
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            "CUDA_HOME": str(tmp_path),
            "TESTS": tests,
            "RACES": str(races),
        }
        options = ["--venv", tmp_path / "venv", "--results", tmp_path / "results"]
        return subprocess.run(
            [ROOT / "benchmarks" / "run_gpu.sh", *options],
            capture_output=True, text=True, env=environment,
        )  # fmt: skip

    return call


def outcomes(folder: Path) -> dict:
    document = json.loads(next(folder.glob("results/nvidia-h200/*-sanitizer.json")).read_text())
    return {name: entry["outcome"] for name, entry in document["outcomes"].items()}


def figures(folder: Path) -> list[Path]:
    return [p for p in folder.glob("results/**/*.json") if "sanitizer" not in p.name]


def test_without_a_gpu_it_says_so_in_one_line(run, tmp_path):
    done = run(card="")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no NVIDIA GPU" in done.stderr
    assert not (tmp_path / "results").exists()


def test_no_tool_passes_that_showed_nothing(run, tmp_path):
    done = run()
    assert done.returncode == 1, done.stderr
    assert outcomes(tmp_path) == {
        "tests": "passed",
        "memcheck": "passed",
        "racecheck": "failed",
        "initcheck": "not available",
        "synccheck": "not available",
    }
    assert figures(tmp_path) == []


def test_missing_tools_leave_the_figures(run, tmp_path):
    done = run(sanitizer=False)
    assert done.returncode == 0, done.stderr
    assert set(list(outcomes(tmp_path).values())[1:]) == {"not available"}
    assert len(figures(tmp_path)) == 1


@pytest.mark.parametrize("tests", ["3 failed, 4 passed in 1s", "9 skipped in 1s", "no module"])
def test_kernels_whose_tests_did_not_pass_are_not_timed(run, tmp_path, tests):
    assert run(tests=tests, sanitizer=False).returncode == 1
    assert outcomes(tmp_path)["tests"] == "failed" and figures(tmp_path) == []
