# SPDX-License-Identifier: Apache-2.0
"""Runs a script as `python SCRIPT.py args...` does, with its published functions replaced by ours.

Output, exit code and traceback are the script's. Ours are lines on stderr: what was replaced, what
was left alone.
"""

from __future__ import annotations

import builtins
import os
import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType, TracebackType

from pkt_ext.compat import notices
from pkt_ext.compat.importing import Finder
from pkt_ext.compat.loading import give_float32
from pkt_ext.compat.replacement import Replacer
from pkt_ext.compat.watching import HOOK, READY, compile_watched

USAGE = """\
usage: python -m pkt_ext.compat [--fix] SCRIPT.py [argument ...]

Runs a published script unchanged, its slow functions replaced by those of pkt_ext.
  --fix   correct what the published code gets wrong, see docs/migrating.md
"""


def main(arguments: list[str]) -> int:
    """Run one command line; the exit code where there is no script to have one."""
    options = []
    while arguments and arguments[0].startswith("-"):
        options.append(arguments[0])
        arguments = arguments[1:]
    if {"-h", "--help"} & set(options):
        print(USAGE, end="")
        return 0
    if not arguments or set(options) - {"--fix"}:
        print(USAGE, end="", file=sys.stderr)
        return 2
    try:
        with open(arguments[0], "rb") as file:
            source = file.read()
    except OSError as error:
        notices.say(f"cannot read {arguments[0]}: {error.strerror}; give a Python script")
        return 2
    try:
        _Run(fix=bool(options)).run(source, arguments)
    except SystemExit:
        raise
    except BaseException:
        _hide_our_frames()
        raise  # Python prints it, and chooses the exit code
    return 0


class _Run:
    """One script's run: what was replaced, and what has been said of it."""

    def __init__(self, *, fix: bool):
        self._replacer = Replacer(fix=fix, announce=True)
        self._warned = False

    def run(self, source: bytes, arguments: list[str]) -> None:
        """Execute the script's source as `__main__`; `arguments` begin with its path."""
        notices.in_lines()
        path = os.path.join(os.getcwd(), arguments[0])
        code = compile_watched(source, path)
        module = ModuleType("__main__")
        module.__file__ = path
        module.__cached__ = None
        module.__loader__ = SourceFileLoader("__main__", path)
        module.__builtins__ = builtins
        module.__annotations__ = {}
        setattr(builtins, HOOK, self._defined)
        Finder(self._models_loaded).install()
        sys.modules["__main__"] = module
        sys.argv = arguments
        if not sys.flags.safe_path:
            sys.path[0] = os.path.dirname(os.path.realpath(path))
        try:
            exec(code, vars(module))
        except ImportError as error:
            if error.name == "peft" and "prepare_model_for_int8_training" in str(error):
                notices.say("`pkt finetune` replaces this script, see docs/migrating.md")
            raise
        finally:
            self._warn_if_nothing("nothing was recognised: the script ran as it is")

    def _defined(self, namespace: dict, name: str) -> None:
        """What watched code calls, when it has defined `name` or is about to begin its work."""
        if name == READY:
            if namespace["__name__"] == "__main__":  # an imported module begins none
                self._warn_if_nothing("nothing recognised so far: the script runs as it is")
            return
        self._replacer.look_at(namespace, name)

    def _warn_if_nothing(self, message: str) -> None:
        if not self._replacer.recognised and not self._warned:
            notices.say(message)
            self._warned = True

    def _models_loaded(self, module: ModuleType) -> None:
        give_float32(module.PreTrainedModel, when=lambda: self._replacer.recognised)


def _hide_our_frames() -> None:
    """Have Python print the traceback of the script alone, by the hook that the script left."""
    shown = sys.excepthook

    def hook(kind: type, error: BaseException, traceback: TracebackType | None) -> None:
        for part in _chain(error):
            part.__traceback__ = _of_script(part.__traceback__)
        shown(kind, error, error.__traceback__)

    sys.excepthook = hook


def _chain(error: BaseException) -> list[BaseException]:
    """An error with its causes, contexts and members."""
    found, waiting = [], [error]
    while waiting:
        part = waiting.pop()
        if part is not None and not any(part is known for known in found):
            found.append(part)
            waiting += [part.__cause__, part.__context__, *getattr(part, "exceptions", ())]
    return found


_FOLDER = os.path.dirname(__file__)
_OURS = {
    os.path.join(_FOLDER, f"{name}.py")
    for name in ("__main__", "importing", "loading", "replacement", "running", "watching")
}


def _of_script(traceback: TracebackType | None) -> TracebackType | None:
    """A traceback without the frames that run and replace, and those that ran us."""
    kept: list[TracebackType] = []
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if file not in _OURS and (kept or file != "<frozen runpy>"):
            kept.append(traceback)
        traceback = traceback.tb_next
    for entry, following in zip(kept, [*kept[1:], None], strict=False):
        entry.tb_next = following
    return kept[0] if kept else None
