# SPDX-License-Identifier: Apache-2.0
"""The commands of the README and of the pages in docs, run as written, on tiny models."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import model_zoo
import pytest

ROOT = Path(__file__).parents[1]
STARTS = ("start-in-2GiB", "start-of-two")  # what the memory page makes


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder that holds what the commands name: teacher, student and the two data files."""
    folder = tmp_path_factory.mktemp("readme")
    teacher, student = model_zoo.pair("llama")
    tokens = model_zoo.tokenizer()
    model_zoo.save(teacher, folder / "teacher", tokens=tokens)
    model_zoo.save(student, folder / "student", tokens=tokens)
    rows = [{"prompt": f"{i} + {i} =", "completion": str(2 * i)} for i in range(6)]
    for name in ("seeds.jsonl", "train.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)


def run(folder, command: list[str]) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_readme_shell_commands(shop):
    (script,) = blocks("README.md", "bash")
    run(shop, ["bash", "-euc", script])
    assert (shop / "model" / "config.json").exists()
    assert (shop / "adapter" / "adapter_config.json").exists()


def test_readme_python(shop):
    methods, kernels = blocks("README.md", "python")
    run(shop, [sys.executable, "-c", methods])
    assert (shop / "model-16" / "config.json").exists()
    run(shop, [sys.executable, "-c", kernels])


def test_kernels_page(tmp_path):
    (script,) = blocks("docs/kernels.md", "bash")
    run(tmp_path, ["bash", "-euc", script])
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
    for script in blocks("docs/kernels.md", "python"):
        run(tmp_path, [sys.executable, "-c", script])


def test_migrating_page(shop):
    """The published scripts are stand-ins of their shape; the later pieces continue each other."""
    stand_in = ROOT / "tests" / "compat" / "scripts" / "seeking_script.py"
    shutil.copy(stand_in, shop / "extract_lora_with_sensitivity.py")
    patched, *pieces = blocks("docs/migrating.md", "python")
    run(shop, [sys.executable, "-c", patched])
    run(shop, [sys.executable, "-c", "\n".join(pieces)])


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert not re.search("@[A-Z]+@", text), "a placeholder was left in"
    for page in ("README.md", "CONTRIBUTING.md", *map(str, (ROOT / "docs").glob("*.md"))):
        page = ROOT / page
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_memory_page(shop):
    (script,) = blocks("docs/memory.md", "bash")
    run(shop, ["bash", "-euc", script])
    one, two = (json.loads((shop / name / "report.json").read_text()) for name in STARTS)
    assert one["budget"] == 2 * 2**30 >= one["memory"]["peak_bytes"]
    assert [len(r["processes"]) for r in (one, two)] == [0, 2]
    assert one["blocks"] == two["blocks"]


def test_laten_page(shop):
    (script,) = blocks("docs/laten.md", "bash")
    run(shop, ["bash", "-euc", script])
    assert (shop / "delta" / "delta.safetensors").exists()
    assert (shop / "merged" / "config.json").exists()


def test_semalign_page(shop):
    (script,) = blocks("docs/semalign.md", "bash")
    run(shop, ["bash", "-euc", script])
    assert (shop / "steered" / "adapter_config.json").exists()
    assert (shop / "steered-model" / "config.json").exists()
    (script,) = blocks("docs/semalign.md", "python")
    run(shop, [sys.executable, "-c", script])
