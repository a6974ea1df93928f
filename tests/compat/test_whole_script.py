# SPDX-License-Identifier: Apache-2.0
"""The extraction script from its checkpoint to its adapter, as it is and on our functions."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import model_zoo
import pytest
import torch
from compat.scripts import seeking_script as script

from pkt_ext.compat import notices, patched

ROOT = Path(__file__).parents[2]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with what the script reads, as the working directory."""
    model_zoo.save(
        model_zoo.build("llama", **model_zoo.TEACHER), tmp_path / "meta-llama" / "Llama-2-13b-hf"
    )
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{n} and {n}?"},
                {"role": "assistant", "content": str(2 * n)},
            ]
        }
        for n in range(4)
    ]
    (tmp_path / "data" / "gsm").mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data" / "gsm" / "sample_gsm.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notices, "_given", set())
    return tmp_path


def extracted(desk: Path) -> dict[str, torch.Tensor]:
    """What the script has written, taken away."""
    (written,) = (desk / "extracted_lora").rglob("adapter_model.bin")
    found = torch.load(written)
    written.unlink()
    written.parent.rmdir()
    return found


def assert_same_products(found, expected):
    assert list(found) == list(expected)
    for name, first in expected.items():
        assert found[name].shape == first.shape
        assert found[name].dtype == torch.float16
        if "_A" in name:
            partner = name.replace("_A", "_B")
            product = expected[partner].double() @ first.double()
            error = (found[partner].double() @ found[name].double() - product).norm()
            assert error <= 1e-3 * product.norm(), name


@pytest.mark.parametrize("embeddings", [True, False])
def test_the_same_adapter(desk, capsys, embeddings):
    args = SimpleNamespace(
        model_size="13b", lora_size="7b", task="gsm", r=4, include_emb=embeddings
    )
    script.main(args)
    plain, expected = capsys.readouterr().out.splitlines(), extracted(desk)
    with patched(script) as replaced:
        assert len(replaced) == 7
        script.main(args)
    ours = capsys.readouterr().out.splitlines()
    assert_same_products(extracted(desk), expected)
    assert ours[-1] == plain[-1]  # the blocks kept
    totals, plain_totals = (dict(eval(lines[-2])) for lines in (ours, plain))
    assert totals == pytest.approx(plain_totals, rel=1e-5)


@pytest.mark.filterwarnings("ignore::pkt_ext.compat.PublishedBehaviour")
def test_a_half_precision_checkpoint_is_scored_in_float32(desk, capsys):
    folder = desk / "meta-llama" / "Llama-2-13b-hf"
    model = model_zoo.build("llama", **model_zoo.TEACHER).half()
    model.float().save_pretrained(folder)  # the same values in float32: what the truth reads
    args = SimpleNamespace(model_size="13b", lora_size="7b", task="gsm", r=4, include_emb=True)
    script.main(args)
    expected = extracted(desk)
    model.half().save_pretrained(folder)
    with patched(script):
        script.main(args)
    assert_same_products(extracted(desk), expected)


def test_as_a_command(desk):
    """Unchanged, by its path, from another folder than its own."""
    path = str(ROOT / "tests" / "compat" / "scripts" / "seeking_script.py")
    command = ["-m", "pkt_ext.compat", path, "--r", "4", "--include_emb", "false"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("pkt_ext.compat: ")]
    assert sum("replaced" in line for line in said) == 7
    found = extracted(desk)
    script.main(
        SimpleNamespace(model_size="13b", lora_size="7b", task="gsm", r=4, include_emb=False)
    )
    assert_same_products(found, extracted(desk))
    # a second run ends as the script's does, in its own traceback
    (desk / "extracted_lora" / "13b-to-7b-gsm").mkdir()
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "FileExistsError" in done.stderr.splitlines()[-1]
    assert "pkt_ext/compat" not in done.stderr
