# SPDX-License-Identifier: Apache-2.0
"""One bar over the blocks of a pass: how far, how fast, what it waits for; lines elsewhere."""

from __future__ import annotations

import logging
import time

from tqdm import tqdm

from pkt_ext.streaming.meter import Meter

log = logging.getLogger("pkt_ext.streaming")

_WORK = {"forward": 1, "backward": 3}  # of a block: forward; forward again and two gradients


class BlockBar:
    """Progress of a pass that goes forward and backward through `blocks` blocks.

    Args:
        meter: of the pass; its bytes and waits are shown.
        show:  a bar on a terminal, log lines elsewhere; False: nothing.
    """

    def __init__(self, blocks: int, meter: Meter, *, show: bool):
        self.blocks, self.meter, self.show = blocks, meter, show
        self._start = time.perf_counter()
        self._done = self._skipped = 0
        self._bar = tqdm(
            total=sum(_WORK.values()) * blocks,
            disable=None if show else True,  # None: where stderr is no terminal
            leave=False,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )

    def skip(self, direction: str) -> None:
        """A block that an earlier run finished, or that does not go in this direction."""
        self._skipped += _WORK[direction]
        self._bar.total -= _WORK[direction]

    def advance(self, direction: str, index: int) -> None:
        """A block is finished."""
        self._done += _WORK[direction]
        facts = self.facts()
        self._bar.set_description(f"{direction} {index + 1}/{self.blocks}", refresh=False)
        self._bar.set_postfix_str(facts, refresh=False)
        self._bar.update(_WORK[direction])
        if self.show and self._bar.disable:
            log.info("%s: block %d of %d, %s", direction, index + 1, self.blocks, facts)

    def facts(self) -> str:
        """Rate of reading, the larger wait, time left."""
        spent = max(time.perf_counter() - self._start, 1e-9)
        kind = max(self.meter.waits, key=self.meter.waits.get)
        text = f"{self.meter.bytes_read / spent / 1e9:.2f} GB/s"
        if (share := self.meter.waits[kind] / spent) >= 0.01:
            text += f", {share:.0%} of the time waiting for the {kind}"
        rest = sum(_WORK.values()) * self.blocks - self._skipped - self._done
        left = round(spent / self._done * rest) if self._done else 0
        return f"{text}, about {left // 60} min {left % 60:02} s left"

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()
