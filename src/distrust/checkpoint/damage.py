"""Finds the files that may be removed as damaged. Reads only.

A file is damaged if it was read completely and is not what was written. A doubtful file is left to the user,
with a warning that says why: a file that this process cannot read, one of a later version of the format or of
another program, a directory, an intact checkpoint under a wrong name (it may be the only copy of its step), a
checkpoint in a foreign format. Of a symbolic link only the link itself counts, never its target.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distrust.checkpoint import catalog, foreign
from distrust.checkpoint.checkpoint_file import DamagedFile
from distrust.checkpoint.files import checkpoint_file_name
from distrust.checkpoint.format import FORMAT, LENGTH_BYTES, MAX_HEADER_BYTES, METADATA, OPENING
from distrust.errors import (
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnreadable,
    CorruptCheckpoint,
    DistrustWarning,
    UnsupportedVersion,
)

_Identity = tuple[catalog.Identity | None, catalog.Identity | None]


def find_damaged(directory: Path) -> Iterator[DamagedFile | DistrustWarning]:
    """Find the damaged files of a directory, by step, and a warning for each doubtful one.

    Each is given as soon as it was read. Remove it before asking for the next: that leaves other programs the
    least time to put an intact file in its place.

    Raises:
        CheckpointError: if the directory cannot be read.
    """
    for entry in catalog.list_names(directory):
        identity = _identity(entry.path)  # before reading, to detect a replacement during it
        finding = _classify(entry.path)
        if isinstance(finding, CorruptCheckpoint) and _identity(entry.path) != identity:
            finding = "it changed while it was read"
        if isinstance(finding, CorruptCheckpoint):
            yield DamagedFile(entry.path, entry.step, finding)
        elif finding is not None:
            yield DistrustWarning(f"{entry.path}: left: {finding}")


def _classify(path: Path) -> CorruptCheckpoint | str | None:
    """The damage of a file; the reason for doubt, as text; None if it is intact."""
    if foreign.find_reader(path):
        return _classify_foreign(path)
    if os.path.isdir(path) and not path.is_symlink():  # Path.is_dir() may raise for a link
        return "a directory; remove it yourself if nothing in it is needed"
    try:
        file = catalog.verify_content(path)
    except CheckpointNotFound:
        return catalog.dangling_link(path) if path.is_symlink() else None
    except CorruptCheckpoint as error:
        return _reason_to_keep(path, error) or error  # when in doubt, keep it
    except (CheckpointUnreadable, UnsupportedVersion) as error:  # it may be intact
        return str(error).removeprefix(f"{path}: ")
    try:
        file.require_name()
    except CorruptCheckpoint as error:
        name = checkpoint_file_name(file.step, file.kind)
        return f"every byte is right, but {error.reason}; rename it {name}, or move it away"
    return None


def _classify_foreign(path: Path) -> str | None:
    """The reason for doubt of a damaged foreign checkpoint: those are never removed."""
    try:
        catalog.verify(path)
    except CheckpointError as error:
        return f"in an older format, and {str(error).removeprefix(f'{path}: ')}"
    return None


def _reason_to_keep(path: Path, error: CorruptCheckpoint) -> str | None:
    """Why a file that did not verify is kept; None if it may be removed."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno != errno.ELOOP:  # a link to itself has no content
        return error.reason  # the disk or network failed: the file may be intact
    try:
        is_foreign = path.is_file() and _is_of_another_program(path)
    except OSError as failure:
        return f"it cannot be read again: {failure.strerror}"
    return "a safetensors file of another program" if is_foreign else None


def _is_of_another_program(path: Path) -> bool:
    """Whether it has a valid safetensors header that is not a damaged one of this library."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > MAX_HEADER_BYTES:  # do not read what a damaged length asks for
            return False
        raw = file.read(length)
    if raw.startswith(OPENING):  # a damaged file of this library
        return False
    try:
        header: Any = json.loads(raw)
    except (ValueError, RecursionError):  # not JSON, or nested without end
        return False
    if type(header) is not dict:
        return False
    metadata = header.pop(METADATA, None)
    if type(metadata) is dict and metadata.get("format") == FORMAT:  # ours, damaged elsewhere
        return False
    return bool(header) and all(
        type(tensor) is dict and tensor.keys() == {"dtype", "shape", "data_offsets"}
        for tensor in header.values()
    )


def _identity(path: Path) -> _Identity:
    """Identity of the name and of what it points to: of a link, either may be replaced."""
    identities: list[catalog.Identity | None] = []
    for status in (os.lstat, os.stat):
        try:
            identities.append(catalog.file_identity(status(path)))
        except OSError:
            identities.append(None)  # does not exist, or may not be read
    return identities[0], identities[1]
