"""A process that reads hostile files for another one, which sees it die or hang, and lives on.

It may take only so much memory beyond what it had when it began, for all the files that it ever reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import NamedTuple

from campaigns.campaign import CounterExample
from campaigns.fuzz import costs

Work = Callable[[int], Counter[str]]


class _Failed(NamedTuple):
    """A promise that was not kept; CounterExample, for a pipe."""

    promise: str


class Worker:
    """The process. It begins at the first case, and again after it died.

    Args:
        work: is called in it with the number of each case.
        allowed: bytes that it may take beyond what it has once it is prepared.
        prepare: is called in it at its beginning.
    """

    def __init__(self, work: Work, *, allowed: int, prepare: Callable[[], object] = tuple) -> None:
        self._order = (work, prepare, allowed)
        self._pipe: Connection
        self._process: ForkProcess | None = None

    def do(self, case: int) -> Counter[str]:
        """Have a case done; returns what was counted.

        Raises:
            CounterExample: if a promise was not kept; to die or to hang keeps none.
        """
        process = self._running()
        try:
            self._pipe.send(case)
            if not self._pipe.poll(costs.HANG_SECONDS):
                self._end(at_once=True)
                raise CounterExample(f"no answer within {costs.HANG_SECONDS} s")
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._end()
            raise CounterExample(f"the process died: exit code {process.exitcode}") from None
        if isinstance(answer, _Failed):
            raise CounterExample(answer.promise)
        assert isinstance(answer, Counter)
        return answer

    def _running(self) -> ForkProcess:
        if self._process is None:
            context = get_context("fork")
            self._pipe, other = context.Pipe()
            self._process = context.Process(
                target=_serve, args=(*self._order, other, self._pipe), daemon=True
            )
            self._process.start()
            other.close()
        return self._process

    def _end(self, *, at_once: bool = False) -> None:
        if self._process is not None:
            if at_once:
                self._process.kill()
            self._process.join()
            self._process = None
            self._pipe.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end(at_once=True)


def _serve(
    work: Work, prepare: Callable[[], object], allowed: int, pipe: Connection, others: Connection
) -> None:
    others.close()
    unprepared: _Failed | None = None
    try:
        prepare()
    except Exception as error:  # told in answer to the first case
        unprepared = _failed(error)
    costs.limit_memory(allowed)
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(unprepared or work(case))
        except Exception as error:
            pipe.send(_failed(error))


def _failed(error: Exception) -> _Failed:
    if isinstance(error, CounterExample):
        return _Failed(str(error))
    return _Failed(f"the campaign itself: {type(error).__name__}: {error}")
