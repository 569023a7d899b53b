"""What the clones of a manager share: the lock, the writer, and what is known of the files."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from pathlib import Path

from distrust.checkpoint import catalog
from distrust.checkpoint.checkpoint_file import CheckpointFile
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.lock import DirectoryLock
from distrust.checkpoint.memory import ReusableMemory
from distrust.checkpoint.snapshot import Snapshot
from distrust.checkpoint.writer import BackgroundWriter


class ManagerState:
    """What the clones of a manager share: the lock, the writer, and what is known of the files."""

    def __init__(self, directory: Path, disk: Disk) -> None:
        self.directory = directory
        self.disk = disk
        self.reset()
        _reset_in_forked_children().add(self)

    def reset(self) -> None:
        """Know nothing and hold nothing: at first, and in a forked child."""
        self.lock = DirectoryLock(self.directory, self.disk)
        self.writer = BackgroundWriter()
        self.snapshot = Snapshot()
        self.ring = ReusableMemory()
        self.mutex = threading.RLock()
        self.leaving = False
        # Identified by name and header digest: a file replaced by another process is another file.
        self.good: set[tuple[str, str]] = set()
        self.damaged: set[tuple[str, str]] = set()
        self.resumed_from: CheckpointFile | None = None
        self.listed: catalog.ScanCache = {}

    def release_when_idle(self) -> None:
        """Let go of the lock once no write is under way: before, the next writer would sweep its file."""
        self.leaving = True
        self.writer.when_idle(self._let_go)

    def _let_go(self) -> None:
        with self.mutex:
            if self.leaving and self.writer.idle:
                self.snapshot.release()
                self.ring.release()
                self.lock.release()


@functools.cache
def _reset_in_forked_children() -> weakref.WeakSet[ManagerState]:
    """Neither the parent's lock nor its thread is in a forked child.

    There it is one thread's work, before any other can be: two that found out at the same time would each
    begin, and take the lock from one another.
    """
    sessions: weakref.WeakSet[ManagerState] = weakref.WeakSet()

    def begin_all() -> None:
        for session in list(sessions):
            session.reset()

    os.register_at_fork(after_in_child=begin_all)
    return sessions
