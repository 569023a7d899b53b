"""Ranks that are threads of this process: the protocol without a network, for code that only calls it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from distrust.ranks import Array, Ranks

T = TypeVar("T")


class RankThread:
    """The ``Ranks`` of one thread. Each thread has a machine of its own."""

    local_index, local_count = 0, 1

    def __init__(self, index: int, arrays: list[Any], barrier: threading.Barrier) -> None:
        self.index, self.count = index, len(arrays)
        self.gathers = 0  # how often it has called gather
        self._arrays, self._barrier = arrays, barrier

    def describe(self, index: int) -> str:
        return f"rank {index} (node-{index})"

    def gather(self, array: Array, *, patient: bool = False) -> Array:
        self.gathers += 1
        self._arrays[self.index] = array.copy()
        self._barrier.wait(10)
        assert len({(array.shape, array.dtype) for array in self._arrays}) == 1
        gathered = np.stack(self._arrays)
        self._barrier.wait(10)  # no array is replaced before all have read it
        return gathered

    def broadcast(self, array: Array) -> None:
        array[:] = self.gather(array)[0]

    def __enter__(self) -> RankThread:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def on_threads(count: int, work: Callable[[Ranks], T]) -> list[T]:
    """What ``work`` returns on each of ``count`` ranks."""
    arrays, barrier = [None] * count, threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda index: work(RankThread(index, arrays, barrier)), range(count)))
