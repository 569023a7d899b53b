"""Reads JSON Lines, JSON, CSV and Parquet one row at a time, in memory that does not grow with the file.

A row is a number and its fields, or an error; ``Columns`` says which fields, and whether nulls are kept. Text
stays text: a CSV cell is never guessed to be a number or a missing value, except in the columns of w and H.
A row that takes more bytes than a limit is an error. In text it is the last row: where it ends is not known.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from distrust.checkpoint.files import open_regular_file
from distrust.data.columns import Columns, Fields
from distrust.data.parquet import bounded_rows, import_pyarrow, open_table, read_batches
from distrust.data.record_errors import RecordError, too_large
from distrust.data.records import Unit
from distrust.data.values import json_kind, parse_number, quote_value, unique_members

Row = tuple[int, Fields | RecordError]  # the number of a row, and its fields or its error

_CHUNK = 1 << 20  # 1 MiB: large enough that system calls cost nothing, small beside any process
_HEAD = 4096  # bytes from which the kind of a file is recognized
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")  # JSON's white space; \s would match more


@dataclass(frozen=True, slots=True)
class Format:
    """How the bytes of a file become rows."""

    name: str  # part of the cache key
    unit: Unit  # how its rows are numbered
    rows: Callable[[BinaryIO, Columns, int], Iterator[Row]]  # takes the limit of bytes of a row


def format_of(path: Path) -> tuple[Format, bool]:
    """The format of a file by its name, and whether it is compressed (``.gz``).

    A ``.json`` file is inspected: it is a list of objects or JSON Lines. An unknown suffix means JSON Lines.
    """
    compressed = path.suffix.lower() == ".gz"
    if _suffix(path) == ".json":
        head = _head(path, compressed=compressed)
        is_list = head.removeprefix(_BOM).lstrip()[:1] == b"["
        return (JSON_LIST if is_list else JSON_LINES), compressed
    return _BY_SUFFIX.get(_suffix(path), JSON_LINES), compressed


def is_data(path: Path) -> bool:
    """Whether a file name has a suffix of a data file."""
    return _suffix(path) in (*_BY_SUFFIX, ".json")


def data_suffix(path: Path) -> str:
    """The end of a file name that decides how the file is read: a known one, or none."""
    return (_suffix(path) if is_data(path) else "") + (".gz" if path.suffix.lower() == ".gz" else "")


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def is_binary(path: Path, *, compressed: bool) -> bool:
    """Whether the beginning of a file has a zero byte. Text has none, except UTF-16, which has a mark."""
    head = _head(path, compressed=compressed)
    return b"\0" in head and not head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def _head(path: Path, *, compressed: bool) -> bytes:
    with open_bytes(path, compressed=compressed) as file:
        return file.read(_HEAD)


@contextlib.contextmanager
def open_bytes(path: Path, *, compressed: bool) -> Iterator[BinaryIO]:
    """The file's decompressed content; OSError if it cannot be read or is not valid gzip."""
    with open_regular_file(path) as raw:
        if not compressed:
            yield raw
            return
        import gzip

        try:
            with gzip.open(raw, "rb") as file:
                yield cast(BinaryIO, file)
        except (EOFError, zlib.error) as error:
            raise OSError(f"damaged: {error}") from error


def _json_lines(file: BinaryIO, columns: Columns, limit: int) -> Iterator[Row]:
    """Yield the lines that are not blank."""
    # In bytes a line ends at LF only: JSON strings may hold U+2028, which str.splitlines splits at.
    for number, raw in enumerate(iter(partial(file.readline, limit + 1), b""), 1):
        if len(raw) > limit:
            yield number, too_large(limit)
            return
        line = (raw.removeprefix(_BOM) if number == 1 else raw).rstrip()
        if line:
            yield number, _decode(line, columns)


def _decode(raw: bytes, columns: Columns) -> Fields | RecordError:
    try:
        text = raw.decode("utf-8")
        return _fields(json.loads(text, object_pairs_hook=unique_members), text, columns)
    except (RecordError, ValueError, RecursionError) as error:
        return _json_error(error, one_line=True)


def _json_error(error: Exception, *, one_line: bool) -> RecordError:
    """The error of a record; positions are those in its line, so a list has none."""
    match error:
        case RecordError():
            return error
        case UnicodeDecodeError():
            at = f" (byte {error.start + 1})" if one_line else ""
            return RecordError("invalid UTF-8; save the file as UTF-8", detail=at)
        case json.JSONDecodeError():
            at = f" (column {error.colno})" if one_line else ""
            remedy = _ONE_OBJECT if one_line else "correct it"
            reason = f"{error.msg[:1].lower()}{error.msg[1:]}"
            return RecordError(f"invalid JSON: {reason}; {remedy}", detail=at)
    # A number of thousands of digits, or endless nesting.
    return RecordError("JSON with a number too long or nested too deep to read; simplify it")


_ONE_OBJECT = "a record is one JSON object on one line"


def _fields(value: Any, text: str, columns: Columns) -> Fields | RecordError:
    if not isinstance(value, dict):
        return RecordError(f"{json_kind(value)}, not a JSON object; {_ONE_OBJECT}")
    return columns.select(value, text)


def _json_list(file: BinaryIO, columns: Columns, limit: int) -> Iterator[Row]:
    """Yield the objects of a list. Invalid JSON ends it: what follows cannot be divided into elements."""
    number = 0
    try:
        with io.TextIOWrapper(file, encoding="utf-8-sig") as text:
            for number, (value, source) in enumerate(_elements(text, limit), 1):
                yield number, _fields(value, source, columns)
    except (RecordError, ValueError, RecursionError) as error:
        yield number + 1, _json_error(error, one_line=False)


def _elements(file: io.TextIOWrapper, limit: int) -> Iterator[tuple[Any, str]]:
    """Yield the elements of a JSON list, and the text of each on one line.

    At most a chunk or one element of the list is in memory. RecordError if one has more than ``limit``
    characters.
    """
    decoder = json.JSONDecoder(object_pairs_hook=unique_members)
    text, at_end, is_first = file.read(_CHUNK), False, True
    position = next_token(text, 0) + 1  # after the bracket
    while True:
        position = next_token(text, position)
        if is_first and text.startswith("]", position):
            break
        try:
            value, end = decoder.raw_decode(text, position)
            end = next_token(text, end)
        except json.JSONDecodeError:
            if at_end:
                raise
            end = len(text)
        if end - position > limit:
            raise too_large(limit)
        if end == len(text) and not at_end:  # the element may continue: a number may have more digits
            # Read at least as much again, so that a huge element is not parsed in quadratic time.
            chunk = file.read(max(_CHUNK, end - position))
            text, position, at_end = text[position:] + chunk, 0, not chunk
            continue
        is_first = False
        # JSON strings cannot hold a raw line break, so each one separates two tokens.
        yield value, text[position:end].rstrip().replace("\n", " ").replace("\r", " ")
        if not text.startswith(",", end):
            position = end
            break
        position = end + 1
    if not text.startswith("]", position):
        raise json.JSONDecodeError("expecting ',' or ']' after an element", "", 0)
    if (text[position + 1 :] + file.read(_CHUNK)).strip():
        raise json.JSONDecodeError("extra data after the list", "", 0)


def next_token(text: str, position: int) -> int:
    """The position of the next JSON token."""
    return cast(re.Match[str], _SPACE.match(text, position)).end()  # always matches, if only ""


def _csv(file: BinaryIO, columns: Columns, limit: int, *, delimiter: str) -> Iterator[Row]:
    """Yield the rows below the header, numbered by the line on which they begin."""
    csv.field_size_limit(sys.maxsize)  # of the whole process; lines are limited here
    header: list[str] | None = None
    line = 1
    try:
        # newline="": the csv module must see line breaks inside quotes unchanged.
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            lines = _Lines(text, limit)
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            for cells in reader:
                lines.begin_row()
                if header is None:
                    header = _header(cells) or None  # a blank line is no header
                elif cells:
                    yield line, _cells(cells, header, columns)
                line = reader.line_num + 1  # a quoted cell may span lines
    except RecordError as error:
        yield line, error
    except csv.Error as error:
        yield line, RecordError(f"invalid CSV: {error}; correct it")
    except UnicodeDecodeError:
        yield line, RecordError("invalid UTF-8 from here on; save the file as UTF-8")


class _Lines:
    """The lines of a text; RecordError if a row, which may span lines, has more than ``limit`` characters."""

    def __init__(self, text: io.TextIOWrapper, limit: int) -> None:
        self._text, self._limit = text, limit
        self.begin_row()

    def begin_row(self) -> None:
        """The next line is the first of a row."""
        self._remaining = self._limit

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(self._remaining + 1)
        self._remaining -= len(line)
        if self._remaining < 0:
            raise too_large(self._limit)
        if not line:
            raise StopIteration
        return line


def _header(names: list[str]) -> list[str]:
    duplicates = [name for name, count in Counter(names).items() if count > 1]
    if duplicates:
        raise RecordError("appears twice in the header; keep one", field=quote_value(duplicates[0]))
    return names


def _cells(cells: list[str], header: list[str], columns: Columns) -> Fields | RecordError:
    if len(cells) != len(header):
        return RecordError(f"{len(cells)} cells under a header of {len(header)}; correct it")
    numbers = columns.numbers
    return columns.select(
        {
            # An empty cell of a number is missing; an empty cell of text is an empty text.
            name: (parse_number(cell) if cell else None) if name in numbers else cell
            for name, cell in zip(header, cells, strict=True)
        }
    )


def _parquet(file: BinaryIO, columns: Columns, limit: int) -> Iterator[Row]:
    pyarrow = import_pyarrow()
    number = 0
    try:
        names = columns.needed_from(_header(open_table(file, limit).schema_arrow.names))
        for batch in read_batches(file, names, limit, dictionaries=True):
            for row in bounded_rows(batch, limit):
                number += 1
                yield number, row if isinstance(row, RecordError) else columns.select(row, is_cells=True)
    except RecordError as error:
        yield 1, error
    except (pyarrow.ArrowException, ArithmeticError, LookupError, ValueError) as error:
        # Not only for damaged files: Python cannot represent every date.
        raise OSError(f"not a readable Parquet file: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class."""
    return next(iter(str(error).splitlines()), type(error).__name__)


JSON_LINES = Format("json lines", "line", _json_lines)
JSON_LIST = Format("json list", "row", _json_list)
PARQUET = Format("parquet", "row", _parquet)
_BY_SUFFIX = {
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".csv": Format("csv", "line", partial(_csv, delimiter=",")),
    ".tsv": Format("tsv", "line", partial(_csv, delimiter="\t")),
    ".parquet": PARQUET,
}
