# SPDX-License-Identifier: Apache-2.0
"""A student with an adapter or a sparse delta written as one complete model, piece by piece."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm
from transformers import PreTrainedModel

from pkt_ext import artifact, delta
from pkt_ext.adapter import (
    CONFIG,
    WEIGHTS,
    AdapterConfig,
    check_fit,
    local,
    read_adapter,
    read_ordinary,
)
from pkt_ext.errors import InputError
from pkt_ext.models.anatomy import describe
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.shards import write_shards

log = logging.getLogger(__name__)

_PIECE = 1 << 22  # elements of a weight at a time: 16 MiB of float32, and a few such
_SURVIVED = 0.9  # below this share of a delta a warning is due
_OWN_FILES = {"config.json", "README.md", "run.json", "report.json", artifact.MANIFEST, CONFIG}
_COPIED = (".json", ".model", ".txt", ".jinja")
_LEGAL = re.compile(r"(licen[cs]e|notice|use_policy)", re.IGNORECASE)


def merge(
    student,
    adapter: str | os.PathLike,
    out: str | os.PathLike,
    dtype: torch.dtype | None = None,
    *,
    revision: str | None = None,
    tokenizer=None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict:
    """Write student + adapter, or + delta, as a complete model: weights, configuration, tokenizer.

    Weights go through in pieces of 16 MiB, whatever the model's size; sums are float32, and each
    matrix is rounded once, to the dtype it has in the student.

    A delta smaller than half the spacing of its weights' dtype is lost in rounding. `survived` is
    the share of the delta D that the written weights carry, <round(W + D) - W, D> / <D, D>;
    `rounding_error` is |round(W + D) - (W + D)| / |D|.

    Args:
        student: folder, hub id or loaded PreTrainedModel: the *unmodified* one.
        adapter: what `pkt finetune` left, any plain LoRA adapter in PEFT's format, or a published
            delta (kind `delta`).
        out: the folder to make (kind `model`).
        dtype: of every weight; float32 loses nothing. None: as stored in the student.
        revision: of a hub id.
        tokenizer: saved along, where the student is a loaded model without a folder.
    Returns:
        What report.json holds: `modules` {path: {norm, survived, rounding_error}}, `survived` of
        all together, `untied`, `dtype`, `bytes`, `seconds`, `warnings`; of a delta also
        `selection`, which compares what was written with the student (`delta.selection`).
    Raises:
        InputError: a Seeking start (kind `init`), an adapter for another model, NaN, ...
        OutputBusyError, ResourceError: see `artifact.publish`.
    """
    if delta.is_delta(adapter):
        source = _delta_source(adapter)
    else:
        factors, config, run = read_ordinary(adapter)
        source = _lora_source(adapter, factors, config, run)
    return _write_model(
        student, source, out, dtype, kind="model",
        revision=revision, tokenizer=tokenizer, overwrite=overwrite, progress=progress,
    )  # fmt: skip


def residual_model(
    student,
    init: str | os.PathLike,
    out: str | os.PathLike,
    dtype: torch.dtype | None = None,
    *,
    revision: str | None = None,
    tokenizer=None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict:
    """Write W - eta B0 A0, the base on which `start/` of a Seeking start is an ordinary adapter.

    For trainers that take a model and an adapter and nothing else. The arguments and the report
    are `merge`'s; the model itself is damaged until `start/` is added.

    Raises:
        InputError: `init` is not a complete Seeking start, or one for another student.
    """
    run = artifact.read(init, kind="init")
    factors, config = read_adapter(Path(init) / "delta")
    return _write_model(
        student, _lora_source(init, factors, config, run), out, dtype, kind="residual-model",
        revision=revision, tokenizer=tokenizer, overwrite=overwrite, progress=progress,
    )  # fmt: skip


def write_trained(
    folder: Path, checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor], report: dict
) -> None:
    """Write a complete model into a staging folder: a checkpoint with some parameters replaced.

    Args:
        weights: by the model's own names; rounded to the dtype that each has in the checkpoint.
        report:  its `warnings`, a list, may get longer.
    """
    skeleton = checkpoint.skeleton(torch.float32)
    names = [name for name, _ in skeleton.named_parameters()]
    stored = {name: checkpoint.dtype_of(name) for name in names}

    def pieces(name: str):
        if name in weights:
            whole = weights[name].detach().to("cpu", stored[name])
        else:
            whole = checkpoint.load([name], stored[name])[name]
        yield from whole.reshape(-1).split(_PIECE)

    write_shards(folder, {name: (checkpoint.shape(name), stored[name]) for name in names}, pieces)
    _write_config(folder, checkpoint, skeleton, None, untied=False)
    _copy_files(folder, checkpoint, None, report)


# (rows, columns of the stored weight) -> those rows of what is added to it, float32
_Edit = Callable[[slice, int], torch.Tensor]


@dataclass(frozen=True)
class _Source:
    """What is added to a student's weights."""

    path: str | os.PathLike
    run: dict
    what: str  # in words
    edits: Callable[[Checkpoint, PreTrainedModel], dict[str, _Edit]]  # by module; checks the fit
    # (student, folder written) -> further entries of the report
    look: Callable[[Checkpoint, Path], dict] | None = None


def _lora_source(path, factors, config: AdapterConfig, run: dict) -> _Source:
    def edit(factor, scale: float, transposed: bool) -> _Edit:
        return lambda rows, width: factor.delta(scale, transposed=transposed, rows=rows)

    def edits(checkpoint, skeleton):
        check_fit(skeleton, factors, tied_ok=True)
        _check_stored_bases(checkpoint, path, config)
        return {
            module: edit(
                factor,
                config.scale[module],
                type(skeleton.get_submodule(module)).__name__ == "Conv1D",
            )
            for module, factor in factors.items()
        }

    return _Source(path, run, "LoRA adapter", edits)


def _delta_source(path) -> _Source:
    def read(skeleton):
        return delta.read_delta(path, describe(skeleton))

    def look(checkpoint, folder):
        deltas = read(checkpoint.skeleton(torch.float32))
        found = delta.selection(checkpoint, folder, deltas)
        if found["outside"]:
            raise RuntimeError(f"{found['outside']} weights outside the delta were changed")
        return {"selection": found}

    def edits(checkpoint, skeleton):
        return delta.edits(read(skeleton), skeleton)

    return _Source(path, artifact.read(path, kind="delta"), "sparse delta", edits, look)


def _write_model(
    student, source: _Source, out, dtype, *, kind, revision, tokenizer, overwrite, progress
) -> dict:
    start = time.perf_counter()
    checkpoint = Checkpoint.open(student, revision=revision)
    if checkpoint.quantisation:
        raise InputError(
            f"{checkpoint.name}: its weights are quantised ({checkpoint.quantisation}), and a sum "
            "would be again; merge into the unquantised checkpoint that it was made from"
        )
    skeleton = checkpoint.skeleton(torch.float32)
    edits = source.edits(checkpoint, skeleton)
    if checkpoint.folder and Path(out).resolve() == checkpoint.folder.resolve():
        raise InputError(f"{out} is the student itself; choose another --out")
    ends = [skeleton.get_input_embeddings(), skeleton.get_output_embeddings()]
    tied = None not in ends and ends[0].weight is ends[1].weight
    untied = tied and any(skeleton.get_submodule(m) in ends for m in edits)
    names = [name for name, _ in skeleton.named_parameters(remove_duplicate=not untied)]
    written = {name: dtype or checkpoint.dtype_of(name) for name in names}
    tensors = {name: (checkpoint.shape(name), written[name]) for name in names}
    size = sum(torch.Size(s).numel() * d.itemsize for s, d in tensors.values())
    changed = {f"{module}.weight": module for module in edits}
    report: dict = {"modules": {}, "untied": untied, "warnings": []}
    inputs = {
        "student": artifact.fingerprint(checkpoint.folder or checkpoint.name),
        "adapter": artifact.fingerprint(source.path),
    }
    _check_same_student(source.run, inputs["student"], report)
    run = {
        "paradigm": source.run.get("paradigm"),
        "config": {"dtype": str(dtype).removeprefix("torch.") if dtype else None},
        "inputs": inputs,
    }
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=kind, leave=False,
               disable=not (progress and sys.stderr.isatty()))  # fmt: skip
    with (
        bar,
        artifact.publish(
            out, kind=kind, run=run, report=report, overwrite=overwrite, planned_bytes=size,
            card=_model_card(kind, checkpoint.name, source.path, source.what),
        ) as folder,
    ):  # fmt: skip

        def pieces(name):
            module = changed.get(name)
            meter = _Meter()
            for piece in _summed(checkpoint, name, written[name], edits.get(module), meter):
                bar.update(piece.numel() * piece.element_size())
                yield piece
            if module is not None:
                report["modules"][module] = meter.result()

        report["bytes"] = write_shards(folder, tensors, pieces)
        _write_config(folder, checkpoint, skeleton, dtype, untied)
        if source.look:
            report.update(source.look(checkpoint, folder))
        _copy_files(folder, checkpoint, tokenizer, report)
        _judge(report, dtype or checkpoint.dtype)
        report["dtype"] = str(dtype or checkpoint.dtype).removeprefix("torch.")
        report["seconds"] = time.perf_counter() - start
    return report


def _summed(checkpoint, name, dtype, edit: _Edit | None, meter):
    """The written rows of one parameter, piece by piece."""
    weight = checkpoint.load([name], checkpoint.dtype_of(name))[name]
    if edit is None:
        yield from (part.to(dtype) for part in weight.reshape(-1).split(_PIECE))
        return
    rows = max(1, _PIECE // weight.shape[1])
    for first in range(0, weight.shape[0], rows):
        part = weight[first : first + rows].float()
        added = edit(slice(first, first + len(part)), part.shape[1])
        total = part + added
        result = total.to(dtype)
        if not result.isfinite().all():
            raise InputError(f"{name}: NaN or infinity in the sum; the student or the dtype is bad")
        meter.add(part.to(dtype).float(), added, total, result.float())
        yield result


class _Meter:
    """How much of one matrix's delta came through rounding, summed in float64 over its pieces."""

    def __init__(self):
        self.square = self.along = self.error = 0.0

    def add(self, weight, delta, total, result) -> None:
        self.square += (delta * delta).sum(dtype=torch.float64).item()
        self.along += ((result - weight) * delta).sum(dtype=torch.float64).item()
        self.error += (result - total).square().sum(dtype=torch.float64).item()

    def result(self) -> dict:
        if self.square == 0:
            return {"norm": 0.0, "survived": 1.0, "rounding_error": 0.0}
        return {
            "norm": math.sqrt(self.square),
            "survived": self.along / self.square,
            "rounding_error": math.sqrt(self.error / self.square),
        }


def _judge(report: dict, dtype: torch.dtype) -> None:
    modules = report["modules"]
    squares = {module: entry["norm"] ** 2 for module, entry in modules.items()}
    total = sum(squares.values())
    report["survived"] = (
        sum(modules[m]["survived"] * square for m, square in squares.items()) / total
        if total
        else 1.0
    )
    low = [module for module, entry in modules.items() if entry["survived"] < _SURVIVED]
    if low:
        worst = min(low, key=lambda module: modules[module]["survived"])
        message = (
            f"rounding to {str(dtype).removeprefix('torch.')} kept less than {_SURVIVED:.0%} of "
            f"the delta in {len(low)} of {len(modules)} matrices (least: {worst}, "
            f"{modules[worst]['survived']:.0%}); --dtype float32 keeps all of it"
        )
        report["warnings"].append(message)
        log.warning(message)


def _check_stored_bases(checkpoint: Checkpoint, adapter, config: AdapterConfig) -> None:
    """PEFT saves whole embeddings along where they are targeted; they must be the student's own."""
    for module, key in config.stored_bases.items():
        with safe_open(local(adapter) / WEIGHTS, framework="pt") as file:
            theirs = file.get_tensor(key)
        name = f"{module}.weight"
        try:
            ours = checkpoint.load([name], checkpoint.dtype_of(name))[name]
        except KeyError:
            raise InputError(f"{adapter}: {key} is no weight of the student") from None
        if theirs.shape != ours.shape or not torch.equal(ours.to(theirs.dtype), theirs):
            raise InputError(
                f"{adapter}: it replaces {name} (a resized vocabulary, or a trained embedding); "
                "merge it with PEFT"
            )


def _check_same_student(source_run: dict, student: dict, report: dict) -> None:
    trained_on = (source_run.get("inputs") or {}).get("student")
    if not isinstance(trained_on, dict) or not (trained_on.get("files") and student.get("files")):
        return
    weights = [
        {name: entry for name, entry in record["files"].items() if name.endswith(".safetensors")}
        for record in (trained_on, student)
    ]
    if weights[0] != weights[1]:
        message = "the student's weights are not those the adapter was made on (hashes differ)"
        report["warnings"].append(message)
        log.warning(message)


def _write_config(folder: Path, checkpoint: Checkpoint, skeleton, dtype, untied: bool) -> None:
    config = checkpoint.config.__class__.from_dict(checkpoint.config.to_dict())
    config.dtype = dtype or checkpoint.dtype
    config.architectures = [type(skeleton).__name__]
    config.tie_word_embeddings = not untied and skeleton.config.tie_word_embeddings
    config.save_pretrained(folder)


def _copy_files(folder: Path, checkpoint: Checkpoint, tokenizer, report: dict) -> None:
    """Tokenizer, chat template, generation configuration and licence, as they lie."""
    source = checkpoint.folder or Path(checkpoint.name)
    if source.is_dir():
        for entry in sorted(source.iterdir()):
            weights = entry.name.endswith(".index.json") or entry.name in _OWN_FILES
            wanted = entry.suffix in _COPIED or _LEGAL.match(entry.name)
            if entry.is_file() and wanted and not weights:
                shutil.copyfile(entry, folder / entry.name)
            elif entry.is_dir() and entry.name == "additional_chat_templates":
                shutil.copytree(entry, folder / entry.name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        message = "the student has no tokenizer files; none were written"
        report["warnings"].append(message)
        log.warning(message)


def _model_card(kind: str, student: str, source, what: str) -> str:
    base, made = artifact.model_name(student), artifact.model_name(source)
    if kind == "model":
        body = f"`{base}` with the {what} `{made}` merged into its weights by pkt_ext."
    else:
        body = (
            f"`{base}` minus the product of the Seeking start `{made}`: a base for training with "
            "that folder's `start/` as the adapter. **Without it the model is damaged.**"
        )
    return artifact.model_card(
        title=f"{base} + {made}" if kind == "model" else f"{base} - {made}",
        kind=kind,
        base_model=student,
        recipe={"student": base, "adapter": made},
        body=body,
        peft=False,
    )
