"""Writes scored records to a new dataset with both columns, everything else unchanged.

A record of a JSON file keeps its exact text: only its two numbers are inserted or replaced. Rows of tables
become JSON, or keep their types if the new file is a table too. Records are read again rather than kept, so
memory does not grow with them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from json import JSONDecoder
from pathlib import Path
from typing import Any, BinaryIO, cast

from distrust.atomic import atomic_file
from distrust.data.columns import Columns, Fields, WholeRow
from distrust.data.formats import first_line, next_token
from distrust.data.parquet import BATCH_ROWS, import_pyarrow, open_table, read_batches
from distrust.data.provenance.score import ScoredRecords
from distrust.data.reading import REPORT_EVERY
from distrust.data.record_errors import RecordError
from distrust.data.records import Location
from distrust.data.sources import Part, Source
from distrust.data.values import quote_value
from distrust.errors import ConfigError, DataError

# A row group ends at whichever limit is reached first: readers hold one in memory.
_GROUP_ROWS, _GROUP_BYTES = 1 << 16, 1 << 25

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def require_format(target: Path) -> None:
    """Refuse a file name whose suffix names no format that can be written, with a ConfigError."""
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

    An existing column keeps its name, whichever alternative that is, and its position; a new one is the last.

    Args:
        sources: the scored sources, opened with ``WholeRows``.
        scored: their scores.
        columns: which fields hold w and H.
        target: in a format that ``require_format`` accepts.
        force: whether to replace an existing file.
        on_progress: called every 5,000 records with the number of records written.

    Raises:
        DataError: a source has changed, or has a value that the format cannot represent.
        WriteFailed: it cannot be written; an existing file is unchanged.
    """
    parts = [part for source in sources for part in source.parts]
    pairs = _pairs(scored, on_progress)
    with atomic_file(target, force=force, follow_link=True) as file:  # the user named it
        if target.name.lower().endswith(".parquet"):
            _write_table(file, parts, pairs, columns)
        elif target.name.lower().endswith(".gz"):
            # No file name and no time in the header: equal data gives equal bytes.
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as compressed:
                _write_lines(cast(BinaryIO, compressed), parts, pairs, columns)
        else:
            _write_lines(file, parts, pairs, columns)
        if next(pairs, None) is not None:  # fewer records than were scored
            raise DataError(f"{parts[-1].name}: it changed while it was read; start again")


Pair = tuple[float, float]  # w and H of a record
Pairs = Iterator[Pair]  # in the order of the sources


def _pairs(scored: ScoredRecords, on_progress: Callable[[int], None] | None) -> Pairs:
    numbers = zip(scored.authority_weight, scored.provenance_entropy, strict=True)
    for count, (w, h) in enumerate(numbers, 1):
        yield float(w), float(h)
        if on_progress is not None and count % REPORT_EVERY == 0:
            on_progress(count)


def _rows(part: Part, pairs: Pairs) -> Iterator[tuple[Location, Fields, Pair]]:
    for location, row in part.located_rows():
        pair = next(pairs, None)
        if pair is None or isinstance(row, RecordError):
            raise DataError(f"{location}: it changed while it was read; start again")
        yield location, row, pair


def _updates(row: Fields, pair: Pair, columns: Columns) -> dict[str, float]:
    """The fields to set; none if the record's own values are kept."""
    values = {name: pair[index] for name, index in _targets(columns, row).items()}
    return {name: value for name, value in values.items() if name not in row or row[name] != value}


def _targets(columns: Columns, available: Collection[str]) -> dict[str, int]:
    """The columns to write, and whether each has w (0) or H (1): those that exist, else the first name."""
    return {
        name: index
        for index, names in enumerate((columns.authority_weight, columns.provenance_entropy))
        for name in [name for name in names if name in available] or names[:1]
    }


def _write_lines(file: BinaryIO, parts: Sequence[Part], pairs: Pairs, columns: Columns) -> None:
    for part in parts:
        for location, row, pair in _rows(part, pairs):
            updates = _updates(row, pair, columns)
            text = row.text if isinstance(row, WholeRow) else None
            line = _to_json(row, updates, location) if text is None else _set_members(text, row, updates)
            file.write(f"{line}\n".encode())


def _set_members(text: str, row: Fields, updates: Mapping[str, float]) -> str:
    """The text of an object with some members replaced or appended."""
    replaced = {name: value for name, value in updates.items() if name in row}
    if replaced:
        text = _replace_values(text, replaced)
    added = [f"{json.dumps(name)}: {value}" for name, value in updates.items() if name not in row]
    if not added:
        return text
    body = text.rstrip()[:-1].rstrip()  # without the closing brace
    return f"{body}{', ' if row else ''}{', '.join(added)}}}"


def _replace_values(text: str, updates: Mapping[str, float]) -> str:
    decoder = JSONDecoder()
    pieces, copied = [], 0  # characters of ``text`` that are in ``pieces`` or replaced
    position = next_token(text, next_token(text, 0) + 1)  # after the brace
    while text[position] == '"':
        key, end = decoder.raw_decode(text, position)
        begin = next_token(text, next_token(text, end) + 1)  # after the colon
        _, end = decoder.raw_decode(text, begin)
        if key in updates:
            pieces += [text[copied:begin], str(updates[key])]
            copied = end
        position = next_token(text, end)
        if text[position] == ",":
            position = next_token(text, position + 1)
    return "".join([*pieces, text[copied:]])


def _to_json(row: Fields, updates: Mapping[str, float], location: Location) -> str:
    """A row of a table as a JSON object."""
    pieces = []
    for name, value in {**row, **updates}.items():
        try:
            pieces.append(f"{_encode(name)}: {_encode(value)}")
        except (TypeError, ValueError, RecursionError):  # also NaN, which is not JSON
            raise DataError(
                f"{location}: {quote_value(name)}: JSON cannot represent {quote_value(value)}; give "
                "--out a name that ends in .parquet"
            ) from None
    return f"{{{', '.join(pieces)}}}"


def _write_table(file: BinaryIO, parts: Sequence[Part], pairs: Pairs, columns: Columns) -> None:
    """Write one Parquet file with the columns of all parts."""
    pyarrow = import_pyarrow()
    try:
        schema = pyarrow.unify_schemas([_schema(part) for part in parts], promote_options="permissive")
        targets = _targets(columns, schema.names)
        for name in targets:
            number = pyarrow.field(name, pyarrow.float64())
            index = schema.get_field_index(name)
            schema = schema.append(number) if index < 0 else schema.set(index, number)
        with pyarrow.parquet.ParquetWriter(file, schema) as writer:
            for group in _groups(_tables(parts, schema, pairs, targets)):
                writer.write_table(group)
    except (pyarrow.ArrowException, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"{', '.join(part.name for part in parts)}: cannot be one table: {first_line(error)}; give "
            "--out a name that ends in .jsonl"
        ) from error


def _schema(part: Part) -> Any:
    """The column types of a part: those of its Parquet file, or inferred from all records."""
    pyarrow = import_pyarrow()
    if part.parquet is not None:
        with part.parquet() as file:
            return open_table(file, part.max_record_bytes).schema_arrow
    schema = pyarrow.schema([])
    rows = (row for _, row in part.rows() if not isinstance(row, RecordError))
    for batch in _batches(rows):
        names = dict.fromkeys(name for row in batch for name in row)  # a set would lose the order
        fields = [(name, _infer_type(name, [row.get(name) for row in batch])) for name in names]
        schema = pyarrow.unify_schemas([schema, pyarrow.schema(fields)], promote_options="permissive")
    return schema


def _batches(rows: Iterator[Fields]) -> Iterator[list[Fields]]:
    """The rows in lists of at most ``BATCH_ROWS``, and few of them if they are long."""
    batch: list[Fields] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += sum(len(value) for value in row.values() if isinstance(value, str | list))
        if len(batch) >= BATCH_ROWS or characters >= _GROUP_BYTES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _infer_type(name: str, values: list[Any]) -> Any:
    pyarrow = import_pyarrow()
    try:
        return pyarrow.array(values).type
    except (pyarrow.ArrowException, ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"column {quote_value(name)}: {error}") from None


def _tables(parts: Sequence[Part], schema: Any, pairs: Pairs, targets: Mapping[str, int]) -> Iterator[Any]:
    """All records as small tables of one schema."""
    pyarrow = import_pyarrow()
    for part in parts:
        if part.parquet is None:
            rows = (
                {**row, **{name: pair[index] for name, index in targets.items()}}
                for _, row, pair in _rows(part, pairs)
            )
            for batch in _batches(rows):
                yield pyarrow.Table.from_pylist(batch, schema=schema)
            continue
        with part.parquet() as file:  # column by column: keeps types that Python does not have
            limit = part.max_record_bytes
            names = open_table(file, limit).schema_arrow.names
            for batch in read_batches(file, names, limit, dictionaries=False):
                yield _set_columns(batch, list(islice(pairs, len(batch))), schema, targets)


def _set_columns(batch: Any, pairs: Sequence[Pair], schema: Any, targets: Mapping[str, int]) -> Any:
    """A batch of a table with its w and H."""
    pyarrow = import_pyarrow()
    values = []
    for field in schema:
        if field.name in targets:
            numbers = [pair[targets[field.name]] for pair in pairs]
            values.append(pyarrow.array(numbers, pyarrow.float64()))
        elif field.name in batch.schema.names:
            values.append(batch.column(field.name).cast(field.type))
        else:
            values.append(pyarrow.nulls(len(batch), field.type))
    return pyarrow.Table.from_arrays(values, schema=schema)


def _groups(tables: Iterator[Any]) -> Iterator[Any]:
    """Join small tables into row groups."""
    pyarrow = import_pyarrow()
    group: list[Any] = []
    for table in tables:
        group.append(table)
        rows = sum(len(piece) for piece in group)
        if rows >= _GROUP_ROWS or sum(piece.nbytes for piece in group) >= _GROUP_BYTES:
            yield pyarrow.concat_tables(group)
            group.clear()
    if group:
        yield pyarrow.concat_tables(group)
