"""The commit protocol: the only place that has anything written, synced, renamed, removed or locked.

What it asks for is done by a disk (``disk.py``), the real one or another in its place. A checkpoint is
written to a hidden temporary name in its own directory, data first and header last (``pouring.py``), then
synced, renamed into place, and the directory synced. At every instant the directory therefore holds, under
the final name, either the file that stood there before or the whole new one.

- Space is reserved before the first byte, so that a full disk is found before anything is touched.
- A failed fsync is never tried again on the same file: the kernel may have dropped the pages it could not
  write, and the second call would report success.
- After a failed fsync of the directory the renamed file stays, and the error is raised.
- One writer a directory: an flock on ``.lock``, which is never unlinked (a new file under the same name
  would be a second lock). The kernel drops it with its holder, however that died; a forked child closes its
  copy at once, so that it cannot hold a dead parent's lock. Before each write the lock that is held must be
  the one at the path: a directory put there since may be another writer's.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import secrets
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from distrust.checkpoint.disk import Disk
from distrust.checkpoint.parallel import Crew
from distrust.errors import CheckpointDirectoryLocked, CheckpointError, SaveFailed

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
        disk: what it is written to.

    Raises:
        SaveFailed: from every method. What stood before is untouched, unless the last step of all, the sync
            of the directory, failed: then the new file stands.
    """

    def __init__(self, path: Path, size: int, disk: Disk) -> None:
        self._path = path
        self._size = size
        self._disk = disk
        self._temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
        self._writers: Crew | None = None
        self._descriptor = -1
        try:
            with self._reported():
                self._descriptor = disk.create(self._temporary)
                disk.reserve(self._descriptor, size)
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
            return self._writers.put(lambda: self._disk.write(self._descriptor, block, offset))

    def commit(self) -> None:
        """Make the file durable and put it under its name."""
        assert self._writers is not None  # noqa: S101 - until it is committed or discarded
        with self._reported():
            self._writers.finish()
            self._disk.truncate(self._descriptor, self._size)  # pages are written whole, the last one too
            self._disk.sync(self._descriptor)
            # Before it has its name: some file systems tell only here of what they could not write. And the
            # directory needs a descriptor to be synced, which may be the last one that there is.
            self._close()
            self._disk.rename(self._temporary, self._path)
        try:
            self._disk.sync_directory(self._path.parent)
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
                with contextlib.suppress(OSError):  # it is thrown away
                    self._close()
        finally:  # an interrupt may cut the wait for the writers short
            with contextlib.suppress(OSError):
                self._disk.unlink(self._temporary)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1  # closed, whatever the system says of it
        self._disk.close(descriptor)

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

    def __init__(self, directory: Path, disk: Disk) -> None:
        self._directory = directory
        self._disk = disk
        self._file: _LockFile | None = None

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
        with _writable(self._directory):
            make_directory(self._directory, self._disk)
            file = _LockFile(self._directory / LOCK_NAME, self._disk)
            try:
                self._lock(file.descriptor)
                sweep(self._directory, self._disk)
                sync_names(self._directory, self._disk)
            except BaseException:
                file.close()
                raise
            self._file = file
            # A manager that is dropped without close() must not lock its own process out.
            weakref.finalize(self, file.close)

    def confirm(self) -> None:
        """Require that the lock that is held is still the directory's.

        Raises:
            SaveFailed: if the directory was removed, renamed, replaced or mounted over: another writer may
                hold what is there now.
        """
        assert self._file is not None  # noqa: S101 - whoever is about to write holds it
        with _writable(self._directory):
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

    def __init__(self, path: Path, disk: Disk) -> None:
        # No fork in between: the child would not know of it, and hold the lock for as long as it lives.
        with _forking():
            self.descriptor = disk.open_lock(path)
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


def make_directory(directory: Path, disk: Disk) -> None:
    """Make a directory and its parents. Their names are not yet durable: see :func:`sync_names`."""
    if directory.is_dir():
        return
    make_directory(directory.parent, disk)
    with contextlib.suppress(FileExistsError):
        disk.make_directory(directory)


def sync_names(directory: Path, disk: Disk) -> None:
    """Have the disk hold the names in a directory, its own, and its parents'.

    Those that stand may be another's work, who was killed before it could sync them, or a save's that failed
    to: to go on from a checkpoint, or to remove an older one, is to rely on its name.

    Raises:
        SaveFailed: if that cannot be done.
    """
    with _writable(directory):
        disk.sync_directory(directory)
        device = os.stat(directory).st_dev
        for parent in directory.parents:
            # A mount point was there before, and where we may not write, nothing was made by one like us.
            if os.stat(parent).st_dev != device or not os.access(parent, os.R_OK | os.W_OK):
                break
            disk.sync_directory(parent)


@contextlib.contextmanager
def _writable(directory: Path) -> Iterator[None]:
    """What the system refuses inside is said of the directory."""
    try:
        yield
    except OSError as error:
        raise SaveFailed(f"{directory}: cannot be written to: {error.strerror}", path=directory) from error


def sweep(directory: Path, disk: Disk) -> None:
    """Remove the temporary files of dead writers, and of saves that failed where nothing could be removed.

    The caller holds the lock and has no write under way, so nobody needs one. What cannot be removed now is
    left to the next time.
    """
    try:
        with os.scandir(directory) as entries:
            stale = [Path(entry.path) for entry in entries if _TEMPORARY_NAME.fullmatch(entry.name)]
    except OSError:
        return
    for path in stale:
        with contextlib.suppress(OSError):
            disk.unlink(path)


def remove(paths: list[Path], disk: Disk) -> None:
    """Remove files. One that is gone already is no error.

    Not synced: should a power cut bring one back, the next clean-up removes it again.

    Raises:
        CheckpointError: for the first that cannot be removed.
    """
    for path in paths:
        try:
            disk.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be removed: {error.strerror}", path=path) from error


def _free_bytes(directory: Path) -> int | None:
    try:
        status = os.statvfs(directory)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize
