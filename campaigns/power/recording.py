"""A disk that executes and records its operations, and can fail or die; the protocol is the product's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from distrust.checkpoint import direct_io
from distrust.checkpoint.disk import Disk


class MakeDirectory(NamedTuple):
    path: Path  # its name is not yet durable


class Create(NamedTuple):
    path: Path  # its name is not yet durable
    file: int  # a number for the operations on it


class Reserve(NamedTuple):
    file: int
    size: int  # at least; zeros where nothing was written


class Write(NamedTuple):
    file: int
    offset: int
    content: bytes
    writer: int = 0  # the machine whose memory holds it until a sync there


class Truncate(NamedTuple):
    file: int
    size: int  # exactly


class Sync(NamedTuple):
    file: int  # what the writer has written is durable; the file's name may not be
    writer: int = 0


class SyncFailed(NamedTuple):
    file: int  # its content may have been dropped, and no later sync brings it back


class Rename(NamedTuple):
    source: Path
    target: Path  # not yet durably


class Unlink(NamedTuple):
    path: Path  # not yet durably


class SyncDirectory(NamedTuple):
    path: Path  # the names in it are durable


Operation = (
    MakeDirectory | Create | Reserve | Write | Truncate | Sync | SyncFailed | Rename | Unlink | SyncDirectory
)


class Killed(BaseException):
    """The process ends here: it makes no further call."""


class RecordingDisk(Disk):
    """The real disk, with a record. Nothing is really synced: the record keeps what a sync guarantees."""

    def __init__(self, record: Callable[[Operation], None], *, writer: int = 0) -> None:
        self.calls = 0  # how many calls there were
        self.direct_writes = 0  # how many blocks went past the page cache
        self.failed: list[str] = []  # the names of the calls that failed
        self.dies_after: int | None = None  # the call after which the process ends; None for never
        #: Gets the name and the number of each call; returns the errno it fails with, or None.
        self.fails: Callable[[str, int], int | None] | None = None
        self._record = record  # called with each operation
        self.numbers: dict[Path, int] = {}  # of the files that were created; writers of one folder share it
        self._writer = writer
        self._files: dict[int, int] = {}  # by descriptor, which the system reuses
        self._created = 0

    def make_directory(self, path: Path) -> None:
        self._call("make_directory")
        super().make_directory(path)
        self._record(MakeDirectory(path))

    def open_lock(self, path: Path) -> int:
        self._call("open_lock")
        is_new = not path.exists()
        descriptor = super().open_lock(path)
        if is_new:
            self._record(Create(path, self._new_number()))
        return descriptor

    def create(self, path: Path) -> int:
        self._call("create")
        descriptor = super().create(path)
        self._files[descriptor] = self.numbers[path] = self._new_number()
        self._record(Create(path, self._files[descriptor]))
        return descriptor

    def join(self, path: Path) -> int:
        self._call("join")
        descriptor = super().join(path)
        self._files[descriptor] = self.numbers[path]
        return descriptor

    def reserve(self, descriptor: int, size: int) -> None:
        self._call("reserve")
        super().reserve(descriptor, size)
        # The real size: not every file system can reserve.
        self._record(Reserve(self._files[descriptor], os.fstat(descriptor).st_size))

    def write(self, descriptor: int, view: memoryview, offset: int) -> None:
        self._call("write")
        super().write(descriptor, view, offset)
        self.direct_writes += direct_io.is_enabled(descriptor)
        self._record(Write(self._files[descriptor], offset, bytes(view), self._writer))

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
        self._record(Sync(self._files[descriptor], self._writer))

    def close(self, descriptor: int) -> None:
        # Closed first: the system closes even where it reports an error, and so does a dead process.
        super().close(descriptor)
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

    def _new_number(self) -> int:
        self._created += 1
        return self._created

    def _call(self, name: str) -> None:
        self.calls += 1
        if self.dies_after is not None and self.calls > self.dies_after:
            raise Killed
        code = self.fails(name, self.calls) if self.fails is not None else None
        if code is not None:
            self.failed.append(name)
            raise OSError(code, os.strerror(code))
