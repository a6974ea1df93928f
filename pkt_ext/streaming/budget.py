# SPDX-License-Identifier: Apache-2.0
"""What fits into a budget of device memory, and what a pass therefore keeps, reads ahead or spills.

On a CPU the budget is of the process's anonymous and shared resident memory, interpreter included:
weights that are mapped from the checkpoint are page cache and cost nothing. On CUDA it is of the
allocator's peak and the context.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pkt_ext.errors import InputError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}i": 2 ** (10 * power) for power, unit in enumerate("KMGT", 1)}


def parse_bytes(text: str | int) -> int:
    """A number of bytes: 8GiB, 512MiB, 6.5GB, 4G or plain bytes.

    Raises:
        InputError: none of these, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*((?:[KMGT]i?)?)B?\s*", str(text), re.IGNORECASE)
    unit = match and (match[2][:1].upper() + match[2][1:].lower())
    if not match or unit not in _UNITS or not (count := int(float(match[1]) * _UNITS[unit])):
        raise InputError(f"{text!r} is no amount of memory; write it as 8GiB, 512MiB or 6.5GB")
    return count


@dataclass(frozen=True)
class Allotment:
    """How a pass shares out its memory. Only `micro_batch` and `head_rows` touch the rounding."""

    micro_batch: int  # samples run at once
    ahead: bool = True  # the next part is read while one is at work
    resident: int = 0  # the last blocks, kept from the forward for the backward
    activation_bytes: int = 0  # boundary activations kept on the device; the rest is spilled
    host_bytes: int = 0  # of the rest, kept in pinned host memory (CUDA); what remains is on disk
    head_rows: int | None = None  # vocabulary rows of the head at a time; None: all
