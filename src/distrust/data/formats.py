"""Bytes -> rows: JSON Lines, JSON, CSV and Parquet, a row at a time, in memory that does not grow with them.

A row is a number and its fields, or what is wrong with it; which fields, and whether nulls are among them,
``Columns`` says. What is text stays the text it is: a cell of a CSV file is never guessed to be a
number or a missing value, apart from those of w and H.
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
from pathlib import Path
from typing import Any, BinaryIO, cast

from distrust.data.columns import Columns
from distrust.data.fields import Fields, json_kind, quote_value, unique_members
from distrust.data.record_errors import RecordError
from distrust.data.records import Unit
from distrust.errors import DataError

Row = tuple[int, Fields | RecordError]
"""The number of a row, and its fields or what is wrong with it."""

_CHUNK = 1 << 20
#: Of a file's beginning, to tell what it is.
_LOOKED_AT = 4096
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class Format:
    """How the bytes of a file become rows.

    Attributes:
        name: as a cache's key has it.
        unit: what its rows are counted by.
        rows: of a file opened for bytes, and the columns that are needed.
    """

    name: str
    unit: Unit
    rows: Callable[[BinaryIO, Columns], Iterator[Row]]


def format_of(path: Path) -> tuple[Format, bool]:
    """How a file is read, by its name, and whether it is compressed (``.gz``).

    A ``.json`` file is looked into: it is a list of objects, or JSON Lines. An unknown name is JSON Lines.

    Raises:
        OSError: a ``.json`` file cannot be read.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if packed else suffixes)[-1:]
    name = suffix[0] if suffix else ""
    if name == ".json":
        return (JSON_LIST if _begins_a_list(path, packed=packed) else JSON_LINES), packed
    return _BY_SUFFIX.get(name, JSON_LINES), packed


def is_data(path: Path) -> bool:
    """Whether a file's name says that it holds data."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix in (*_BY_SUFFIX, ".json")


def is_binary(path: Path, *, packed: bool) -> bool:
    """Whether a file begins as no text does, with a zero byte; text in UTF-16 has its mark first.

    Raises:
        OSError: it cannot be read.
    """
    with open_bytes(path, packed=packed) as file:
        first = file.read(_LOOKED_AT)
    return b"\0" in first and not first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def _begins_a_list(path: Path, *, packed: bool) -> bool:
    with open_bytes(path, packed=packed) as file:
        return file.read(_LOOKED_AT).removeprefix(_BOM).lstrip()[:1] == b"["


@contextlib.contextmanager
def open_bytes(path: Path, *, packed: bool) -> Iterator[BinaryIO]:
    """The file's content, unpacked.

    Raises:
        OSError: it cannot be read, or is not what ``.gz`` says.
    """
    with path.open("rb") as raw:
        if not packed:
            yield raw
            return
        import gzip

        try:
            with gzip.open(raw, "rb") as file:
                yield cast(BinaryIO, file)
        except (EOFError, zlib.error) as error:
            raise OSError(f"damaged: {error}") from error


def _json_lines(file: BinaryIO, columns: Columns) -> Iterator[Row]:
    """The lines that are not blank. Only a line feed ends a line: JSON text may hold U+2028 and the like."""
    for number, raw in enumerate(file, 1):
        line = (raw.removeprefix(_BOM) if number == 1 else raw).rstrip()
        if line:
            yield number, _decode(line, columns)


def _decode(raw: bytes, columns: Columns) -> Fields | RecordError:
    """The fields of a line, or what is wrong with it."""
    try:
        text = raw.decode("utf-8")
        return _fields(json.loads(text, object_pairs_hook=unique_members), text, columns)
    except RecordError as problem:
        return problem
    except UnicodeDecodeError as error:
        return RecordError(f"invalid UTF-8 at byte {error.start + 1}; save the file as UTF-8")
    except json.JSONDecodeError as error:
        reason = error.msg[:1].lower() + error.msg[1:]
        return RecordError(
            f"invalid JSON at column {error.colno}: {reason}; a record is one JSON object on one line"
        )
    except (ValueError, RecursionError):  # a number of thousands of digits; brackets without end
        return RecordError("JSON with a number too long or nested too deep to read; simplify it")


def _fields(value: Any, text: str, columns: Columns) -> Fields | RecordError:
    """An object's fields."""
    if not isinstance(value, dict):
        return RecordError(f"{json_kind(value)}, not a JSON object; a record is one JSON object on one line")
    return columns.select(value, text)


def _json_list(file: BinaryIO, columns: Columns) -> Iterator[Row]:
    """The objects of a list. After one that is no JSON nothing can be told of the rest, so it is the last."""
    number = 0
    try:
        with io.TextIOWrapper(file, encoding="utf-8-sig") as text:
            for number, (value, written) in enumerate(_elements(text), 1):
                yield number, _fields(value, written, columns)
    except RecordError as problem:
        yield number + 1, problem
    except UnicodeDecodeError:
        yield number + 1, RecordError("invalid UTF-8; save the file as UTF-8")
    except json.JSONDecodeError as error:
        yield number + 1, RecordError(f"invalid JSON: {error.msg[:1].lower() + error.msg[1:]}; correct it")
    except (ValueError, RecursionError):
        yield number + 1, RecordError("JSON with a number too long or nested too deep to read; simplify it")


def _elements(file: io.TextIOWrapper) -> Iterator[tuple[Any, str]]:
    """The elements of a JSON list and how they are written, on one line each.

    No more of the list is in memory than a chunk or an element.
    """
    decoder = json.JSONDecoder(object_pairs_hook=unique_members)
    text, ended, first = file.read(_CHUNK), False, True
    place = next_token(text, 0) + 1  # behind the bracket
    while True:
        place = next_token(text, place)
        if first and text.startswith("]", place):
            break
        try:
            value, end = decoder.raw_decode(text, place)
            end = next_token(text, end)
        except json.JSONDecodeError:
            if ended:
                raise
            end = len(text)
        if end == len(text) and not ended:  # cut short, perhaps
            more = file.read(max(_CHUNK, end - place))  # as much again: a huge element costs no square
            text, place, ended = text[place:] + more, 0, not more
            continue
        first = False
        # A string of JSON holds no line's end as such, so each of them stands between two tokens.
        yield value, text[place:end].rstrip().replace("\n", " ").replace("\r", " ")
        if not text.startswith(",", end):
            place = end
            break
        place = end + 1
    if not text.startswith("]", place):
        raise json.JSONDecodeError("expecting ',' or ']' after an element", "", 0)
    if (text[place + 1 :] + file.read(_CHUNK)).strip():
        raise json.JSONDecodeError("extra data after the list", "", 0)


def next_token(text: str, place: int) -> int:
    """Where the next token of JSON begins."""
    return cast(re.Match[str], _SPACE.match(text, place)).end()


def _csv_format(delimiter: str) -> Callable[[BinaryIO, Columns], Iterator[Row]]:
    def rows(file: BinaryIO, columns: Columns) -> Iterator[Row]:
        csv.field_size_limit(sys.maxsize)  # a document may be longer than the 128 KiB that are the default
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            yield from _csv_rows(csv.reader(text, delimiter=delimiter, strict=True), columns)

    return rows


def _csv_rows(reader: Any, columns: Columns) -> Iterator[Row]:
    """The rows under a header, each by the line it begins at."""
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            begins, line = line, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _header(cells)
            else:
                yield begins, _cells(cells, header, columns)
    except RecordError as problem:
        yield 1, problem
    except csv.Error as error:
        yield line, RecordError(f"invalid CSV: {error}; correct it")
    except UnicodeDecodeError:
        yield line, RecordError("invalid UTF-8 from here on; save the file as UTF-8")


def _header(cells: list[str]) -> list[str]:
    twice = [name for name, count in Counter(cells).items() if count > 1]
    if twice:
        raise RecordError("stands twice in the header; keep one", field=quote_value(twice[0]))
    return cells


def _cells(cells: list[str], header: list[str], columns: Columns) -> Fields | RecordError:
    if len(cells) != len(header):
        return RecordError(f"{len(cells)} cells under a header of {len(header)}; correct it")
    numbers = columns.numbers
    return columns.select(
        {
            name: (_number(cell) if cell else None) if name in numbers else cell
            for name, cell in zip(header, cells, strict=True)
        }
    )


def _number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


#: Rows of a Parquet file that are in memory at once.
_BATCH = 256


def _parquet(file: BinaryIO, columns: Columns) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"Parquet files need pyarrow ({error}): pip install 'distrust-trainer[train]'"
        ) from None
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=_CHUNK)
        needed = columns.needed_from(_header(table.schema_arrow.names))
        for batch in table.iter_batches(_BATCH, columns=needed, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield number, columns.select(row)
    except RecordError as problem:
        yield 1, problem
    except (pyarrow.ArrowException, ArithmeticError, LookupError, ValueError) as error:
        # Not only of the file: a date may be beyond all that Python has.
        raise OSError(f"is not the Parquet file that it should be: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


JSON_LINES = Format("json lines", "line", _json_lines)
JSON_LIST = Format("json list", "row", _json_list)
PARQUET = Format("parquet", "row", _parquet)
_BY_SUFFIX = {
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".csv": Format("csv", "line", _csv_format(",")),
    ".tsv": Format("tsv", "line", _csv_format("\t")),
    ".parquet": PARQUET,
}
