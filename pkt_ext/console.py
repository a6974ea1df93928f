# SPDX-License-Identifier: Apache-2.0
"""What surrounds a command: its log, its signals, and how an error becomes one line and a code.

Exit codes: 0 done, 1 a fault of ours, 2 bad input, 73 output busy, 75 out of disk or memory,
130 and 143 stopped by SIGINT and SIGTERM.

Of several processes that a launcher started, the first one speaks; another only of an error that it
alone has met.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from typing import NoReturn

import typer

from pkt_ext.errors import InputError, PktError, ResourceError
from pkt_ext.heap import give_back_freed_memory
from pkt_ext.settings import launched_as


def settle_environment() -> None:
    """For a process of our own, before other libraries load: no bars but on a terminal."""
    give_back_freed_memory()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def run(app: typer.Typer, argv: list[str]) -> int:
    """Run one command line; the exit code. Errors are reported here and nowhere else."""
    switches = {"-v", "--verbose", "-q", "--quiet", "--debug"}
    given, argv = switches.intersection(argv), [a for a in argv if a not in switches]
    debug = "--debug" in given
    _quieten(given)
    previous = {number: signal.signal(number, _stop) for number in _STOPS}
    try:
        return app(argv, prog_name="pkt", standalone_mode=False) or 0
    except BaseException as error:
        code, message = _explain(error)
        message = "; ".join([message, *_notes(error)]) if message else message
        message = _of_process(error, message)
        if debug and message:
            traceback.print_exception(error)
        if message:
            print("pkt: " + " ".join(message.split()), file=sys.stderr)
        return code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


_STOPS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def leave(code: int) -> NoReturn:
    """End the process without taking the interpreter apart.

    With torch loaded that takes seconds, in which a kill would make a finished run look
    interrupted: its output would be there, its exit code another.
    """
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = code or 1
    os._exit(code)


class _Stopped(BaseException):
    """A signal, as an exception: what was staged is removed on the way out.

    Not KeyboardInterrupt, which typer turns into an exit code, its notes lost.
    """


def _stop(number: int, _) -> None:
    raise _Stopped(number)


def _quieten(switches: set[str]) -> None:
    """Our log goes to stderr; other libraries' notices only with -v."""
    verbose = not switches.isdisjoint({"-v", "--verbose"})
    quiet = not switches.isdisjoint({"-q", "--quiet"}) or not is_main()
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO
    others = logging.WARNING if verbose else logging.ERROR
    logging.basicConfig(level=others, format="%(message)s", stream=sys.stderr, force=True)
    if not verbose:
        logging.getLogger().handlers[0].addFilter(_Throttle())
    logging.getLogger("pkt_ext").setLevel(level)
    _progress["show"] = not quiet
    if not verbose:
        warnings.simplefilter("ignore")


class _Throttle(logging.Filter):
    """Lets progress (INFO) through every ten seconds, warnings and errors always."""

    _last: float | None = None  # the clock starts with the work: importing can take ten seconds

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is shown."""
        if record.levelno >= logging.WARNING:
            return True
        if self._last is None:
            self._last = time.monotonic()
        if time.monotonic() - self._last < 10:
            return False
        self._last = time.monotonic()
        return True


_progress = {"show": True}


def progress() -> bool:
    """Whether progress is to be shown: not after -q."""
    return _progress["show"]


def is_main() -> bool:
    """Whether this process is the only one, or the first, of its command."""
    return _rank() == 0


def say(text: str) -> None:
    """Print what a command has done; once, however many processes did it."""
    if is_main():
        typer.echo(text)


def _rank() -> int:
    try:
        return launched_as().rank
    except InputError:  # each process says what is wrong with its environment
        return 0


def _of_process(error: BaseException, message: str) -> str:
    """The message if this process is to report it, else nothing; see `streaming.ranks`."""
    reporter = getattr(error, "reported_by", 0)
    if not message or reporter != _rank():
        return ""
    return f"process {reporter}: {message}" if reporter else message


def _notes(error: BaseException | None) -> list[str]:
    """What was noted on an error and on those that it came from."""
    notes = []
    while error is not None:
        notes += getattr(error, "__notes__", ())
        error = error.__cause__
    return notes


def _explain(error: BaseException) -> tuple[int, str]:
    """(exit code, one line) of whatever ended a command."""
    if isinstance(error, PktError):
        return error.exit_code, f"error: {error}"
    if hasattr(error, "format_message"):  # a usage error of typer's parser
        where = getattr(getattr(error, "ctx", None), "command_path", "pkt")
        return 2, f"error: {error.format_message()} (see {where} --help)"
    if isinstance(error, _Stopped):
        (number,) = error.args
        return 128 + number, f"{_STOPS[number]}; nothing was left half-written"
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1, ""
    if _out_of_memory(error):
        advice = "use a smaller --micro-batch or --max-length, or another --device"
        return ResourceError.exit_code, f"error: out of memory; {advice}"
    if isinstance(error, BrokenPipeError):  # `pkt info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, ""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError.exit_code, "error: the disk is full; free some space and run again"
    if isinstance(error, PermissionError):
        return 2, f"error: {error.filename}: permission denied; choose another path"
    reason = f"{type(error).__name__}: {error}"[:400]
    return 1, f"internal error: {reason} (run again with --debug and report the traceback)"


def _out_of_memory(error: BaseException) -> bool:
    # torch.OutOfMemoryError by name: reporting an error must not import torch
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or isinstance(error, RuntimeError)
        and "can't allocate memory" in str(error)
    )
