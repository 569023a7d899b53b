"""Names and opening of checkpoint files: only regular files are read, and opening one never blocks."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from distrust.checkpoint.format import LENGTH_BYTES, OPENING, Kind
from distrust.errors import (
    CheckpointNotFound,
    CheckpointUnreadable,
    CorruptCheckpoint,
    ErrorTranslator,
    UnsupportedVersion,
)

#: The file may be intact: falling back from it to an older checkpoint could lose work.
_PROCESS_ERRORS = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENODEV}
CUT_WHILE_READ = "the file ends in the middle: it was cut while it was read"
NOT_REGULAR = "not a regular file"
_WRONG_KINDS = {errno.ELOOP: "a link; remove it", errno.EISDIR: "a folder; remove it"}

_Answer = TypeVar("_Answer")


def errors_with_path(path: Path) -> ErrorTranslator:
    """Context manager that raises errors of its block as this library's errors, with the path."""
    kinds = (OSError, MemoryError, CorruptCheckpoint, UnsupportedVersion)
    return ErrorTranslator(kinds, lambda error: error_with_path(error, path))


def error_with_path(error: Exception, path: Path) -> Exception:
    """The error of this library for one that reading a file raised."""
    match error:
        case CorruptCheckpoint():
            return CorruptCheckpoint(error.reason, path=path, tensor=error.tensor)
        case UnsupportedVersion():
            return UnsupportedVersion(f"{path}: {error}", path=path)
        case FileNotFoundError():
            return CheckpointNotFound(f"{path}: no such checkpoint", path=path)
        case OSError() if error.errno not in _PROCESS_ERRORS:  # EIO, ELOOP: the file's fault
            return CorruptCheckpoint(f"it cannot be read: {error.strerror or error}", path=path)
    reason = error.strerror if isinstance(error, OSError) else str(error) or "no memory"
    return CheckpointUnreadable(f"{path}: cannot be read: {reason}", path=path)


@contextlib.contextmanager
def open_regular(path: str | Path, *, folder: int | None = None) -> Iterator[tuple[int, os.stat_result]]:
    """Open a file for reading; gives descriptor and status. Raises CorruptCheckpoint if it is not regular.

    ``folder`` is the descriptor of the folder that contains it; then links are not followed.
    """
    descriptor = _open_without_blocking(path, folder)
    try:
        status = os.fstat(descriptor)  # of the open file: the name may already be another file's
        if not stat.S_ISREG(status.st_mode):
            raise CorruptCheckpoint(NOT_REGULAR)
        yield descriptor, status
    finally:
        os.close(descriptor)


def open_regular_file(path: str | Path) -> io.BufferedReader:
    """Open a file for reading, following links. Raises OSError, also if it is not a regular file."""
    file = _NeverWaits(path, opener=lambda name, _: _open_without_blocking(name))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, NOT_REGULAR, str(path))
    return io.BufferedReader(file)


class _NeverWaits(io.FileIO):
    """Raises OSError where there is nothing to read yet, as in the kernel's log, which counts as regular."""

    def readinto(self, buffer: Any) -> int:
        count: int | None = super().readinto(buffer)
        return self._require(count)

    def readall(self) -> bytes:
        return self._require(super().readall())

    def _require(self, answer: _Answer | None) -> _Answer:
        if answer is None:
            raise BlockingIOError(errno.EAGAIN, NOT_REGULAR, str(self.name))
        return answer


def open_to_write(path: Path, flags: int, mode: int = 0o666) -> int:
    """Open a file in place, with the flags of ``os.open``; ``mode`` is for a new one.

    Raises OSError for a link, a second name of a file, whose content may be another's, and no regular file.
    """
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    try:
        descriptor = os.open(path, flags, mode)
    except OSError as error:
        reason = _WRONG_KINDS.get(error.errno or 0, error.strerror or "")
        raise OSError(error.errno, f"{path.name}: {reason}", str(path)) from None
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
        return descriptor
    os.close(descriptor)
    reason = f"{NOT_REGULAR}; remove it"
    if stat.S_ISREG(status.st_mode):
        reason = "a hard link, and writing to it would change the other file; copy it, or remove it"
    raise OSError(errno.EMLINK, f"{path.name}: {reason}", str(path))


def _open_without_blocking(path: str | Path, folder: int | None = None) -> int:
    # O_NONBLOCK: opening a pipe must not wait for a writer.
    # O_NOCTTY: opening a terminal must not make it this process's controlling terminal.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    if folder is not None:
        flags |= os.O_NOFOLLOW
    return os.open(path, flags, dir_fd=folder)  # never by a name that is resolved twice


def read_into(descriptor: int, view: memoryview, offset: int) -> None:
    """Fill ``view`` from ``offset`` on. Raises CorruptCheckpoint if the file ends too early, or OSError."""
    while view:  # a read may return less than asked for
        count = os.preadv(descriptor, [view], offset)
        if count == 0:  # end of file: the size was checked before
            raise CorruptCheckpoint(CUT_WHILE_READ)
        view = view[count:]
        offset += count


def begins_as_checkpoint(path: Path) -> bool:
    """Whether a file begins like every file of this format. Raises as :func:`open_regular`."""
    with open_regular(path) as (descriptor, _):
        return os.pread(descriptor, LENGTH_BYTES + len(OPENING), 0).startswith(OPENING, LENGTH_BYTES)


# At most 18 digits: a step fits in a signed 64-bit number.
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})(-final)?(\.safetensors)?", re.ASCII)


class Entry(NamedTuple):
    """A name of a checkpoint in a directory, with the step and kind that it states."""

    path: Path  #: of the file or, without a suffix, of a folder of a foreign format
    step: int
    kind: Kind


def checkpoint_file_name(step: int, kind: Kind) -> str:
    """The name of a checkpoint's file."""
    return f"checkpoint-{step}{'-final' if kind == 'final' else ''}.safetensors"


def parse_checkpoint_name(path: Path) -> Entry | None:
    """Parse the name of a checkpoint file or folder; None for any other name."""
    match = _NAME.fullmatch(path.name)  # fullmatch: "$" would accept a final newline
    return Entry(path, int(match[1]), "final" if match[2] else "periodic") if match else None
