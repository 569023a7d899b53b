"""The lock of a directory's writer: an flock on a file in it that is never unlinked.

A new file of the same name would be a second lock. The kernel releases the lock when its holder dies, in
whatever way. A forked child closes its copy at once, so that it cannot keep a dead parent's lock. Before each
write, the locked file must still be the one at the path: a directory put there since may be another writer's.
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
from distrust.checkpoint.files import open_regular
from distrust.checkpoint.storage import errors_for_directory, make_directory, remove_stale_files, sync_names
from distrust.errors import CheckpointDirectoryLocked, CheckpointError, SaveFailed, quote_untrusted

LOCK_NAME = ".lock"
WAIT_SECONDS = 1.0


class DirectoryLock:
    """The right to write in one directory. Belongs to a process, and to none of its children."""

    def __init__(self, directory: Path, disk: Disk) -> None:
        self._directory = directory
        self._disk = disk
        self._file: _LockFile | None = None
        self._finalizer: weakref.finalize[[], DirectoryLock] | None = None

    @property
    def is_held(self) -> bool:
        """Whether this process has it."""
        return self._file is not None and self._file.descriptor >= 0

    def acquire(self) -> None:
        """Create the directory if needed, lock it, remove stale files, and sync the names of dead writers.

        Raises:
            CheckpointDirectoryLocked: if another writer has the lock.
            SaveFailed: if the directory cannot be created or written to.
        """
        if self.is_held:
            return  # this process has it: a manager acquires before every save
        with errors_for_directory(self._directory):
            make_directory(self._directory, self._disk)
            file = _LockFile(self._directory / LOCK_NAME, self._disk)
            try:
                self._lock(file.descriptor)
                remove_stale_files(self._directory, self._disk)  # safe: no other writer is alive
                sync_names(self._directory, self._disk)
                # A manager that is dropped without close() must not lock its own process out.
                self._finalizer = weakref.finalize(self, file.close)
                self._file = file  # only now: an error above leaves nothing locked
            except BaseException:
                file.close()
                raise

    def confirm(self) -> None:
        """Raise SaveFailed if the lock is no longer the directory's."""
        # It was removed, renamed, replaced or mounted over: another writer may have locked what exists there.
        assert self._file is not None  # noqa: S101 - the caller has acquired it
        with errors_for_directory(self._directory):
            try:
                status = os.lstat(self._directory / LOCK_NAME)
                if os.path.samestat(status, os.fstat(self._file.descriptor)):  # same device and inode
                    return
                reason = f"another {LOCK_NAME} exists there"
            except (FileNotFoundError, NotADirectoryError):
                reason = f"no {LOCK_NAME} exists there"
        raise SaveFailed(
            f"{self._directory}: cannot be written to: it is not the directory that this process locked "
            f"({reason}); it was removed, renamed, replaced or mounted over. Put it back, or start again",
            path=self._directory,
        )

    def release(self) -> None:
        """Release the lock; does nothing if it is not held."""
        if self._finalizer is not None:
            self._finalizer()  # closes the file, once, which releases the lock of the kernel, too

    def _lock(self, descriptor: int) -> None:
        # Retry for a moment: the kernel releases a killed writer's lock only when it has torn the process
        # down, and a child forked just before closes its copy only when it first runs.
        deadline = time.monotonic() + WAIT_SECONDS
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                text = f"{self._directory}: {_conflict(descriptor)}"
                raise CheckpointDirectoryLocked(text, path=self._directory)
            time.sleep(WAIT_SECONDS / 20)  # flock has no timeout
        with contextlib.suppress(OSError):  # a full disk has no space for the note
            self._disk.write_lock_note(descriptor, f"{_this_process()}\n")


def _conflict(descriptor: int) -> str:
    """Who has the lock, and what to do. The note is only for this message: never judge staleness by it."""
    if pid := _holder(descriptor):
        holder = _describe_process(pid)
    else:  # on another machine, perhaps
        holder = quote_untrusted(os.pread(descriptor, 256, 0).decode(errors="replace").strip())
    if holder == _this_process():
        return f"another manager of this process ({holder}) has locked this directory: close() it"
    return (
        f"another writer has locked this directory ({holder or 'starting up'}); "
        "wait until it ends, stop it, or write to another directory"
    )


def _holder(descriptor: int) -> int | None:
    """The process that has locked a file, as Linux lists it; None if it is not listed.

    The note may be that of an earlier writer: whoever may open the file can lock it without writing one.
    """
    status = os.fstat(descriptor)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with contextlib.suppress(OSError), open("/proc/locks") as file:
        for line in file:  # 1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5] == device and int(fields[4]) > 0:
                return int(fields[4])
    return None


def is_locked(directory: Path) -> bool:
    """Whether a living process has the lock, as far as Linux lists it. Nothing is locked for the answer."""
    with contextlib.suppress(OSError, CheckpointError), open_regular(directory / LOCK_NAME) as (file, _):
        return _holder(file) is not None
    return False


def _this_process() -> str:
    return _describe_process(os.getpid())


def _describe_process(pid: int) -> str:
    return f"pid {pid} on {os.uname().nodename}"


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # held by another open file, perhaps of this process
        return False
    return True


class _LockFile:
    """A lock's open file, which every forked child closes at once; the parent keeps the lock."""

    def __init__(self, path: Path, disk: Disk) -> None:
        # No fork in between: the child would not know the file, and keep the lock as long as it lives.
        with _fork_mutex():
            self.descriptor = disk.open_lock(path)  # close-on-exec: a started program does not inherit it
            _open_lock_files.add(self)

    def close(self) -> None:
        """Close the file and so release the lock; a second call does nothing."""
        with _fork_mutex():
            descriptor, self.descriptor = self.descriptor, -1  # closing twice could close another file
            try:
                _open_lock_files.discard(self)
            finally:  # an interrupt here would leave the directory locked as long as this process lives
                if descriptor >= 0:
                    os.close(descriptor)


_open_lock_files: set[_LockFile] = set()


@functools.cache
def _fork_mutex() -> threading.RLock:
    """Forks wait for it. Reentrant: a signal handler that forks may interrupt its holder."""
    mutex = threading.RLock()

    def close_all() -> None:
        for file in list(_open_lock_files):
            file.close()  # the flock belongs to the open file, which the parent still has
        mutex.release()  # the child inherited it locked

    os.register_at_fork(before=mutex.acquire, after_in_parent=mutex.release, after_in_child=close_all)
    return mutex
