# SPDX-License-Identifier: Apache-2.0
"""What an interrupted run has finished, in a folder beside its output.

    state.json       what the run belongs to: its configuration, the hashes of its inputs
    journal.jsonl    one line for every finished step, in order, appended when its files are there
    *.safetensors    results that lines name, with their sha256
    *.activations    what the next steps start from (streaming/store.py)

A kill at any moment leaves at worst a torn last line and files that no line names: both are ignored
and written again. What a power cut has damaged is noticed by its hash: the steps from there on are
forgotten and done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as format_tensors

from pkt_ext.errors import InputError

_OURS = re.compile(  # all that a run ever has in its folder
    r"state\.json|journal\.jsonl|(rank|pkt_ext)-.*|.*\.(tmp|safetensors|activations)"
)


class Progress:
    """The progress of one run.

    Args:
        folder: made where it is missing; its parent exists.
        state:  what the run belongs to, JSON values only.
        resume: go on from what is there; else it is deleted.
    Raises:
        InputError: the folder holds the progress of another run, and says what differs; or it is
            no progress at all, and stays as it is.
    """

    def __init__(self, folder: str | os.PathLike, state: dict, *, resume: bool = True):
        self.folder = Path(folder)
        self.state = json.loads(json.dumps(state))
        self._lines: list[dict] = []
        if resume and (self.folder / "state.json").is_file():
            self._check()
            self._read()
        else:
            self._refuse_foreign()
            self.restart()

    @property
    def found(self) -> bool:
        """Whether any step is finished."""
        return bool(self._lines)

    def find(self, step: str) -> dict | None:
        """The facts of a finished step."""
        return next((line for line in self._lines if line["step"] == step), None)

    def record(self, step: str, **facts) -> None:
        """Note a step as finished; its files are complete.

        Args:
            facts: JSON values; `saved` is {any name: what `save` returned}.
        """
        line = {"step": step, **facts}
        with (self.folder / "journal.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._lines.append(line)

    def keep(self, count: int) -> None:
        """Forget all steps but the first `count`."""
        if count < len(self._lines):
            self._lines = self._lines[:count]
            self._write_journal()

    def keep_until(self, step: str | None) -> None:
        """Forget all steps behind `step`; None: all."""
        names = [line["step"] for line in self._lines]
        self.keep(0 if step is None else names.index(step) + 1)

    def drop_from(self, step: str) -> None:
        """Forget `step`, if it is finished, and all behind it."""
        names = [line["step"] for line in self._lines]
        if step in names:
            self.keep(names.index(step))

    def save(self, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
        """Write tensors; what to record so that `load` finds them."""
        content = format_tensors({key: value.contiguous() for key, value in tensors.items()})
        path = self.folder / f"{name}.safetensors"
        staged = path.with_suffix(".tmp")
        staged.write_bytes(content)
        staged.replace(path)
        return {"file": path.name, "sha256": hashlib.sha256(content).hexdigest()}

    def load(self, saved: dict[str, str]) -> dict[str, torch.Tensor]:
        """The tensors that `save` wrote."""
        return parse_tensors((self.folder / saved["file"]).read_bytes())

    def remember(self, **more) -> None:
        """Add to the state."""
        self.state |= json.loads(json.dumps(more))
        staged = self.folder / "state.tmp"
        staged.write_text(json.dumps(self.state, indent=2), encoding="utf-8")
        staged.replace(self.folder / "state.json")

    def restart(self) -> None:
        """Forget all steps."""
        self.remove()
        self.folder.mkdir(parents=True)
        self._lines = []
        self.remember()

    def remove(self) -> None:
        """Delete the folder; its state last, so that what a kill leaves of it is still known."""
        if not self.folder.exists():
            return
        for path in self.folder.iterdir():
            if path.name != "state.json":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(self.folder)

    def _refuse_foreign(self) -> None:
        """A folder or file of this name that no run has made is not to be deleted."""
        if not self.folder.exists():
            return
        if self.folder.is_dir():
            if all(map(_OURS.fullmatch, (path.name for path in self.folder.iterdir()))):
                return
        raise InputError(
            f"{self.folder} is not the progress of a run, whose place it takes; move it away, or "
            "choose another --out"
        )

    def _check(self) -> None:
        path = self.folder / "state.json"
        try:
            earlier = json.loads(path.read_bytes())
        except ValueError:
            earlier = {}
        self.state |= {key: earlier[key] for key in earlier.keys() - self.state.keys()}
        reason = _difference(earlier, self.state)
        if reason:
            raise InputError(
                f"{self.folder} holds the progress of another run: {reason}; repeat that run's "
                "command to finish it, or pass --no-resume to start afresh"
            )

    def _read(self) -> None:
        journal = self.folder / "journal.jsonl"
        content = journal.read_bytes() if journal.is_file() else b""
        for text in content.splitlines(keepends=True):
            try:
                line = json.loads(text) if text.endswith(b"\n") else {}
            except ValueError:
                line = {}
            if not line or not all(map(self.sound, line.get("saved", {}).values())):
                # rewritten, so that the next line is not joined to what is left of this one
                self._write_journal()
                return
            self._lines.append(line)

    def sound(self, saved: dict[str, str]) -> bool:
        """Whether the file that `save` wrote is there and undamaged."""
        path = self.folder / saved["file"]
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == saved["sha256"]

    def _write_journal(self) -> None:
        staged = self.folder / "journal.tmp"
        staged.write_text("".join(json.dumps(line) + "\n" for line in self._lines), "utf-8")
        staged.replace(self.folder / "journal.jsonl")


def _difference(old, new, path: str = "") -> str:
    """The first place where two JSON values differ, in words; empty where there is none."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            inner = f"{path}.{key}" if path else key
            if reason := _difference(old.get(key), new.get(key), inner):
                return reason
        return ""
    return "" if old == new else f"{path} was {_short(old)}, is {_short(new)}"


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
