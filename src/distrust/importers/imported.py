"""The values that importers return: :class:`Imported`, and :class:`ImportedHeader` for listings.

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
from distrust.importers.host_arrays import HostArray, make_array
from distrust.run_record import imported_run

if TYPE_CHECKING:
    from distrust.checkpoint.arrays import Framework
    from distrust.checkpoint.checkpoint import Checkpoint

#: Keys of the metadata of the checkpoint that it becomes.
FOREIGN_CONFIG, FOREIGN_FIELDS = "foreign_config", "foreign_fields"


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A checkpoint of another program: what every importer returns."""

    format: str  # its name, for listings and messages
    step: int  # optimizer steps made
    kind: Kind = "periodic"  # by its file name
    model: Mapping[str, Any]  # name -> array, of a framework or a HostArray
    optimizer: Mapping[str, Any] = field(default_factory=dict)  # AdamW's state in the form of either engine
    rng: Mapping[str, Any] = field(default_factory=dict)  # the state of random generators
    history: Mapping[str, Any] = field(default_factory=dict)  # metric -> array
    options: Mapping[str, Any] = field(default_factory=dict)  # our options that the checkpoint proves, by key
    metadata: Mapping[str, Any] = field(default_factory=dict)  # the caller's, and what has no other place
    metrics: Mapping[str, float] = field(default_factory=dict)  # of this step
    dropped: tuple[str, ...] = ()  # a line for each thing that is not imported
    source: Mapping[str, Any] = field(default_factory=dict)  # further keys of ``run`` about its origin

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
            if isinstance(node, dict):
                return {key: convert(value) for key, value in node.items()}
            return [convert(value) for value in node] if type(node) is list else node

        return Checkpoint(
            step=self.step,
            model=convert(self.model),
            optimizer=convert(self.optimizer),
            rng=convert(self.rng),
            history=convert(self.history),
            config=self.options,
            metadata=self.metadata,
            metrics=self.metrics,
            run=imported_run(self.format, dropped=self.dropped, **self.source),
        )


@dataclass(eq=False, kw_only=True)
class ImportedHeader:
    """The metadata of a checkpoint in an older format, with the attributes of our own header."""

    format: str  # its name
    kind: Kind  # by its file name
    file_size: int  # of all its files, in bytes
    describe: Callable[[], Mapping[str, HostArray]]  # returns its arrays by label, without their data
    lacks_arrays: bool  # whether it has neither model nor optimizer
    step: int  # optimizer steps made
    timestamp: Any  # when it was saved, usually in seconds since 1970; unchecked
    losses: tuple[float, ...]  # of the logged steps, oldest first
    random_state: Any  # unchecked
    metadata: dict[str, Any]  # the caller's, unchanged
    optimizer_scalars: dict[str, Any]  # what the optimizer holds besides arrays
    config: dict[str, Any]  # of the program that wrote it, unchanged
    unknown: dict[str, Any]  # all other fields
    digest: str = ""  # the format has none
    state_digest: str = ""  # it gets one when it is converted
    measured_on: str = ""  # the format does not say
    run_info: dict[str, Any] = field(init=False)  # when it was saved, its metrics, and the format's name

    def __post_init__(self) -> None:
        self.run_info = {
            "created": _iso_time(self.timestamp),
            "host": None,
            "metrics": self.saved_metrics,
            "extra": imported_run(self.format),
        }

    @property
    def saved_metrics(self) -> dict[str, float]:
        """The last loss, if any: no other field is certain to be a metric."""
        return {"loss": self.losses[-1]} if self.losses else {}

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers of the metadata, and the last loss."""
        numbers = {name: value for name, value in self.metadata.items() if type(value) in (int, float)}
        return {**numbers, **self.saved_metrics}

    @lockfree_cached_property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """By name, without digests: the arrays, and the metadata that becomes arrays when it is loaded.

        Raises:
            CorruptCheckpoint: if they are not described as numpy or safetensors do.
        """
        sections = {"rng": self._rng(), "history": self._history()}
        converted = flatten(sections, is_array=lambda value: isinstance(value, HostArray))[1]
        arrays = {**self.describe(), **converted}
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

    def to_imported(self, model: Mapping[str, HostArray], optimizer: dict[str, Any], **more: Any) -> Imported:
        """The whole checkpoint.

        Args:
            model: name -> array.
            optimizer: scalars, and moments as ``m`` and ``v``.
            more: ``options`` that the optimizer proves, and ``dropped``, as in :class:`Imported`.
        """
        foreign = {FOREIGN_CONFIG: self.config, FOREIGN_FIELDS: self.unknown}
        return Imported(
            format=self.format,
            step=self.step,
            kind=self.kind,
            model=model,
            optimizer=optimizer,
            rng=self._rng(),
            history=self._history(),
            options={**_lora_rank(model), **more.pop("options", {})},
            metadata={**self.metadata, **{name: value for name, value in foreign.items() if value}},
            metrics=self.saved_metrics,
            source={"timestamp": self.timestamp},
            **more,
        )

    def _rng(self) -> dict[str, Any]:
        if self.random_state is None:
            return {}
        state = _convert_lists(self.random_state)
        return state if type(state) is dict else {"state": state}

    def _history(self) -> dict[str, HostArray]:
        return {"loss": make_array(self.losses, "F64")} if self.losses else {}


def _convert_lists(node: Any) -> Any:
    """Lists of integers, which are long in the state of a generator, become arrays."""
    if type(node) is dict:
        return {key: _convert_lists(value) for key, value in node.items()}
    if type(node) is not list:
        return node
    if {*map(type, node)} == {int} and min(node) >= -(2**63) and max(node) < 2**63:
        return make_array(node, "I64")
    return [_convert_lists(value) for value in node]


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
    if type(timestamp) is str:
        return timestamp
    if type(timestamp) not in (int, float):
        return None
    try:
        return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return None
