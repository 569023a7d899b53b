"""How files are opened to be read: only regular ones, waiting for nobody; and what is said of failures."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from distrust.checkpoint.format import Kind
from distrust.errors import CheckpointNotFound, CheckpointUnreadable, CorruptCheckpoint, UnsupportedVersion

#: Such a file may be whole: to fall back from it to an older one would lose what it holds.
_NOT_THE_FILES_FAULT = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENODEV}
CUT_WHILE_READ = "the file ends in the middle: it was cut while it was read"


@contextlib.contextmanager
def errors_with_path(path: Path) -> Iterator[None]:
    """Errors raised inside say which file it is, and are this library's."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointNotFound(f"{path}: no such checkpoint", path=path) from None
    except OSError as error:
        if error.errno in _NOT_THE_FILES_FAULT:
            raise CheckpointUnreadable(f"{path}: cannot be read: {error.strerror}", path=path) from error
        raise CorruptCheckpoint(f"it cannot be read: {error.strerror}", path=path) from error
    except MemoryError as error:
        raise CheckpointUnreadable(
            f"{path}: cannot be read: {str(error) or 'no memory'}", path=path
        ) from error
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(error.reason, path=path, tensor=error.tensor) from None
    except UnsupportedVersion as error:
        raise UnsupportedVersion(f"{path}: {error}", path=path) from None


@contextlib.contextmanager
def open_regular(path: str | Path, *, folder: int | None = None) -> Iterator[tuple[int, os.stat_result]]:
    """A regular file, open to be read, and its status.

    Args:
        path: of the file.
        folder: descriptor of the folder in which it has that name: there, no link is followed.

    Raises:
        CorruptCheckpoint: if it is anything else than a regular file.
        OSError: if it cannot be opened.
    """
    # O_NONBLOCK: opening a pipe that lies in the way must not wait for its writer.
    # O_NOCTTY: opening a terminal there must not make it the one whose keys end this process.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    if folder is not None:
        flags |= os.O_NOFOLLOW
    descriptor = os.open(path, flags, dir_fd=folder)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CorruptCheckpoint("not a regular file")
        yield descriptor, status
    finally:
        os.close(descriptor)


def read_into(descriptor: int, view: memoryview, offset: int) -> None:
    """Fill ``view`` from ``offset`` on.

    Raises:
        CorruptCheckpoint: if the file ends before.
        OSError: if the disk cannot be read.
    """
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise CorruptCheckpoint(CUT_WHILE_READ)
        view = view[count:]
        offset += count


_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})(-final)?(\.safetensors)?", re.ASCII)

Entry = tuple[Path, int, Kind]


def checkpoint_file_name(step: int, kind: Kind) -> str:
    """The name of a checkpoint's file."""
    return f"checkpoint-{step}{'-final' if kind == 'final' else ''}.safetensors"


def parse_checkpoint_name(path: Path) -> Entry | None:
    """What the name of a checkpoint says, of a file or of a folder."""
    match = _NAME.fullmatch(path.name)
    return (path, int(match[1]), "final" if match[2] else "periodic") if match else None
