"""A process that reads hostile files for another one, which sees it die or hang, and lives on.

It may take only so much memory beyond what it had when it began, for all the files that it ever reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import NamedTuple

from campaigns.campaign import CounterExample
from campaigns.hostile import costs

Work = Callable[[int], Counter[str]]


class _Failed(NamedTuple):
    """A promise that was not kept; CounterExample, for a pipe."""

    promise: str


class Worker:
    """The process. It begins at the first case, and again after it died.

    Args:
        work: is called in it with the number of each case.
        allowed: bytes that it may take beyond what it has at the beginning.
    """

    def __init__(self, work: Work, *, allowed: int) -> None:
        context = get_context("fork")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(work, allowed, other, self._pipe), daemon=True)
        self._process.start()
        other.close()

    def do(self, case: int) -> Counter[str]:
        """Have a case done; returns what was counted.

        Raises:
            CounterExample: if a promise was not kept; to die or to hang keeps none.
        """
        self._pipe.send(case)
        try:
            if not self._pipe.poll(costs.HANG_SECONDS):
                raise CounterExample(f"no answer within {costs.HANG_SECONDS} s")
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise CounterExample(f"the process died: exit code {self._process.exitcode}") from None
        if isinstance(answer, _Failed):
            raise CounterExample(answer.promise)
        assert isinstance(answer, Counter)
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(work: Work, allowed: int, pipe: Connection, others: Connection) -> None:
    others.close()
    costs.limit_memory(allowed)
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(work(case))
        except CounterExample as found:
            pipe.send(_Failed(str(found)))
        except Exception as error:
            pipe.send(_Failed(f"the campaign itself: {type(error).__name__}: {error}"))
