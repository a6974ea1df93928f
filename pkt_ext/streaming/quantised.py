# SPDX-License-Identifier: Apache-2.0
"""Matrices that bitsandbytes has quantised: found in a checkpoint, decoded by its own functions.

Beside a packed `weight` lie, as `save_pretrained` writes them,

4 bits  weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__nf4 (or fp4), and with
        double quantisation weight.nested_absmax and weight.nested_quant_map;
8 bits  SCB, the largest magnitude of each row, and weight_format (LLM.int8: Dettmers et al.,
        NeurIPS 2022, arXiv 2208.07339).

Sizes are checked against each other before native code sees them.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import sys
from dataclasses import dataclass, field, replace
from math import prod

import torch

from pkt_ext.errors import InputError
from pkt_ext.models.quantisation import Quantisation
from pkt_ext.streaming.files import Files, Stored, first_line, listed

_STATE = re.compile(r"\.quant_state\.bitsandbytes__(nf4|fp4)$")
_NESTED = ("nested_absmax", "nested_quant_map")
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # elements that share a scale
_DTYPES = ("float32", "float16", "bfloat16")
_CHUNK = 2**22  # elements decoded at once: little memory beside the result


@dataclass(frozen=True)
class Packed:
    """What is stored of one quantised matrix [out, in]."""

    type: str  # "nf4", "fp4" or "int8"
    parts: dict[str, Stored]  # by bitsandbytes' names; "state" and "weight_format" are read by fit
    transposed: bool = False  # the parameter is [in, out] (GPT-2's Conv1D)
    state: dict = field(default_factory=dict)  # of 4 bits: block size, original dtype, ...

    @property
    def bytes(self) -> int:
        """Bytes of all of it."""
        return sum(part.bytes for part in self.parts.values())

    @property
    def tensors(self) -> dict[str, Stored]:
        """The parts that `dequantise` needs."""
        return {n: p for n, p in self.parts.items() if n not in ("state", "weight_format")}


def gather(stored: dict[str, Stored]) -> dict[str, Stored]:
    """The same with each quantised matrix and what lies beside it made one tensor of its key.

    Raises:
        InputError: a matrix lacks a part.
    """
    types = {key: match for key in stored if (match := _STATE.search(key))}
    found: dict[str, Packed] = {}
    for key, match in types.items():
        weight = key[: match.start()]
        names = {n: f"{weight}.{n}" for n in ("absmax", "quant_map", *_NESTED)}
        found[weight] = _collect(stored, match[1], names | {"weight": weight, "state": key})
    for key in stored:
        if key.endswith(".SCB"):
            stem = key.removesuffix("SCB")
            names = {n: stem + n for n in ("weight", "SCB", "weight_format")}
            found[f"{stem}weight"] = _collect(stored, "int8", names)
    inside = {part.key for packed in found.values() for part in packed.parts.values()}
    result = {key: one for key, one in stored.items() if key not in inside}
    for key, packed in found.items():
        result[key] = replace(packed.parts["weight"], packed=packed)
    return result


def _collect(stored: dict[str, Stored], kind: str, names: dict[str, str]) -> Packed:
    parts = {name: stored[key] for name, key in names.items() if key in stored}
    optional = {"weight_format"} if kind == "int8" or parts.keys() & set(_NESTED) else set(_NESTED)
    absent = [key for name, key in names.items() if name not in parts and name not in optional]
    if absent:
        where = next(iter(parts.values()))
        raise InputError(
            f"{where.file or where.key}: lacks {listed(absent)}, which bitsandbytes needs for "
            f"{names['weight']}; download the checkpoint again"
        )
    return Packed(kind, parts)


def kind_of(stored: dict[str, Stored]) -> Quantisation | None:
    """How the matrices are quantised, from what `gather` found; None where none is."""
    packed = [one.packed for one in stored.values() if one.packed is not None]
    if not packed:
        return None
    first = packed[0]
    bits = 8 if first.type == "int8" else 4
    return Quantisation("bitsandbytes", bits, first.type, "nested_absmax" in first.parts)


def fit(stored: Stored, shape: tuple[int, ...], transposed: bool, files: Files) -> Stored:
    """A quantised parameter with its own shape in place of the packed one's, all sizes checked.

    Args:
        shape:      of the parameter, by the configuration.
        transposed: it is the matrix [out, in] transposed.
        files:      read for what is stored in no header; not where only headers are there.
    Raises:
        InputError: parts that do not belong together, or to this shape.
    """
    packed, matrix = stored.packed, shape[::-1] if transposed else shape
    parts, state, count = packed.parts, {}, prod(matrix)
    weight = parts["weight"]
    if packed.type == "int8":
        right = len(matrix) == 2 and weight.shape == matrix and weight.dtype == torch.int8
    else:
        right = len(matrix) == 2 and weight.bytes == -(-count // 2)
    if not right:
        raise InputError(
            f"{stored.file or stored.key}: {stored.key} is {list(weight.shape)} in {packed.type}, "
            f"the configuration says {list(matrix)}; they are of different models"
        )
    if not stored.remote:
        if packed.type == "int8":
            fits = _fits_int8(parts, matrix, files)
        else:
            state = _read_state(parts["state"], files)
            fits = _fits_four_bit(parts, state, matrix)
        if not fits:
            way = "download or save the checkpoint again"
            if stored.file is None:
                way = "pass its folder instead (bitsandbytes repacks a model that runs on the CPU)"
            raise InputError(
                f"{stored.file or 'the loaded model'}: what bitsandbytes stores for {stored.key} "
                f"does not belong to a matrix {list(matrix)}; {way}"
            )
    return replace(stored, shape=shape, packed=replace(packed, transposed=transposed, state=state))


def _read_state(part: Stored, files: Files) -> dict:
    """The settings that are stored as JSON in a tensor of bytes."""
    try:
        state = json.loads(bytes(files.tensor(part).flatten().tolist()))
        return dict(state)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{part.file or part.key}: {part.key} is damaged ({first_line(error)}); download the "
            "checkpoint again"
        ) from error


def _fits_int8(parts: dict[str, Stored], matrix: tuple[int, ...], files: Files) -> bool:
    rows = "weight_format" not in parts or int(files.tensor(parts["weight_format"])) == 0
    return rows and _is(parts["SCB"], torch.float32, matrix[0])


def _fits_four_bit(parts: dict[str, Stored], state: dict, matrix: tuple[int, ...]) -> bool:
    size, nested = state.get("blocksize"), "nested_absmax" in parts
    if size not in _BLOCKS or state.get("dtype") not in _DTYPES:
        return False
    if list(state.get("shape") or ()) != list(matrix):
        return False
    blocks = -(-prod(matrix) // size)
    right = _is(parts["quant_map"], torch.float32, 16)
    right &= _is(parts["absmax"], torch.uint8 if nested else torch.float32, blocks)
    if nested:
        size, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if size not in _BLOCKS or not isinstance(offset, float | int):
            return False
        right &= state.get("nested_dtype") == "float32"
        right &= _is(parts["nested_quant_map"], torch.float32, 256)
        right &= _is(parts["nested_absmax"], torch.float32, -(-blocks // size))
    return right


def _is(part: Stored, dtype: torch.dtype, count: int) -> bool:
    return part.dtype == dtype and prod(part.shape) == count


def dequantise(
    packed: Packed,
    tensors: dict[str, torch.Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    index: slice | torch.Tensor | None = None,
) -> torch.Tensor:
    """A quantised parameter, or some of its rows, as an ordinary tensor.

    Args:
        tensors: of `packed.tensors`, on the device where the result is wanted.
        shape:   of the parameter.
        dtype:   of the result; what bitsandbytes gives is rounded to it.
        index:   rows: a slice with both bounds, or int64 [K] on the CPU.
    """
    if packed.transposed:
        whole = dequantise(replace(packed, transposed=False), tensors, shape[::-1], dtype)
        return (whole.T if index is None else whole.T[index]).contiguous()
    decode = _int8(tensors) if packed.type == "int8" else _four_bit(packed, tensors, shape)
    index = slice(0, shape[0]) if index is None else index
    sliced = isinstance(index, slice)
    count = index.stop - index.start if sliced else len(index)
    device = tensors["weight"].device
    result = torch.empty(count, shape[1], dtype=dtype, device=device)
    step = max(1, _CHUNK // shape[1])
    for first in range(0, count, step):
        last = min(count, first + step)
        if sliced:
            rows = slice(index.start + first, index.start + last)
        else:
            rows = index[first:last].to(device)
        result[first:last] = decode(rows)
    return result


def _int8(tensors: dict[str, torch.Tensor]):
    functional = bitsandbytes().functional
    weight, scale = tensors["weight"], tensors["SCB"].flatten()
    return lambda rows: functional.int8_vectorwise_dequant(weight[rows], scale[rows])


def _four_bit(packed: Packed, tensors: dict[str, torch.Tensor], shape: tuple[int, int]):
    functional = bitsandbytes().functional
    weight = tensors["weight"].view(torch.uint8)
    beside = {name: tensor for name, tensor in tensors.items() if name != "weight"}
    state = functional.QuantState.from_dict(
        packed.state | beside | {"quant_type": packed.type}, weight.device
    )
    if shape[1] % state.blocksize:  # a scale covers the end of one row and the start of the next
        whole = functional.dequantize_4bit(weight.view(-1, 1), state)
        return lambda rows: whole[rows]
    if state.nested:
        state.absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        state.state2, state.nested = None, False
    weight, scales = weight.view(shape[0], -1), state.absmax.view(shape[0], -1)

    def decode(rows):
        packed_rows = weight[rows]
        part = functional.QuantState(
            absmax=scales[rows].reshape(-1),
            shape=torch.Size((len(packed_rows), shape[1])),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        return functional.dequantize_4bit(packed_rows.reshape(-1, 1), part)

    return decode


@functools.cache
def bitsandbytes():
    """The library, imported when a quantised checkpoint is first met.

    Raises:
        InputError: it is not installed.
    """
    # With a package `kernels` it would download native code while it is imported, and without one
    # it warns; both are for a product of matrices that is not used here.
    notes, present = logging.getLogger("bitsandbytes.backends.cpu.ops"), sys.modules.get("kernels")
    level = notes.level
    notes.setLevel(logging.ERROR)
    sys.modules["kernels"] = None
    try:
        import bitsandbytes as library
    except ImportError as error:
        raise InputError(
            "a checkpoint quantised by bitsandbytes needs it: pip install 'pkt_ext[quant]'"
        ) from error
    finally:
        notes.setLevel(level)
        if present is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = present
    return library
