"""Allows one run at a time in a process.

A framework's random generators and thread count belong to the process. Two simultaneous runs would seed and
use the same generators, so neither would be reproducible.
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


_run_lock = _RunLock()


@contextmanager
def exclusive_run(out: Path) -> Iterator[None]:
    """Context manager in which no other run of this process can start.

    Raises:
        RunInProgress: another run is in progress.
    """
    lock = _run_lock.lock
    if not lock.acquire(blocking=False):
        raise RunInProgress(
            f"{out}: cannot start, because this process is training {_run_lock.holder}. Random generators "
            "and threads belong to the process, so two runs at once would change each other's results: wait "
            "for it, or start another process",
            out=_run_lock.holder,
        )
    try:
        _run_lock.holder = out
        yield
    finally:
        lock.release()
