"""What is in a directory of checkpoints, and whether it is whole. Reads only, and needs no lock.

:func:`scan` is the only definition of what is there: the files named as checkpoints, each with its header
proven by its digest, or the reason why it is damaged. *Good* there means that name, size and header agree;
what is checked of a header when is said in :mod:`distrust.checkpoint.header`. :func:`verify` reads all of it,
and the data too; what a listing takes for damaged, it does not call whole. A file is opened once and asked
through its descriptor: a writer that replaces or removes it meanwhile cannot mix two files into one answer.

Checkpoints in the formats that were before this one (:mod:`distrust.importers`) are listed apart, so
that no rule ever counts or removes them; where a step stands in both, ours is the one that is meant.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distrust import importers
from distrust.checkpoint import foreign
from distrust.checkpoint.files import (
    Entry,
    checkpoint_file_name,
    errors_with_path,
    open_regular,
    parse_checkpoint_name,
    read_into,
)
from distrust.checkpoint.format import ALIGNMENT, FORMAT, LENGTH_BYTES, OPENING, Kind, TensorInfo
from distrust.checkpoint.header import Header, header_length, parse_header
from distrust.errors import (
    NOT_FOUND_ERRORS,
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnreadable,
    CorruptCheckpoint,
    DistrustWarning,
    UnsupportedVersion,
    read_failure_reason,
)

if TYPE_CHECKING:
    from distrust.importers.imported import ImportedHeader

__all__ = [
    "RUN_SUBDIRECTORY",
    "CheckpointFile",
    "DamagedFile",
    "Entry",
    "Identity",
    "Known",
    "Scan",
    "checkpoint_directory",
    "checkpoint_file_name",
    "dangling_link",
    "file_identity",
    "is_directory",
    "list_names",
    "looks_like_checkpoint",
    "newest",
    "open_checkpoint",
    "read_header",
    "require_exists",
    "require_name",
    "resolve",
    "scan",
    "verify",
    "verify_content",
]  # fmt: skip

RUN_SUBDIRECTORY = "checkpoints"
#: A file changed later than this before it was read is read again: no file system's clock is coarser.
STABLE_AFTER_NANOSECONDS = 2_000_000_000


class CheckpointFile(NamedTuple):
    """A checkpoint whose header is whole.

    Attributes:
        path: where it is.
        header: what it says.
    """

    path: Path
    header: Header | ImportedHeader

    @property
    def format(self) -> str:
        """``distrust``, or the name of an older format."""
        return self.header.format

    @property
    def is_foreign(self) -> bool:
        """Whether it is in an older format: it has no digests, and is never removed."""
        return self.format != FORMAT

    @property
    def metadata_only(self) -> bool:
        """Whether it is metadata alone, as only one in an older format can be."""
        return not isinstance(self.header, Header) and self.header.lacks_arrays

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
    def measured_on(self) -> str:
        """What its metrics were measured on; empty where that was not said."""
        return self.header.measured_on

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
        """In the order of their data.

        Raises:
            CorruptCheckpoint: if they are not described as a writer does; damage was found before.
        """
        with errors_with_path(self.path):
            return self.header.tensors

    def require_intact(self) -> None:
        """Check all that is checked without the tensors' bytes; see :mod:`distrust.checkpoint.header`.

        Raises:
            CorruptCheckpoint: with what no writer makes.
        """
        with errors_with_path(self.path):
            self.header.require_intact()


class DamagedFile(NamedTuple):
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


class Scan(NamedTuple):
    """What a directory holds.

    Attributes:
        files: checkpoints whose headers are whole, by step, a periodic one before the final of its step.
        damaged: the others, by step.
        older: those in an older format whose metadata is whole, in the same order.
    """

    files: tuple[CheckpointFile, ...]
    damaged: tuple[DamagedFile, ...]
    foreign: tuple[CheckpointFile, ...] = ()

    @property
    def all_intact(self) -> tuple[CheckpointFile, ...]:
        """All that are whole, by step; of a step the one that is meant stands last."""
        return tuple(sorted([*self.foreign, *self.files], key=_rank))

    def by_step(self) -> dict[int, CheckpointFile]:
        """One file a step, in ascending order: ours before an older one, and then the final one.

        Metadata alone stands for a step only where nothing else does.
        """
        return {file.step: file for file in self.all_intact}


def _rank(file: CheckpointFile) -> tuple[int, bool, bool, bool]:
    return file.step, not file.metadata_only, not file.is_foreign, file.kind == "final"


#: What tells that a file is the same, with the same content: device, inode, size, times of its last changes.
Identity = tuple[int, int, int, int, int]
#: Checkpoints as a scan found them; see :func:`scan`.
Known = dict[Path, tuple[Identity, CheckpointFile]]


def scan(directory: Path, known: Known | None = None) -> Scan:
    """List a directory. One that does not exist holds nothing.

    Args:
        directory: of checkpoints.
        known: empty at first, and held by the caller from one scan to the next, which bring it up to date: a
            checkpoint that is still the same file, unchanged, is not read again.

    Raises:
        CheckpointError: if the directory cannot be read.
    """
    while True:
        seen: Known = {}
        found = [_classify(entry, known or {}, seen) for entry in list_names(directory)]
        # A writer removes a checkpoint once a newer one stands: that one was not in the list.
        if None not in found:
            if known is not None:
                # Other threads look into it meanwhile: it is never without what is still there.
                known.update(seen)
                for path in list(known):
                    if path not in seen:
                        known.pop(path, None)
            whole = [file for file in found if isinstance(file, CheckpointFile)]
            return Scan(
                files=tuple(file for file in whole if not file.is_foreign),
                damaged=tuple(file for file in found if isinstance(file, DamagedFile)),
                foreign=tuple(file for file in whole if file.is_foreign),
            )


def resolve(target: Path) -> list[Path]:
    """The checkpoints that a run, a directory of them, or one of them stands for, by step.

    Raises:
        CheckpointNotFound: if there are none.
    """
    if is_directory(target):
        directory = checkpoint_directory(target)
        paths = [path for path, _, _ in list_names(directory)]
        if not paths:
            raise CheckpointNotFound(
                f"{target}: no checkpoints here{foreign.import_hint(target)}", path=target
            )
        return paths
    require_exists(target)
    return [target]


def require_exists(target: Path) -> None:
    """Check that something is at the place that a user has named.

    Raises:
        CheckpointNotFound: if nothing is.
        CheckpointUnreadable: if this process may not look.
    """
    try:
        os.stat(target)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise CheckpointNotFound(f"{target}: {NOT_FOUND_ERRORS}", path=target) from None
    except OSError as error:
        raise CheckpointUnreadable(f"{target}: {read_failure_reason(error)}", path=target) from error


def newest(target: Path) -> CheckpointFile:
    """The checkpoint that ``target`` stands for; of a directory the newest with a whole header.

    Warns of newer ones that are damaged.

    Raises:
        CheckpointNotFound: if there is none.
        CorruptCheckpoint: if a file was named and its header is damaged.
    """
    if not is_directory(target):
        require_exists(target)
        return read_header(target)
    found = scan(checkpoint_directory(target))
    files = found.all_intact
    if not files:
        also = f"; {len(found.damaged)} damaged" if found.damaged else foreign.import_hint(target)
        raise CheckpointNotFound(f"{target}: no checkpoints here{also}", path=target)
    for damaged in found.damaged:
        if damaged.step >= files[-1].step:
            warnings.warn(f"skipped a damaged checkpoint: {damaged.error}", DistrustWarning, stacklevel=2)
    return files[-1]


def checkpoint_directory(target: Path) -> Path:
    """The directory of checkpoints of a run, or ``target`` itself if it is one."""
    inner = target / RUN_SUBDIRECTORY
    return inner if os.path.isdir(inner) else target


def is_directory(path: Path) -> bool:
    """Whether it may hold checkpoints: a folder that is one itself, in an older format, does not."""
    return (
        os.path.isdir(path) and importers.detect_format(path) is None
    )  # a link that cannot be followed is none; Path.is_dir() may raise for it


def read_header(path: Path) -> CheckpointFile:
    """Read and check a header; the data is not touched.

    Raises:
        CheckpointNotFound: if there is no such file.
        CorruptCheckpoint: if it is damaged.
        CheckpointUnreadable: if this process cannot read it.
        UnsupportedVersion: if a later version of the format wrote it.
    """
    if importers.detect_format(path):
        return CheckpointFile(path, importers.read_header(path))
    return _read_header(path)[0]


def verify(path: Path) -> CheckpointFile:
    """Read a whole checkpoint and check every byte of it, and that it is the one that its name says.

    Raises:
        CheckpointNotFound: if there is no such file.
        CorruptCheckpoint: with the first damaged tensor and where it lies.
        CheckpointUnreadable: if this process cannot read it.
        UnsupportedVersion: if a later version of the format wrote it.
    """
    file = verify_content(path)
    require_name(file)
    return file


def verify_content(path: Path) -> CheckpointFile:
    """The same, whatever the name of the file.

    Raises:
        CheckpointNotFound: if there is no such file.
        CorruptCheckpoint: with the first damaged tensor and where it lies.
        CheckpointUnreadable: if this process cannot read it.
        UnsupportedVersion: if a later version of the format wrote it.
    """
    if importers.detect_format(path):
        return CheckpointFile(path, importers.verify(path))

    from distrust.checkpoint import (
        verified_read,  # listing, which is all that most commands do, needs none of it
    )

    with open_checkpoint(path) as (descriptor, header):
        verified_read.verify_file(descriptor, header)
        return CheckpointFile(path, header)


@contextlib.contextmanager
def open_checkpoint(path: Path) -> Iterator[tuple[int, Header]]:
    """A checkpoint's descriptor and its header, all of which was checked; errors raised inside get the path.

    Raises:
        CheckpointNotFound: if there is no such file.
        CorruptCheckpoint: if it is damaged.
        CheckpointUnreadable: if this process cannot read it.
        UnsupportedVersion: if a later version of the format wrote it.
    """
    with errors_with_path(path), open_regular(path) as (descriptor, status):
        header = _header(descriptor, status.st_size)
        header.require_intact()
        yield descriptor, header


def _header(descriptor: int, file_size: int) -> Header:
    first = os.pread(descriptor, ALIGNMENT, 0)  # all of a small one
    length = header_length(first, file_size)
    if length == len(first):
        return parse_header(first, file_size)
    raw = bytearray(length)
    read_into(descriptor, memoryview(raw), 0)
    return parse_header(raw, file_size)


def _read_header(path: Path) -> tuple[CheckpointFile, os.stat_result]:
    with errors_with_path(path), open_regular(path) as (descriptor, status):
        return CheckpointFile(path, _header(descriptor, status.st_size)), status


def _classify(entry: Entry, known: Known, seen: Known) -> CheckpointFile | DamagedFile | None:
    """What a file of that name is; None if it is not there any more."""
    path, step, _ = entry
    try:
        before = known.get(path)
        if before is not None and before[0] == file_identity(_status(path)):
            seen[path] = before
            return before[1]
        if importers.detect_format(path):
            file = CheckpointFile(path, importers.read_header(path))
            require_name(file)
            return file
        file, status = _read_header(path)
        require_name(file)
        # Changed twice within a tick of the file system's clock, a file shows the same time.
        if time.time_ns() - status.st_ctime_ns > STABLE_AFTER_NANOSECONDS:
            seen[path] = file_identity(status), file
        return file
    except CheckpointNotFound:
        if not path.is_symlink():
            return None
        return DamagedFile(path, step, dangling_link(path))
    except (CorruptCheckpoint, UnsupportedVersion) as error:
        return DamagedFile(path, step, error)


def _status(path: Path) -> os.stat_result:
    with errors_with_path(path):
        return path.stat()


def dangling_link(path: Path) -> CorruptCheckpoint:
    """The error for a symbolic link whose end is not there."""
    return CorruptCheckpoint("a link to nothing", path=path)


def require_name(file: CheckpointFile) -> None:
    """Check that a file named as a checkpoint is the one of that name; any other name says nothing.

    Raises:
        CorruptCheckpoint: if it is not.
    """
    entry = parse_checkpoint_name(file.path)
    if entry is not None and (file.step, file.kind) != entry[1:]:
        reason = f"it holds step {file.step} ({file.kind}), not what its name says"
        raise CorruptCheckpoint(reason, path=file.path)


def looks_like_checkpoint(path: Path) -> bool:
    """Whether anything says that a file is or was a checkpoint: its name, or how it begins.

    What may not or cannot be looked into may be one.
    """
    if parse_checkpoint_name(path) is not None or importers.detect_format(path) is not None:
        return True
    try:
        with open_regular(path) as (descriptor, _):
            return os.pread(descriptor, LENGTH_BYTES + len(OPENING), 0).startswith(OPENING, LENGTH_BYTES)
    except CorruptCheckpoint:
        return False
    except OSError:
        return True


def file_identity(status: os.stat_result) -> Identity:
    """What tells that a file is the same, with the same content."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def list_names(directory: Path) -> list[Entry]:
    """What is named as a checkpoint: files, and folders of an older format, which stand before them.

    By step; a periodic one stands before the final of its step.

    Raises:
        CheckpointError: if the directory cannot be read.
    """
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror}", path=directory) from error
    entries = [entry for name in names if (entry := parse_checkpoint_name(directory / name)) is not None]
    found = [entry for entry in entries if entry[0].suffix or importers.detect_format(entry[0])]
    # "final" would sort before "periodic": the periodic one of a step comes first.
    return sorted(found, key=lambda entry: (entry[1], bool(entry[0].suffix), entry[2] == "final"))
