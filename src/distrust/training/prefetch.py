"""Computes the batches of the next step while the current step runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Context manager that prefetches the next step's value.

    Args:
        compute: a pure function of the step; runs in a thread.
        last: the last step.
    """

    def __init__(self, compute: Callable[[int], T], *, last: int) -> None:
        self._compute = compute
        self._last = last
        # One thread: batches are small, and steps need the CPU.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="distrust-prefetch")
        self._pending: tuple[int, Future[T]] | None = None

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def get(self, step: int) -> T:
        """The value of this step; starts computing the next. Raises what ``compute`` raised."""
        pending, self._pending = self._pending, None
        # Any other step than the prefetched one is computed here: the value depends on the step alone.
        value = pending[1].result() if pending is not None and pending[0] == step else self._compute(step)
        if step < self._last:
            self._pending = step + 1, self._thread.submit(self._compute, step + 1)
        return value
