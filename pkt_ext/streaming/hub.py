# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on the Hub: fetched into the cache, whole or only what its headers say.

Hub access goes through huggingface_hub alone; what goes wrong is said in words.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

from pkt_ext.errors import InputError
from pkt_ext.models.quantisation import gguf
from pkt_ext.streaming.files import (
    DTYPES,
    INDEX,
    SINGLE,
    Stored,
    first_line,
    no_safetensors,
    read_index,
)

_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]


def resolve(
    source: str | Path, revision: str | None = None, weights: str | None = "safetensors"
) -> Path:
    """The local folder of a source: itself, or the snapshot of a Hub id (fetched if need be).

    Args:
        source: a folder, or "owner/name" on the Hub (HF_HOME and HF_HUB_OFFLINE are obeyed).
        revision: branch, tag or commit of a Hub id.
        weights: "safetensors", "bin", or None: what `fetch_header` needs and no weights.

    Raises:
        InputError: no such folder or repository, gated, or offline and not cached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"{source} is a folder; a revision applies to Hub ids only")
        return folder
    if folder.exists():
        if folder.suffix == ".gguf":
            raise InputError(gguf(str(source)))
        raise InputError(f"{source} is a file; pass the folder that holds config.json")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)) or str(source).startswith("."):
        raise InputError(f"{source}: no such folder; pass a checkpoint's folder or a Hub id")
    if weights is None:
        return _snapshot(str(source), revision, ["config.json", "adapter_config.json", INDEX])
    stem = "model" if weights == "safetensors" else "pytorch_model"
    folder = _snapshot(str(source), revision, _SMALL_FILES)
    index = folder / f"{stem}.{weights}.index.json"
    wanted = sorted(set(read_index(index).values())) if index.is_file() else [f"{stem}.{weights}"]
    return _snapshot(str(source), _commit(folder) or revision, wanted)


def small_files(repository: str, folder: Path) -> Path:
    """The snapshot `folder` with the tokenizer and all other small files fetched into it."""
    return _snapshot(repository, _commit(folder), _SMALL_FILES)


def fetch_header(repository: str, folder: Path, file: str) -> Iterable[Stored]:
    """The tensors named in the header of a safetensors file, by range requests.

    Args:
        folder: the snapshot, from `resolve(..., weights=None)`; its revision is asked for.
    Raises:
        InputError: see `resolve`; no such file, or no valid header.
    """
    from huggingface_hub import HfApi, errors

    try:
        with _in_words(repository, None):
            # the library asks for the first 100 kB, and for the rest of a longer header
            header = HfApi().parse_safetensors_file_metadata(
                repository, file, revision=_commit(folder)
            )
    except errors.EntryNotFoundError:
        if file == SINGLE:
            raise no_safetensors(folder, repository) from None
        raise InputError(f"{repository}: {file} is named in {INDEX} but not there") from None
    except errors.SafetensorsParsingError as error:
        raise InputError(f"{repository}/{file}: no valid safetensors header") from error
    for key, tensor in header.tensors.items():
        dtype = DTYPES.get(tensor.dtype, tensor.dtype)
        yield Stored(key, tuple(tensor.shape), dtype, file=folder / file, remote=True)


def _commit(folder: Path) -> str | None:
    """The revision a snapshot is of, so that all of its files come from one."""
    return folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def _snapshot(repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with _in_words(repository, revision):
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
            )
        )


@contextlib.contextmanager
def _in_words(repository: str, revision: str | None):
    """What the Hub refuses, as an InputError; a missing file is left to the caller."""
    from huggingface_hub import errors

    at = f" at revision {revision}" if revision else ""
    try:
        yield
        return
    except errors.GatedRepoError as error:
        problem, cause = (
            f"is gated; accept its licence at https://huggingface.co/{repository}, "
            "then run: hf auth login",
            error,
        )
    except errors.RepositoryNotFoundError as error:
        problem, cause = (
            "is neither a folder here nor a model on the Hub that you may read; check the "
            "spelling, or run: hf auth login",
            error,
        )
    except errors.RevisionNotFoundError as error:
        problem, cause = "has no such revision; check --revision", error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        problem, cause = _unreachable(repository), error
    except errors.EntryNotFoundError:
        raise
    except errors.HFValidationError as error:
        problem, cause = "is neither a folder nor a valid Hub id", error
    except errors.HfHubHTTPError as error:
        problem, cause = f"could not be fetched: {first_line(error)}", error
    except errors.HTTPError as error:  # of the HTTP library: no connection, a timeout
        problem, cause = _unreachable(repository), error
    raise InputError(f"{repository}{at} {problem}") from cause


def _unreachable(repository: str) -> str:
    return (
        "is no folder here, not in the local cache (HF_HOME), and the Hub cannot be reached "
        f"(offline, or HF_HUB_OFFLINE is set); where there is a network: hf download {repository}"
    )
