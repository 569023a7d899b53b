"""The commit protocol: the only place that has anything written, synced, renamed or removed.

What it asks for is done by a disk (``disk.py``), the real one or another in its place. A checkpoint is
written to a hidden temporary name in its own directory, data first and header last (``pouring.py``), then
synced, renamed into place, and the directory synced. At every instant the directory therefore holds, under
the final name, either the file that stood there before or the whole new one.

- Space is reserved before the first byte, so that a full disk is found before anything is touched.
- A failed fsync is never tried again on the same file: the kernel may have dropped the pages it could not
  write, and the second call would report success.
- After a failed fsync of the directory the renamed file stays, and the error is raised.
- One writer a directory: who writes or removes holds its lock (``lock.py``).
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

from distrust.checkpoint.disk import Disk
from distrust.checkpoint.parallel import WorkerPool
from distrust.errors import CheckpointError, SaveFailed

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
        self._writers: WorkerPool | None = None
        self._descriptor = -1
        try:
            with self._cleanup_on_error():
                self._descriptor = disk.create(self._temporary)
                disk.reserve(self._descriptor, size)
            self._writers = WorkerPool(WRITES_IN_FLIGHT)
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
        with self._cleanup_on_error():
            return self._writers.submit(lambda: self._disk.write(self._descriptor, block, offset))

    def commit(self) -> None:
        """Make the file durable and put it under its name."""
        assert self._writers is not None  # noqa: S101 - until it is committed or discarded
        with self._cleanup_on_error():
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
                f"{self._path}: written completely, but its directory could not be synced "
                f"({error.strerror}): a power cut may still remove it",
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
    def _cleanup_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            free = _free_bytes(self._path.parent)
            raise SaveFailed(
                f"{self._path}: not saved: {error.strerror}; {self._size:,} bytes wanted, "
                f"{'unknown' if free is None else f'{free:,}'} free. What existed before is unchanged",
                path=self._path,
                needed=self._size,
                free=free,
            ) from error


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
    with errors_for_directory(directory):
        disk.sync_directory(directory)
        device = os.stat(directory).st_dev
        for parent in directory.parents:
            # A mount point was there before, and where we may not write, nothing was made by one like us.
            if os.stat(parent).st_dev != device or not _may_sync(parent):
                break
            disk.sync_directory(parent)


def _may_sync(directory: Path) -> bool:
    """Whether this process may write in a directory and open it: a sandbox refuses what permissions allow."""
    try:
        os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except PermissionError:
        return False
    return os.access(directory, os.W_OK)


@contextlib.contextmanager
def errors_for_directory(directory: Path) -> Iterator[None]:
    """What the system refuses inside is said of the directory.

    Raises:
        SaveFailed: for every OSError.
    """
    try:
        yield
    except OSError as error:
        raise SaveFailed(f"{directory}: cannot be written to: {error.strerror}", path=directory) from error


def remove_stale_files(directory: Path, disk: Disk) -> None:
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
        CheckpointError: for the first that cannot be removed; the others are gone then.
    """
    failed: list[CheckpointError] = []
    for path in paths:
        try:
            disk.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            failed.append(CheckpointError(f"{path}: cannot be removed: {error.strerror}", path=path))
    if failed:
        raise failed[0]


def _free_bytes(directory: Path) -> int | None:
    try:
        status = os.statvfs(directory)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize
