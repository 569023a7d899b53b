"""The batches of the next step, made while this one is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """What a pure function of the step gives, asked for one step ahead in a thread; a context.

    Args:
        make: gives what a step needs.
        last: the last step there is.
    """

    def __init__(self, make: Callable[[int], T], *, last: int) -> None:
        self._make = make
        self._last = last
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="distrust-ahead")
        self._begun: tuple[int, Future[T]] | None = None

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def get(self, step: int) -> T:
        """What this step needs; the next one's is begun. Raises what making it raised."""
        begun, self._begun = self._begun, None
        made = begun[1].result() if begun is not None and begun[0] == step else self._make(step)
        if step < self._last:
            self._begun = step + 1, self._thread.submit(self._make, step + 1)
        return made
