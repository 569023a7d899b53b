"""Sources -> records, one at a time, each checked: nothing is repaired or skipped.

A record's content is a text, or a prompt and a completion, or a conversation; its source is worth an
authority weight and a provenance entropy. Fields of other names are nobody's business here. What is wrong
is an error, and all that is wrong is told at once, before anything slow is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from os import PathLike, fspath
from typing import Any, TypeVar

from blake3 import blake3

from distrust.data.columns import Columns
from distrust.data.fields import (
    Fields,
    check_authority_weight,
    check_provenance_entropy,
    read_authority_weight,
    read_content,
    read_provenance_entropy,
    read_source,
)
from distrust.data.record_errors import RecordError, RecordErrors
from distrust.data.records import Conversation, Location, Record
from distrust.data.sources import Source, open_source
from distrust.errors import ConfigError, DataError

T = TypeVar("T")

#: Of what is read: a change of what a record means makes what was remembered of it worthless.
_VERSION = 1

_REPORT_EVERY = 5000


@dataclass(frozen=True, slots=True)
class RecordReader:
    """Sources and how they are read.

    Attributes:
        sources: at least one.
        columns: which fields hold what.
        authority_weight: w of records that have none; None where that is an error.
        provenance_entropy: H in bits of records that have none; None where that is an error.
    """

    sources: tuple[Source, ...]
    columns: Columns
    authority_weight: float | None = None
    provenance_entropy: float | None = None

    @property
    def name(self) -> str:
        """The sources, as a message names them."""
        return ", ".join(source.name for source in self.sources)

    @property
    def key(self) -> str:
        """BLAKE3, in hex, of all that decides what the records are; names of files are no part of it."""
        decides = {
            "version": _VERSION,
            "sources": [[part.digest for part in source.parts] for source in self.sources],
            "columns": asdict(self.columns),
            "defaults": [self.authority_weight, self.provenance_entropy],
        }
        return blake3(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def rows(self, source: Source) -> Iterator[tuple[Location, Record | None, list[RecordError]]]:
        """Each row of a source: where it stands, and its record or what is wrong with it."""
        for part in source.parts:
            for number, fields in part.rows():
                location = Location(part.name, number, part.unit)
                yield (location, *self._record(fields, location))

    def records(self) -> Iterator[Record]:
        """The records of all sources, which have been checked before.

        Raises:
            DataError: one is wrong: the source is not what was checked.
        """
        for source in self.sources:
            for location, record, _ in self.rows(source):
                if record is None:
                    raise DataError(f"{location}: it changed while it was read; start again")
                yield record

    def _record(
        self, fields: Fields | RecordError, location: Location
    ) -> tuple[Record | None, list[RecordError]]:
        """The record of a row, or what is wrong with it: content and source are judged independently."""
        if isinstance(fields, RecordError):
            return None, [fields]
        problems: list[RecordError] = []

        def attempt(read: Callable[[], T]) -> T | None:
            try:
                return read()
            except RecordError as problem:
                problems.append(problem)
                return None

        columns = self.columns
        content = attempt(lambda: read_content(fields, columns))
        weight = attempt(lambda: read_authority_weight(fields, columns, self.authority_weight))
        entropy = attempt(lambda: read_provenance_entropy(fields, columns, self.provenance_entropy))
        if content is None or weight is None or entropy is None:
            return None, problems
        return Record(location, weight, entropy, content, read_source(fields, columns)), problems


@dataclass(frozen=True, slots=True)
class DatasetStats:
    """What there is, once all of it is known to be right.

    Attributes:
        sizes: the records of each source.
        conversations: how many of them are conversations.
        first_conversation: where the first one stands.
    """

    sizes: tuple[int, ...]
    conversations: int = 0
    first_conversation: str | None = None

    @property
    def records(self) -> int:
        """The records of all sources."""
        return sum(self.sizes)


def dataset_stats(records: Iterable[Record]) -> DatasetStats:
    """Of records that are at hand, as one source."""
    count = conversations = 0
    first = None
    for record in records:
        count += 1
        if isinstance(record.content, Conversation):
            conversations += 1
            first = first or str(record.location)
    return DatasetStats((count,), conversations, first)


def check_records(reader: RecordReader, *, on_progress: Callable[[int], None] | None = None) -> DatasetStats:
    """Reads every record once, and keeps none.

    Args:
        reader: what to check.
        on_progress: called now and then with the number of records read.

    Raises:
        DataError: a source cannot be read or holds nothing (one line), or records are wrong (a headline,
            then one line for each of the first 20 problems; ``problems`` holds the first 1000).
    """
    problems = RecordErrors()
    sizes: list[int] = []
    read = 0

    def good(source: Source) -> Iterator[Record]:
        nonlocal read
        before = read
        for location, record, found in reader.rows(source):
            read += 1
            if record is None:
                problems.add(location, found)
            else:
                yield record
            if on_progress is not None and read % _REPORT_EVERY == 0:
                on_progress(read)
        if read == before:
            raise DataError(f"{source.name}: holds no records; there must be one at least")
        sizes.append(read - before)

    census = dataset_stats(record for source in reader.sources for record in good(source))
    if problems.records:
        are = "record is" if read == 1 else "records are"
        raise problems.to_data_error(f"{reader.name}: {problems.records} of {read} {are} wrong")
    return DatasetStats(tuple(sizes), census.conversations, census.first_conversation)


def read_records(
    path: str | PathLike[str],
    *,
    default_authority_weight: float | None = None,
    default_provenance_entropy: float | None = None,
) -> list[Record]:
    """Reads all records of a file or folder into memory.

    Args:
        path: the file or folder, such as ``--data`` takes it.
        default_authority_weight: w of records that have none; without it that is an error.
        default_provenance_entropy: H in bits of records that have none; without it that is an error.

    Returns:
        The records in the file's order, at least one.

    Raises:
        DataError: as ``check`` raises it.
        ConfigError: a default is outside its range.
    """
    columns = Columns()
    reading = RecordReader(
        (open_source(fspath(path), columns),),
        columns,
        _checked_default("default_authority_weight", default_authority_weight, check_authority_weight),
        _checked_default("default_provenance_entropy", default_provenance_entropy, check_provenance_entropy),
    )
    check_records(reading)
    return list(reading.records())


def _checked_default(option: str, value: float | None, check: Callable[[Any, str], float]) -> float | None:
    if value is None:
        return None
    try:
        return check(value, option)
    except RecordError as problem:
        raise ConfigError(str(problem)) from None
