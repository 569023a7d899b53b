"""One run at a time in a process.

A framework's generators of random numbers and its number of threads belong to the process. Two runs at once
would draw from, and seed, the same generators: neither could be exact.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distrust.errors import RunInProgress


class _RunLock:
    def __init__(self) -> None:
        self.renew()
        os.register_at_fork(after_in_child=self.renew)  # the parent's run is not the child's

    def renew(self) -> None:
        self.lock = threading.Lock()
        self.holder = Path()


_turn = _RunLock()


@contextmanager
def exclusive_run(out: Path) -> Iterator[None]:
    """A context in which no other run of this process trains.

    Raises:
        RunInProgress: if one does.
    """
    lock = _turn.lock
    if not lock.acquire(blocking=False):
        raise RunInProgress(
            f"{out}: cannot begin: this process is training {_turn.holder}. Random numbers and threads "
            "belong to the process, and two runs at once would change each other's bits: wait for it, or "
            "start another process",
            out=_turn.holder,
        )
    try:
        _turn.holder = out
        yield
    finally:
        lock.release()
