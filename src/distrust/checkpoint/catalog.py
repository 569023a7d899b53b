"""Lists a directory of checkpoints, and resolves what a user names. Reads only, and needs no lock.

:func:`scan` is the only definition of a directory's contents: the files named as checkpoints, each with a
header proven by its digest, or the reason why it is damaged. *Intact* here means that name, size and header
agree. :func:`verify` reads the data too, and rejects everything that a listing rejects.

A file is opened once and read through its descriptor, so that a writer that replaces or removes it cannot
mix two files into one answer.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from distrust.checkpoint import foreign
from distrust.checkpoint.checkpoint_file import CheckpointFile, DamagedFile, Scan
from distrust.checkpoint.files import (
    Entry,
    begins_as_checkpoint,
    errors_with_path,
    open_regular,
    parse_checkpoint_name,
    read_into,
)
from distrust.checkpoint.format import ALIGNMENT
from distrust.checkpoint.header import Header, header_length, parse_header
from distrust.errors import (
    NO_SUCH_FILE,
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnreadable,
    CorruptCheckpoint,
    DamagedCheckpointWarning,
    UnsupportedVersion,
    read_failure_reason,
)

#: The folder of a training run that contains its checkpoints.
RUN_SUBDIRECTORY = "checkpoints"
#: A file that changed less than this before it was read is read again: no file system's clock is coarser.
STABLE_AFTER_NANOSECONDS = 2_000_000_000

#: Identifies a file's content: device, inode, size, times of modification and change.
Identity = tuple[int, int, int, int, int]
#: Headers read by earlier scans; see :func:`scan`.
ScanCache = dict[Path, tuple[Identity, CheckpointFile]]


def scan(directory: Path, cache: ScanCache | None = None) -> Scan:
    """List a directory of checkpoints. One that does not exist is empty; else as :func:`list_names`.

    Each scan updates ``cache``, so that the next one does not read unchanged checkpoints again.
    """
    while True:
        fresh: ScanCache = {}
        files = [_classify(entry, cache or {}, fresh) for entry in list_names(directory)]
        if None in files:
            continue  # a writer removed it after committing a newer one, which this list does not contain
        if cache is not None:
            # Update in place, never clear: other threads scan with it at the same time.
            cache.update(fresh)
            for path in list(cache):
                if path not in fresh:
                    cache.pop(path, None)
        return Scan.of(file for file in files if file is not None)


def _classify(entry: Entry, cache: ScanCache, fresh: ScanCache) -> CheckpointFile | DamagedFile | None:
    """Read the header of a file unless the cache has it; None if the file no longer exists."""
    path = entry.path
    try:
        if cached := cache.get(path):
            with errors_with_path(path):
                is_unchanged = cached[0] == file_identity(path.stat())  # one stat instead of a read
            if is_unchanged:
                fresh[path] = cached
                return cached[1]
        if reader := foreign.find_reader(path):
            file, is_stable = CheckpointFile(path, reader.read_header(path)), False  # it may be a folder
        else:
            file, status = _read_header(path)
            # Two changes within one tick of the file system's clock leave the same times: do not cache.
            is_stable = time.time_ns() - status.st_ctime_ns > STABLE_AFTER_NANOSECONDS
        file.require_name()
        if is_stable:
            fresh[path] = file_identity(status), file
        return file
    except CheckpointNotFound:
        return DamagedFile(path, entry.step, dangling_link(path)) if path.is_symlink() else None
    except (CorruptCheckpoint, UnsupportedVersion) as error:
        return DamagedFile(path, entry.step, error)


def list_names(directory: Path) -> list[Entry]:
    """The names of checkpoints in a directory: files, and folders of foreign formats.

    By step; of one step: folders, the periodic file, the final file. Raises CheckpointError if the directory
    cannot be read.
    """
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []  # a run that has not saved yet
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror}", path=directory) from error
    entries = [entry for name in names if (entry := parse_checkpoint_name(directory / name)) is not None]
    # A name without a suffix is a checkpoint only if a reader of foreign formats accepts it.
    entries = [entry for entry in entries if entry.path.suffix or foreign.find_reader(entry.path)]
    # "final" sorts before "periodic" as text, so compare with it.
    return sorted(entries, key=lambda entry: (entry.step, bool(entry.path.suffix), entry.kind == "final"))


def resolve(target: Path) -> list[Path]:
    """The checkpoints of a run or directory, by step, or the one ``target``; CheckpointNotFound if none."""
    if not is_directory(target):
        require_exists(target)
        return [target]
    paths = [entry.path for entry in list_names(checkpoint_directory(target))]
    if not paths:
        raise _no_checkpoints(target, foreign.import_hint(target))
    return paths


def require_exists(target: Path) -> None:
    """Raise CheckpointNotFound if nothing is at a path, CheckpointUnreadable if this process may not look."""
    try:
        os.stat(target)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte
        raise CheckpointNotFound(f"{target}: {NO_SUCH_FILE}", path=target) from None
    except OSError as error:
        raise CheckpointUnreadable(f"{target}: {read_failure_reason(error)}", path=target) from error


def newest(target: Path) -> CheckpointFile:
    """The checkpoint ``target``, or the newest one with an intact header in a run or directory.

    Warns of newer ones that are damaged. Raises CheckpointNotFound if there is none, and errors as
    :func:`read_header` if a file was named.
    """
    if not is_directory(target):
        require_exists(target)
        return read_header(target)
    contents = scan(checkpoint_directory(target))
    files = contents.all_intact
    if not files:
        count = len(contents.damaged)
        raise _no_checkpoints(target, f"; {count} damaged" if count else foreign.import_hint(target))
    for damaged in contents.damaged:
        if damaged.step >= files[-1].step:  # an older one does not matter
            text = f"skipped a damaged checkpoint: {damaged.error}"
            warnings.warn(text, DamagedCheckpointWarning, stacklevel=2)
    return files[-1]


def _no_checkpoints(target: Path, hint: str) -> CheckpointNotFound:
    return CheckpointNotFound(f"{target}: no checkpoints here{hint}", path=target)


def checkpoint_directory(target: Path) -> Path:
    """The directory of checkpoints of a run, or ``target`` itself if it is one."""
    inner = target / RUN_SUBDIRECTORY  # users name the run or its checkpoints
    return inner if os.path.isdir(inner) else target


def is_directory(path: Path) -> bool:
    """Whether it is a directory that may contain checkpoints, and not a foreign checkpoint itself."""
    # Not Path.is_dir(), which may raise for a link that cannot be followed.
    return os.path.isdir(path) and foreign.find_reader(path) is None


def read_header(path: Path) -> CheckpointFile:
    """Read and check a header, not the data.

    Raises:
        CheckpointError: CheckpointNotFound, CorruptCheckpoint, CheckpointUnreadable or UnsupportedVersion.
    """
    if reader := foreign.find_reader(path):
        return CheckpointFile(path, reader.read_header(path))
    return _read_header(path)[0]


def verify(path: Path) -> CheckpointFile:
    """Read a whole checkpoint; check every byte, and that its name is right.

    Raises:
        CheckpointError: as :func:`read_header`; for damage with the first damaged tensor and its location.
    """
    file = verify_content(path)
    file.require_name()
    return file


def verify_content(path: Path) -> CheckpointFile:
    """As :func:`verify`, for a file of any name."""
    if reader := foreign.find_reader(path):
        return CheckpointFile(path, reader.verify(path))

    from distrust.checkpoint import verified_read  # numpy and threads: not needed for listing

    with errors_with_path(path), open_checkpoint(path) as (descriptor, header):
        verified_read.verify_file(descriptor, header)
        return CheckpointFile(path, header)


@contextlib.contextmanager
def open_checkpoint(path: Path) -> Iterator[tuple[int, Header]]:
    """Open a checkpoint and check its header fully; gives descriptor and header.

    Use it inside :func:`errors_with_path`: a generator must not translate errors itself (ErrorTranslator).
    """
    with open_regular(path) as (descriptor, status):
        header = _parse_header(descriptor, status.st_size)
        header.require_intact()  # before any of its offsets is used
        yield descriptor, header


def _read_header(path: Path) -> tuple[CheckpointFile, os.stat_result]:
    with errors_with_path(path), open_regular(path) as (descriptor, status):
        return CheckpointFile(path, _parse_header(descriptor, status.st_size)), status


def _parse_header(descriptor: int, file_size: int) -> Header:
    first = os.pread(descriptor, ALIGNMENT, 0)  # one read is enough for a small header
    length = header_length(first, file_size)  # checked against the file's size before memory is taken
    if length == len(first):
        return parse_header(first, file_size)
    raw = bytearray(length)  # bounded by header_length
    read_into(descriptor, memoryview(raw), 0)
    return parse_header(raw, file_size)


def dangling_link(path: Path) -> CorruptCheckpoint:
    """The error for a symbolic link without a target."""
    return CorruptCheckpoint("a link to nothing", path=path)


def looks_like_checkpoint(path: Path) -> bool:
    """Whether a file's name or first bytes are a checkpoint's. True if this process cannot look."""
    if parse_checkpoint_name(path) is not None or foreign.find_reader(path) is not None:
        return True
    try:
        return begins_as_checkpoint(path)
    except CorruptCheckpoint:
        return False
    except OSError:
        return True


def file_identity(status: os.stat_result) -> Identity:
    """Identifies a file's content, by its status."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
