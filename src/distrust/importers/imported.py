"""What an importer returns: :class:`Imported`, and the header that a listing shows.

============================  =======================================================================
in the older format           in our checkpoint
============================  =======================================================================
the model's arrays            ``model``: name -> array
the optimizer's moments       ``optimizer``: ``{"m": {name: array}, "v": {name: array}}``
``optimizer_scalars``         ``optimizer``, next to ``m`` and ``v``: ``step``, ``learning_rate``
``loss_history``              ``history["loss"]``, float64; its last value is the metric ``loss``
``random_state``              ``rng``; a list of integers becomes an int64 array
``metadata``                  ``metadata``, unchanged
``config``                    ``metadata["foreign_config"]``, unchanged
unknown fields                ``metadata["foreign_fields"]``, unchanged
the rank of the LoRA arrays   ``config["lora_rank"]``: the arrays prove it
``timestamp``                 ``run["timestamp"]``
============================  =======================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from distrust.checkpoint.format import Kind, TensorInfo
from distrust.checkpoint.lazy import lockfree_cached_property
from distrust.checkpoint.tree import flatten
from distrust.errors import CheckpointError
from distrust.importers.host_arrays import HostArray
from distrust.run_record import imported_run

if TYPE_CHECKING:
    from distrust.checkpoint.arrays import Framework
    from distrust.checkpoint.checkpoint import Checkpoint
    from distrust.importers.metadata import Metadata


@dataclass(frozen=True, slots=True)
class Imported:
    """A checkpoint of another program.

    Attributes:
        format: its name.
        step: optimizer steps made.
        kind: by its file name.
        model: name -> array, of a framework or a :class:`HostArray`.
        optimizer: AdamW's state in the form of either engine; empty without moments.
        rng: the state of random generators.
        history: metric -> array.
        options: our options that the checkpoint proves, by key.
        metadata: the caller's, and what has no other place.
        metrics: of this step.
        dropped: a line for each thing that is not imported.
        source: further keys of ``run`` about where it comes from.
    """

    format: str
    step: int
    model: Mapping[str, Any]
    kind: Kind = "periodic"
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    rng: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)

    def to_checkpoint(self, framework: Framework = "numpy") -> Checkpoint:
        """A checkpoint of the same state; each :class:`HostArray` becomes an array of ``framework``.

        Raises:
            ConfigError: if the framework does not have a dtype.
        """
        from distrust.checkpoint import arrays
        from distrust.checkpoint.checkpoint import Checkpoint

        def convert(node: Any) -> Any:
            if isinstance(node, HostArray):
                return arrays.from_host(node.data, node.dtype, node.shape, framework=framework)
            if type(node) is dict:
                return {key: convert(value) for key, value in node.items()}
            return [convert(value) for value in node] if type(node) is list else node

        return Checkpoint(
            step=self.step,
            model=convert(dict(self.model)),
            optimizer=convert(dict(self.optimizer)),
            rng=convert(dict(self.rng)),
            history=convert(dict(self.history)),
            config=dict(self.options),
            metadata=dict(self.metadata),
            metrics=dict(self.metrics),
            run=imported_run(self.format, dropped=self.dropped, **self.source),
        )


class ImportedHeader:
    """What a listing shows of a checkpoint in an older format, with the attributes of our own header.

    Args:
        format: its name.
        content: its metadata.
        kind: by its file name.
        file_size: of all its files, in bytes.
        describe: returns the arrays of its model and optimizer by label, without their data.
        lacks_arrays: whether it holds neither model nor optimizer.

    Attributes:
        digest: empty: the format has none.
        state_digest: empty: it gets one when it is converted.
        measured_on: empty: the format does not say.
        run_info: when it was saved, its metrics, and the format's name.
    """

    digest = state_digest = measured_on = ""

    def __init__(
        self,
        format: str,  # noqa: A002 - the name of the attribute in every header
        content: Metadata,
        *,
        kind: Kind,
        file_size: int,
        describe: Callable[[], Mapping[str, HostArray]],
        lacks_arrays: bool = False,
    ) -> None:
        self.format = format
        self.content = content
        self.kind = kind
        self.file_size = file_size
        self.lacks_arrays = lacks_arrays
        self._describe = describe
        self.run_info: dict[str, Any] = {
            "created": _iso_time(content.timestamp),
            "host": None,
            "metrics": self.saved_metrics,
            "extra": imported_run(format),
        }

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        return self.content.step

    @property
    def config(self) -> dict[str, Any]:
        """The config of the program that wrote it, unchanged."""
        return self.content.config

    @property
    def metadata(self) -> dict[str, Any]:
        """The caller's metadata, unchanged."""
        return self.content.user

    @property
    def saved_metrics(self) -> dict[str, float]:
        """The last loss of its history, as ``loss``."""
        return self.content.metrics

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
        """By name, without digests: the arrays, and the metadata that becomes arrays when it is loaded.

        Raises:
            CorruptCheckpoint: if they are not described as numpy or safetensors do.
        """
        sections = {"rng": self.content.rng(), "history": self.content.history()}
        converted = flatten(sections, is_array=lambda value: isinstance(value, HostArray))[1]
        arrays = {**self._describe(), **converted}
        return tuple(sorted(array.info(label) for label, array in arrays.items()))

    @property
    def sections(self) -> dict[str, Any]:
        """What comparing two headers needs.

        Raises:
            CheckpointError: always: an older format has no digests.
        """
        raise CheckpointError(
            f"step {self.step} is in an older format ({self.format}), without digests to compare; "
            "convert it with `distrust convert` and compare the result"
        )

    def require_intact(self) -> None:
        """Check everything except the arrays' data.

        Raises:
            CorruptCheckpoint: if the tensors are not described as they should be.
        """
        _ = self.tensors

    def to_imported(
        self,
        model: Mapping[str, HostArray],
        optimizer: Mapping[str, Any],
        *,
        options: Mapping[str, Any] | None = None,
        foreign_fields: Mapping[str, Any] | None = None,
        dropped: tuple[str, ...] = (),
    ) -> Imported:
        """The whole checkpoint, with the arrays of its files.

        Args:
            model: name -> array.
            optimizer: scalars, and moments as ``m`` and ``v``.
            options: our options that the optimizer proves, by key.
            foreign_fields: further fields to keep in the metadata.
            dropped: a line for each thing that is not imported.
        """
        content = self.content.with_unknown(foreign_fields or {})
        return Imported(
            self.format,
            self.step,
            model,
            kind=self.kind,
            optimizer=optimizer,
            rng=content.rng(),
            history=content.history(),
            options={**_lora_rank(model), **(options or {})},
            metadata=content.imported,
            metrics=self.saved_metrics,
            dropped=dropped,
            source={"timestamp": content.timestamp},
        )


def _lora_rank(model: Mapping[str, HostArray]) -> dict[str, Any]:
    """The option that the arrays prove: lora_a is [in, rank], lora_b is [rank, out].

    The config of the file is not trusted: it may belong to another run.
    """
    ranks = {
        array.shape[axis]
        for name, array in model.items()
        for suffix, axis in ((".lora_a", -1), (".lora_b", 0))
        if name.endswith(suffix) and len(array.shape) == 2
    }
    return {"lora_rank": ranks.pop()} if len(ranks) == 1 else {}


def _iso_time(timestamp: Any) -> str | None:
    """Seconds since 1970, or text, as ISO 8601 in UTC; None if it is not a time."""
    if isinstance(timestamp, str):
        return timestamp
    if isinstance(timestamp, bool) or not isinstance(timestamp, (int, float)):
        return None
    try:
        return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return None
