"""Reads Parquet files row by row, in memory that a limit or the size of the file bounds.

A few bytes of a Parquet file may stand for gigabytes: pages are compressed, and a value that repeats is
stored once. pyarrow allocates what the pages claim. So their headers are read first, and the largest page
decides how many rows are decoded at once. What the metadata at the end of the file says about sizes is not
used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from distrust.data.parquet_pages import Page, read_pages
from distrust.data.record_errors import RecordError, too_large
from distrust.errors import MissingDependency

BATCH_ROWS = 256  # rows that are decoded at once, at most
_BATCHES_PER_DICTIONARY = 16  # batches that are read at once, where a column has a large dictionary
_DECODED = 8  # a page, and what is decoded at once, may take so many times the limit of a record
_EXPANSION = 64  # ... or so many times its size in the file: then memory is proportional to the file
_READ_DICTIONARY = 1 << 22  # bytes; libraries write 1 or 2 MiB
_FOOTER_BYTES = 8  # at the end of a file: the length of the metadata, and b"PAR1"
_BUFFER_BYTES = 1 << 20  # for the compressed bytes of a column
_RAISE = "raise --max-record-bytes"


def import_pyarrow() -> Any:
    """The module ``pyarrow``, with all that this package uses of it; MissingDependency if not installed."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependency("a Parquet file", library="pyarrow", extra="train") from error
    return pyarrow


def open_table(file: BinaryIO, limit: int, **options: Any) -> Any:
    """A ``pyarrow.parquet.ParquetFile``; OSError if its metadata takes more than ``limit`` bytes."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - _FOOTER_BYTES))
    size = int.from_bytes(file.read(4), "little")
    if limit < size < end:  # a wrong length is for pyarrow to report
        raise OSError(f"its metadata takes {size:,} bytes; write larger row groups, or {_RAISE}")
    file.seek(0)
    # No pre-buffering: memory stays at one batch.
    return import_pyarrow().parquet.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES, **options)


def read_batches(file: BinaryIO, names: Sequence[str], limit: int, *, dictionaries: bool) -> Iterator[Any]:
    """The rows of the named columns as small ``pyarrow.RecordBatch``es.

    With ``dictionaries``, strings inside lists may be dictionary arrays: a row may repeat a long one often.

    Raises:
        OSError: a page or a list takes much more memory than both ``limit`` bytes and its size in the file.
    """
    metadata = open_table(file, limit).metadata
    for group in range(metadata.num_row_groups):
        chunks = list(_chunks(file, metadata, group, names))
        for chunk in chunks:
            chunk.require_bounded(limit)
        repeated = [chunk.path for chunk in chunks if dictionaries and chunk.may_repeat(limit)]
        # pyarrow copies the dictionary for each batch, so these are larger.
        rows = BATCH_ROWS * (_BATCHES_PER_DICTIONARY if repeated else 1)
        largest = max((chunk.row_bytes(limit) for chunk in chunks), default=1)
        rows = min(rows, max(1, _DECODED * limit // largest))
        table = open_table(file, limit, metadata=metadata, read_dictionary=repeated)
        for batch in table.iter_batches(rows, row_groups=[group], columns=names, use_threads=False):
            yield from (batch.slice(first, BATCH_ROWS) for first in range(0, len(batch), BATCH_ROWS))


@dataclass(slots=True)
class _Chunk:
    """A column of a row group, as the headers of its pages describe it."""

    path: str
    row_group: int
    value_bytes: int  # of a value in an array of them; 0: they vary
    elements: int = 0  # values in lists, which may all be in one row; 0 outside of lists
    compressed: int = 0  # bytes in the file
    decompressed: int = 0  # bytes of all pages
    largest_page: int = 0  # bytes, decompressed
    largest_expanded: int = 0  # likewise, of the pages compressed to less than 1/_EXPANSION
    largest_in_dictionary: int = 0  # bytes of a value, at most

    def require_bounded(self, limit: int) -> None:
        """Raise OSError if reading it could take too much memory."""
        where = f"column {self.path}, row group {self.row_group}"
        if self.largest_expanded > _DECODED * limit:
            size = f"a page of {self.largest_expanded:,} bytes, from less than 1/{_EXPANSION} of that"
            raise OSError(f"{where}: {size}; write smaller pages, or {_RAISE}")
        allowed = max(limit, _EXPANSION * self.compressed)
        if self.elements > allowed or self.elements * self.value_bytes > _DECODED * allowed:
            size = f"lists of {self.elements:,} elements in {self.compressed:,} bytes"
            raise OSError(f"{where}: {size}; write smaller row groups, or {_RAISE}")

    def row_bytes(self, limit: int) -> int:
        """Bytes that a row may take; 1 if the number of rows at once need not be limited."""
        if not self.elements:
            # A value is never larger than the page that holds it, or that holds its dictionary.
            return self.value_bytes or max(1, self.largest_page)
        is_bounded = self.decompressed <= max(_DECODED * limit, _EXPANSION * self.compressed)
        return 1 if is_bounded else self.largest_page

    def may_repeat(self, limit: int) -> bool:
        """Whether the values of one row, copied from the dictionary, could take too much memory."""
        allowed = max(_DECODED * limit, _EXPANSION * self.compressed)
        return not self.value_bytes and self.elements * self.largest_in_dictionary > allowed


def _chunks(file: BinaryIO, metadata: Any, row_group: int, names: Sequence[str]) -> Iterator[_Chunk]:
    columns = metadata.row_group(row_group)
    for index in range(columns.num_columns):
        column, schema = columns.column(index), metadata.schema.column(index)
        if not any(f"{schema.path}.".startswith(f"{name}.") for name in names):
            continue
        width = 0 if schema.physical_type == "BYTE_ARRAY" else max(schema.length or 0, 8)
        chunk = _Chunk(schema.path, row_group, width)
        for page in read_pages(file, column):
            chunk.compressed += page.compressed
            chunk.decompressed += page.size
            chunk.largest_page = max(chunk.largest_page, page.size)
            if page.size > _EXPANSION * page.compressed:
                chunk.largest_expanded = max(chunk.largest_expanded, page.size)
            if page.is_dictionary:
                largest = _largest_value(file, page, column.compression)
                chunk.largest_in_dictionary = max(chunk.largest_in_dictionary, largest)
            elif schema.max_repetition_level:
                chunk.elements += page.values
        yield chunk


def _largest_value(file: BinaryIO, page: Page, codec: str) -> int:
    """The bytes of the largest text in the page of a dictionary, or at least as many."""
    pyarrow = import_pyarrow()
    if page.size > _READ_DICTIONARY:
        return page.size
    file.seek(page.position)
    data = file.read(page.compressed)
    if codec != "UNCOMPRESSED":
        try:
            data = pyarrow.decompress(data, page.size, codec.lower(), asbytes=True)
        except (pyarrow.ArrowException, OSError, ValueError):  # pyarrow has codecs that it offers only inside
            return page.size
    position = largest = 0
    while position < len(data):
        size = int.from_bytes(data[position : position + 4], "little")
        largest = max(largest, size)
        position += 4 + size
    return min(largest, page.size)


def bounded_rows(
    batch: Any, limit: int, decode: Callable[[Any], Iterable[dict[str, Any]]] | None = None
) -> Iterator[dict[str, Any] | RecordError]:
    """The rows of a batch or table; an error in place of one that takes more than ``limit`` bytes.

    ``decode`` returns the rows of a batch of bounded size; by default as pyarrow does.
    """
    decode = decode or _decode
    if _size(batch) <= limit:
        yield from decode(batch)
        return
    for number in range(len(batch)):
        row = batch.slice(number, 1)
        if _size(row) > limit:
            yield too_large(limit)
        else:
            yield from decode(row)


def _decode(batch: Any) -> list[dict[str, Any]]:
    # Plain arrays first: a Python value of a dictionary array takes several times as long.
    schema = import_pyarrow().schema([field.with_type(_plain(field.type)) for field in batch.schema])
    plain = batch if schema.equals(batch.schema) else batch.cast(schema)
    rows: list[dict[str, Any]] = plain.to_pylist()
    return rows


def _plain(kind: Any) -> Any:
    """An Arrow type without dictionaries inside lists and structs."""
    pyarrow = import_pyarrow()
    match kind:
        case pyarrow.DictionaryType():
            return kind.value_type
        case pyarrow.ListType():
            return pyarrow.list_(kind.value_field.with_type(_plain(kind.value_type)))
        case pyarrow.LargeListType():
            return pyarrow.large_list(kind.value_field.with_type(_plain(kind.value_type)))
        case pyarrow.StructType():
            return pyarrow.struct([field.with_type(_plain(field.type)) for field in kind])
    return kind


def _size(batch: Any) -> int:
    return sum(
        _array_size(chunk) for column in batch.columns for chunk in getattr(column, "chunks", [column])
    )


def _array_size(array: Any) -> int:
    """The bytes of an array; a value of a dictionary counts as often as it appears."""
    pyarrow = import_pyarrow()
    match array:
        case pyarrow.DictionaryArray():
            return len(array) + _decoded_size(array)
        case pyarrow.ListArray() | pyarrow.LargeListArray() | pyarrow.FixedSizeListArray():
            return len(array) + _array_size(array.flatten())
        case pyarrow.StructArray():
            return len(array) + sum(map(_array_size, array.flatten()))
    return int(array.nbytes)


def _decoded_size(array: Any) -> int:
    compute, values = import_pyarrow().compute, array.dictionary
    try:
        lengths = compute.binary_length(values)
    except NotImplementedError:  # values of one size
        return int(values.nbytes // max(1, len(values)) * len(array))
    used = lengths.cast("int64").take(array.indices)
    return int(compute.sum(used).as_py() or 0)
