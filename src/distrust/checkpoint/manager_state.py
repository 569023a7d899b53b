"""What the clones of a manager share: the lock, the background writer, which files are intact."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from distrust.checkpoint import catalog
from distrust.checkpoint.checkpoint_file import CheckpointFile, Scan
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.file_writer import SaveState
from distrust.checkpoint.lock import LOCK_NAME, DirectoryLock
from distrust.checkpoint.remote.line import TERMS
from distrust.checkpoint.step_snapshots import StepSnapshots, find_snapshot
from distrust.errors import ConfigError

if TYPE_CHECKING:
    from distrust.checkpoint.remote.mirror import MirrorWriter


class ManagerState(SaveState):
    """Shared by a manager's reader, writer, retainer and clones."""

    def __init__(self, directory: Path, disk: Disk) -> None:
        self.directory = directory
        super().__init__(disk)

    def reset(self) -> None:
        """Start without lock, thread and knowledge: initially, and in a forked child."""
        super().reset()
        self.lock = DirectoryLock(self.directory, self.disk)
        self.intact: set[tuple[str, str]] = set()  # identities of files that this process wrote or verified
        self.damaged: set[tuple[str, str]] = set()  # identities of files that did not verify
        self.resumed_from: CheckpointFile | None = None  # loaded last; kept until a newer one is saved
        self.pinned: int | None = None  # the step that the caller wants to keep
        self._scan_cache: catalog.ScanCache = {}  # headers, so that listing again reads only new files
        self._closing = False
        self.snapshots = StepSnapshots(self.directory)
        self._is_new = False  # whether this process has created the lock
        self.mirror: MirrorWriter | None = None  # in a forked child its client would hang

    def acquire(self) -> None:
        """Take the directory's lock, unless this process has it; a close in progress is cancelled."""
        self._closing = False
        if self.mirror is not None:
            self.mirror.connect()  # first: without credentials nothing is created
        if not self.lock.is_held:
            if os.path.isdir(self.directory / TERMS):  # its names are not read here: a run would begin anew
                raise ConfigError(
                    f"{self.directory}: is a mirror, or a copy of one; `distrust copy` makes a run of it"
                )
            self._is_new |= not os.path.lexists(self.directory / LOCK_NAME)
            self.lock.acquire()
            names = catalog.list_names(self.directory)
            self.snapshots.durable_step = max((entry.step for entry in names), default=0)
        if self.mirror is not None:
            self.mirror.connect().watch()  # another writer

    def find_snapshot(self) -> CheckpointFile | None:
        """A verified snapshot that is newer than every checkpoint; None in a directory that is new."""
        self.snapshots.wait()  # for this process's own
        is_older = self._is_new and not self.snapshots.has_any  # than the directory: the inode is used again
        return None if is_older else find_snapshot(self.directory)

    def begin(self, base: int | None = None, on_wait: Callable[[], None] = lambda: None) -> None:
        """Take the lock, and the right to write to the mirror; see MirrorWriter.begin."""
        self.acquire()
        if self.mirror is not None:
            if base is None and self.resumed_from is not None:
                base = self.resumed_from.step
            self.mirror.begin(base, on_wait)

    def finish(self, *, wait: bool = True) -> None:
        """Wait for the save in progress, and for the uploads; raise their errors."""
        try:
            if wait or self.background.idle:
                self.background.wait()
        finally:
            if self.mirror is not None:
                self.mirror.close(None if wait else 0.0)

    def scan(self) -> Scan:
        """List the directory."""
        return catalog.scan(self.directory, self._scan_cache)

    def verify(self, file: CheckpointFile) -> None:
        """Read every byte of a file; raises as :func:`catalog.verify`."""
        catalog.verify(file.path)

    def record_saved(self, path: Path, digest: str, step: int) -> None:
        """A save committed this file."""
        if self.mirror is not None:
            self.mirror.offer(path)  # opens it, before the rules may remove it
        self.intact.add((path.name, digest))
        self.snapshots.durable_step = max(step, self.snapshots.durable_step)
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
                self.release_memory()
                if self.lock.is_held:
                    self.snapshots.close()
                self.lock.release()  # last: until then no other writer may start
