"""What a checkpoint in an older format says of itself, under the names that ours have."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from distrust.checkpoint.format import Kind, TensorInfo
from distrust.checkpoint.lazy import lockfree_cached_property
from distrust.errors import CheckpointError
from distrust.importers import OlderFormat
from distrust.importers.fields import Fields
from distrust.run_record import imported_run

NO_DIGEST = ""


class OlderHeader:
    """A listing's view of a checkpoint in an older format; it stands for a :class:`Header` of ours.

    Args:
        format: its name.
        fields: what its metadata says.
        kind: by its name.
        file_size: of all its files, in bytes.
        tensors: describes the tensors of its model and its optimizer, when they are asked for.
        lacks_arrays: whether it holds neither model nor optimizer.

    Attributes:
        digest: empty: the format has none.
        state_digest: empty: it gets one when it is converted.
        run_info: when it was saved, its metrics, and the format's name.
    """

    digest = NO_DIGEST
    state_digest = NO_DIGEST
    measured_on = ""

    def __init__(
        self,
        format: OlderFormat,  # noqa: A002 - the attribute's name, as the header of ours has it
        fields: Fields,
        *,
        kind: Kind,
        file_size: int,
        tensors: Callable[[], tuple[TensorInfo, ...]],
        lacks_arrays: bool = False,
    ) -> None:
        self.format: str = format
        self.fields = fields
        self.kind = kind
        self.file_size = file_size
        self.lacks_arrays = lacks_arrays
        self._tensors = tensors
        self.run_info: dict[str, Any] = {
            "created": _as_time(fields.timestamp),
            "host": None,
            "metrics": self.saved_metrics,
            "extra": imported_run(format),
        }

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        return self.fields.step

    @property
    def config(self) -> dict[str, Any]:
        """The config of the program that wrote it, as it stands."""
        return self.fields.config

    @property
    def metadata(self) -> dict[str, Any]:
        """The caller's metadata, as it stands."""
        return self.fields.metadata

    @property
    def saved_metrics(self) -> dict[str, float]:
        """The last loss of its history, as ``loss``."""
        return self.fields.metrics

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers of the metadata, and the last loss."""
        numbers = {
            name: value
            for name, value in self.metadata.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        return {**numbers, **self.saved_metrics}

    @lockfree_cached_property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """By name, without digests; and what of the metadata becomes arrays when it is loaded.

        Raises:
            CorruptCheckpoint: if they are not described as numpy or safetensors do.
        """
        return tuple(sorted([*self._tensors(), *self.fields.tensors]))

    @property
    def sections(self) -> dict[str, Any]:
        """What a comparison by headers needs: an older format has nothing of it.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(
            f"step {self.step} is in an older format ({self.format}), without digests to compare by; "
            "`distrust convert` it, and compare that"
        )

    def require_intact(self) -> None:
        """Check all that is checked without the arrays' data.

        Raises:
            CorruptCheckpoint: if the tensors are not described as they should be.
        """
        _ = self.tensors


def _as_time(timestamp: Any) -> str | None:
    """A number of seconds, or text, as ISO 8601 in UTC; None if it is no time."""
    if isinstance(timestamp, str):
        return timestamp
    if isinstance(timestamp, bool) or not isinstance(timestamp, (int, float)):
        return None
    try:
        return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return None
