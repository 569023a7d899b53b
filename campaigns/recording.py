"""A disk that does what it is asked for, keeps a record of it, and can fail or die on the way.

It stands where the real one stands, below the commit protocol: the protocol is the product's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from distrust.checkpoint import direct_io
from distrust.checkpoint.disk import Disk


class MakeDirectory(NamedTuple):
    """A directory was made; its name is not yet durable."""

    path: Path


class Create(NamedTuple):
    """A file was made; its name is not yet durable."""

    path: Path
    file: int


class Reserve(NamedTuple):
    """Space was allocated: the file has that size at least, and zeros where nothing was written."""

    file: int
    size: int


class Write(NamedTuple):
    """Bytes were written."""

    file: int
    offset: int
    content: bytes


class Truncate(NamedTuple):
    """The size was set."""

    file: int
    size: int


class Sync(NamedTuple):
    """All that was written to the file is durable; its name need not be."""

    file: int


class SyncFailed(NamedTuple):
    """What was written may have been dropped, and no later sync brings it back."""

    file: int


class Rename(NamedTuple):
    """A file has another name; not yet durably."""

    source: Path
    target: Path


class Unlink(NamedTuple):
    """A name is gone; not yet durably."""

    path: Path


class SyncDirectory(NamedTuple):
    """The names in a directory are durable."""

    path: Path


Operation = (
    MakeDirectory | Create | Reserve | Write | Truncate | Sync | SyncFailed | Rename | Unlink | SyncDirectory
)


class Killed(BaseException):
    """The process ends here: nothing that comes after this is done any more."""


class RecordingDisk(Disk):
    """The real disk with a record.

    Nothing is really synced: what a sync promises is kept by the record.

    Args:
        record: told of each operation.

    Attributes:
        calls: how many calls there were.
        direct_writes: how many blocks went past the page cache.
        failed: the names of those that failed.
        dies_after: the call after which the process ends; None for never.
        fails: told the name of each call and its number; gives the errno that it fails with, or None;
            None if none fails.
    """

    def __init__(self, record: Callable[[Operation], None]) -> None:
        self.calls = 0
        self.direct_writes = 0
        self.failed: list[str] = []
        self.dies_after: int | None = None
        self.fails: Callable[[str, int], int | None] | None = None
        self._record = record
        self._files: dict[int, int] = {}
        self._made = 0

    def make_directory(self, path: Path) -> None:
        self._call("make_directory")
        super().make_directory(path)
        self._record(MakeDirectory(path))

    def open_lock(self, path: Path) -> int:
        self._call("open_lock")
        is_new = not path.exists()
        descriptor = super().open_lock(path)
        if is_new:
            self._record(Create(path, self._number()))
        return descriptor

    def create(self, path: Path) -> int:
        self._call("create")
        descriptor = super().create(path)
        self._files[descriptor] = self._number()
        self._record(Create(path, self._files[descriptor]))
        return descriptor

    def reserve(self, descriptor: int, size: int) -> None:
        self._call("reserve")
        super().reserve(descriptor, size)
        # As much as the file system did: not all of them can.
        self._record(Reserve(self._files[descriptor], os.fstat(descriptor).st_size))

    def write(self, descriptor: int, view: memoryview, offset: int) -> None:
        self._call("write")
        super().write(descriptor, view, offset)
        self.direct_writes += direct_io.is_enabled(descriptor)
        self._record(Write(self._files[descriptor], offset, bytes(view)))

    def truncate(self, descriptor: int, size: int) -> None:
        self._call("truncate")
        super().truncate(descriptor, size)
        self._record(Truncate(self._files[descriptor], size))

    def sync(self, descriptor: int) -> None:
        try:
            self._call("sync")
        except OSError:
            self._record(SyncFailed(self._files[descriptor]))
            raise
        self._record(Sync(self._files[descriptor]))

    def close(self, descriptor: int) -> None:
        super().close(descriptor)  # it is closed, whatever the system says of it; the dead close theirs, too
        self._call("close")

    def rename(self, source: Path, target: Path) -> None:
        self._call("rename")
        super().rename(source, target)
        self._record(Rename(source, target))

    def unlink(self, path: Path) -> None:
        self._call("unlink")
        super().unlink(path)
        self._record(Unlink(path))

    def sync_directory(self, path: Path) -> None:
        self._call("sync_directory")
        self._record(SyncDirectory(path))

    def _number(self) -> int:
        self._made += 1
        return self._made

    def _call(self, name: str) -> None:
        self.calls += 1
        if self.dies_after is not None and self.calls > self.dies_after:
            raise Killed
        code = self.fails(name, self.calls) if self.fails is not None else None
        if code is not None:
            self.failed.append(name)
            raise OSError(code, os.strerror(code))
