# SPDX-License-Identifier: Apache-2.0
"""Output folders as transactions: staged beside their final name, hashed, renamed into place.

A reader either finds a complete folder or none. Inside, next to the payload: `run.json` (what was
asked, with which versions, from which inputs), `report.json` (what came of it), `README.md` (the
model card) and `manifest.json` (size and sha256 of every other file, written last).
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pkt_ext.errors import InputError, OutputBusyError, ResourceError

KINDS = ("init", "adapter", "delta", "model", "residual-model", "converted")
MANIFEST = "manifest.json"
_FORMAT = 1
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNWRITABLE = {
    errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENOENT,
    errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip
_SAMPLE = 1 << 20  # bytes hashed at either end of a file too large to hash whole
_WHOLE = 64 << 20  # input files up to this size are hashed whole
# a merged model is checked by size; `pkt verify` hashes it
_HASHED_ON_READ = ("init", "adapter", "delta")


@contextlib.contextmanager
def publish(
    out: str | os.PathLike,
    *,
    kind: str,
    run: dict,
    report: dict,
    card: str | None = None,
    overwrite: bool = False,
    planned_bytes: int = 0,
) -> Iterator[Path]:
    """Yield a staging folder beside `out`; when the body succeeds, publish it under that name.

    The body fills the folder and may go on filling `run` and `report`: both are written at the end.
    When it raises (a signal turned into an exception included), the staging folder and the parents
    made for it are removed and `out` is as before. The output stays locked against other runs from
    the first line to the last.

    Args:
        out: final name of the folder; missing parents are made.
        kind: one of `KINDS`.
        run: goes to run.json, completed with `kind` and `versions`; put `paradigm`, `config` and
            `inputs` (see `fingerprint`) there.
        report: goes to report.json.
        card: goes to README.md; None leaves whatever the body wrote there.
        overwrite: replace an output of the same kind. Other folders are never replaced.
        planned_bytes: size expected; refused at once where the disk has less than 1.2 times that.

    Raises:
        InputError: `out` exists, or its parent cannot be written.
        OutputBusyError: another process writes the same output.
        ResourceError: the disk is full.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    out = Path(out).expanduser().resolve()  # through a link, so that the rename stays on one disk
    if not out.name:
        raise InputError(f"{out} cannot be an output; choose another --out")
    made = [folder for folder in out.parents if not os.path.exists(folder)]  # innermost first
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            _recover(out)
            _check_target(out, kind, overwrite)
            _check_space(out, planned_bytes)
            staging = out.with_name(f"{out.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
            try:
                staging.mkdir()
                yield staging
                record = {"kind": kind, "versions": versions()} | run | {"kind": kind}
                write_json(staging / "run.json", record)
                write_json(staging / "report.json", report)
                if card is not None:
                    (staging / "README.md").write_text(card, encoding="utf-8")
                _seal(staging)
                _swap_in(staging, out)
            except BaseException as error:
                if _is_disk_full(error):
                    raise ResourceError(_full_message(out, staging, planned_bytes)) from error
                raise
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        # only what touches the output itself; an OSError of the body passes unchanged
        if error.errno in _UNWRITABLE and (str(error.filename or "").startswith(str(out.parent))):
            raise InputError(
                f"cannot write {out}: {error.strerror}; choose another --out"
            ) from error
        if error.errno in _FULL:
            raise ResourceError(_full_message(out, out, planned_bytes)) from error
        raise
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # not empty: it holds the output, or another's
                folder.rmdir()


def verify(folder: str | os.PathLike) -> list[str]:
    """Compare a published folder with its manifest; the problems found, none when it is sound.

    Finds every flipped bit (of the manifest too), every missing and every extra file.
    """
    folder = Path(folder)
    try:
        files = _manifest(folder)
    except InputError as error:
        return [str(error)]
    present = {name for name in _walk(folder) if name != MANIFEST}
    problems = [f"{name}: not in the manifest" for name in sorted(present - files.keys())]
    return problems + _differences(folder, files, hashes=True)


def read(folder: str | os.PathLike, kind: str | tuple[str, ...] | None = None) -> dict:
    """The run record of a published folder; refuses an incomplete, damaged or wrong one.

    What is small is hashed, models are compared by size (`verify` hashes them too).

    Raises:
        InputError: no such folder, incomplete, damaged, or none of the kinds asked for.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; pass the --out of a finished pkt run")
    files = _manifest(folder)
    try:
        run = json.loads((folder / "run.json").read_bytes())
        found = run["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'run.json'}: unreadable ({error}); repeat the run") from error
    problems = _differences(folder, files, hashes=found in _HASHED_ON_READ)
    if problems:
        raise InputError(f"{folder}: damaged ({problems[0]}); see pkt verify, or repeat the run")
    wanted = (kind,) if isinstance(kind, str) else kind
    if wanted is not None and found not in wanted:
        hint = ""
        if found == "init":
            hint = "; a Seeking start is no adapter for the student: run pkt finetune on it first"
        elif found == "model":
            hint = "; it is a complete model, to be loaded as it is"
        raise InputError(f"{folder} is of kind {found!r}, expected {' or '.join(wanted)}{hint}")
    return run


def is_published(folder: str | os.PathLike) -> bool:
    """Whether the folder carries a manifest of ours (complete or not)."""
    return (Path(folder) / MANIFEST).is_file()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages an output depends on, without importing them."""
    import platform

    found = {"python": platform.python_version()}
    for name in ("pkt_ext", "torch", "transformers", "peft", "accelerate", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def finished(out: Path, progress: Path, run: dict) -> dict | None:
    """The report of a run that was killed between publishing and cleaning up its progress.

    Args:
        out: its output.
        progress: the folder of its progress, which goes last.
        run: what run.json would get: `config` and `inputs` have to agree.
    """
    if not is_published(out) or not progress.is_dir():
        return None
    found, ours = read(out), json.loads(json.dumps(run))
    for config in (found.get("config") or {}, ours["config"]):
        for name in ("budget", "map_cache"):  # they change no result
            config.pop(name, None)
    if any(found.get(key) != ours[key] for key in ("config", "inputs")):
        return None
    return json.loads((out / "report.json").read_bytes())


def fingerprint(path: str | os.PathLike) -> dict:
    """What identifies an input: sha256 of a file, or of the files at the top of a model folder.

    Files over 64 MiB are hashed by size, first and last MiB (key `sha256_sampled`): a safetensors
    header lies at the start. A snapshot of the Hub's cache also yields its commit. A name that is
    no local path (a Hub id) comes back as {"name": ...}.
    """
    if not str(path):
        return {"name": ""}  # a model made in memory; Path("") would be the working directory
    path = Path(path)
    if path.is_file():
        return {"name": path.name, "bytes": path.stat().st_size, **_hash_input(path)}
    if not path.is_dir():
        return {"name": str(path)}
    kept = (".json", ".safetensors", ".model", ".txt", ".jinja", ".bin")
    files = {
        entry.name: {"bytes": entry.stat().st_size, **_hash_input(entry)}
        for entry in sorted(path.iterdir())
        if entry.is_file() and entry.suffix in kept
    }
    record = {"name": path.name, "files": files}
    real = path.resolve()
    if real.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", real.name):
        record["commit"] = real.name
    return record


def model_card(
    *, title: str, kind: str, base_model: str, recipe: dict, body: str, peft: bool = True
) -> str:
    """A README.md for the Hub: front matter, what it is, the recipe, where it comes from.

    Args:
        base_model: folder or Hub id of the student. Only an id goes into the front matter (the Hub
            rejects paths there); the licence is inherited where the folder's card names one.
        recipe: the configuration, shown as YAML.
        body: the text between title and recipe: how to load it, its limits.
        peft: whether the folder is loaded through PEFT (else through transformers).
    """
    import yaml

    front: dict = {"library_name": "peft" if peft else "transformers", "tags": ["pkt_ext", kind]}
    local = bool(base_model) and Path(base_model).is_dir()
    if not local and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model):
        front["base_model"] = base_model
    if local and (licence := _licence(Path(base_model) / "README.md")):
        front["license"] = licence
    shown = yaml.safe_dump(_plain(recipe), sort_keys=False)
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {title}\n\n{body.strip()}\n\n"
        f"Base model: `{model_name(base_model)}`. Its licence and its "
        "limitations apply to this folder too.\n\n"
        f"## Recipe\n\n```yaml\n{shown}```\n\n"
        "Versions and hashes of the inputs: `run.json`. Figures: `report.json`. "
        "Integrity: `pkt verify` compares every file with `manifest.json`.\n"
    )


def model_name(model: str) -> str:
    """How a model is called in a card: a Hub id in full, of a folder the last name only."""
    hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(model)) and not Path(model).is_dir()
    return str(model) if hub else Path(model).name


def write_json(path: Path, value: dict) -> None:
    """Write indented JSON: NaN and infinity as null, paths and other odd values as strings."""
    text = json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()  # a scalar of numpy or torch
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


# --- the transaction ------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    path = out.with_name(f".{out.name}.lock")
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(handle)
            raise OutputBusyError(
                f"{out} is being written by process {holder}; wait for it or choose another --out"
            ) from error
        except BaseException:
            os.close(handle)
            raise
        # the holder unlinks the file on its way out: a lock on an unlinked file is worth nothing
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                break
        os.close(handle)
    try:
        with contextlib.suppress(OSError):  # the pid is for people; a full disk may refuse it
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.close(handle)


def _recover(out: Path) -> None:
    """Clean up after runs that were killed; needs the lock."""
    pattern = re.compile(re.escape(out.name) + r"\.(tmp|old)-(\d+)-[0-9a-f]{8}")
    for entry in out.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if not match or _alive(int(match[2])):
            continue
        if match[1] == "old" and not out.exists():
            entry.rename(out)  # killed between setting the old output aside and publishing
        else:
            shutil.rmtree(entry, ignore_errors=True)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # we hold the lock, so what bears our pid was left by an earlier owner of it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _check_target(out: Path, kind: str, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file; choose another --out")
    if not any(out.iterdir()):
        return
    if not is_published(out):
        raise InputError(f"{out} exists and was not written by pkt; choose another --out")
    if not overwrite:
        raise InputError(f"{out} exists; choose another --out, or pass --overwrite to replace it")
    try:
        found = json.loads((out / "run.json").read_bytes())["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # damaged, so nothing is lost
    if found != kind:
        raise InputError(f"{out} is of kind {found!r}, not {kind!r}; choose another --out")


def _check_space(out: Path, planned_bytes: int) -> None:
    if planned_bytes * 1.2 > shutil.disk_usage(out.parent).free:
        raise ResourceError(_full_message(out, out, planned_bytes))


def _full_message(out: Path, staging: Path, planned_bytes: int) -> str:
    written = sum((staging / name).lstat().st_size for name in _walk(staging))
    free = shutil.disk_usage(out.parent).free
    need = (
        f"{_size(planned_bytes * 1.2)} needed" if planned_bytes else f"over {_size(written)} needed"
    )
    return (
        f"disk full while writing {out}: {need}, {_size(free)} free; the output was not written: "
        "free some space or choose another --out, then run again"
    )


def _is_disk_full(error: BaseException | None) -> bool:
    seen: set[int] = set()  # an error may have become its own cause
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        # safetensors reports the operating system's error only in words
        if any(f"(os error {code})" in str(error) for code in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def _seal(staging: Path) -> None:
    files = {}
    for name in _walk(staging):
        path = staging / name
        if path.is_symlink():
            raise ValueError(f"{name} is a link; an output holds plain files only")
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
            os.fsync(handle.fileno())
        files[name] = {"bytes": path.stat().st_size, "sha256": digest}
    manifest = staging / MANIFEST
    manifest.write_bytes(_manifest_bytes(files))
    _fsync(manifest)
    for root, _, _ in os.walk(staging):
        _fsync(Path(root))


def _swap_in(staging: Path, out: Path) -> None:
    aside = None
    if out.exists() and any(out.iterdir()):
        aside = out.with_name(f"{out.name}.old-{os.getpid()}-{secrets.token_hex(4)}")
        out.rename(aside)
    try:
        staging.rename(out)
    except BaseException:
        if aside is not None and not out.exists():
            aside.rename(out)
        raise
    _fsync(out.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- the manifest ---------------------------------------------------------------------------------


def _manifest_bytes(files: dict) -> bytes:
    """The one spelling of a manifest; it carries its own hash, so that a flipped bit shows."""
    content = {"format": _FORMAT, "complete": True, "files": dict(sorted(files.items()))}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, indent=1) + "\n").encode()


def _manifest(folder: Path) -> dict[str, dict]:
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{folder}: no {MANIFEST}, so not a complete output of pkt; repeat the run"
        )
    try:
        data = path.read_bytes()
        files = json.loads(data)["files"]
        sound = data == _manifest_bytes(files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise InputError(f"{path}: damaged, or written by another version; repeat the run")
    return files


def _differences(folder: Path, files: dict[str, dict], *, hashes: bool) -> list[str]:
    present = set(_walk(folder))
    problems = []
    for name, entry in files.items():
        path = folder / name
        if name not in present or path.is_symlink():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name}: {path.stat().st_size} bytes instead of {entry['bytes']}")
        elif hashes:
            with path.open("rb") as handle:
                if hashlib.file_digest(handle, "sha256").hexdigest() != entry["sha256"]:
                    problems.append(f"{name}: content differs from the manifest")
    return problems


def _walk(folder: Path) -> Iterator[str]:
    """Names of the files below a folder, relative, with forward slashes, sorted."""
    if folder.is_dir():
        for root, folders, names in os.walk(folder):
            folders.sort()
            links = [name for name in folders if os.path.islink(os.path.join(root, name))]
            for name in sorted(names + links):
                yield (Path(root) / name).relative_to(folder).as_posix()


def _hash_input(path: Path) -> dict[str, str]:
    size = path.stat().st_size
    with path.open("rb") as handle:
        if size <= _WHOLE:
            return {"sha256": hashlib.file_digest(handle, "sha256").hexdigest()}
        digest = hashlib.sha256(str(size).encode())
        digest.update(handle.read(_SAMPLE))
        handle.seek(-_SAMPLE, os.SEEK_END)
        digest.update(handle.read(_SAMPLE))
    return {"sha256_sampled": digest.hexdigest()}


def _licence(card: Path) -> str | None:
    import yaml

    try:
        front = card.read_text(encoding="utf-8").split("---\n", 2)[1]
        licence = yaml.safe_load(front).get("license")
    except (OSError, IndexError, UnicodeDecodeError, AttributeError, yaml.YAMLError):
        return None
    return licence if isinstance(licence, str) else None


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
