"""Reads the headers of the pages of a Parquet column: what a reader of the column would allocate.

A header is a struct of Thrift's compact protocol, as https://parquet.apache.org/docs/file-format defines it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

_FIRST_READ = 1 << 12  # bytes; most headers take less than 100
_MAX_HEADER_BYTES = 1 << 24  # as in pyarrow
_DICTIONARY_PAGE = 2


class Page(NamedTuple):
    """A page, by its header."""

    is_dictionary: bool
    size: int  # bytes, decompressed
    compressed: int  # bytes in the file, without the header
    values: int  # number of values, with nulls and empty lists
    position: int  # of its content in the file


def read_pages(file: BinaryIO, column: Any) -> Iterator[Page]:
    """The pages of a column of a row group, a ``pyarrow.parquet.ColumnChunkMetaData``.

    Raises:
        OSError: a header is damaged, or the file ends too early.
    """
    begin = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < begin:
        begin = column.dictionary_page_offset
    position, end, remaining = begin, begin + column.total_compressed_size, column.num_values
    while remaining > 0 and position < end:  # as pyarrow, which stops at this number of values
        page, length = _read_header(file, position)
        if min(page) < 0:
            raise OSError("a damaged page")
        position += length + page.compressed
        remaining -= 0 if page.is_dictionary else page.values
        yield page


def _read_header(file: BinaryIO, position: int) -> tuple[Page, int]:
    """The page at a position of the file, and the bytes of its header."""
    size = _FIRST_READ
    while size <= _MAX_HEADER_BYTES:
        file.seek(position)
        data = file.read(size)
        struct = _Struct(data)
        try:
            fields = struct.read()
            # Fields 5, 7 and 8: of a page of data, a dictionary, a page of data in version 2.
            counts = fields.get(8) or fields.get(7) or fields.get(5) or {}
            begin = position + struct.position
            page = Page(fields[1] == _DICTIONARY_PAGE, fields[2], fields[3], counts.get(1, 0), begin)
            return page, struct.position
        except IndexError:  # longer than what was read
            if len(data) < size:
                raise OSError("a page ends in the middle") from None
            size *= 16
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            break
    raise OSError("a damaged page header")


class _Struct:
    """A struct of Thrift's compact protocol: its fields by number; texts are skipped."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def read(self) -> dict[int, Any]:
        """The fields; IndexError if the data ends before the struct does."""
        fields: dict[int, Any] = {}
        number = 0
        while header := self._byte():
            number = number + (header >> 4) if header >> 4 else self._integer()
            fields[number] = self._value(header & 15)
        return fields

    def _value(self, kind: int) -> Any:
        match kind:
            case 1 | 2:  # true, false
                return kind == 1
            case 3:
                return self._byte()
            case 4 | 5 | 6:  # integers of 16, 32 and 64 bits
                return self._integer()
            case 7:  # double
                self.position += 8
            case 8:  # text
                size = self._varint()
                self.position += size
            case 12:
                return self.read()
            case _:  # headers have no other
                raise ValueError(kind)
        return None

    def _byte(self) -> int:
        byte = self._data[self.position]
        self.position += 1
        return byte

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)  # zigzag
