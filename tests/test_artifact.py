# SPDX-License-Identifier: Apache-2.0
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pkt_ext import artifact
from pkt_ext.errors import InputError, OutputBusyError, ResourceError

ROOT = Path(__file__).resolve().parents[1]


def write(out, payload=b"payload", **options):
    with artifact.publish(
        out, kind="adapter", run={"config": {"rank": 2}}, report={}, **options
    ) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "data.bin").write_bytes(payload)
    return Path(out)


def child(body, *arguments, **options):
    """A fresh interpreter running `body` with the package importable."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def test_publishes_a_complete_folder(tmp_path):
    run, report = {"paradigm": "postpkt"}, {}
    out = tmp_path / "made" / "out"
    with artifact.publish(out, kind="init", run=run, report=report, card="# card\n") as folder:
        assert folder.parent == out.parent and not out.exists()
        (folder / "x.txt").write_text("x")
        run["late"] = 1
        report["loss"] = [0.5, float("nan")]
    assert artifact.verify(out) == []
    record = artifact.read(out, kind=("init", "adapter"))
    assert record["kind"] == "init" and record["late"] == 1
    assert set(record["versions"]) >= {"python", "torch", "transformers", "peft"}
    assert json.loads((out / "report.json").read_text()) == {"loss": [0.5, None]}
    assert (out / "README.md").read_text() == "# card\n"
    assert [p.name for p in out.parent.iterdir()] == ["out"]  # no lock, no staging


def test_every_flipped_bit_is_found(tmp_path):
    out = write(tmp_path / "out", payload=bytes(range(40)))
    for path in [p for p in out.rglob("*") if p.is_file()]:
        clean = path.read_bytes()
        for bit in range(0, 8 * len(clean), 1 if len(clean) < 50 else 13):
            dirty = bytearray(clean)
            dirty[bit // 8] ^= 1 << bit % 8
            path.write_bytes(dirty)
            assert artifact.verify(out), (path.name, bit)
        path.write_bytes(clean)
    assert artifact.verify(out) == []


def test_missing_extra_and_incomplete(tmp_path):
    out = write(tmp_path / "out")
    (out / "extra").write_text("")
    (out / "link").symlink_to(tmp_path)
    assert len(artifact.verify(out)) == 2
    (out / "deep" / "data.bin").unlink()
    assert any("missing" in problem for problem in artifact.verify(out))
    with pytest.raises(InputError, match="damaged"):
        artifact.read(out)
    (out / "manifest.json").unlink()
    with pytest.raises(InputError, match="not a complete output"):
        artifact.read(out)
    with pytest.raises(InputError, match="no such folder"):
        artifact.read(tmp_path / "nowhere")


def test_kind_is_checked(tmp_path):
    with artifact.publish(tmp_path / "s", kind="init", run={}, report={}):
        pass
    with pytest.raises(InputError, match="pkt finetune"):
        artifact.read(tmp_path / "s", kind="adapter")


def test_overwrite_keeps_to_its_kind(tmp_path):
    out = write(tmp_path / "out", payload=b"a merged model, say")
    with pytest.raises(InputError, match="is of kind 'adapter', not 'init'; choose another"):
        with artifact.publish(out, kind="init", run={}, report={}, overwrite=True):
            pass
    assert artifact.verify(out) == []
    (out / "run.json").write_text("{")
    with artifact.publish(out, kind="init", run={}, report={}, overwrite=True):
        pass
    assert artifact.read(out, kind="init")


def test_existing_output(tmp_path):
    out = write(tmp_path / "out", payload=b"old")
    with pytest.raises(InputError, match="exists"):
        write(out)
    assert write(out, payload=b"new", overwrite=True).joinpath("deep/data.bin").read_bytes() == (
        b"new"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    foreign = tmp_path / "home"
    foreign.mkdir()
    write(foreign)  # an empty folder is as good as none
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not written by pkt"):
        write(tmp_path / "mine", overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        write(tmp_path / "mine" / "thesis.tex", overwrite=True)
    with pytest.raises(InputError, match="choose another"):
        write(tmp_path / "mine" / "thesis.tex" / "below")


@pytest.mark.parametrize("failure", [ValueError("boom"), KeyboardInterrupt(), SystemExit(143)])
def test_failure_leaves_everything_as_before(tmp_path, failure):
    out = write(tmp_path / "out", payload=b"old")
    with pytest.raises(type(failure)):
        with artifact.publish(out, kind="adapter", run={}, report={}, overwrite=True) as folder:
            (folder / "half").write_text("half")
            raise failure
    assert artifact.verify(out) == []
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(type(failure)):  # of the parents only those that it made go
        with artifact.publish(tmp_path / "new/er/est", kind="adapter", run={}, report={}) as folder:
            (folder / "half").write_text("half")
            raise failure
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "kept").mkdir()
    with pytest.raises(type(failure)):
        with artifact.publish(tmp_path / "kept/a/b", kind="adapter", run={}, report={}) as folder:
            (folder.parent / "another's").write_text("data")
            raise failure
    assert [p.name for p in (tmp_path / "kept/a").iterdir()] == ["another's"]
    with pytest.raises(type(failure)):
        with artifact.publish(tmp_path / "kept/out", kind="adapter", run={}, report={}):
            raise failure
    assert (tmp_path / "kept").is_dir()


def test_disk_full(tmp_path, monkeypatch):
    with pytest.raises(ResourceError, match="needed, .* free"):
        with artifact.publish(tmp_path / "a", kind="model", run={}, report={}):
            raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
    with pytest.raises(ResourceError) as caught:  # safetensors has no errno, only words
        with artifact.publish(tmp_path / "a", kind="model", run={}, report={}):
            raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert caught.value.exit_code == 75
    with pytest.raises(ResourceError, match="needed"):
        write(tmp_path / "a", planned_bytes=1 << 60)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError):
        write(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="unrelated"):
        with artifact.publish(tmp_path / "a", kind="model", run={}, report={}):
            raise FileNotFoundError(errno.ENOENT, "unrelated", "elsewhere")


def test_file_size_limit(tmp_path):
    """A real short write, by the kernel: RLIMIT_FSIZE stands in for a small disk."""
    body = """
        import resource, sys
        import torch
        from safetensors.torch import save_file
        from pkt_ext import artifact
        from pkt_ext.errors import ResourceError
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        try:
            with artifact.publish(sys.argv[1], kind="model", run={}, report={}) as folder:
                save_file({"x": torch.zeros(1 << 16)}, folder / "x.safetensors")
        except ResourceError as error:
            print(error)
    """
    process = child(body, tmp_path / "out")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "disk full" in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


HOLD = """
    import sys, time
    from pathlib import Path
    from pkt_ext import artifact
    stage = sys.argv[2]
    def stop(*_):
        print("here", flush=True)
        time.sleep(60)
    if stage == "rename":
        artifact._swap_in = stop
    if stage == "aside":
        rename = Path.rename
        Path.rename = lambda self, to: stop() if ".tmp-" in self.name else rename(self, to)
    with artifact.publish(sys.argv[1], kind="adapter", run={}, report={}, overwrite=True) as folder:
        (folder / "half").write_text("half")
        if stage == "body":
            stop()
"""


@pytest.mark.parametrize("stage", ["body", "rename", "aside"])
def test_second_writer_and_killed_writer(tmp_path, stage):
    out = write(tmp_path / "out", payload=b"old") if stage == "aside" else tmp_path / "out"
    process = child(HOLD, out, stage)
    try:
        assert process.stdout.readline() == "here\n"
        with pytest.raises(OutputBusyError, match=f"process {process.pid}"):
            write(out)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not out.exists()
    assert any(".tmp-" in p.name for p in tmp_path.iterdir())
    if stage == "aside":  # the old output had been set aside: it comes back
        with pytest.raises(InputError, match="exists"):
            write(out)
        assert (out / "deep" / "data.bin").read_bytes() == b"old"
    else:
        write(out)
    assert artifact.verify(out) == []
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_threads_do_not_share_a_lock(tmp_path):
    with artifact.publish(tmp_path / "out", kind="model", run={}, report={}):
        with pytest.raises(OutputBusyError, match=str(os.getpid())):
            write(tmp_path / "out")


def test_fingerprint(tmp_path, monkeypatch):
    small = tmp_path / "rows.jsonl"
    small.write_text("{}\n")
    first = artifact.fingerprint(small)
    assert first["name"] == "rows.jsonl" and len(first["sha256"]) == 64
    small.write_text("{ }")
    assert artifact.fingerprint(small)["sha256"] != first["sha256"]
    assert artifact.fingerprint("org/model") == {"name": "org/model"}
    commit = tmp_path / "snapshots" / ("a" * 40)
    commit.mkdir(parents=True)
    (commit / "model.safetensors").write_bytes(os.urandom(1000))
    monkeypatch.setattr(artifact, "_WHOLE", 100)
    monkeypatch.setattr(artifact, "_SAMPLE", 50)
    record = artifact.fingerprint(commit)
    assert record["commit"] == "a" * 40
    assert "sha256_sampled" in record["files"]["model.safetensors"]


def test_model_card(tmp_path):
    import yaml

    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    card = artifact.model_card(
        title="T", kind="adapter", base_model=str(tmp_path), recipe={"rank": 16}, body="Body."
    )
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {"library_name": "peft", "tags": ["pkt_ext", "adapter"], "license": "mit"}
    assert "rank: 16" in card and str(tmp_path) not in card
    card = artifact.model_card(
        title="T", kind="model", base_model="org/m", recipe={}, body="", peft=False
    )
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "org/m"


def test_a_card_calls_a_hub_model_by_its_id_and_a_folder_by_its_name(tmp_path):
    assert artifact.model_name("org/m") == "org/m" and artifact.model_name("gpt2") == "gpt2"
    assert artifact.model_name(str(tmp_path)) == tmp_path.name
    assert artifact.model_name("/gone/m") == "m" and artifact.model_name("") == ""


def test_import_is_light():
    """artifact.py is a leaf: pkt verify must not wait for torch."""
    process = child("import sys, pkt_ext.artifact; print('torch' in sys.modules)")
    assert process.communicate(timeout=30)[0] == "False\n"


def test_an_error_that_is_its_own_cause_is_only_an_error(tmp_path):
    def write():
        with artifact.publish(tmp_path / "out", kind="adapter", run={}, report={}):
            try:
                raise ValueError("first")
            except ValueError as error:
                raise error from error

    with pytest.raises(ValueError, match="first"):
        write()
