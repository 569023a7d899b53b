"""The hook for checkpoints in other formats: the core itself reads only its own.

A package above the core registers one reader. Checkpoints of other formats then appear in listings and load
like those of this library, but no rule ever counts or removes them. Without a reader they are no checkpoints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from distrust.errors import CheckpointError, CorruptCheckpoint

if TYPE_CHECKING:
    from distrust.checkpoint.arrays import Framework
    from distrust.checkpoint.checkpoint import Checkpoint
    from distrust.checkpoint.checkpoint_file import CheckpointFile
    from distrust.checkpoint.format import Kind, TensorInfo


class ForeignHeader(Protocol):
    """The header of a checkpoint in another format: the same attributes as :class:`header.Header`."""

    format: str  #: its name, for listings
    step: int
    kind: Kind
    file_size: int
    lacks_arrays: bool  #: whether it holds neither model nor optimizer
    digest: str  #: empty if the format has no digests
    state_digest: str  #: likewise
    measured_on: str
    run_info: dict[str, Any]
    config: dict[str, Any]
    metadata: dict[str, Any]

    @property
    def saved_metrics(self) -> dict[str, float]:
        """The metrics saved as such."""

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers of the metadata, and the saved metrics."""

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The description of each tensor; raises CorruptCheckpoint if it is damaged."""

    @property
    def sections(self) -> dict[str, Any]:
        """The skeleton of each section; raises CheckpointError if the format has none."""

    def require_intact(self) -> None:
        """Check everything except the tensors' bytes; raises CorruptCheckpoint."""


class ForeignReader(Protocol):
    """What a reader of other formats offers. A module with these functions is one.

    Every function is given a path that ``detect_format`` accepted, except the two hints. Reading raises
    CheckpointNotFound, CorruptCheckpoint or CheckpointUnreadable, as the readers of the core do.
    """

    def detect_format(self, path: Path) -> str | None:
        """The name of the format at ``path``; None if the reader does not know it. Never raises."""

    def read_header(self, path: Path) -> ForeignHeader:
        """Read the header, not the arrays."""

    def verify(self, path: Path) -> ForeignHeader:
        """Read everything and check it as far as the format allows."""

    def read(self, path: Path, *, framework: Framework = "numpy") -> tuple[ForeignHeader, Checkpoint]:
        """Verify everything and load it, with arrays of ``framework``."""

    def import_hint(self, folder: Path) -> str:
        """Text to append to "no checkpoints here": what the folder is and how to import it. Never raises."""

    def convert_hint(self, path: Path) -> str:
        """What to do to convert the checkpoint at ``path``, as part of an error message."""


_load_reader: Callable[[], ForeignReader] | None = None


def register(load: Callable[[], ForeignReader] | None) -> None:
    """Set the reader of other formats, or remove it with None.

    ``load`` is called whenever a path is not in the core's own format: it imports what it needs only then.
    """
    global _load_reader  # one reader: it knows all foreign formats
    _load_reader = load


def find_reader(path: Path) -> ForeignReader | None:
    """The reader for the checkpoint at ``path``; None if it is in the core's format, or not a checkpoint.

    Raises CheckpointUnreadable if the reader itself cannot be loaded, as without a free file descriptor.
    """
    from distrust.checkpoint.files import begins_as_checkpoint, errors_with_path  # late: keeps imports cheap

    if _load_reader is None:
        return None
    with contextlib.suppress(OSError, ValueError, CorruptCheckpoint):  # a folder, or no readable file
        if begins_as_checkpoint(path):
            return None  # the core's own files never load the reader: listing them stays cheap
    with errors_with_path(path):
        reader = _load_reader()  # imports the readers on first use
    return reader if reader.detect_format(path) is not None else None


def import_hint(folder: Path) -> str:
    """What a folder without checkpoints seems to be, to append to a message; empty if it is unknown."""
    return _load_reader().import_hint(folder) if _load_reader else ""


def require_converted(file: CheckpointFile) -> None:
    """Raise CheckpointError, with what to do, if a checkpoint is not in the core's format."""
    if not file.is_foreign:
        return
    if file.metadata_only:
        remedy = ", and metadata only: there is no model to resume from; move it away"
    else:
        remedy = f"; {_load_reader().convert_hint(file.path) if _load_reader else 'convert it first'}"
    raise CheckpointError(f"{file.path}: in an older format ({file.format}){remedy}", path=file.path)
