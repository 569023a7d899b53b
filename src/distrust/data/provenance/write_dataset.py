"""Weighed records -> a data set with both columns, everything else as it was.

A record of a JSON file is written with the very letters it has there: its two numbers are put into its text,
nothing else of it is touched. Rows of tables become JSON, or stay the typed columns that they are where the
new file is a table too. Records are read again, not kept, so memory does not grow with them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from json import JSONDecoder
from pathlib import Path
from typing import Any, BinaryIO, cast

from distrust.atomic import atomic_file
from distrust.data.columns import Columns, WholeRow
from distrust.data.fields import Fields, quote_value
from distrust.data.formats import next_token
from distrust.data.provenance.score import REPORT_EVERY, ScoredRecords
from distrust.data.record_errors import RecordError
from distrust.data.records import Location
from distrust.data.sources import Part, Source
from distrust.errors import ConfigError, DataError

_BATCH_ROWS = 256
_GROUP_ROWS, _GROUP_BYTES = 1 << 16, 1 << 25
"""A row group of a table ends at whichever is reached first: readers hold one in memory."""


def require_format(target: Path) -> None:
    """Refuse a name that says nothing of a format that is written.

    Raises:
        ConfigError: for such a name.
    """
    if not target.name.lower().endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise ConfigError(f"{target}: give a name that ends in .jsonl, .jsonl.gz or .parquet")


def write_scored(
    sources: Sequence[Source],
    scored: ScoredRecords,
    columns: Columns,
    target: Path,
    *,
    force: bool,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Writes all records with their w and H.

    A column that goes by any of its names keeps that name and its place; one that is not there is the last.

    Args:
        sources: as they were weighed, read as whole rows.
        scored: what was found.
        columns: which fields hold w and H.
        target: of a format that ``require_format`` knows.
        force: whether a file that is there is replaced.
        on_progress: called now and then with the number of records written.

    Raises:
        ConfigError: the name is of no known format, or taken.
        DataError: a source changed meanwhile, or holds what the format has no words for.
        WriteFailed: it cannot be written; what stood there before still stands.
    """
    require_format(target)
    parts = [part for source in sources for part in source.parts]
    pairs = _pairs(scored, on_progress)
    with atomic_file(target, force=force) as file:
        if target.name.lower().endswith(".parquet"):
            _write_table(file, parts, pairs, columns)
        elif target.name.lower().endswith(".gz"):
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
                _write_lines(cast(BinaryIO, packed), parts, pairs, columns)
        else:
            _write_lines(file, parts, pairs, columns)
        if next(pairs, None) is not None:
            raise DataError(f"{parts[-1].name}: it changed while it was read; start again")


Pair = tuple[float, float]
Pairs = Iterator[Pair]
"""The w and H of each record, in the order of the sources."""


def _pairs(weighed: ScoredRecords, on_progress: Callable[[int], None] | None) -> Pairs:
    numbers = zip(weighed.authority_weight, weighed.provenance_entropy, strict=True)
    for count, (w, h) in enumerate(numbers, 1):
        yield float(w), float(h)
        if on_progress is not None and count % REPORT_EVERY == 0:
            on_progress(count)


def _rows(part: Part, pairs: Pairs) -> Iterator[tuple[Location, Fields, Pair]]:
    """Each record of a part, and its w and H."""
    for number, row in part.rows():
        location = Location(part.name, number, part.unit)
        pair = next(pairs, None)
        if pair is None or isinstance(row, RecordError):
            raise DataError(f"{location}: it changed while it was read; start again")
        yield location, row, pair


def _to_set(row: Fields, pair: Pair, columns: Columns) -> dict[str, float]:
    """The fields that do not yet say what holds; none where the record's own values were kept."""
    new = {}
    for names, value in zip((columns.authority_weight, columns.provenance_entropy), pair, strict=True):
        there = [name for name in names if name in row] or names[:1]
        new.update({name: value for name in there if name not in row or row[name] != value})
    return new


def _write_lines(file: BinaryIO, parts: Sequence[Part], pairs: Pairs, columns: Columns) -> None:
    for part in parts:
        for location, row, pair in _rows(part, pairs):
            new = _to_set(row, pair, columns)
            text = row.text if isinstance(row, WholeRow) else None
            line = _as_json(row, new, location) if text is None else _with_members(text, row, new)
            file.write(line.encode("utf-8"))
            file.write(b"\n")


def _with_members(text: str, row: Fields, new: Mapping[str, float]) -> str:
    """The text of an object with some of its members set."""
    replaced = {name: value for name, value in new.items() if name in row}
    if replaced:
        text = _with_values(text, replaced)
    added = [f"{json.dumps(name)}: {value}" for name, value in new.items() if name not in row]
    if not added:
        return text
    body = text.rstrip()[:-1].rstrip()
    return f"{body}{', ' if row else ''}{', '.join(added)}}}"


def _with_values(text: str, new: Mapping[str, float]) -> str:
    """The text of an object with the values of some of its members replaced."""
    decoder = JSONDecoder()
    pieces, kept = [], 0
    place = next_token(text, next_token(text, 0) + 1)  # behind the brace
    while text[place] == '"':
        key, end = decoder.raw_decode(text, place)
        begin = next_token(text, next_token(text, end) + 1)  # behind the colon
        _, end = decoder.raw_decode(text, begin)
        if key in new:
            pieces += [text[kept:begin], str(new[key])]
            kept = end
        place = next_token(text, end)
        if text[place] == ",":
            place = next_token(text, place + 1)
    return "".join([*pieces, text[kept:]])


def _as_json(row: Fields, new: Mapping[str, float], location: Location) -> str:
    """A row of a table as an object."""
    values = {**row, **new}
    try:
        return json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        name = next(name for name, value in values.items() if not _has_words(value))
        raise DataError(
            f"{location}: {quote_value(name)}: JSON has no words for {quote_value(values[name])}; give "
            "--out a name that ends in .parquet"
        ) from None


def _has_words(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _write_table(file: BinaryIO, parts: Sequence[Part], pairs: Pairs, columns: Columns) -> None:
    """One Parquet file of all parts, with the columns of all of them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"Parquet files need pyarrow ({error}): pip install 'distrust-trainer[train]'"
        ) from None
    try:
        schema = pyarrow.unify_schemas([_schema(part) for part in parts], promote_options="permissive")
        schema = _with_columns(schema, columns)
        with pyarrow.parquet.ParquetWriter(file, schema) as writer:
            for group in _groups(_tables(parts, schema, pairs, columns)):
                writer.write_table(group)
    except (pyarrow.ArrowException, ArithmeticError, LookupError, TypeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"{', '.join(part.name for part in parts)}: cannot be one table: {reason}; give --out a name "
            "that ends in .jsonl"
        ) from error


def _schema(part: Part) -> Any:
    """The columns of a part and their types: as its file says, or as all of its records need them."""
    import pyarrow
    import pyarrow.parquet

    if part.parquet is not None:
        with part.parquet() as file:
            return pyarrow.parquet.ParquetFile(file).schema_arrow
    schema = pyarrow.schema([])
    rows = (row for _, row in part.rows() if not isinstance(row, RecordError))
    while batch := list(islice(rows, _BATCH_ROWS)):
        names = dict.fromkeys(name for row in batch for name in row)
        fields = [(name, _type(name, [row.get(name) for row in batch])) for name in names]
        schema = pyarrow.unify_schemas([schema, pyarrow.schema(fields)], promote_options="permissive")
    return schema


def _type(name: str, values: list[Any]) -> Any:
    """The type that a column's values have in common."""
    import pyarrow

    try:
        return pyarrow.array(values).type
    except (pyarrow.ArrowException, ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"column {quote_value(name)}: {error}") from None


def _with_columns(schema: Any, columns: Columns) -> Any:
    """A schema in which w and H are numbers, last where they were not there."""
    import pyarrow

    for names in (columns.authority_weight, columns.provenance_entropy):
        for name in [name for name in names if name in schema.names] or names[:1]:
            number = pyarrow.field(name, pyarrow.float64())
            at = schema.get_field_index(name)
            schema = schema.append(number) if at < 0 else schema.set(at, number)
    return schema


def _tables(parts: Sequence[Part], schema: Any, pairs: Pairs, columns: Columns) -> Iterator[Any]:
    """All records as tables of some rows each, of one schema."""
    import pyarrow
    import pyarrow.parquet

    numbers = {
        name: index
        for index, names in enumerate((columns.authority_weight, columns.provenance_entropy))
        for name in names
        if name in schema.names
    }
    for part in parts:
        if part.parquet is None:
            rows = (
                {**row, **{name: pair[index] for name, index in numbers.items()}}
                for _, row, pair in _rows(part, pairs)
            )
            while batch := list(islice(rows, _BATCH_ROWS)):
                yield pyarrow.Table.from_pylist(batch, schema=schema)
            continue
        with part.parquet() as file:
            table = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
            for batch in table.iter_batches(_BATCH_ROWS, use_threads=False):
                yield _with_numbers(batch, list(islice(pairs, len(batch))), schema, numbers)


def _with_numbers(batch: Any, pairs: Sequence[Pair], schema: Any, numbers: Mapping[str, int]) -> Any:
    """Some rows of a table, with their w and H."""
    import pyarrow

    values = []
    for field in schema:
        if field.name in numbers:
            index = numbers[field.name]
            values.append(pyarrow.array([pair[index] for pair in pairs], pyarrow.float64()))
        elif field.name in batch.schema.names:
            values.append(batch.column(field.name).cast(field.type))
        else:
            values.append(pyarrow.nulls(len(batch), field.type))
    return pyarrow.Table.from_arrays(values, schema=schema)


def _groups(tables: Iterator[Any]) -> Iterator[Any]:
    """Small tables joined to row groups."""
    import pyarrow

    held: list[Any] = []
    for table in tables:
        held.append(table)
        rows = sum(len(piece) for piece in held)
        if rows >= _GROUP_ROWS or sum(piece.nbytes for piece in held) >= _GROUP_BYTES:
            yield pyarrow.concat_tables(held)
            held.clear()
    if held:
        yield pyarrow.concat_tables(held)
