# SPDX-License-Identifier: Apache-2.0
"""A checkpoint read lazily: a folder of safetensors, a Hub id, or a model already in memory.

Nothing but headers is read until `load`. Checkpoint keys become parameter names by transformers'
own rules (conversion mapping, base prefix added or stripped, tied heads absent), and every
parameter must be matched exactly once. Only the text model of a multimodal checkpoint is used.
"""

from __future__ import annotations

import copy
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pkt_ext.errors import InputError
from pkt_ext.models.anatomy import check_config
from pkt_ext.models.quantisation import KEYS, refusal, settings_of
from pkt_ext.models.versions import dtype_of, from_config, key_renamer
from pkt_ext.streaming.files import (
    Files,
    Stored,
    first_line,
    listed,
    populate,
    read_config,
    read_headers,
)
from pkt_ext.streaming.hub import fetch_header, resolve, small_files
from pkt_ext.streaming.quantised import bitsandbytes, dequantise, fit, gather, kind_of

# Buffers that old checkpoints carry: transformers ignores the first two in every model, the third
# (a causal mask's fill value) in GPT-NeoX only, though GPT-2 files have it too.
_OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$")

_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Checkpoint:
    """The weights, configuration and tokenizer of one causal language model.

    Attributes:
        name: the folder, Hub id or model name as given.
        config: the (text) model's configuration.
        folder: the local folder with its files; None for a loaded model.
        quantisation: how its matrices are quantised; None where they are not. `load` gives
            dequantised ones.
        disk_seconds: time spent so far in having pages read.
    """

    def __init__(
        self,
        name: str,
        config,
        *,
        folder: Path | None = None,
        model: PreTrainedModel | None = None,
        remote: bool = False,
    ):
        """Use `open`."""
        self.name, self.folder, self._model, self._outer = name, folder, model, None
        self._remote = remote
        self.config = copy.deepcopy(config)
        if not getattr(config, "is_encoder_decoder", False) and hasattr(config, "text_config"):
            self._outer, self.config = config, copy.deepcopy(config.get_text_config(decoder=True))
            # the outer model does the tying, whatever its text configuration says
            self.config.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
        for key in KEYS:
            vars(self.config).pop(key, None)  # what is loaded is dequantised
        check_config(self.config)
        if reason := refusal(config):
            raise InputError(f"{name}: {reason}")
        settings = settings_of(config)
        if model is not None:
            self._stored = _of_model(model, bool(settings))
        else:
            fetch = partial(fetch_header, name, folder) if remote else None
            self._stored = read_headers(folder, name, fetch)
        self.quantisation = None
        if settings:
            self._stored = gather(self._stored)
            self.quantisation = kind_of(self._stored)
        self._compute_dtype = None
        if self.quantisation and self.quantisation.bits == 4:
            self._compute_dtype = settings.get("bnb_4bit_compute_dtype")
        self._names: dict[str, Stored] = {}
        self.disk_seconds = 0.0

    @classmethod
    def open(
        cls,
        source: str | Path | PreTrainedModel | Checkpoint,
        *,
        revision: str | None = None,
        headers_only: bool = False,
    ) -> Checkpoint:
        """Open a folder, a Hub id (downloaded where it is not cached) or a loaded model.

        Args:
            headers_only: of a Hub id, fetch the configuration and the headers of weights that are
                not cached, no more: enough for everything but `load` and `rows`. Of a quantised
                checkpoint, do without the library that dequantises.
        Raises:
            InputError: nothing there, no safetensors, damaged files, an architecture that is not
                supported; the message says what to do.
        """
        if isinstance(source, Checkpoint):
            return source
        if isinstance(source, nn.Module):
            if not isinstance(source, PreTrainedModel) or hasattr(source, "peft_config"):
                kind = type(source).__name__
                raise InputError(
                    f"expected a transformers PreTrainedModel without adapters, got {kind}: "
                    "merge the adapter first (merge_and_unload)"
                )
            name = source.name_or_path or type(source).__name__
            return cls(name, source.config, model=source)
        remote = headers_only and not Path(source).expanduser().is_dir()
        folder = resolve(source, revision, weights=None if remote else "safetensors")
        config = read_config(folder, str(source))
        checkpoint = cls(str(source), config, folder=folder, remote=remote)
        if checkpoint.quantisation and not headers_only:
            bitsandbytes()  # missing: say so before any work
        return checkpoint

    @property
    def dtype(self) -> torch.dtype:
        """The checkpoint's floating-point dtype: its configuration's, else its tensors'.

        Of one quantised to 4 bits, the dtype that it is to be computed in.

        Raises:
            InputError: the configuration names a dtype that is none.
        """
        if self._model is not None and self.quantisation is None:
            return self._model.dtype
        dtype = (
            self._compute_dtype
            or dtype_of(self.config)
            or (self._outer is not None and dtype_of(self._outer))
            or None
        )
        if dtype is None:
            plain = [s.dtype for s in self._stored.values() if s.packed is None]
            dtype = Counter(plain).most_common(1)[0][0]
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        if not dtype.is_floating_point or dtype.itemsize < 2:
            name = str(dtype).removeprefix("torch.")
            raise InputError(
                f"{self.name}: its config.json says dtype {name}, which no model computes in; "
                "correct it (bfloat16, float16 or float32), or pass --dtype"
            )
        return dtype

    def tokenizer(self):
        """Its tokenizer.

        Raises:
            InputError: there is none.
        """
        where = small_files(self.name, self.folder) if self._remote else self.folder or self.name
        try:
            return transformers.AutoTokenizer.from_pretrained(where)
        except Exception as error:  # whatever the tokenizer's own parser raises
            raise InputError(
                f"{self.name}: no usable tokenizer ({type(error).__name__}: {first_line(error)}); "
                "put the model's tokenizer files into its folder"
            ) from error

    def skeleton(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model in eval mode with parameters on meta and buffers (rotary tables) on the CPU.

        Attention is transformers' choice: SDPA, or eager where scores are soft-capped. The result
        is bound: `load` accepts its parameters' names.

        Raises:
            InputError: see `bind`.
        """
        model = _build(transformers.AutoModelForCausalLM, self.config, dtype)
        lost = [name for name, buffer in model.named_buffers() if buffer.is_meta]
        if lost:
            raise RuntimeError(f"buffers without values: {', '.join(lost)}")
        self.bind(model)
        return model

    def bind(self, model: PreTrainedModel) -> None:
        """Match every parameter of `model` to exactly one stored tensor.

        A head that the configuration ties but the checkpoint stores with other values is untied
        in `model`, as transformers does. Of headers alone the values are taken to be equal.

        Raises:
            InputError: parameters without a tensor, tensors without a parameter, two tensors for
                one parameter, or another shape than the configuration's.
        """
        expected = dict(model.named_parameters(remove_duplicate=False))
        matched: dict[str, Stored] = {}
        unexpected, packed = [], []
        for name, stored in self._renamed(model):
            if name not in expected:
                unexpected.append(stored.key)
            elif name in matched:
                raise InputError(
                    f"{self.name}: both {matched[name].key} and {stored.key} are {name}; "
                    "remove one of them"
                )
            elif stored.packed is not None:
                packed.append(name)
                matched[name] = stored
            elif stored.dtype not in _PLAIN:
                kind = str(stored.dtype).removeprefix("torch.")
                raise InputError(
                    f"{stored.file or self.name}: {stored.key} is stored as {kind}, and no "
                    "quantization_config says how; use the unquantised checkpoint"
                )
            elif stored.shape != tuple(expected[name].shape):
                raise InputError(
                    f"{stored.file or self.name}: {stored.key} is {list(stored.shape)}, the "
                    f"configuration says {list(expected[name].shape)}; they are of different models"
                )
            else:
                matched[name] = stored
        files = Files()
        for name in packed:
            transposed = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
            shape = tuple(expected[name].shape)
            matched[name] = fit(matched[name], shape, transposed, files)
        groups: dict[int, list[str]] = {}
        for name, parameter in expected.items():
            groups.setdefault(id(parameter), []).append(name)
        for names in groups.values():
            self._share(model, names, matched)
        missing = [name for name in expected if name not in matched]
        if missing or unexpected:
            raise InputError(
                f"{self.name} does not fit {type(model).__name__}: "
                + "; ".join(
                    f"{what} {listed(rest)}"
                    for what, rest in (
                        ("not in the checkpoint:", missing),
                        ("not in the model:", unexpected),
                    )
                    if rest
                )
            )
        self._names = matched

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter as stored."""
        return self._find(name).shape

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a parameter as stored."""
        return self._find(name).dtype

    def bytes_of(self, names: Iterable[str]) -> int:
        """Bytes of these parameters as stored; tied ones count once."""
        distinct = {(s.file, s.key): s for s in map(self._find, names)}
        return sum(stored.bytes for stored in distinct.values())

    @property
    def to_download(self) -> int:
        """Bytes of the tensors of which only the headers were fetched."""
        return sum(stored.bytes for stored in self._stored.values() if stored.remote)

    def load(
        self,
        names: Iterable[str],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        move: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Read these parameters and nothing else.

        Args:
            move: brings a stored tensor to `device`; None: `Tensor.to`.
        Returns:
            {name: tensor of `dtype` on `device`}. On the CPU in the stored dtype it is a private
            mapping of the file: pages come in when touched, writes stay with this tensor. Of a
            loaded model it may be the parameter itself: do not write to it.

        Raises:
            InputError: the file vanished, changed or was damaged since it was opened.
            RuntimeError: only headers were fetched.
        """
        # one mapping per call, gone with its tensors: memory and file handles follow the caller
        files = Files()
        return {name: self._read(files, self._find(name), dtype, device, move) for name in names}

    def rows(
        self,
        name: str,
        index: slice | torch.Tensor,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        move: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Read some rows of a matrix and nothing else.

        Args:
            name:  of a parameter [N, D].
            index: rows within [0, N]: a slice of step 1, or row numbers int64 [K].
            move:  see `load`.
        Returns:
            [K, D] of `dtype` on `device`, a copy of its own.

        Raises:
            InputError: the file vanished, changed or was damaged since it was opened.
            IndexError: rows that are not there.
            ValueError: no matrix.
            RuntimeError: only headers were fetched.
        """
        stored = self._find(name)
        if len(stored.shape) != 2:
            raise ValueError(f"{name} is {list(stored.shape)}, not a matrix")
        index = _row_numbers(index, stored.shape[0], name)
        files = Files()
        if stored.packed is not None:
            return self._read(files, stored, dtype, device, move, index)
        tensor = files.tensor(stored)
        if isinstance(index, slice):
            tensor = tensor[index]
            self._bring(tensor, stored.file)
            moved = (move(tensor) if move else tensor.to(device)).to(dtype)
            return moved.clone() if moved.data_ptr() == tensor.data_ptr() else moved
        if stored.file is not None:
            for row in index.unique().tolist():
                self._bring(tensor[row], stored.file)
        chosen = tensor.index_select(0, index.to(tensor.device))
        return (move(chosen) if move else chosen.to(device)).to(dtype)

    def is_mapped(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> bool:
        """Whether `load` of this parameter costs no memory of its own.

        So it is with page cache (CPU, the stored dtype) and with a loaded model's own tensor.
        """
        return _in_place(self._find(name), dtype, torch.device(device))

    def populate(self, tensors: dict[str, torch.Tensor]) -> None:
        """Bring in the pages of what `load` gave in mappings, so that none fails when used.

        Raises:
            InputError: a file that is shorter than it was, or whose disk fails, by its name.
        """
        for name, tensor in tensors.items():
            if self.is_mapped(name, tensor.dtype, tensor.device):
                self._bring(tensor, self._find(name).file)

    def _read(
        self, files: Files, stored: Stored, dtype: torch.dtype, device, move, index=None
    ) -> torch.Tensor:
        """A parameter, dequantised where need be; of a quantised one, these rows."""
        parts = {"": stored} if stored.packed is None else stored.packed.tensors
        tensors = {}
        for name, part in parts.items():
            tensor = files.tensor(part)
            if stored.packed is not None or not _in_place(stored, dtype, device):
                self._bring(tensor, part.file)
            tensors[name] = move(tensor) if move else tensor.to(device)
        if stored.packed is None:
            return tensors[""].to(dtype)
        return dequantise(stored.packed, tensors, stored.shape, dtype, index)

    def _bring(self, tensor: torch.Tensor, file: Path | None) -> None:
        """Have the pages of a mapping read before torch touches them; a model's are there."""
        if file is not None:
            start = time.perf_counter()
            populate(tensor, file)
            self.disk_seconds += time.perf_counter() - start

    def _find(self, name: str) -> Stored:
        if not self._names:
            raise RuntimeError("call skeleton() or bind(model) first")
        return self._names[name]

    def _renamed(self, model: PreTrainedModel) -> Iterable[tuple[str, Stored]]:
        """(parameter name of `model`, tensor) for every tensor that is not to be ignored."""
        outer, inner = model, None
        if self._outer is not None:
            outer = _build(transformers.AutoModelForImageTextToText, self._outer, torch.float32)
            inner = _text_names(outer, model)
        known = outer.state_dict()
        rename = key_renamer(outer, known, stored=self._model is None)
        ignored = [*_OLD_BUFFERS, *(outer._keys_to_ignore_on_load_unexpected or ())]
        for stored in self._stored.values():
            name, converter = rename(stored.key)
            if name not in known and stored.key in known:
                name, converter = stored.key, None
            if name not in known:
                if not any(re.search(pattern, name) for pattern in ignored):
                    yield stored.key, stored
            elif converter is not None:
                raise InputError(
                    f"{self.name}: {stored.key} is in an older layout; load the model with "
                    "transformers, write it with save_pretrained and use that folder"
                )
            elif inner is None:
                yield name, stored
            elif name in inner:
                yield inner[name], stored

    def _share(self, model: PreTrainedModel, names: list[str], matched: dict) -> None:
        """Give the names of one tied parameter one tensor, or untie them where values differ."""
        present = [name for name in names if name in matched]
        if len(names) == 1 or not present:
            return
        for other in present[1:]:
            if not self._equal(matched[present[0]], matched[other]):
                parent, _, leaf = other.rpartition(".")
                parameter = model.get_parameter(other)
                setattr(model.get_submodule(parent), leaf, nn.Parameter(parameter.detach().clone()))
                model.config.tie_word_embeddings = self.config.tie_word_embeddings = False
                names = [name for name in names if name != other]
        for name in names:
            matched[name] = matched[present[0]]

    def _equal(self, one: Stored, two: Stored) -> bool:
        if one.remote or two.remote:
            return True
        files = Files()
        first, second = (
            self._read(files, stored, self.dtype if stored.packed else stored.dtype, "cpu", None)
            for stored in (one, two)
        )
        return first.data_ptr() == second.data_ptr() or torch.equal(first, second)


def _in_place(stored: Stored, dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether a parameter can be used where it is stored, mapped or in a loaded model."""
    device = torch.device(device)
    held = torch.device("cpu") if stored.tensor is None else stored.tensor.device
    there = held.type == device.type and device.index in (None, held.index)
    return there and stored.packed is None and stored.dtype == dtype


def _row_numbers(index: slice | torch.Tensor, count: int, name: str) -> slice | torch.Tensor:
    """`index`, checked: a slice with both bounds, or numbers on the CPU."""
    if isinstance(index, slice):
        start, stop = index.start or 0, count if index.stop is None else index.stop
        if not 0 <= start <= stop <= count or index.step not in (None, 1):
            raise IndexError(f"{name} has {count} rows, {index} was asked for")
        return slice(start, stop)
    index = index.cpu()
    if index.dtype != torch.int64 or index.ndim != 1:
        raise TypeError(f"row numbers: int64 [K] expected, got {index.dtype} {list(index.shape)}")
    if len(index) and not 0 <= index.min() <= index.max() < count:
        raise IndexError(
            f"{name} has {count} rows, {int(index.min())} to {int(index.max())} were asked for"
        )
    return index


def _build(auto, config, dtype: torch.dtype) -> PreTrainedModel:
    """`auto.from_config` with parameters on meta, tied, in eval mode."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = from_config(auto, config, dtype)
    model.tie_weights()  # moving to meta made two parameters of one
    return model.eval()


def _text_names(outer: PreTrainedModel, model: PreTrainedModel) -> dict[str, str]:
    """{name in the multimodal model: name in the text model} of the text model's parameters."""
    kind = type(model.base_model)
    path = next((name for name, module in outer.named_modules() if type(module) is kind), None)
    if path is None:
        raise InputError(f"{type(outer).__name__}: no {kind.__name__} inside; not supported")
    heads = {id(outer.get_output_embeddings()): model.get_output_embeddings()}
    paths = {id(module): name for name, module in model.named_modules()}
    names = {}
    for name, module in outer.named_modules():
        if name == path:
            target = model.base_model_prefix
        elif id(module) in heads:
            target = paths[id(heads[id(module)])]
        else:
            continue
        for leaf, _ in module.named_parameters(remove_duplicate=False):
            names[f"{name}.{leaf}"] = f"{target}.{leaf}"
    return names


def _of_model(model: PreTrainedModel, quantised: bool) -> dict[str, Stored]:
    tensors = dict(model.named_parameters(remove_duplicate=False))
    if quantised:  # what lies beside its weights is in no parameter, but where it would be saved
        buffers = {name for name, _ in model.named_buffers()}
        tensors |= {n: t for n, t in model.state_dict().items() if n not in buffers}
    found = {}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise InputError(
                f"{model.name_or_path}: {name} is offloaded; pass the checkpoint's folder instead"
            )
        tensor = tensor.detach()
        found[name] = Stored(name, tuple(tensor.shape), tensor.dtype, tensor=tensor)
    return found
