"""What the metadata of both older formats says: one JSON object, each field of the type it should be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from distrust.checkpoint.checkpoint import MAX_STEP
from distrust.checkpoint.files import parse_checkpoint_name
from distrust.checkpoint.format import TensorInfo
from distrust.checkpoint.tree import flatten
from distrust.errors import CorruptCheckpoint, quote_untrusted, shorten
from distrust.importers.bounded import parse_object

#: Keys of the metadata of the checkpoint that it becomes.
FOREIGN_CONFIG, FOREIGN_FIELDS = "foreign_config", "foreign_fields"
#: More than the losses of a million steps take.
MAX_METADATA_BYTES = 64 << 20
_KNOWN = (
    "step", "timestamp", "loss_history", "random_state", "metadata", "optimizer_scalars", "config"
)  # fmt: skip


class Whole(NamedTuple):
    """A list of whole numbers that becomes an array of int64.

    Attributes:
        values: of them there is one at least.
    """

    values: list[int]


@dataclass(frozen=True, slots=True)
class Fields:
    """What the metadata says.

    Attributes:
        step: optimizer steps made.
        timestamp: when it was saved: seconds since 1970, as a rule; as it stands.
        losses: of the steps that were logged, oldest first.
        random_state: as it stands.
        metadata: the caller's.
        optimizer_scalars: what the optimizer holds besides arrays.
        config: of the program that wrote it.
        others: fields that this reader does not know, as they stand.
    """

    step: int
    timestamp: Any
    losses: tuple[float, ...]
    random_state: Any
    metadata: dict[str, Any]
    optimizer_scalars: dict[str, Any]
    config: dict[str, Any]
    others: dict[str, Any]

    @property
    def kept(self) -> dict[str, Any]:
        """The metadata of the checkpoint that it becomes: the caller's, and what has no other place."""
        ours = {FOREIGN_CONFIG: self.config, FOREIGN_FIELDS: self.others}
        return {**self.metadata, **{name: value for name, value in ours.items() if value}}

    @property
    def metrics(self) -> dict[str, float]:
        """The last loss, where there is one: nothing else here is plainly a metric."""
        return {"loss": self.losses[-1]} if self.losses else {}

    @property
    def rng(self) -> dict[str, Any]:
        """The state of random generators; its lists of whole numbers, which are long, are :class:`Whole`."""
        if self.random_state is None:
            return {}
        found = _with_arrays(self.random_state)
        return found if type(found) is dict else {"state": found}

    @property
    def tensors(self) -> list[TensorInfo]:
        """What of it becomes an array, as a listing shows it."""
        losses = [TensorInfo("history.loss", "F64", (len(self.losses),), 0, 8 * len(self.losses), "")]
        whole = flatten({"rng": self.rng}, is_array=lambda value: isinstance(value, Whole))[1]
        return [
            *(losses if self.losses else []),
            *(
                TensorInfo(label, "I64", (len(found.values),), 0, 8 * len(found.values), "")
                for label, found in whole.items()
            ),
        ]


def parse(raw: bytes, what: str, path: Path) -> Fields:
    """The fields of the metadata.

    Args:
        raw: JSON.
        what: for messages: where it stands.
        path: of the checkpoint: its name says the step, too.

    Raises:
        CorruptCheckpoint: naming the first field that is not what it should be.
        CheckpointUnreadable: if there is not the memory for it.
    """
    found = parse_object(raw, what)
    step = found.get("step")
    if step is None and (named := parse_checkpoint_name(path)):
        step = named[1]
    if type(step) is not int or not 0 <= step < MAX_STEP:
        raise CorruptCheckpoint(f"{what}: step is {shorten(repr(step))}, no number of optimizer steps")
    metadata = _object(found, "metadata", what)
    together(metadata, {FOREIGN_CONFIG: None, FOREIGN_FIELDS: None}, f"{what}: its metadata")
    return Fields(
        step=step,
        timestamp=found.get("timestamp"),
        losses=_losses(found.get("loss_history"), what),
        random_state=found.get("random_state"),
        metadata=metadata,
        optimizer_scalars=_object(found, "optimizer_scalars", what),
        config=_object(found, "config", what),
        others={name: value for name, value in found.items() if name not in _KNOWN},
    )


def together(a: dict[str, Any], b: dict[str, Any], what: str) -> dict[str, Any]:
    """Both, where no name stands in both.

    Raises:
        CorruptCheckpoint: naming the first that does.
    """
    if both := a.keys() & b.keys():
        raise CorruptCheckpoint(f"{what}: there would be two values of the name {quote_untrusted(min(both))}")
    return {**a, **b}


def _with_arrays(node: Any) -> Any:
    if type(node) is dict:
        return {key: _with_arrays(value) for key, value in node.items()}
    if type(node) is not list:
        return node
    if {*map(type, node)} == {int} and min(node) >= -(2**63) and max(node) < 2**63:
        return Whole(node)
    return [_with_arrays(value) for value in node]


def _object(found: dict[str, Any], name: str, what: str) -> dict[str, Any]:
    value = found.get(name)
    if value is None:
        return {}
    if type(value) is not dict:
        raise CorruptCheckpoint(f"{what}: {name} is no object")
    return value


def _losses(value: Any, what: str) -> tuple[float, ...]:
    if value is None:
        return ()
    if type(value) is not list or {*map(type, value)} - {int, float}:
        raise CorruptCheckpoint(f"{what}: loss_history is no list of numbers")
    try:
        return tuple(map(float, value))
    except OverflowError:
        raise CorruptCheckpoint(f"{what}: loss_history holds a number that is no float") from None
