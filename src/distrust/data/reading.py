"""Reads and validates records one at a time. Nothing is repaired or skipped.

A record's content is a text, a prompt and completion, or a conversation; its provenance is an authority
weight and an entropy. Fields that are ignored are listed once. All wrong records are reported in one error,
before anything slow, such as a model, is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from os import PathLike, fspath
from typing import Any

from blake3 import blake3

from distrust.config import TrainConfig
from distrust.data.column_report import NO_COLUMNS, ColumnReport, SeenColumns
from distrust.data.columns import Columns, Fields
from distrust.data.fields import (
    read_authority_weight,
    read_content,
    read_provenance_entropy,
    read_source,
    read_weight,
)
from distrust.data.record_errors import RecordError, RecordErrors
from distrust.data.records import Conversation, Location, Record
from distrust.data.sources import Source, open_source
from distrust.errors import DataError
from distrust.option_values import MAX_RECORD_BYTES

_VERSION = 3  # increment when the same bytes give other records: it invalidates the cached results

NO_WEIGHT = RecordError(
    "missing, but other records have one; add it, or give --default-weight", field="weight"
)

REPORT_EVERY = 5000  # records between two calls of ``on_progress``


@dataclass(frozen=True, slots=True)
class RecordReader:
    """Sources, and how their records are read."""

    sources: tuple[Source, ...]  # at least one
    columns: Columns
    authority_weight: float | None = None  # w of records without one; None makes that an error
    provenance_entropy: float | None = None  # H in bits of records without one; None makes that an error
    weight: float | None = None  # weight of records without one; None: all state one, or none does

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
            "defaults": [self.authority_weight, self.provenance_entropy, self.weight],
        }
        return blake3(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def checked_key(self) -> str:
        """:attr:`key`, and what else determines the result of a check: limits, columns that are not read."""
        parts = [part for source in self.sources for part in source.parts]
        changed = sorted({part.max_record_bytes for part in parts} - {MAX_RECORD_BYTES})
        # The digests of files cover all of their columns, those of examples only the needed ones.
        names = [name for part in parts if part.unit == "index" for name in part.column_names()]
        inputs = json.dumps([self.key, changed, names])
        return blake3(inputs.encode()).hexdigest() if changed or names else self.key

    def rows(self, source: Source) -> Iterator[tuple[Location, Fields, Record | list[RecordError]]]:
        """Each row of a source: its location, its fields if it can be read, and its record or its errors."""
        for part in source.parts:
            for location, fields in part.located_rows():
                readable = {} if isinstance(fields, RecordError) else fields
                yield location, readable, self._record(fields, location)

    def records(self) -> Iterator[Record]:
        """The records of all sources, which ``check_records`` has checked; DataError if one has changed."""
        for source in self.sources:
            for location, _, record in self.rows(source):
                if not isinstance(record, Record):
                    raise DataError(f"{location}: it changed while it was read; start again")
                yield record

    def _record(self, fields: Fields | RecordError, location: Location) -> Record | list[RecordError]:
        """The record of a row, or all of its errors: content and provenance are checked independently."""
        if isinstance(fields, RecordError):
            return [fields]
        columns, errors = self.columns, []
        reads: dict[str, Callable[[], Any]] = {
            "content": lambda: read_content(fields, columns),
            "authority_weight": lambda: read_authority_weight(fields, columns, self.authority_weight),
            "provenance_entropy": lambda: read_provenance_entropy(fields, columns, self.provenance_entropy),
            "weight": lambda: read_weight(fields, columns, self.weight),
            "source": lambda: read_source(fields, columns),
        }
        values: dict[str, Any] = {}
        for name, read in reads.items():
            try:
                values[name] = read()
            except RecordError as error:
                errors.append(error)
        return errors or Record(location, **values)


@dataclass(frozen=True, slots=True)
class DatasetStats:
    """Counts of a dataset without errors."""

    sizes: tuple[int, ...]  # records of each source
    conversations: int = 0  # how many of them are conversations
    columns: ColumnReport = NO_COLUMNS
    stated: Mapping[str, int] = field(default_factory=dict)  # records that state a field such as weight

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
    errors, columns = RecordErrors(), SeenColumns(reader.columns)
    sizes: list[int] = []
    conversations, is_weighted = 0, False
    for source in reader.sources:
        total = sum(sizes)
        count = 0  # of this source
        for count, (location, fields, record) in enumerate(reader.rows(source), 1):
            columns.add(fields, record)
            if isinstance(record, Record):
                conversations += isinstance(record.content, Conversation)
                is_weighted = is_weighted or record.weight > 0
            else:
                errors.add(location, record)
            if on_progress is not None and (total + count) % REPORT_EVERY == 0:
                on_progress(total + count)
        require_records(count, source)
        sizes.append(count)
        for part in source.parts:
            columns.add_names(part.column_names())
    raise_errors(errors, reader.name, sum(sizes), hint=columns.hint())
    stated = columns.stated
    if reader.weight is None and 0 < stated["weight"] < sum(sizes):
        for location, fields, _ in chain.from_iterable(map(reader.rows, reader.sources)):
            if not any(name in fields for name in reader.columns.weight):
                errors.add(location, [NO_WEIGHT])
        raise_errors(errors, reader.name, sum(sizes))
    if not is_weighted:
        raise DataError(f"{reader.name}: every record has weight 0; there is nothing to train on")
    return DatasetStats(tuple(sizes), conversations, columns.report(), stated)


def require_records(count: int, source: Source) -> None:
    """Raise DataError if a source has no records."""
    if not count:
        raise DataError(f"{source.name}: contains no records; give at least one")


def raise_errors(errors: RecordErrors, names: str, count: int, *, hint: str = "") -> None:
    """Raise DataError if any of the ``count`` records of the named sources has errors."""
    words = f"record{'s' * (count > 1)} {'is' if errors.records == 1 else 'are'} wrong"
    errors.raise_if_any(f"{names}: {errors.records} of {count} {words}", of=count, hint=hint)


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
