"""The values that importers return: :class:`Imported`, and :class:`ImportedHeader` for listings.

``docs/importing.md`` says what becomes of each field of the older formats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrust.checkpoint.checkpoint import MAX_STEP
from distrust.checkpoint.files import errors_with_path, parse_checkpoint_name
from distrust.checkpoint.format import Kind, TensorInfo
from distrust.checkpoint.lazy import lockfree_cached_property
from distrust.checkpoint.tree import flatten
from distrust.errors import CheckpointError, CorruptCheckpoint, quote_untrusted, shorten
from distrust.importers.host_arrays import HostArray, make_array
from distrust.importers.optimizer import OptimizerConfig
from distrust.importers.safe_json import parse_object
from distrust.run_record import imported_run

if TYPE_CHECKING:
    from distrust.checkpoint.arrays import Framework
    from distrust.checkpoint.checkpoint import Checkpoint

#: More than the losses of a million steps take.
MAX_METADATA_BYTES = 64 << 20
#: Keys of the metadata of the checkpoint that it becomes.
FOREIGN_CONFIG, FOREIGN_FIELDS = "foreign_config", "foreign_fields"
_KNOWN = {"step", "timestamp", "loss_history", "random_state", "metadata", "optimizer_scalars", "config"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A checkpoint of another program: what every importer returns."""

    format: str  # its name, for listings and messages
    step: int  # completed optimizer steps
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

        sections = {name: convert(getattr(self, name)) for name in ("model", "optimizer", "rng", "history")}
        run: Any = imported_run(self.format, dropped=self.dropped, **self.source)
        record = {"config": self.options, "metadata": self.metadata, "metrics": self.metrics, "run": run}
        return Checkpoint(step=self.step, **sections, **record)


class ImportedHeader:
    """The metadata of a checkpoint in an older format, with the attributes of our own header.

    It is parsed from JSON, which messages call ``what``. The name of ``path`` gives the kind, and the step if
    the metadata does not. ``reopen`` opens a checkpoint, to describe its arrays.

    Raises:
        CorruptCheckpoint: naming the first invalid field.
        CheckpointUnreadable: if there is not enough memory.
    """

    digest: str = ""  # the format has none
    state_digest: str = ""  # it gets one when it is converted
    measured_on: str = ""  # the format does not say

    def __init__(
        self,
        raw: bytes,
        what: str,
        path: Path,
        reopen: Callable[[Path], AbstractContextManager[Any]],
        format: str,  # noqa: A002 - the name of the attribute in every header
        *,
        file_size: int,
        lacks_arrays: bool,
    ) -> None:
        fields = parse_object(raw, what)
        entry = parse_checkpoint_name(path)
        step = fields.get("step")
        if step is None and entry:
            step = entry.step
        # type(), not isinstance(): True is an int.
        if type(step) is not int or not 0 <= step < MAX_STEP:
            raise CorruptCheckpoint(f"{what}: step is {shorten(repr(step))}, not a number of optimizer steps")
        self._fields, self._what, self._path, self._reopen = fields, what, path, reopen
        self.format, self.file_size, self.lacks_arrays = format, file_size, lacks_arrays
        self.step = step
        self.kind: Kind = entry.kind if entry else "periodic"
        self.metadata = _object(fields, "metadata", what)  # the caller's, unchanged
        merge_unique(self.metadata, {FOREIGN_CONFIG: None, FOREIGN_FIELDS: None}, f"{what}: its metadata")
        self.losses = _losses(fields.get("loss_history"), what)  # of the logged steps, oldest first
        # What the optimizer holds besides arrays.
        self.optimizer_scalars = _object(fields, "optimizer_scalars", what)
        self.config = _object(fields, "config", what)  # of the program that wrote it, unchanged
        self.unknown = {name: value for name, value in fields.items() if name not in _KNOWN}
        origin = {"host": None, "metrics": self.saved_metrics, "extra": imported_run(format)}
        self.run_info: dict[str, Any] = {"created": _iso_time(fields.get("timestamp")), **origin}

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
        """By name, without digests: the arrays, and the metadata that becomes arrays when it is loaded."""
        sections = {"rng": self._rng(), "history": self._history()}
        arrays = flatten(sections, is_array=lambda value: isinstance(value, HostArray))[1]
        with errors_with_path(self._path), self._reopen(self._path) as checkpoint:
            arrays = {**checkpoint.describe(), **arrays}
        infos = (TensorInfo(label, a.dtype, a.shape, 0, a.nbytes, "") for label, a in arrays.items())
        return tuple(sorted(infos))

    @property
    def sections(self) -> dict[str, Any]:
        """What comparing two headers needs. Raises CheckpointError: an older format has no digests."""
        raise CheckpointError(
            f"step {self.step} is in an older format ({self.format}), without digests to compare; "
            "convert it with `distrust convert` and compare the result"
        )

    def require_intact(self) -> None:
        """Check everything except the arrays' data: CorruptCheckpoint unless their formats describe them."""
        _ = self.tensors

    def to_imported(
        self, model: Mapping[str, HostArray], optimizer: dict[str, Any], config: OptimizerConfig | None = None
    ) -> Imported:
        """The complete checkpoint."""
        options: dict[str, Any] = {}
        dropped: tuple[str, ...] = ()
        unknown = self.unknown
        if config is not None:
            options, dropped = config.options({name: array.shape for name, array in model.items()})
            # Nothing else here has the meaning of the groups, so the metadata keeps them.
            unknown = merge_unique(unknown, {"param_groups": config.groups}, self._what)
        foreign = {FOREIGN_CONFIG: self.config, FOREIGN_FIELDS: unknown}
        return Imported(
            format=self.format,
            step=self.step,
            kind=self.kind,
            model=model,
            optimizer=optimizer,
            rng=self._rng(),
            history=self._history(),
            options={**_lora_rank(model), **options},
            metadata={**self.metadata, **{name: value for name, value in foreign.items() if value}},
            metrics=self.saved_metrics,
            dropped=dropped,
            source={"timestamp": self._fields.get("timestamp")},
        )

    def _rng(self) -> dict[str, Any]:
        state = _convert_lists(self._fields.get("random_state"))
        return state if type(state) is dict else {} if state is None else {"state": state}

    def _history(self) -> dict[str, HostArray]:
        return {"loss": make_array(self.losses, "F64")} if self.losses else {}


def merge_unique(a: dict[str, Any], b: dict[str, Any], what: str) -> dict[str, Any]:
    """Merge two dicts; raises CorruptCheckpoint naming a key of both."""
    if shared := a.keys() & b.keys():
        raise CorruptCheckpoint(f"{what}: two values of the name {quote_untrusted(min(shared))}")
    return {**a, **b}


def _object(fields: dict[str, Any], name: str, what: str) -> dict[str, Any]:
    value = fields.get(name)
    if value is not None and type(value) is not dict:
        raise CorruptCheckpoint(f"{what}: {name} is not an object")
    return value or {}


def _losses(value: Any, what: str) -> tuple[float, ...]:
    if value is None:
        return ()
    if type(value) is not list or {*map(type, value)} - {int, float}:
        raise CorruptCheckpoint(f"{what}: loss_history is not a list of numbers")
    try:
        return tuple(map(float, value))
    except OverflowError:
        raise CorruptCheckpoint(f"{what}: loss_history contains a number too large for a float") from None


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
    """The option that the arrays prove: lora_a is [in, rank], lora_b is [rank, out]."""
    # The config of the file is not trusted: it may belong to another run.
    ranks = {
        array.shape[axis]
        for name, array in model.items()
        for suffix, axis in ((".lora_a", -1), (".lora_b", 0))
        if name.endswith(suffix) and len(array.shape) == 2
    }
    return {"lora_rank": ranks.pop()} if len(ranks) == 1 else {}


def _iso_time(timestamp: Any) -> str | None:
    """Seconds since 1970, or text, as ISO 8601 in UTC; None if it is not a time."""
    if type(timestamp) not in (int, float):
        return timestamp if type(timestamp) is str else None
    try:
        return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return None
