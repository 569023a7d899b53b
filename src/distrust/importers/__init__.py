"""Importers: readers of checkpoints that other programs wrote. They never write, change or remove anything.

Two older formats are listed, verified and loaded like our own, under names like our own:

- ``directory``: a folder ``checkpoint-{step}[-final]/`` with ``metadata.json``, ``checksum.txt`` and
  optionally ``model.npz`` and ``optimizer.npz`` (:mod:`distrust.importers.npz_folder`);
- ``tensor file``: a file ``checkpoint-{step}[-final].safetensors`` with JSON in its tensor ``_metadata``
  (:mod:`distrust.importers.tensor_file`).

Folders of the transformers Trainer and adapters of peft and mlx-lm are only converted
(:mod:`distrust.importers.convert`). Every importer returns one
:class:`~distrust.importers.imported.Imported`.

No file is trusted: no object is unpickled, no name in a file is used as a path, and claimed sizes are
compared with the file before memory is allocated. A listing without such checkpoints imports only this
module.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distrust.checkpoint.files import errors_with_path, open_regular, parse_checkpoint_name
from distrust.checkpoint.format import LENGTH_BYTES, MAX_HEADER_BYTES, OPENING
from distrust.errors import CorruptCheckpoint
from distrust.importers.detect import TRAINER_STATE, convert_hint, import_hint

if TYPE_CHECKING:
    from distrust.checkpoint.arrays import Framework
    from distrust.checkpoint.checkpoint import Checkpoint
    from distrust.importers.host_arrays import HostArray
    from distrust.importers.imported import Imported, ImportedHeader
    from distrust.importers.npz_folder import NpzFolder
    from distrust.importers.tensor_file import TensorFile

__all__ = ["convert_hint", "detect_format", "import_hint", "load", "read", "read_header", "verify"]

#: The names of the two formats, in listings and in converted checkpoints.
DIRECTORY, TENSOR_FILE = "directory", "tensor file"
METADATA, CHECKSUMS, MODEL, OPTIMIZER = "metadata.json", "checksum.txt", "model.npz", "optimizer.npz"
#: The files of the directory format.
MEMBERS = (METADATA, CHECKSUMS, MODEL, OPTIMIZER)
#: The key in the header of a tensor file that identifies it.
_METADATA_KEY = b'"_metadata"'
_PIECE_BYTES = 1 << 20


def detect_format(path: Path) -> str | None:
    """The name of the older format at ``path``; None for our own format and everything else. Never raises.

    A path that is named like a checkpoint folder but cannot be read counts as one: otherwise listings would
    silently omit it, and reading it says why.
    """
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            return DIRECTORY if _is_directory_format(path) else None
        return TENSOR_FILE if _is_tensor_file(path) else None
    except FileNotFoundError:
        return DIRECTORY if _is_named_folder(path) and os.path.islink(path) else None  # a dangling link
    except OSError:
        return DIRECTORY if _is_named_folder(path) and not os.path.isfile(path) else None
    except (ValueError, CorruptCheckpoint):  # a name with a zero byte; a pipe or device
        return None


def read_header(path: Path) -> ImportedHeader:
    """Read the metadata of a checkpoint in an older format, not its arrays.

    In a folder, ``metadata.json`` is compared with its checksum, and missing files are detected.

    Raises:
        CheckpointNotFound: if it does not exist.
        CorruptCheckpoint: with everything that is wrong, in one line.
        CheckpointUnreadable: if this process cannot read it.
    """
    with _open(path) as checkpoint:
        return checkpoint.header


def verify(path: Path) -> ImportedHeader:
    """Read all of a checkpoint and check it, without keeping it in memory; raises as :func:`read_header`.

    A tensor file has no checksums: only contradictions are detected.
    """
    with _open(path) as checkpoint:
        checkpoint.read("verify")
        return checkpoint.header


def read(path: Path, *, framework: Framework = "numpy") -> tuple[ImportedHeader, Checkpoint]:
    """Verify and load a checkpoint; :mod:`distrust.importers.imported` documents what becomes of each field.

    Args:
        path: of the folder or file.
        framework: of the arrays.

    Raises:
        CheckpointError: as :func:`read_header`, or if there is not enough memory.
        ConfigError: if the framework, or one of the dtypes in it, is not available.
    """
    from distrust.checkpoint import arrays

    arrays.require_framework(framework)
    with _open(path) as checkpoint:
        return checkpoint.header, checkpoint.read("load").to_checkpoint(framework)


def load(path: Path) -> tuple[ImportedHeader, Imported]:
    """Verify and load a checkpoint, with arrays of no framework; raises as :func:`read`."""
    with _open(path) as checkpoint:
        return checkpoint.header, checkpoint.read("load")


def describe(path: Path) -> Mapping[str, HostArray]:
    """The arrays of a checkpoint by label, without their data; raises as :func:`read_header`."""
    with _open(path) as checkpoint:
        return checkpoint.describe()


@contextlib.contextmanager
def _open(path: Path) -> Iterator[NpzFolder | TensorFile]:
    """Open a checkpoint; errors name its path."""
    with errors_with_path(path):
        if os.path.isdir(path):  # imported late, so that listings stay fast
            from distrust.importers.npz_folder import NpzFolder

            with NpzFolder.open(path) as folder:
                yield folder
        else:
            from distrust.importers.tensor_file import TensorFile

            with TensorFile.open(path) as file:
                yield file


def _is_named_folder(path: Path) -> bool:
    return parse_checkpoint_name(path) is not None and not path.suffix


def _is_directory_format(path: Path) -> bool:
    names = os.listdir(path)
    members = {*MEMBERS, TRAINER_STATE}.intersection(names)
    if TRAINER_STATE in members:
        return False
    if not names:
        return _is_named_folder(path)  # its files were removed
    # In a folder named like a checkpoint any of the files suffices; under another name it could be anything.
    return bool(members) if parse_checkpoint_name(path) else METADATA in members and len(members) > 1


def _is_tensor_file(path: Path) -> bool:
    with open_regular(path) as (descriptor, status):
        start = os.pread(descriptor, LENGTH_BYTES + len(OPENING), 0)
        if start.startswith(OPENING, LENGTH_BYTES):
            return False  # our own format
        length = int.from_bytes(start[:LENGTH_BYTES], "little")
        # An impossible length may be the damage itself: then search near the beginning.
        end = LENGTH_BYTES + length if length <= min(status.st_size, MAX_HEADER_BYTES) else _PIECE_BYTES
        tail = b""  # the key may cross the border between two pieces
        for offset in range(LENGTH_BYTES, end, _PIECE_BYTES):
            piece = os.pread(descriptor, min(_PIECE_BYTES, end - offset), offset)
            if _METADATA_KEY in tail + piece:
                return True
            tail = piece[-len(_METADATA_KEY) :]
        return False
