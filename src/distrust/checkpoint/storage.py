"""The commit protocol: the only module of the core that writes, syncs, renames or removes files.

A checkpoint is written to a hidden temporary name in its own directory, data first and header last, then
synced, renamed into place, and the directory synced. So at every instant the directory contains, under the
final name, either the previous file or the complete new one.

- Space is reserved before the first byte: a full disk is detected before anything changes.
- A failed fsync is never retried on the same file: the kernel may have dropped the pages that it could not
  write, and the second call would report success.
- After a failed fsync of the directory the renamed file stays, and the error is raised.
- There is one writer of a manager's directory: only the holder of its lock (``lock.py``) writes or removes.
  Other processes of its run may write parts of its temporary file (``shared_writer.py``).
  A file that a caller named (``single_file.py``) has no such lock; its temporary file is locked itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import threading
import time
from pathlib import Path

from distrust.checkpoint.disk import Disk
from distrust.checkpoint.files import open_regular
from distrust.checkpoint.parallel import WorkerPool
from distrust.errors import CheckpointError, CorruptCheckpoint, ErrorTranslator, SaveFailed

#: Threads, not asynchronous system calls: two that write most of the time keep a disk busy on every system.
WRITES_IN_FLIGHT = 2
# The 16 random hex digits keep the names of two saves apart; no other file matches.
_TEMPORARY_NAME = re.compile(r"\.checkpoint-[0-9]+(-final)?\.safetensors\.[0-9a-f]{16}\.tmp", re.ASCII)


class AtomicCheckpointFile:
    """A new file of known size, in bytes, that appears under its name complete, or not at all.

    If it ``is_part`` of another process's file, :meth:`join` opens that, and :meth:`commit` only syncs it.

    Raises:
        SaveFailed: from every method. Existing files are unchanged, unless only the last step failed, the
            sync of the directory: then the new file exists.
    """

    def __init__(self, path: Path, size: int, disk: Disk, *, is_part: bool = False) -> None:
        self.is_part = is_part
        self.path = path
        self._size = size
        self._disk = disk
        self.token = secrets.randbits(64)
        self._temporary = path.parent / f".{path.name}.{self.token:016x}.tmp"
        self._writers: WorkerPool | None = None
        self._descriptor = -1
        try:
            with self._save_errors():
                if not is_part:
                    self._descriptor = disk.create(self._temporary)
                    disk.reserve(self._descriptor, size)  # ENOSPC comes here, before a byte is written
            self._writers = WorkerPool(WRITES_IN_FLIGHT)
        except BaseException:
            self.discard()  # no caller has a reference yet
            raise

    def join(self, token: int) -> None:
        """Open the file with a token. It is a number: no name of a file is taken from the network."""
        with self._save_errors():
            self._descriptor = self._disk.join(self.path.parent / f".{self.path.name}.{token:016x}.tmp")

    def write(self, block: memoryview, offset: int) -> threading.Event:
        """Start writing a block: whole pages, page-aligned, as is its offset in the file.

        The last block may extend beyond the end of the file. Returns an event that is set when the block is
        written; until then it must not change.
        """
        assert self._writers is not None  # noqa: S101 - neither committed nor discarded
        with self._save_errors():
            return self._writers.submit(lambda: self._disk.write(self._descriptor, block, offset))

    def commit(self) -> None:
        """Make the file durable and give it its name."""
        assert self._writers is not None  # noqa: S101 - neither committed nor discarded
        with self._save_errors():
            self._writers.finish()  # raises the error of any write in flight
            if not self.is_part:
                self._disk.truncate(self._descriptor, self._size)  # the last page was written whole
            self._disk.sync(self._descriptor)  # never retried
            # Close before rename: some file systems report failed writes only on close. And syncing the
            # directory needs a descriptor, which may be the last one available.
            self._close()
            if self.is_part:
                return
            self._disk.rename(self._temporary, self.path)  # COMMITS: readers see the new file
        try:
            self._disk.sync_directory(self.path.parent)  # now the name survives a power cut
        except OSError as error:
            text = (
                f"{self.path}: written completely, but its directory could not be synced "
                f"({error.strerror}): a power cut may still remove it"
            )
            raise SaveFailed(text, path=self.path) from error

    def discard(self) -> None:
        """Remove what was not committed; does nothing after :meth:`commit`."""
        try:
            if self._writers is not None:
                self._writers.stop()
                self._writers = None
            if self._descriptor >= 0:
                with contextlib.suppress(OSError):  # the file is removed anyway
                    self._close()
        finally:  # also if an interrupt ends the wait for the writers
            with contextlib.suppress(OSError):
                if not self.is_part:
                    self._disk.unlink(self._temporary)  # after a commit the name no longer exists

    def _close(self) -> None:
        # A descriptor is closed even if close() fails: closing it again could close another file.
        descriptor, self._descriptor = self._descriptor, -1
        self._disk.close(descriptor)

    def __enter__(self) -> AtomicCheckpointFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.discard()

    def _save_errors(self) -> ErrorTranslator:
        return ErrorTranslator((OSError,), self._not_saved)

    def _not_saved(self, error: OSError) -> SaveFailed:
        free = _free_bytes(self.path.parent)
        text = (
            f"{self.path}: not saved: {error.strerror}; {self._size:,} bytes needed, "
            f"{'unknown' if free is None else f'{free:,}'} free. Existing files are unchanged"
        )
        return SaveFailed(text, path=self.path, needed=self._size, free=free)


def make_directory(directory: Path, disk: Disk) -> None:
    """Create a directory and its parents. Their names are durable only after :func:`sync_names`."""
    if directory.is_dir():
        return
    make_directory(directory.parent, disk)
    with contextlib.suppress(FileExistsError):  # another process created it meanwhile
        disk.make_directory(directory)


def sync_names(directory: Path, disk: Disk) -> None:
    """Make the names in a directory durable, and its own name, and its parents'.

    A killed writer, or a failed save, may have left names that were never synced. Resuming from a checkpoint,
    or removing an older one, relies on its name. Raises SaveFailed if they cannot be synced.
    """
    with errors_for_directory(directory):
        disk.sync_directory(directory)
        device = os.stat(directory).st_dev
        for parent in directory.parents:
            # A mount point existed before; and in a directory that is not writable nothing was created.
            if os.stat(parent).st_dev != device or not _may_sync(parent):
                break
            disk.sync_directory(parent)


def _may_sync(directory: Path) -> bool:
    try:  # opening it: a sandbox may deny what permissions allow
        os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except PermissionError:
        return False
    return os.access(directory, os.W_OK)


def errors_for_directory(directory: Path) -> ErrorTranslator:
    """Context manager that raises OSErrors of its block as SaveFailed, with the directory."""
    return ErrorTranslator(
        (OSError,),
        lambda error: SaveFailed(f"{directory}: cannot be written to: {error.strerror}", path=directory),
    )


def remove_stale_files(directory: Path, disk: Disk, *, name: str = "", min_age: float = 0.0) -> None:
    """Remove the temporary files of dead writers and failed saves.

    A living writer has its file locked (:meth:`Disk.create`): one that cannot be locked stays. What cannot be
    removed now is left for the next call.

    Args:
        directory: is searched for temporary files of checkpoints.
        disk: for the removal.
        name: of another file whose temporary files count, too.
        min_age: seconds since the last write. Without the directory's lock, a file may just have been
            created, and not be locked yet.
    """
    named = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{16}}\.tmp", re.ASCII)
    try:
        with os.scandir(directory) as entries:
            stale = [
                Path(entry.path)
                for entry in entries
                if _TEMPORARY_NAME.fullmatch(entry.name) or named.fullmatch(entry.name)
            ]
    except OSError:
        return
    for path in stale:
        with contextlib.suppress(OSError, CorruptCheckpoint), open_regular(path) as (descriptor, status):
            if time.time() - status.st_mtime >= min_age:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if its writer lives
                disk.unlink(path)


def remove(paths: list[Path], disk: Disk) -> None:
    """Remove files that exist; raise CheckpointError for the first that cannot be, after all others.

    Not synced: if a power cut restores one, the next cleanup removes it again.
    """
    errors: list[CheckpointError] = []
    for path in paths:
        try:
            with contextlib.suppress(FileNotFoundError):
                disk.unlink(path)
        except OSError as error:
            errors.append(CheckpointError(f"{path}: cannot be removed: {error.strerror}", path=path))
    if errors:
        raise errors[0]


def _free_bytes(directory: Path) -> int | None:
    try:
        status = os.statvfs(directory)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize  # available to this user, without the reserve of root
