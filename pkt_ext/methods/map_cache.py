# SPDX-License-Identifier: Apache-2.0
"""Semantic maps kept on disk, each by a hash of all that it comes from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pkt_ext.methods.semantic_bases import HeadRows, spans

log = logging.getLogger(__name__)

_FORMAT = 1  # to be raised where a map is computed otherwise than before


def content_key(heads: Sequence[HeadRows], options: dict, chunk: int, show: bool) -> str:
    """sha256 of the rows of both heads that are used, their gains, the ids and the options.

    Args:
        chunk: rows read at once; does not matter to the result.
    """
    digest = hashlib.sha256(json.dumps({"format": _FORMAT, **options}, sort_keys=True).encode())
    for head in heads:
        shape = [len(head), head.width, str(head.stream.dtype), head.gain is not None]
        digest.update(json.dumps(shape).encode())
        digest.update(_raw(head.ids))
        if head.gain is not None:
            digest.update(_raw(head.gain))
        for span in spans(len(head), chunk, "semantic map: looking for it", show):
            digest.update(_raw(head.stored(*span)))
    return digest.hexdigest()


def find(folder: Path, key: str, shape: tuple[int, int]) -> tuple[torch.Tensor, dict] | None:
    """(matrix float32 of `shape`, report) of an earlier run; None where there is none.

    A damaged file is none, and said to be damaged; `keep` replaces it.
    """
    path = folder / f"{key}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
            matrix = file.get_tensor("matrix").clone()  # memory of its own, no mapping
        whole = matrix.dtype == torch.float32 and matrix.shape == shape
        if whole and facts["sha256"] == hashlib.sha256(_raw(matrix)).hexdigest():
            return matrix, json.loads(facts["report"])
        reason = "its content is not what was written"
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    log.warning("%s is damaged (%s); the semantic map is built again", path, reason)
    return None


def keep(folder: Path, key: str, matrix: torch.Tensor, report: dict) -> None:
    """Write a map, whole or not at all; where it cannot be written, that is a warning."""
    path = folder / f"{key}.safetensors"
    temporary = folder / f".{key}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    digest = hashlib.sha256(_raw(matrix)).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"matrix": matrix}, temporary, {"sha256": digest, "report": json.dumps(report)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        log.warning("the semantic map was not kept in %s (%s)", folder, error)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
