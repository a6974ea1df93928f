# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of pickled .bin shards rewritten as safetensors.

Read with `weights_only=True`: a file that wants to run code is refused. Shards are mapped and
written one after another: memory stays at one shard, and at next to nothing where it can be mapped.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm import tqdm

from pkt_ext import artifact
from pkt_ext.errors import InputError
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.files import first_line, read_config, read_index
from pkt_ext.streaming.hub import resolve

_SIDE_FILES = {".json", ".model", ".txt", ".jinja", ".md"}
_OURS = {"run.json", "report.json", artifact.MANIFEST}
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")


def convert(
    source: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write the .bin checkpoint `source` as safetensors to `out`, tokenizer and card included.

    Tensors keep their keys and dtypes. Of a tied head saved beside its embedding one copy is kept.
    The result is matched against the model before it is published.

    Args:
        source: folder or Hub id.
        revision: branch, tag or commit of a Hub id.
        max_shard_size: as in transformers' `save_pretrained`.
        progress: show a bar over the files (on a terminal only).

    Raises:
        InputError: no .bin files, damaged or unsafe ones, or an unsupported architecture.
    """
    folder = resolve(source, revision, weights="bin")
    config = read_config(folder, str(source))
    files = _bin_files(folder, str(source))
    tied = getattr(config.get_text_config(), "tie_word_embeddings", False)
    settings = {"source": str(source), "revision": revision, "max_shard_size": max_shard_size}
    run = {"config": settings, "inputs": {"source": artifact.fingerprint(folder)}}
    report: dict = {"dropped": []}
    card = None
    if not (folder / "README.md").is_file():
        card = artifact.model_card(
            title=f"{Path(source).name} as safetensors",
            kind="converted",
            base_model=str(source),
            recipe=settings,
            body="The weights of the base model, unchanged, in another file format.",
            peft=False,
        )
    total = sum(file.stat().st_size for file in files)
    with artifact.publish(
        out,
        kind="converted",
        run=run,
        report=report,
        card=card,
        overwrite=overwrite,
        planned_bytes=total,
    ) as staging:
        for path in sorted(folder.iterdir()):
            side = path.suffix in _SIDE_FILES or path.name in ("LICENSE", "NOTICE")
            if side and path.is_file() and not path.name.endswith(".index.json"):
                if path.name not in _OURS:
                    shutil.copyfile(path, staging / path.name)
        shards: list[list[str]] = []
        sizes = 0
        for file in tqdm(files, desc="convert", unit="file", disable=None if progress else True):
            tensors = _unshared(_read(file), tied, report["dropped"])
            plan = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
            for keys in plan.filename_to_tensors.values():
                part = {key: tensors[key] for key in keys}
                sizes += sum(tensor.nbytes for tensor in part.values())
                save_file(part, staging / f"{len(shards)}.part", metadata={"format": "pt"})
                shards.append(list(keys))
            del tensors
        _name_shards(staging, shards, sizes)
        Checkpoint(str(source), config, folder=staging).skeleton(torch.float32)
        report.update(tensors=sum(map(len, shards)), bytes=sizes, shards=len(shards))
    return Path(out)


def _bin_files(folder: Path, name: str) -> list[Path]:
    index = folder / "pytorch_model.bin.index.json"
    if (folder / "model.safetensors").is_file() or (
        folder / "model.safetensors.index.json"
    ).is_file():
        raise InputError(f"{name}: holds safetensors already; use it as it is")
    names = sorted(set(read_index(index).values())) if index.is_file() else ["pytorch_model.bin"]
    for file in names:
        if not (folder / file).is_file():
            raise InputError(f"{folder / file}: missing; pass the folder of a .bin checkpoint")
    return [folder / file for file in names]


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # written before torch 1.6, or not by torch at all
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        LookupError,
        OSError,
        ValueError,
    ) as error:
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise InputError(
                f"{path}: refused, it holds more than tensors and could run code; "
                "ask its author for safetensors"
            ) from error
        raise InputError(
            f"{path}: truncated or corrupt ({first_line(error)}); download or copy it again"
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise InputError(f"{path}: not a state dict of tensors; pass a model's weights")
    return content


def _unshared(
    tensors: dict[str, torch.Tensor], tied: bool, dropped: list[str]
) -> dict[str, torch.Tensor]:
    """Contiguous tensors that share no memory; a tied head's second copy goes to `dropped`."""
    seen: dict[int, torch.Tensor] = {}
    result = {}
    for key in sorted(tensors, key=lambda key: (bool(_HEAD.search(key)), key)):
        tensor = tensors[key].contiguous()
        storage = tensor.untyped_storage().data_ptr()
        if tensor.numel() and storage in seen:
            if tied and _HEAD.search(key) and torch.equal(tensor, seen[storage]):
                dropped.append(key)
                continue
            tensor = tensor.clone()
        seen[storage] = tensor
        result[key] = tensor
    return result


def _name_shards(staging: Path, shards: list[list[str]], sizes: int) -> None:
    if len(shards) == 1:
        (staging / "0.part").rename(staging / "model.safetensors")
        return
    where = {}
    for i, keys in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (staging / f"{i}.part").rename(staging / name)
        where |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": sizes}, "weight_map": dict(sorted(where.items()))}
    (staging / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
