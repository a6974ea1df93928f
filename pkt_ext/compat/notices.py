# SPDX-License-Identifier: Apache-2.0
"""What compat tells its user: a warning once for each published flaw, a line for each replacement.

Nothing here goes to stdout, which belongs to the script.
"""

import os
import sys
import warnings


class PublishedBehaviour(UserWarning):
    """The published code's behaviour was reproduced although it looks wrong."""


_given: set[str] = set()
_as_lines = False


def in_lines() -> None:
    """From now on `once` prints lines: for a process of our own that runs somebody's script."""
    global _as_lines
    _as_lines = True


def once(key: str, message: str) -> None:
    """Warn of a published behaviour, the first time in this process that `key` is met.

    Args:
        key:     names the behaviour.
        message: what was reproduced, and what corrects it.
    """
    if key in _given:
        return
    if _as_lines:
        say(message)
    else:
        warnings.warn(message, PublishedBehaviour, stacklevel=3)
    _given.add(key)  # only now: a filter that makes errors of warnings is obeyed every time


def say(message: str) -> None:
    """Print one line to stderr; of several processes that a launcher started, the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"pkt_ext.compat: {message}", file=sys.stderr, flush=True)
