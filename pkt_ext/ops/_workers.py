# SPDX-License-Identifier: Apache-2.0
"""Tiles of torch operations on several CPU threads, each tile on one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import torch

from pkt_ext.ops._thin_products import on_threads

Tile, Space, Result = TypeVar("Tile"), TypeVar("Space"), TypeVar("Result")


def over_tiles(
    work: Callable[[Tile, Space], Result],
    tiles: Iterable[Tile],
    make_space: Callable[[], Space],
    device: torch.device,
) -> list[Result]:
    """work(tile, space) for every tile, in their order; `space` is memory no other tile uses now.

    On a CPU as many tiles run at once as torch has threads, each tile's operations on one thread:
    its bits depend on no thread count, and no operation waits for a thread that the system has put
    aside. On a GPU one after the other. Gradients are not recorded.
    """
    tiles = list(tiles)
    if device.type == "cuda":
        space = make_space() if tiles else None
        with torch.no_grad():
            return [work(tile, space) for tile in tiles]
    workers = min(len(tiles), torch.get_num_threads())
    spaces: SimpleQueue = SimpleQueue()
    for _ in range(workers):  # here, so that they count as this thread's
        spaces.put(make_space())

    inference = torch.is_inference_mode_enabled()  # which threads do not inherit

    def run(tile: Tile) -> Result:
        space = spaces.get()
        try:
            with torch.inference_mode(inference), torch.no_grad():
                return work(tile, space)
        finally:
            spaces.put(space)

    with on_threads(1):
        if workers <= 1:
            return [run(tile) for tile in tiles]
        with ThreadPoolExecutor(workers, "tile", torch.set_num_threads, (1,)) as pool:
            return list(pool.map(run, tiles))


def spans(stop: int, size: int, start: int = 0) -> Iterator[slice]:
    """Slices of `size`, the last one shorter, from start to stop."""
    for first in range(start, stop, max(1, size)):
        yield slice(first, min(first + size, stop))
