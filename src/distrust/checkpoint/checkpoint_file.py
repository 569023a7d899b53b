"""What a listing says of one checkpoint file, and of a directory of them: values, without I/O."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from distrust.checkpoint.files import errors_with_path, parse_checkpoint_name
from distrust.checkpoint.foreign import ForeignHeader
from distrust.checkpoint.format import FORMAT, Kind, TensorInfo
from distrust.checkpoint.header import Header
from distrust.errors import CorruptCheckpoint, UnsupportedVersion

#: Order of preference; see :attr:`CheckpointFile.rank`.
Rank = tuple[int, bool, bool, bool]


class CheckpointFile(NamedTuple):
    """A checkpoint whose header is intact."""

    path: Path  #: of the file or, in a foreign format, of the folder
    header: Header | ForeignHeader

    @property
    def format(self) -> str:
        """``distrust``, or the name of a foreign format."""
        return self.header.format

    @property
    def is_foreign(self) -> bool:
        """Whether it is in a foreign format: it has no digests and is never removed."""
        return self.format != FORMAT  # a foreign header has another name there

    @property
    def metadata_only(self) -> bool:
        """Whether it has neither model nor optimizer. Only a foreign checkpoint can be so."""
        return self.header.lacks_arrays

    @property
    def step(self) -> int:
        """Number of completed optimizer steps."""
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
        return created if isinstance(created, str) else None  # untrusted: any JSON value may be there

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers by which it can be listed and chosen."""
        return self.header.metrics

    @property
    def measured_on(self) -> str:
        """Identifies the data on which the metrics were measured; empty if unknown."""
        return self.header.measured_on

    @property
    def metadata(self) -> dict[str, Any]:
        """The caller's metadata."""
        return self.header.metadata

    @property
    def digest(self) -> str:
        """The digest of the header, which covers the digests of all tensors."""
        return self.header.digest

    @property
    def state_digest(self) -> str:
        """The identity of the state: equal for bit-identical runs."""
        return self.header.state_digest

    @property
    def identity(self) -> tuple[str, str]:
        """Name and digest: a file that another process replaced has another identity."""
        return self.path.name, self.digest  # the digest covers the data's digests, so the whole file

    @property
    def rank(self) -> Rank:
        """Sort key, by step; of one step: metadata only < foreign < periodic < final."""
        # The highest of a step is the one that load(step) reads.
        return self.step, not self.metadata_only, not self.is_foreign, self.kind == "final"

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The tensors, in the order of their data; CorruptCheckpoint if no writer lays them out like this."""
        with errors_with_path(self.path):
            return self.header.tensors

    def require_intact(self) -> None:
        """Check everything except the tensors' bytes; raise CorruptCheckpoint for what no writer writes."""
        with errors_with_path(self.path):
            self.header.require_intact()

    def require_name(self) -> None:
        """Raise CorruptCheckpoint if the file's name states another step or kind; any name may state none."""
        entry = parse_checkpoint_name(self.path)  # None for a file that the user renamed freely
        if entry is not None and (self.step, self.kind) != (entry.step, entry.kind):
            reason = f"it holds step {self.step} ({self.kind}), not what its name says"
            raise CorruptCheckpoint(reason, path=self.path)


class DamagedFile(NamedTuple):
    """A file with the name of a checkpoint that cannot be read as one."""

    path: Path
    step: int  #: by its name
    error: CorruptCheckpoint | UnsupportedVersion  #: damage, or a later version of the format

    @property
    def reason(self) -> str:
        """What is wrong, without the path."""
        return str(self.error).removeprefix(f"{self.path}: ")

    @property
    def rank(self) -> Rank:
        """As :attr:`CheckpointFile.rank`, by the name."""
        return self.step, True, True, self.path.stem.endswith("-final")  # above foreign ones of its step


class Scan(NamedTuple):
    """The contents of a directory of checkpoints; each tuple by step, the periodic one before the final."""

    files: tuple[CheckpointFile, ...]  #: checkpoints with an intact header
    damaged: tuple[DamagedFile, ...]  #: files named as checkpoints that are damaged: no rule counts them
    foreign: tuple[CheckpointFile, ...] = ()  #: with intact metadata; separate, as no rule counts them

    @classmethod
    def of(cls, files: Iterable[CheckpointFile | DamagedFile]) -> Scan:
        """Group files, which are in order."""
        files = list(files)  # iterated twice
        intact = [file for file in files if isinstance(file, CheckpointFile)]
        return cls(
            files=tuple(file for file in intact if not file.is_foreign),
            damaged=tuple(file for file in files if isinstance(file, DamagedFile)),
            foreign=tuple(file for file in intact if file.is_foreign),
        )

    @property
    def all_intact(self) -> tuple[CheckpointFile, ...]:
        """Every intact checkpoint, ours and foreign, by :attr:`CheckpointFile.rank`."""
        return tuple(sorted([*self.foreign, *self.files], key=lambda file: file.rank))

    def by_step(self) -> dict[int, CheckpointFile]:
        """The checkpoint that ``load(step)`` reads, for each step in ascending order."""
        return {file.step: file for file in self.all_intact}  # the last one of a step wins
