"""Readers of the formats that checkpoints had before this one. They read, and never write or remove anything.

Two formats, under the names that ours have, too:

- ``directory``: a folder ``checkpoint-{step}[-final]/`` of ``metadata.json``, ``checksum.txt`` and, where the
  arrays were saved, ``model.npz`` and ``optimizer.npz`` (:mod:`distrust.importers.directory`);
- ``byte tensors``: a file ``checkpoint-{step}[-final].safetensors`` with JSON in its tensors ``_metadata``
  and ``_optimizer`` (:mod:`distrust.importers.byte_tensors`).

Nothing that such a checkpoint says is trusted: no object is unpickled, no name in it is used as a path, what
it says of sizes is compared with what is there before memory is taken for it. This module is all that a
listing pays for where there are none.
"""

from __future__ import annotations

import os
import stat
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distrust.checkpoint.files import errors_with_path, open_regular, parse_checkpoint_name
from distrust.checkpoint.format import LENGTH_BYTES, MAX_HEADER_BYTES, OPENING
from distrust.errors import CorruptCheckpoint
from distrust.importers.detect import TRAINER_STATE, convert_hint, import_hint

if TYPE_CHECKING:
    from distrust.checkpoint.arrays import Framework
    from distrust.checkpoint.checkpoint import Checkpoint
    from distrust.importers.header import OlderHeader

__all__ = ["convert_hint", "detect_format", "import_hint", "read", "read_header", "verify"]

OlderFormat = Literal["directory", "byte tensors"]

METADATA, CHECKSUMS, MODEL, OPTIMIZER = "metadata.json", "checksum.txt", "model.npz", "optimizer.npz"
#: What a folder of the directory format holds, and nothing else.
MEMBERS = (METADATA, CHECKSUMS, MODEL, OPTIMIZER)
#: How the name of the tensor that tells the other format stands in its header.
_BYTE_TENSOR = b'"_metadata"'
_PIECE_BYTES = 1 << 20


def detect_format(path: Path) -> OlderFormat | None:
    """The older format that stands at ``path``; None for one of ours, and for whatever else. Never raises.

    What has the name of such a folder and cannot be looked into counts as one: whoever reads it is told why
    not, and without that it would be missing from every list without a word.
    """
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            return "directory" if _is_directory_format(path) else None
        return "byte tensors" if _is_byte_tensors(path) else None
    except FileNotFoundError:
        return "directory" if _is_named_folder(path) and os.path.islink(path) else None
    except OSError:
        return "directory" if _is_named_folder(path) and not os.path.isfile(path) else None
    except (ValueError, CorruptCheckpoint):
        return None


def read_header(path: Path) -> OlderHeader:
    """What a checkpoint in an older format says of itself; its arrays are not read.

    Of a folder, ``metadata.json`` is compared with its checksum, and every file that should be there is.

    Raises:
        CheckpointNotFound: if it is not there.
        CorruptCheckpoint: with all that is wrong, in one line.
        CheckpointUnreadable: if this process cannot read it.
    """
    with errors_with_path(path):
        header: OlderHeader = _reader(path).header(path)
        return header


def verify(path: Path) -> OlderHeader:
    """Read all of it: every checksum is compared, every array is read; nothing is kept.

    The byte tensors have no checksums: there, only what contradicts itself is found.

    Raises:
        CheckpointNotFound: if it is not there.
        CorruptCheckpoint: with all that is wrong, in one line.
        CheckpointUnreadable: if this process cannot read it.
    """
    with errors_with_path(path):
        header: OlderHeader = _reader(path).verify(path)
        return header


def read(path: Path, *, framework: Framework = "numpy") -> tuple[OlderHeader, Checkpoint]:
    """Verify all of it, and load it; see :mod:`distrust.importers.state` for what it becomes.

    Args:
        path: of the folder or file.
        framework: of the arrays.

    Raises:
        CheckpointNotFound: if it is not there.
        CorruptCheckpoint: with all that is wrong, in one line.
        CheckpointUnreadable: if this process cannot read it, or has not the memory for it.
        ConfigError: if the framework, or a dtype of it, is not at hand.
    """
    from distrust.checkpoint import arrays

    arrays.require_framework(framework)
    with errors_with_path(path):
        found: tuple[OlderHeader, Checkpoint] = _reader(path).read(path, framework)
        return found


def _reader(path: Path) -> Any:
    """The module of a format: each has the same functions. Imported here, so that a listing stays light."""
    name = "directory" if os.path.isdir(path) else "byte_tensors"
    return import_module(f"distrust.importers.{name}")


def _is_named_folder(path: Path) -> bool:
    return parse_checkpoint_name(path) is not None and not path.suffix


def _is_directory_format(path: Path) -> bool:
    names = os.listdir(path)
    there = {*MEMBERS, TRAINER_STATE}.intersection(names)
    if TRAINER_STATE in there:
        return False
    if not names:
        return _is_named_folder(path)  # what was in it is gone
    # Under its own name any of the files tells it; a folder of another name could be anything.
    return bool(there) if parse_checkpoint_name(path) else METADATA in there and len(there) > 1


def _is_byte_tensors(path: Path) -> bool:
    with open_regular(path) as (descriptor, status):
        first = os.pread(descriptor, LENGTH_BYTES + len(OPENING), 0)
        if first.startswith(OPENING, LENGTH_BYTES):
            return False
        length = int.from_bytes(first[:LENGTH_BYTES], "little")
        # A length that makes no sense may be the damage: the name would stand near the beginning.
        end = LENGTH_BYTES + length if length <= min(status.st_size, MAX_HEADER_BYTES) else _PIECE_BYTES
        before = b""
        for offset in range(LENGTH_BYTES, end, _PIECE_BYTES):
            piece = os.pread(descriptor, min(_PIECE_BYTES, end - offset), offset)
            if _BYTE_TENSOR in before + piece:
                return True
            before = piece[-len(_BYTE_TENSOR) :]
        return False
