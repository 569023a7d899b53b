"""What the clones of a manager share: the lock, the background writer, which files are intact."""

from __future__ import annotations

from pathlib import Path

from distrust.checkpoint import catalog
from distrust.checkpoint.checkpoint_file import CheckpointFile, Scan
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.file_writer import SaveState
from distrust.checkpoint.lock import DirectoryLock


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
                self.release_memory()
                self.lock.release()  # last: until then no other writer may start
