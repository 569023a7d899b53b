"""Which files may be removed as damaged. Reads only.

Damaged is what was read, every byte of it, and is not what was written. Wherever there is a doubt, the file
is left to a person, with a warning that says why: what this process cannot read may be whole, and so may a
file of a later version of the format, or of another program; a whole checkpoint under a name that is not its
own may be the only copy of its step; a directory may hold anything; one in an older format has no digests of
this library, and is never removed. Of a symbolic link only the link is
meant, never what it points to.
"""

from __future__ import annotations

import errno
import json
import os
import warnings
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


def find_damaged(directory: Path) -> Iterator[DamagedFile]:
    """The damaged files of a directory, by step; warns of each doubtful one.

    Each is told of as soon as it was read. Whoever removes it does so before asking for the next: so there is
    the least of time for another program to put a good one there.

    Raises:
        CheckpointError: if the directory cannot be read.
    """
    for path, step, _ in catalog.list_names(directory):
        before = _identity(path)
        found = _classify(path)
        if isinstance(found, CorruptCheckpoint) and _identity(path) != before:
            found = "it changed while it was read"
        if isinstance(found, CorruptCheckpoint):
            yield DamagedFile(path, step, found)
        elif found is not None:
            warnings.warn(f"{path}: left: {found}", DistrustWarning, stacklevel=2)


def _classify(path: Path) -> CorruptCheckpoint | str | None:
    """What is wrong with a file; or, in words, why that is doubtful; or None if nothing is."""
    if foreign.find_reader(path):
        return _classify_foreign(path)
    if os.path.isdir(path) and not path.is_symlink():  # Path.is_dir() may raise for a link
        return "a directory; remove it yourself if nothing in it is needed"
    try:
        file = catalog.verify_content(path)
    except CheckpointNotFound:
        return catalog.dangling_link(path) if path.is_symlink() else None
    except CorruptCheckpoint as error:
        return _reason_to_keep(path, error) or error
    except (CheckpointUnreadable, UnsupportedVersion) as error:
        return str(error).removeprefix(f"{path}: ")
    try:
        file.require_name()
    except CorruptCheckpoint as error:
        own = checkpoint_file_name(file.step, file.kind)
        return f"every byte is right, but {error.reason}; rename it {own}, or move it away"
    return None


def _classify_foreign(path: Path) -> str | None:
    """Why one in an older format is left although it is damaged: it is never removed."""
    try:
        catalog.verify(path)
    except CheckpointError as error:
        return f"in an older format, and {str(error).removeprefix(f'{path}: ')}"
    return None


def _reason_to_keep(path: Path, error: CorruptCheckpoint) -> str | None:
    """Why a file that did not verify may still be worth something; None if it is not."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno != errno.ELOOP:  # a link to itself has no content
        return error.reason  # a disk or a network that does not answer says nothing of what is there
    try:
        foreign = path.is_file() and _is_of_another_program(path)
    except OSError as failure:
        return f"it cannot be read again: {failure.strerror}"
    return "a safetensors file of another program" if foreign else None


def _is_of_another_program(path: Path) -> bool:
    """Whether a header is one of safetensors, and not a damaged one of this library."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > MAX_HEADER_BYTES:
            return False
        raw = file.read(length)
    if raw.startswith(OPENING):
        return False
    try:
        header: Any = json.loads(raw)
    except (ValueError, RecursionError):
        return False
    if type(header) is not dict:
        return False
    metadata = header.pop(METADATA, None)
    if type(metadata) is dict and metadata.get("format") == FORMAT:
        return False
    return bool(header) and all(
        type(tensor) is dict and tensor.keys() == {"dtype", "shape", "data_offsets"}
        for tensor in header.values()
    )


def _identity(path: Path) -> _Identity:
    """Of a file; of a link, and of what it points to: either may be replaced."""
    identities: list[catalog.Identity | None] = []
    for status in (os.lstat, os.stat):
        try:
            identities.append(catalog.file_identity(status(path)))
        except OSError:
            identities.append(None)
    return identities[0], identities[1]
