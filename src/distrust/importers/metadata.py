"""The metadata of both older formats: one JSON object; each known field is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distrust.checkpoint.checkpoint import MAX_STEP
from distrust.checkpoint.files import parse_checkpoint_name
from distrust.errors import CorruptCheckpoint, quote_untrusted, shorten
from distrust.importers.host_arrays import HostArray, make_array
from distrust.importers.safe_json import parse_object

#: Keys of the metadata of the checkpoint that it becomes.
FOREIGN_CONFIG, FOREIGN_FIELDS = "foreign_config", "foreign_fields"
#: More than the losses of a million steps take.
MAX_METADATA_BYTES = 64 << 20
_KNOWN = (
    "step", "timestamp", "loss_history", "random_state", "metadata", "optimizer_scalars", "config"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Metadata:
    """The fields of the metadata. Those without a meaning here keep their values as parsed.

    Attributes:
        step: optimizer steps made.
        timestamp: when it was saved, usually in seconds since 1970; unchecked.
        losses: of the logged steps, oldest first.
        random_state: unchecked.
        user: the caller's metadata.
        optimizer_scalars: what the optimizer holds besides arrays.
        config: of the program that wrote it.
        unknown: all other fields.
    """

    step: int
    timestamp: Any
    losses: tuple[float, ...]
    random_state: Any
    user: dict[str, Any]
    optimizer_scalars: dict[str, Any]
    config: dict[str, Any]
    unknown: dict[str, Any]

    @property
    def imported(self) -> dict[str, Any]:
        """The metadata of the checkpoint that it becomes: the caller's, the config and unknown fields."""
        foreign = {FOREIGN_CONFIG: self.config, FOREIGN_FIELDS: self.unknown}
        return {**self.user, **{name: value for name, value in foreign.items() if value}}

    @property
    def metrics(self) -> dict[str, float]:
        """The last loss, if any: no other field is certain to be a metric."""
        return {"loss": self.losses[-1]} if self.losses else {}

    def with_unknown(self, fields: Mapping[str, Any]) -> Metadata:
        """The same with further unknown fields."""
        return replace(self, unknown=merge_unique(self.unknown, dict(fields), "the unknown fields"))

    def rng(self) -> dict[str, Any]:
        """The state of the random generators; lists of integers, which are long, become int64 arrays."""
        if self.random_state is None:
            return {}
        state = _convert_lists(self.random_state)
        return state if type(state) is dict else {"state": state}

    def history(self) -> dict[str, HostArray]:
        """``loss``: float64, one number for each logged step."""
        return {"loss": make_array(self.losses, "F64")} if self.losses else {}


def parse(raw: bytes, what: str, path: Path) -> Metadata:
    """Parse the metadata.

    Args:
        raw: JSON.
        what: the name of the JSON, for messages.
        path: of the checkpoint: its name gives the step if the metadata does not.

    Raises:
        CorruptCheckpoint: naming the first invalid field.
        CheckpointUnreadable: if there is not enough memory.
    """
    fields = parse_object(raw, what)
    step = fields.get("step")
    if step is None and (entry := parse_checkpoint_name(path)):
        step = entry[1]
    # type(), not isinstance(): True is an int.
    if type(step) is not int or not 0 <= step < MAX_STEP:
        raise CorruptCheckpoint(f"{what}: step is {shorten(repr(step))}, not a number of optimizer steps")
    user = _object(fields, "metadata", what)
    merge_unique(user, {FOREIGN_CONFIG: None, FOREIGN_FIELDS: None}, f"{what}: its metadata")
    return Metadata(
        step=step,
        timestamp=fields.get("timestamp"),
        losses=_losses(fields.get("loss_history"), what),
        random_state=fields.get("random_state"),
        user=user,
        optimizer_scalars=_object(fields, "optimizer_scalars", what),
        config=_object(fields, "config", what),
        unknown={name: value for name, value in fields.items() if name not in _KNOWN},
    )


def merge_unique(a: dict[str, Any], b: dict[str, Any], what: str) -> dict[str, Any]:
    """Merge two dicts that share no key.

    Raises:
        CorruptCheckpoint: naming a key of both.
    """
    if shared := a.keys() & b.keys():
        raise CorruptCheckpoint(f"{what}: two values of the name {quote_untrusted(min(shared))}")
    return {**a, **b}


def _convert_lists(node: Any) -> Any:
    if type(node) is dict:
        return {key: _convert_lists(value) for key, value in node.items()}
    if type(node) is not list:
        return node
    if {*map(type, node)} == {int} and min(node) >= -(2**63) and max(node) < 2**63:
        return make_array(node, "I64")
    return [_convert_lists(value) for value in node]


def _object(fields: dict[str, Any], name: str, what: str) -> dict[str, Any]:
    value = fields.get(name)
    if value is None:
        return {}
    if type(value) is not dict:
        raise CorruptCheckpoint(f"{what}: {name} is not an object")
    return value


def _losses(value: Any, what: str) -> tuple[float, ...]:
    if value is None:
        return ()
    if type(value) is not list or {*map(type, value)} - {int, float}:
        raise CorruptCheckpoint(f"{what}: loss_history is not a list of numbers")
    try:
        return tuple(map(float, value))
    except OverflowError:
        raise CorruptCheckpoint(f"{what}: loss_history contains a number too large for a float") from None
