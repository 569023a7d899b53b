"""Parses the metadata of both older formats: one JSON object; each known field is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distrust import importers
from distrust.checkpoint.checkpoint import MAX_STEP
from distrust.checkpoint.files import parse_checkpoint_name
from distrust.errors import CorruptCheckpoint, quote_untrusted, shorten
from distrust.importers.imported import FOREIGN_CONFIG, FOREIGN_FIELDS, ImportedHeader
from distrust.importers.safe_json import parse_object

#: More than the losses of a million steps take.
MAX_METADATA_BYTES = 64 << 20
_KNOWN = {
    "step", "timestamp", "loss_history", "random_state", "metadata", "optimizer_scalars", "config"
}  # fmt: skip


def parse_header(
    raw: bytes,
    what: str,
    path: Path,
    *,
    format: str,  # noqa: A002 - the name of the attribute in every header
    file_size: int,
    lacks_arrays: bool,
) -> ImportedHeader:
    """Parse the metadata.

    Args:
        raw: JSON.
        what: the name of the JSON, for messages.
        path: of the checkpoint: its name gives the kind, and the step if the metadata does not.
        format: its name.
        file_size: of all its files, in bytes.
        lacks_arrays: whether it has neither model nor optimizer.

    Raises:
        CorruptCheckpoint: naming the first invalid field.
        CheckpointUnreadable: if there is not enough memory.
    """
    fields = parse_object(raw, what)
    entry = parse_checkpoint_name(path)
    step = fields.get("step")
    if step is None and entry:
        step = entry[1]
    # type(), not isinstance(): True is an int.
    if type(step) is not int or not 0 <= step < MAX_STEP:
        raise CorruptCheckpoint(f"{what}: step is {shorten(repr(step))}, not a number of optimizer steps")
    metadata = _object(fields, "metadata", what)
    merge_unique(metadata, {FOREIGN_CONFIG: None, FOREIGN_FIELDS: None}, f"{what}: its metadata")
    return ImportedHeader(
        format=format,
        kind=entry[2] if entry else "periodic",
        file_size=file_size,
        describe=lambda: importers.describe(path),
        lacks_arrays=lacks_arrays,
        step=step,
        timestamp=fields.get("timestamp"),
        losses=_losses(fields.get("loss_history"), what),
        random_state=fields.get("random_state"),
        metadata=metadata,
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
