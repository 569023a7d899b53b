"""What the clones of a manager share: the lock, the background writer, which files are intact."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from pathlib import Path

from distrust.checkpoint import catalog
from distrust.checkpoint.background import BackgroundWriter
from distrust.checkpoint.checkpoint_file import CheckpointFile, Scan
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.lock import DirectoryLock
from distrust.checkpoint.memory import ReusableMemory
from distrust.checkpoint.snapshot import Snapshot


class ManagerState:
    """Shared by a manager's reader, writer, retainer and clones."""

    def __init__(self, directory: Path, disk: Disk) -> None:
        self.directory = directory
        self.disk = disk
        self.reset()
        _reset_after_fork().add(self)

    def reset(self) -> None:
        """Start without lock, thread and knowledge: initially, and in a forked child."""
        self.lock = DirectoryLock(self.directory, self.disk)
        self.background = BackgroundWriter()
        self.snapshot = Snapshot()
        self.block_buffer = ReusableMemory()
        # Every operation that writes holds it, so that clones in several threads wait for each other.
        self.mutex = threading.RLock()  # reentrant: close() may release under it
        self.intact: set[tuple[str, str]] = set()  # identities of files that this process wrote or verified
        self.damaged: set[tuple[str, str]] = set()  # identities of files that did not verify
        self.resumed_from: CheckpointFile | None = None  # loaded last; kept until a newer one is saved
        self._scan_cache: catalog.ScanCache = {}  # headers, so that listing again reads only new files
        self._closing = False

    def acquire(self) -> None:
        """Take the directory's lock, unless this process has it; a close in progress is cancelled."""
        self._closing = False
        self.lock.acquire()

    def scan(self) -> Scan:
        """List the directory."""
        return catalog.scan(self.directory, self._scan_cache)

    def record_saved(self, path: Path, digest: str, step: int) -> None:
        """A save committed this file."""
        self.intact.add((path.name, digest))
        if self.resumed_from is not None and step > self.resumed_from.step:
            self.resumed_from = None  # a newer one exists: the rules alone decide about it

    def record_loaded(self, file: CheckpointFile) -> None:
        """This file was verified and loaded: the run may resume from it."""
        if not file.is_foreign:  # no rule ever counts or removes a foreign one
            self.intact.add(file.identity)
            self.resumed_from = file

    def forget_removed(self, files: tuple[CheckpointFile, ...]) -> None:
        """Forget what is known of files that no longer exist: a long run writes many."""
        # Not an assignment of what remains: a save that ends meanwhile adds its own file.
        removed = (self.intact | self.damaged) - {file.identity for file in files}
        self.intact -= removed
        self.damaged -= removed

    def release_when_idle(self) -> None:
        """Release the lock once no write is in progress: earlier, the next writer would sweep its file."""
        self._closing = True
        self.background.when_idle(self._release)

    def _release(self) -> None:
        with self.mutex:
            if self._closing and self.background.idle:  # not if a save began meanwhile
                self.snapshot.release()
                self.block_buffer.release()
                self.lock.release()  # last: until then no other writer may start


@functools.cache
def _reset_after_fork() -> weakref.WeakSet[ManagerState]:
    """The states to reset in a forked child: neither the parent's lock nor its threads exist there."""
    # The hook runs before any other thread of the child can exist, so no two threads reset the same state.
    states: weakref.WeakSet[ManagerState] = weakref.WeakSet()  # must not keep dropped managers alive

    def reset_all() -> None:
        for state in list(states):
            state.reset()

    os.register_at_fork(after_in_child=reset_all)
    return states
