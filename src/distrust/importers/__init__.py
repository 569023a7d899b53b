"""Importers: readers of checkpoints that other programs wrote. They never write, change or remove anything.

Two older formats are listed, verified and loaded like our own: the directory format (:mod:`.npz_folder`) and
the tensor file (:mod:`.tensor_file`). Folders of other kinds are only converted (:mod:`.convert`).

No file is trusted: no object is unpickled, no name in a file is used as a path, and claimed sizes are
compared with the file before memory is allocated. Listings of our own checkpoints import only this module.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from distrust.checkpoint.files import errors_with_path
from distrust.importers.detect import convert_hint, detect_format, import_hint

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from distrust.checkpoint.arrays import Framework
    from distrust.checkpoint.checkpoint import Checkpoint
    from distrust.importers.imported import Imported, ImportedHeader
    from distrust.importers.npz_folder import NpzFolder
    from distrust.importers.tensor_file import TensorFile

__all__ = ["convert_hint", "detect_format", "import_hint", "load", "read", "read_header", "verify"]


def read_header(path: Path) -> ImportedHeader:
    """Read the metadata of a checkpoint in an older format. In a folder, missing files are detected.

    Raises:
        CheckpointNotFound: if it does not exist.
        CorruptCheckpoint: with everything that is wrong, in one line.
        CheckpointUnreadable: if this process cannot read it.
    """
    with errors_with_path(path), _open(path) as checkpoint:
        return checkpoint.header


def verify(path: Path) -> ImportedHeader:
    """Read all of a checkpoint and check it, without keeping it in memory; raises as :func:`read_header`."""
    with errors_with_path(path), _open(path) as checkpoint:
        checkpoint.read("verify")
        return checkpoint.header


def read(path: Path, *, framework: Framework = "numpy") -> tuple[ImportedHeader, Checkpoint]:
    """Verify and load a checkpoint with arrays of ``framework``; raises as :func:`load`.

    Raises:
        ConfigError: if the framework, or one of the dtypes in it, is not available.
    """
    from distrust.checkpoint import arrays

    arrays.require_framework(framework)
    header, imported = load(path)
    return header, imported.to_checkpoint(framework)


def load(path: Path) -> tuple[ImportedHeader, Imported]:
    """Verify and load a checkpoint with arrays of no framework; raises as :func:`read_header`."""
    with errors_with_path(path), _open(path) as checkpoint:
        return checkpoint.header, checkpoint.read("load")


def _open(path: Path) -> AbstractContextManager[NpzFolder | TensorFile]:
    if os.path.isdir(path):  # imported late, so that listings stay fast
        from distrust.importers import npz_folder

        return npz_folder.NpzFolder.open(path)
    from distrust.importers import tensor_file

    return tensor_file.TensorFile.open(path)
