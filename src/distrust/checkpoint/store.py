"""What is in a directory of checkpoints, and whether it is whole. Reads only, and needs no lock.

:func:`scan` is the only definition of what is there: the files named as checkpoints, each with its header
checked or the reason why it is damaged. *Good* there means that name, size and header agree; :func:`verify`
reads the data too. A file is opened once and asked through its descriptor: a writer that replaces or removes
it meanwhile cannot mix two files into one answer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrust.checkpoint import reading
from distrust.checkpoint.format import (
    LENGTH_BYTES,
    Header,
    Kind,
    TensorInfo,
    header_length,
    parse_header,
)
from distrust.errors import (
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnreadable,
    CorruptCheckpoint,
    DistrustWarning,
    UnsupportedVersion,
)

RUN_SUBDIRECTORY = "checkpoints"
#: Such a file may be whole: to fall back from it to an older one would lose what it holds.
_NOT_THE_FILES_FAULT = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})(-final)?\.safetensors", re.ASCII)


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """A checkpoint whose header is whole.

    Attributes:
        path: where it is.
        header: what it says.
    """

    path: Path
    header: Header

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        return self.header.step

    @property
    def kind(self) -> Kind:
        """``periodic`` or ``final``."""
        return self.header.kind

    @property
    def bytes(self) -> int:
        """The size of the file."""
        return self.header.file_size

    @property
    def created(self) -> str | None:
        """When it was written: ISO 8601, UTC."""
        created = self.header.run_info.get("created")
        return created if isinstance(created, str) else None

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers by which it can be listed and chosen."""
        return self.header.metrics

    @property
    def metadata(self) -> dict[str, Any]:
        """The caller's metadata."""
        return self.header.metadata

    @property
    def digest(self) -> str:
        """The digest of the header, and through it of the whole file."""
        return self.header.digest

    @property
    def state_digest(self) -> str:
        """The identity of the state: equal for bit-identical runs."""
        return self.header.state_digest

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """In the order of their data."""
        return self.header.tensors


@dataclass(frozen=True, slots=True)
class DamagedFile:
    """A file named as a checkpoint that this program cannot take for one.

    Attributes:
        path: where it is.
        step: by its name.
        error: what is wrong with it: damaged, or of a later version.
    """

    path: Path
    step: int
    error: CorruptCheckpoint | UnsupportedVersion

    @property
    def reason(self) -> str:
        """What is wrong with it, without the path."""
        return str(self.error).removeprefix(f"{self.path}: ")


@dataclass(frozen=True, slots=True)
class Scan:
    """What a directory holds.

    Attributes:
        files: checkpoints whose headers are whole, by step, a periodic one before the final of its step.
        damaged: the others, by step.
    """

    files: tuple[CheckpointFile, ...]
    damaged: tuple[DamagedFile, ...]

    def by_step(self) -> dict[int, CheckpointFile]:
        """One file a step, in ascending order: where both kinds stand, the final one."""
        return {file.step: file for file in self.files}


def file_name(step: int, kind: Kind) -> str:
    """The name of a checkpoint's file."""
    return f"checkpoint-{step}{'-final' if kind == 'final' else ''}.safetensors"


def scan(directory: Path) -> Scan:
    """List a directory. One that does not exist holds nothing.

    Raises:
        CheckpointError: if the directory cannot be read.
    """
    while True:
        found = [_read_listed(path, step, kind) for path, step, kind in _named(directory)]
        # A writer removes a checkpoint once a newer one stands: that one was not in the list.
        if None not in found:
            return Scan(
                files=tuple(file for file in found if isinstance(file, CheckpointFile)),
                damaged=tuple(file for file in found if isinstance(file, DamagedFile)),
            )


def find(target: Path) -> list[Path]:
    """The checkpoint files that a run, a directory of checkpoints, or a file stands for, by step.

    Raises:
        CheckpointNotFound: if there are none.
    """
    if target.is_dir():
        directory = checkpoint_directory(target)
        paths = [path for path, _, _ in _named(directory)]
        if not paths:
            raise CheckpointNotFound(f"{target}: no checkpoints here", path=target)
        return paths
    if not target.exists():
        raise CheckpointNotFound(f"{target}: no such file or directory", path=target)
    return [target]


def newest(target: Path) -> CheckpointFile:
    """The checkpoint that ``target`` stands for; of a directory the newest with a whole header.

    Warns of newer ones that are damaged.

    Raises:
        CheckpointNotFound: if there is none.
        CorruptCheckpoint: if a file was named and its header is damaged.
    """
    if not target.is_dir():
        return read_header(target)
    found = scan(checkpoint_directory(target))
    if not found.files:
        also = f"; {len(found.damaged)} damaged" if found.damaged else ""
        raise CheckpointNotFound(f"{target}: no checkpoints here{also}", path=target)
    for damaged in found.damaged:
        if damaged.step >= found.files[-1].step:
            warnings.warn(f"skipped a damaged checkpoint: {damaged.error}", DistrustWarning, stacklevel=2)
    return found.files[-1]


def checkpoint_directory(target: Path) -> Path:
    """The directory of checkpoints of a run, or ``target`` itself if it is one."""
    inner = target / RUN_SUBDIRECTORY
    return inner if inner.is_dir() else target


def read_header(path: Path) -> CheckpointFile:
    """Read and check a header; the data is not touched.

    Raises:
        CheckpointNotFound: if there is no such file.
        CorruptCheckpoint: if it is damaged.
        CheckpointUnreadable: if this process cannot read it.
        UnsupportedVersion: if a later version of the format wrote it.
    """
    with opened(path) as (_, header):
        return CheckpointFile(path, header)


def verify(path: Path) -> CheckpointFile:
    """Read a whole checkpoint and check every byte of it.

    Raises:
        CheckpointNotFound: if there is no such file.
        CorruptCheckpoint: with the first damaged tensor and where it lies.
        UnsupportedVersion: if a later version of the format wrote it.
    """
    with opened(path) as (descriptor, header):
        _ = header.sections, header.run_info
        reading.verify(descriptor, header)
        return CheckpointFile(path, header)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[int, Header]]:
    """A checkpoint's descriptor and its checked header; errors raised inside get the path.

    Raises:
        CheckpointNotFound: if there is no such file.
        CorruptCheckpoint: if it is damaged.
        CheckpointUnreadable: if this process cannot read it.
        UnsupportedVersion: if a later version of the format wrote it.
    """
    descriptor = -1
    try:
        # O_NONBLOCK: opening a pipe that lies in the way must not wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CorruptCheckpoint("not a regular file")
        raw = bytearray(header_length(os.pread(descriptor, LENGTH_BYTES, 0), status.st_size))
        reading.read_into(descriptor, memoryview(raw), 0)
        yield descriptor, parse_header(bytes(raw), status.st_size)
    except FileNotFoundError:
        raise CheckpointNotFound(f"{path}: no such checkpoint", path=path) from None
    except OSError as error:
        if error.errno in _NOT_THE_FILES_FAULT:
            raise CheckpointUnreadable(f"{path}: cannot be read: {error.strerror}", path=path) from error
        raise CorruptCheckpoint(f"it cannot be read: {error.strerror}", path=path) from error
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(error.reason, path=path, tensor=error.tensor) from None
    except UnsupportedVersion as error:
        raise UnsupportedVersion(f"{path}: {error}", path=path) from None
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _read_listed(path: Path, step: int, kind: Kind) -> CheckpointFile | DamagedFile | None:
    """What a file of that name is; None if it is not there any more."""
    try:
        file = read_header(path)
        if (file.step, file.kind) != (step, kind):
            reason = f"it holds step {file.step} ({file.kind}), not what its name says"
            raise CorruptCheckpoint(reason, path=path)
        _ = file.header.sections, file.header.run_info  # readable, too
    except CheckpointNotFound:
        if not path.is_symlink():
            return None
        return DamagedFile(path, step, CorruptCheckpoint("a link to nothing", path=path))
    except (CorruptCheckpoint, UnsupportedVersion) as error:
        return DamagedFile(path, step, error)
    return file


def _named(directory: Path) -> list[tuple[Path, int, Kind]]:
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror}", path=directory) from error
    found: list[tuple[Path, int, Kind]] = []
    for name in names:
        match = _NAME.fullmatch(name)
        if match:
            found.append((directory / name, int(match[1]), "final" if match[2] else "periodic"))
    # "final" would sort before "periodic": the periodic one of a step comes first.
    return sorted(found, key=lambda entry: (entry[1], entry[2] == "final"))
