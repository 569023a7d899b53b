"""Reads and validates records one at a time. Nothing is repaired or skipped.

A record's content is a text, a prompt and completion, or a conversation; its provenance is an authority
weight and an entropy. Other fields are ignored. All wrong records are reported in one error, before anything
slow, such as a model, is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from os import PathLike, fspath
from typing import TypeVar

from blake3 import blake3

from distrust.config import MAX_RECORD_BYTES, TrainConfig
from distrust.data.columns import Columns, Fields
from distrust.data.fields import read_authority_weight, read_content, read_provenance_entropy, read_source
from distrust.data.record_errors import RecordError, RecordErrors
from distrust.data.records import Conversation, Location, Record
from distrust.data.sources import Source, open_source
from distrust.errors import DataError

T = TypeVar("T")

_VERSION = 1  # increment when the same bytes give other records: it invalidates the cached results

REPORT_EVERY = 5000  # records between two calls of ``on_progress``


@dataclass(frozen=True, slots=True)
class RecordReader:
    """Sources, and how their records are read."""

    sources: tuple[Source, ...]  # at least one
    columns: Columns
    authority_weight: float | None = None  # w of records without one; None makes that an error
    provenance_entropy: float | None = None  # H in bits of records without one; None makes that an error

    @property
    def name(self) -> str:
        """The names of the sources, for messages."""
        return ", ".join(source.name for source in self.sources)

    @property
    def key(self) -> str:
        """BLAKE3, in hex, of all that determines the records; file names are not part of it."""
        identity = {
            "version": _VERSION,
            "sources": [[part.digest for part in source.parts] for source in self.sources],
            "columns": asdict(self.columns),
            "defaults": [self.authority_weight, self.provenance_entropy],
        }
        return blake3(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def checked_key(self) -> str:
        """:attr:`key`, and the limits of the records: checked with one, data may be wrong with another."""
        limits = {part.max_record_bytes for source in self.sources for part in source.parts}
        changed = sorted(limits - {MAX_RECORD_BYTES})
        return blake3(f"{self.key} {changed}".encode()).hexdigest() if changed else self.key

    def rows(self, source: Source) -> Iterator[tuple[Location, Record | list[RecordError]]]:
        """Each row of a source: its location, and its record or else its errors."""
        for part in source.parts:
            for location, fields in part.located_rows():
                yield location, self._record(fields, location)

    def records(self) -> Iterator[Record]:
        """The records of all sources, which ``check_records`` has checked; DataError if one has changed."""
        for source in self.sources:
            for location, record in self.rows(source):
                if not isinstance(record, Record):
                    raise DataError(f"{location}: it changed while it was read; start again")
                yield record

    def _record(self, fields: Fields | RecordError, location: Location) -> Record | list[RecordError]:
        """The record of a row, or all of its errors: content and provenance are checked independently."""
        if isinstance(fields, RecordError):
            return [fields]
        errors: list[RecordError] = []

        def attempt(read: Callable[[], T]) -> T | None:
            try:
                return read()
            except RecordError as error:
                errors.append(error)
                return None

        columns = self.columns
        content = attempt(lambda: read_content(fields, columns))
        weight = attempt(lambda: read_authority_weight(fields, columns, self.authority_weight))
        entropy = attempt(lambda: read_provenance_entropy(fields, columns, self.provenance_entropy))
        if content is None or weight is None or entropy is None:
            return errors
        return Record(location, weight, entropy, content, read_source(fields, columns))


@dataclass(frozen=True, slots=True)
class DatasetStats:
    """Counts of a dataset without errors."""

    sizes: tuple[int, ...]  # records of each source
    conversations: int = 0  # how many of them are conversations
    first_conversation: str | None = None  # location of the first one

    @property
    def records(self) -> int:
        """The records of all sources."""
        return sum(self.sizes)


def check_records(reader: RecordReader, *, on_progress: Callable[[int], None] | None = None) -> DatasetStats:
    """Reads every record once, and keeps none.

    Args:
        reader: what to check.
        on_progress: called every 5,000 records with the number of records read.

    Raises:
        DataError: a source cannot be read or is empty (one line), or records are wrong (a headline, then one
            line for each of the first 20 different errors; ``problems`` holds the first 1000 errors).
    """
    errors = RecordErrors()
    sizes: list[int] = []
    conversations, first_conversation = 0, None
    for source in reader.sources:
        total = sum(sizes)
        count = 0  # of this source
        for count, (location, record) in enumerate(reader.rows(source), 1):
            if not isinstance(record, Record):
                errors.add(location, record)
            elif isinstance(record.content, Conversation):
                conversations += 1
                first_conversation = first_conversation or str(location)
            if on_progress is not None and (total + count) % REPORT_EVERY == 0:
                on_progress(total + count)
        require_records(count, source)
        sizes.append(count)
    raise_errors(errors, reader.name, sum(sizes))
    return DatasetStats(tuple(sizes), conversations, first_conversation)


def require_records(count: int, source: Source) -> None:
    """Raise DataError if a source has no records."""
    if not count:
        raise DataError(f"{source.name}: contains no records; give at least one")


def raise_errors(errors: RecordErrors, names: str, count: int) -> None:
    """Raise DataError if any of the ``count`` records of the named sources has errors."""
    verb = "record is" if count == 1 else "records are"
    errors.raise_if_any(f"{names}: {errors.records} of {count} {verb} wrong")


def read_records(
    path: str | PathLike[str],
    *,
    default_authority_weight: float | None = None,
    default_provenance_entropy: float | None = None,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> list[Record]:
    """Reads all records of a file or folder into memory, in order; at least one.

    Args:
        path: the file or folder, as ``--data`` takes it.
        default_authority_weight: w in [0, 0.99] of records without one (high: less training weight).
        default_provenance_entropy: H in bits of records without one. Without a default that is an error.
        max_record_bytes: a larger record is an error.

    Raises:
        DataError: as for ``check_records``.
        ConfigError: a default is outside its range.
    """
    w, h = default_authority_weight, default_provenance_entropy
    limit = max_record_bytes
    # It refuses values outside their range.
    TrainConfig(default_authority_weight=w, default_provenance_entropy=h, max_record_bytes=limit)
    columns = Columns()
    source = open_source(fspath(path), columns, max_record_bytes=limit)
    reader = RecordReader((source,), columns, w, h)
    check_records(reader)
    return list(reader.records())
