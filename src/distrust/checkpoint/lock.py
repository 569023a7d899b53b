"""One writer a directory: an flock on a file in it that is never unlinked.

A new file under the same name would be a second lock. The kernel drops the lock with its holder, however that
died; a forked child closes its copy at once, so that it cannot hold a dead parent's lock. Before each write
the lock that is held must be the one at the path: a directory put there since may be another writer's.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import threading
import time
import weakref
from pathlib import Path

from distrust.checkpoint.disk import Disk
from distrust.checkpoint.storage import errors_for_directory, make_directory, remove_stale_files, sync_names
from distrust.errors import CheckpointDirectoryLocked, SaveFailed, quote_untrusted

LOCK_NAME = ".lock"
WAIT_SECONDS = 1.0


class DirectoryLock:
    """The right to write in one directory. Held by a process, and by none of its children."""

    def __init__(self, directory: Path, disk: Disk) -> None:
        self._directory = directory
        self._disk = disk
        self._file: _LockFile | None = None
        self._dropped: weakref.finalize[[], DirectoryLock] | None = None

    @property
    def held(self) -> bool:
        """Whether this process may write."""
        return self._file is not None and self._file.descriptor >= 0

    def acquire(self) -> None:
        """Make the directory if need be, take the lock, sweep what dead writers left, sync what they made.

        Raises:
            CheckpointDirectoryLocked: if another writer holds it.
            SaveFailed: if the directory cannot be made or written to.
        """
        if self.held:
            return
        with errors_for_directory(self._directory):
            make_directory(self._directory, self._disk)
            file = _LockFile(self._directory / LOCK_NAME, self._disk)
            try:
                self._lock(file.descriptor)
                remove_stale_files(self._directory, self._disk)
                sync_names(self._directory, self._disk)
            except BaseException:
                file.close()
                raise
            self._file = file
            # A manager that is dropped without close() must not lock its own process out.
            self._dropped = weakref.finalize(self, file.close)

    def confirm(self) -> None:
        """Require that the lock that is held is still the directory's.

        Raises:
            SaveFailed: if the directory was removed, renamed, replaced or mounted over: another writer may
                hold what is there now.
        """
        assert self._file is not None  # noqa: S101 - whoever is about to write holds it
        with errors_for_directory(self._directory):
            try:
                there = os.lstat(self._directory / LOCK_NAME)
                if os.path.samestat(there, os.fstat(self._file.descriptor)):
                    return
                what = f"another {LOCK_NAME} stands there"
            except (FileNotFoundError, NotADirectoryError):
                what = f"no {LOCK_NAME} stands there"
        raise SaveFailed(
            f"{self._directory}: cannot be written to: it is not the directory that this process locked "
            f"({what}); it was removed, renamed, replaced or mounted over. Put it back, or start again",
            path=self._directory,
        )

    def release(self) -> None:
        """Let go of the lock; does nothing if it is not held."""
        if self._file is not None:
            self._file.close()
        if self._dropped is not None:  # Python would keep it, and the file, for as long as this lock lives
            self._dropped.detach()

    def _lock(self, descriptor: int) -> None:
        # A killed writer lets go when the kernel has taken it apart, and a child that it had just forked when
        # it runs for the first time: a restart right after the kill waits for that.
        given_up = time.monotonic() + WAIT_SECONDS
        while not _try_lock(descriptor):
            if time.monotonic() > given_up:
                # The note is for the message only: whether a lock is stale is the kernel's to know.
                holder = quote_untrusted(os.pread(descriptor, 256, 0).decode(errors="replace").strip())
                if holder == _holder():
                    what = f"another manager of this process ({holder}) holds this directory: close() it"
                else:
                    what = (
                        f"another writer holds this directory ({holder or 'starting up'}); "
                        "wait until it ends, stop it, or write elsewhere"
                    )
                raise CheckpointDirectoryLocked(
                    f"{self._directory}: {what}",
                    path=self._directory,
                )
            time.sleep(WAIT_SECONDS / 20)
        with contextlib.suppress(OSError):  # a full disk has no room for it
            self._disk.write_lock_note(descriptor, f"{_holder()}\n")


def _holder() -> str:
    return f"pid {os.getpid()} on {os.uname().nodename}"


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _LockFile:
    """A lock's open file, which every forked child closes at once.

    An flock belongs to the open file, which parent and child share: closing it lets go of it in the child
    without unlocking the parent's.
    """

    def __init__(self, path: Path, disk: Disk) -> None:
        # No fork in between: the child would not know of it, and hold the lock for as long as it lives.
        with _forking():
            self.descriptor = disk.open_lock(path)
            _open_lock_files.add(self)

    def close(self) -> None:
        """Let go of it; once is enough."""
        with _forking():
            descriptor, self.descriptor = self.descriptor, -1
            try:
                _open_lock_files.discard(self)
            finally:  # an interrupt just now would have it locked for as long as this process lives
                if descriptor >= 0:
                    os.close(descriptor)


_open_lock_files: set[_LockFile] = set()


@functools.cache
def _forking() -> threading.RLock:
    """What a fork waits for. One thread may take it again: it may be interrupted by what forks."""
    mutex = threading.RLock()

    def close_all() -> None:
        for file in list(_open_lock_files):
            file.close()
        mutex.release()

    os.register_at_fork(before=mutex.acquire, after_in_parent=mutex.release, after_in_child=close_all)
    return mutex
