"""The commit protocol: the only place that writes, syncs, renames, removes and locks.

A checkpoint is written to a hidden temporary name in its own directory, data first and header last
(``writing.py``), then synced, renamed into place, and the directory synced. At every instant the directory
therefore holds, under the final name, either the file that stood there before or the whole new one.

- Space is reserved before the first byte, so that a full disk is found before anything is touched.
- A failed fsync is never tried again on the same file: the kernel may have dropped the pages it could not
  write, and the second call would report success.
- After a failed fsync of the directory the renamed file stays, and the error is raised.
- One writer a directory: an flock on ``.lock``, which is never unlinked (a new file under the same name
  would be a second lock). The kernel drops it with its holder, however that died; a forked child closes its
  copy at once, so that it cannot hold a dead parent's lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import re
import secrets
import struct
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from distrust.checkpoint import writing
from distrust.checkpoint.parallel import Crew
from distrust.errors import CheckpointDirectoryLocked, SaveFailed

LOCK_NAME = ".lock"
PATIENCE_SECONDS = 1.0
#: Threads, not asynchronous system calls: two, in a write most of the time, keep a disk busy on every system.
WRITES_IN_FLIGHT = 2
_TEMPORARY_NAME = re.compile(r"\.checkpoint-[0-9]+(-final)?\.safetensors\.[0-9a-f]{16}\.tmp", re.ASCII)


class AtomicFile:
    """A new file of a known size that appears under its name wholly, or not at all.

    Args:
        path: the final name.
        size: in bytes.

    Raises:
        SaveFailed: from every method. What stood before is untouched, unless the last step of all, the sync
            of the directory, failed: then the new file stands.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size
        self._temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
        self._writers: Crew | None = None
        self._descriptor = -1
        try:
            with self._reported():
                self._descriptor = writing.create(self._temporary)
                reserve(self._descriptor, size)
            self._writers = Crew(WRITES_IN_FLIGHT)
        except BaseException:
            self.discard()
            raise

    def write(self, block: memoryview, offset: int) -> threading.Event:
        """Begin to write a block.

        Args:
            block: whole pages that begin on one. The last block of the file may reach behind its end.
            offset: where it belongs, a multiple of a page.

        Returns:
            What is set when the block is written; until then it may not change.
        """
        assert self._writers is not None  # noqa: S101 - until it is committed or discarded
        with self._reported():
            return self._writers.put(lambda: writing.write(self._descriptor, block, offset))

    def commit(self) -> None:
        """Make the file durable and put it under its name."""
        assert self._writers is not None  # noqa: S101 - until it is committed or discarded
        with self._reported():
            self._writers.finish()
            os.ftruncate(self._descriptor, self._size)  # pages are written whole, the last one too
            sync(self._descriptor)
            os.replace(self._temporary, self._path)
        try:
            sync_directory(self._path.parent)
        except OSError as error:
            raise SaveFailed(
                f"{self._path}: written and whole, but its directory could not be synced "
                f"({error.strerror}): a power cut may still take it away",
                path=self._path,
            ) from error

    def discard(self) -> None:
        """Drop what was not committed; does nothing after :meth:`commit`."""
        try:
            if self._writers is not None:
                self._writers.stop()
                self._writers = None
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
        finally:  # an interrupt may cut the wait for the writers short
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.discard()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            free = _free_bytes(self._path.parent)
            raise SaveFailed(
                f"{self._path}: not saved: {error.strerror}; {self._size:,} bytes wanted, "
                f"{'unknown' if free is None else f'{free:,}'} free. What stood there before is untouched",
                path=self._path,
                wanted=self._size,
                free=free,
            ) from error


class DirectoryLock:
    """The right to write in one directory. Held by a process, and by none of its children."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: _LockFile | None = None

    @property
    def held(self) -> bool:
        """Whether this process may write."""
        return self._file is not None and self._file.descriptor >= 0

    def acquire(self) -> None:
        """Make the directory if need be, take the lock, and sweep what dead writers left behind.

        Raises:
            CheckpointDirectoryLocked: if another writer holds it.
            SaveFailed: if the directory cannot be made or written to.
        """
        if self.held:
            return
        try:
            make_directory(self._directory)
            file = _LockFile(self._directory / LOCK_NAME)
            try:
                self._lock(file.descriptor)
            except BaseException:
                file.close()
                raise
            self._file = file
            # A manager that is dropped without close() must not lock its own process out.
            self._close = weakref.finalize(self, file.close)
            sweep(self._directory)
        except OSError as error:
            raise SaveFailed(
                f"{self._directory}: cannot be written to: {error.strerror}", path=self._directory
            ) from error

    def release(self) -> None:
        """Let go of the lock; does nothing if it is not held."""
        if self.held:
            self._close()

    def _lock(self, descriptor: int) -> None:
        # A killed writer lets go when the kernel has taken it apart, and a child that it had just forked when
        # it runs for the first time: a restart right after the kill waits for that.
        given_up = time.monotonic() + PATIENCE_SECONDS
        while not _try_lock(descriptor):
            if time.monotonic() > given_up:
                # The note is for the message only: whether a lock is stale is the kernel's to know.
                holder = os.pread(descriptor, 256, 0).decode(errors="replace").strip()
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
            time.sleep(PATIENCE_SECONDS / 20)
        with contextlib.suppress(OSError):  # a full disk has no room for it
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{_holder()}\n".encode(), 0)


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

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        # No fork in between: the child would not know of it, and hold the lock for as long as it lives.
        with _forking():
            self.descriptor = os.open(path, flags, 0o666)
            _open_lock_files.add(self)

    def close(self) -> None:
        """Let go of it; once is enough."""
        with _forking():
            descriptor, self.descriptor = self.descriptor, -1
            _open_lock_files.discard(self)
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


def make_directory(directory: Path) -> None:
    """Make a directory and its parents, durably."""
    if directory.is_dir():
        return
    make_directory(directory.parent)
    with contextlib.suppress(FileExistsError):
        directory.mkdir()
    sync_directory(directory.parent)


def sweep(directory: Path) -> None:
    """Remove the temporary files of dead writers. The caller holds the lock, so no living one has any."""
    with os.scandir(directory) as entries:
        stale = [entry.path for entry in entries if _TEMPORARY_NAME.fullmatch(entry.name)]
    for path in stale:
        with contextlib.suppress(OSError):
            os.unlink(path)


def remove(paths: list[Path]) -> None:
    """Remove files. One that is gone already is no error.

    Not synced: should a power cut bring one back, the next clean-up removes it again.
    """
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def reserve(descriptor: int, size: int) -> None:
    """Reserve space for a file, or raise ENOSPC before a byte is written."""
    if size and sys.platform == "linux":
        # Not os.posix_fallocate: where the file system cannot reserve, it writes a byte into every block.
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
        fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        if fallocate(descriptor, 0, 0, size) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EINTR):
            raise OSError(code, os.strerror(code))
    elif size and sys.platform == "darwin" and _preallocated(descriptor, size):
        return
    status = os.fstatvfs(descriptor)
    if status.f_bavail * status.f_frsize < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _preallocated(descriptor: int, size: int) -> bool:
    """macOS: whether the space was given. The file keeps its size: it grows as it is written."""
    allocate_all, from_the_end = 4, 3  # F_ALLOCATEALL, F_PEOFPOSMODE; Python has no names for them
    wanted = struct.pack("@Iiqqq", allocate_all, from_the_end, 0, size, 0)
    try:
        fcntl.fcntl(descriptor, 42, wanted)  # F_PREALLOCATE
    except OSError:
        return False  # full, or not this file system's: the free space tells
    return True


def sync(descriptor: int) -> None:
    """Have the disk hold what was written."""
    if sys.platform == "darwin":
        # fsync on macOS leaves the data in the drive's cache.
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def sync_directory(directory: Path) -> None:
    """Have the disk hold the names in a directory."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(directory: Path) -> int | None:
    try:
        status = os.statvfs(directory)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize
