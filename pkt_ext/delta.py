# SPDX-License-Identifier: Apache-2.0
"""Sparse changes of a student's weights as a small file, and as an ordinary LoRA adapter.

An artefact of kind `delta` holds `delta.safetensors`. For each changed projection, by its full path
in the student and its role:

    <block>.<module>.<role>.index    int64 [n], rows (up, v) or columns (down, o) of the projection
    <block>.<module>.<role>.values   float32 [n, D], what is added to each

`pkt merge` adds it to the student's weights, `models.injection.injected` while a context lasts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pkt_ext import artifact
from pkt_ext.adapter import Factor, matrix_shape, stores_transposed, write_adapter
from pkt_ext.errors import InputError
from pkt_ext.models.anatomy import Anatomy, describe
from pkt_ext.models.injection import Change, Deltas, changes
from pkt_ext.ops.low_rank import lora_factors
from pkt_ext.streaming.checkpoint import Checkpoint

FILE = "delta.safetensors"
_PIECE = 1 << 22  # elements compared at a time


def write_delta(folder: str | os.PathLike, deltas: Deltas, anatomy: Anatomy) -> int:
    """Write `delta.safetensors` into a folder, meant to be a staging one of `artifact.publish`.

    Args:
        deltas:  of any device and dtype; written as float32.
        anatomy: the student's.
    Returns:
        Bytes of tensors.
    Raises:
        InputError: nothing to write, deltas that do not fit, NaN or infinity in one.
    """
    if not deltas:
        raise InputError("the delta is empty; nothing was located or translated")
    tensors = {}
    names = _names(anatomy)
    for key, change in changes(anatomy, deltas).items():
        # copies: up and down may share an index, and safetensors refuses what shares memory
        values = change.values.detach().to("cpu", torch.float32, copy=True).contiguous()
        _check_finite(change.module, values)
        tensors[f"{names[key]}.index"] = deltas[key][0].to("cpu", copy=True)
        tensors[f"{names[key]}.values"] = values
    # one entry: safetensors writes several in random order, and equal runs leave equal bytes
    save_file(tensors, Path(folder) / FILE, metadata={"pkt_ext": "delta"})
    return sum(tensor.nbytes for tensor in tensors.values())


def publish_delta(
    out: str | os.PathLike,
    deltas: Deltas,
    anatomy: Anatomy,
    *,
    base_model: str,
    run: dict | None = None,
    report: dict | None = None,
    overwrite: bool = False,
) -> None:
    """Publish deltas alone as the folder `out` (kind `delta`).

    Args:
        base_model: folder or hub id of the student.
        run, report: go to run.json and report.json.
    Raises:
        InputError: see `write_delta`.
        OutputBusyError, ResourceError: see `artifact.publish`.
    """
    run = {"paradigm": "prepkt", "inputs": {"student": artifact.fingerprint(base_model)}} | (
        run or {}
    )
    size = sum(4 * values.numel() + 8 * index.numel() for index, values in deltas.values())
    with artifact.publish(
        out,
        kind="delta",
        run=run,
        report=report if report is not None else {},
        card=delta_card(base_model, run.get("config") or {}),
        overwrite=overwrite,
        planned_bytes=size,
    ) as folder:
        write_delta(folder, deltas, anatomy)


def is_delta(folder: str | os.PathLike) -> bool:
    """Whether this is a published delta (and not an adapter, or nothing of ours).

    Raises:
        InputError: it is ours, and damaged.
    """
    return artifact.is_published(folder) and artifact.read(folder)["kind"] == "delta"


def read_delta(
    folder: str | os.PathLike, anatomy: Anatomy
) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    """The deltas of a published folder, checked against a student by name and shape.

    Args:
        anatomy: the student's, from `models.anatomy.describe`.
    Returns:
        `injection.Deltas`: int64 and float32, on the CPU.
    Raises:
        InputError: no complete delta, a damaged one, or one for another model.
    """
    artifact.read(folder, kind="delta")
    path = Path(folder) / FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: damaged ({error}); make it again") from error
    found = {}
    for key, name in _names(anatomy).items():
        index, values = (tensors.pop(f"{name}.{part}", None) for part in ("index", "values"))
        if index is None and values is None:
            continue
        if index is None or values is None or values.dtype != torch.float32:
            raise InputError(f"{path}: {name} is not an index with float32 values; make it again")
        _check_finite(name, values)
        found[key] = index, values
    if tensors:
        raise InputError(
            f"{path}: the student has no projection for {min(tensors)}; the delta was made for "
            "another model"
        )
    if not found:
        raise InputError(f"{path}: no deltas in it; make it again")
    try:
        changes(anatomy, found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return found


def delta_card(student: str, recipe: dict) -> str:
    """README.md of a delta."""
    name = artifact.model_name(student) or "the student"
    return artifact.model_card(
        title=f"Delta for {name}",
        kind="delta",
        base_model=student,
        recipe=recipe,
        body=f"""
Some rows and columns of the weights of `{name}`, and what is added to them. It is no model and no
PEFT adapter:

```
pkt merge --student {name} --adapter THIS_FOLDER --out MODEL
```

Transfer of parameters between models of different size is reported to be unstable: compare the
result with the unmodified student on your own task.
""",
        peft=False,
    )


def _names(anatomy: Anatomy) -> dict[tuple[int, str], str]:
    """{(block, role): what it is called in the file} of every projection."""
    return {
        (block, part.role): f"{anatomy.blocks[block]}.{part.module}.{part.role}"
        for block, parts in enumerate(anatomy.projections)
        for part in parts
    }


def _check_finite(name: str, values: torch.Tensor) -> None:
    if not values.isfinite().all():
        raise InputError(
            f"{name}: NaN or infinity in its delta; train again at a lower learning rate"
        )


# --- in the weights -------------------------------------------------------------------------------


def dense_rows(found: list[Change], transposed: bool, rows: slice, width: int) -> torch.Tensor:
    """Some rows of one module's dense delta as its weight is stored: float32 [rows, width].

    Args:
        found: all changes of the module.
        transposed: stored [in, out], as Conv1D does.
        width: columns of the stored weight.
    """
    piece = torch.zeros(rows.stop - rows.start, width)
    for change in found:
        if change.rows != transposed:
            here = (change.index >= rows.start) & (change.index < rows.stop)
            piece.index_add_(0, change.index[here] - rows.start, change.values[here])
        else:
            piece.index_add_(1, change.index, change.values[:, rows].T)
    return piece


def edits(deltas: Deltas, student) -> dict[str, Callable[[slice, int], torch.Tensor]]:
    """{module path: `dense_rows` of it, for (rows, width)} of a student, which may be on meta."""
    grouped = by_module(deltas, describe(student))
    return {
        module: lambda rows, width, found=found, module=module: dense_rows(
            found, _transposed(student, module), rows, width
        )
        for module, found in grouped.items()
    }


def by_module(deltas: Deltas, anatomy: Anatomy) -> dict[str, list[Change]]:
    """The changes of every module that has any."""
    grouped: dict[str, list[Change]] = {}
    for change in changes(anatomy, deltas).values():
        grouped.setdefault(change.module, []).append(change)
    return grouped


def selection(student, merged, deltas: Deltas) -> dict[str, int]:
    """Compare a merged model with its student, weight by weight.

    Args:
        student, merged: folder, hub id, loaded model or `Checkpoint` each. The student's weights
            are rounded to the merged model's dtype before they are compared.
    Returns:
        `selected`: rows and columns in the delta; `changed`: those with a weight that differs, all
        of them unless rounding took some; `outside`: weights that differ elsewhere, 0 if all is
        well.
    """
    ours, theirs = Checkpoint.open(student), Checkpoint.open(merged)
    ours.skeleton(torch.float32)
    skeleton = theirs.skeleton(torch.float32)
    grouped = by_module(deltas, describe(skeleton))
    seen = {id(c): torch.zeros(len(c.index), dtype=bool) for f in grouped.values() for c in f}
    outside = 0
    for name, _ in skeleton.named_parameters():
        one, two = (c.load([name], c.dtype_of(name))[name].detach() for c in (ours, theirs))
        one, two = (t.reshape(len(t), -1) for t in (one, two))
        module = name.removesuffix(".weight")
        transposed = module in grouped and _transposed(skeleton, module)
        step = max(1, _PIECE // one.shape[1])
        for first in range(0, len(one), step):
            rows = slice(first, first + step)
            differ = one[rows].to(two.dtype) != two[rows]
            for change in grouped.get(module, ()):
                if change.rows != transposed:
                    here = (change.index >= first) & (change.index < first + step)
                    places = change.index[here] - first
                    seen[id(change)][here] |= differ[places].any(1)
                    differ[places] = False
                else:
                    seen[id(change)] |= differ[:, change.index].any(0)
                    differ[:, change.index] = False
            outside += int(differ.sum())
    return {
        "selected": sum(map(len, seen.values())),
        "changed": sum(int(each.sum()) for each in seen.values()),
        "outside": outside,
    }


def _transposed(student, module: str) -> bool:
    return type(student.get_submodule(module)).__name__ == "Conv1D"


# --- as an adapter --------------------------------------------------------------------------------


def to_adapter(
    folder: str | os.PathLike,
    student,
    out: str | os.PathLike,
    *,
    rank: int | None = None,
    energy: float = 0.99,
    revision: str | None = None,
    overwrite: bool = False,
) -> dict:
    """Write a delta as an ordinary LoRA adapter that PEFT loads on the unmodified student.

    n changed rows or columns are a matrix of rank n at most; kept is the best approximation of a
    lower one. The delta file itself is exact, and mostly smaller.

    Args:
        folder: a published delta.
        student: folder, hub id or loaded model.
        out: the folder to make (kind `adapter`).
        rank: of every module's factors, or as many as the module has; None: as `energy` needs.
        energy: least share of each module's squared norm to keep.
    Returns:
        What report.json holds: `modules` {path: {rank, energy}}, `energy` of all together.
    Raises:
        InputError: no delta, one for another student, all of it zero, rank or energy out of range.
    """
    if rank is not None and rank < 1:
        raise InputError(f"rank is {rank}; give at least 1")
    if not 0 < energy <= 1:
        raise InputError(f"energy is {energy}; give a share above 0, up to 1")
    run = artifact.read(folder, kind="delta")
    checkpoint = Checkpoint.open(student, revision=revision)
    skeleton = checkpoint.skeleton(torch.float32)
    anatomy = describe(skeleton)
    factors, report, norms = {}, {}, {}
    for module, found in by_module(read_delta(folder, anatomy), anatomy).items():
        rows = found[0].rows  # the same of all: no module holds both row and column roles
        index = torch.cat([change.index for change in found])
        values = torch.cat([change.values for change in found])
        norms[module] = values.double().square().sum().item()
        if norms[module] == 0:
            continue
        B, A, low_rank = lora_factors(
            values, min(rank or _rank_for(values, energy), *values.shape), return_report=True
        )
        B, A = B.cpu(), A.cpu()
        size = matrix_shape(skeleton.get_submodule(module))
        if rows:
            factor = Factor(A, torch.zeros(size[0], len(A)).index_copy(0, index, B))
        else:
            factor = Factor(torch.zeros(len(A), size[1]).index_copy(1, index, B.T), A.T)
        factors[module] = factor
        report[module] = {"rank": factor.rank, "energy": float(low_rank.captured)}
    if not factors:
        raise InputError(f"{folder}: the delta is zero everywhere; there is nothing to write")
    kept = sum(report[module]["energy"] * norms[module] for module in report)
    summary = {"modules": report, "energy": kept / sum(norms.values())}
    inputs = {
        "student": artifact.fingerprint(checkpoint.folder or checkpoint.name),
        "delta": artifact.fingerprint(folder),
    }
    config = {"rank": rank, "energy": None if rank else energy}
    with artifact.publish(
        out,
        kind="adapter",
        run={"paradigm": run.get("paradigm"), "config": config, "inputs": inputs},
        report=summary,
        card=_adapter_card(checkpoint.name, folder, config),
        overwrite=overwrite,
        planned_bytes=sum(4 * (f.A.numel() + f.B.numel()) for f in factors.values()),
    ) as staging:
        write_adapter(
            staging,
            factors,
            alpha_over_rank=1.0,
            base_model=checkpoint.name,
            fan_in_fan_out=stores_transposed(skeleton),
        )
    return summary


def _rank_for(values: torch.Tensor, energy: float) -> int:
    """The least rank that keeps this share of the squared norm."""
    short = values if len(values) <= values.shape[1] else values.T
    gram = short.double() @ short.double().T
    energies = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)  # squared singular values
    missing = energies.sum() - energies.cumsum(0)
    return int((missing > (1 - energy) * energies.sum()).sum()) + 1


def _adapter_card(student: str, delta, recipe: Mapping) -> str:
    name, made = artifact.model_name(student), artifact.model_name(delta)
    return artifact.model_card(
        title=f"{made} as an adapter for {name}",
        kind="adapter",
        base_model=student,
        recipe=dict(recipe),
        body=f"A LoRA adapter for the **unmodified** `{name}`, which approximates the sparse delta "
        f"`{made}`; report.json says how well. `peft.PeftModel.from_pretrained` loads it.",
    )
