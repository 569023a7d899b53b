"""A numpy ``.npz`` as named arrays, read without numpy's trust in it: nothing is unpickled or evaluated.

An ``.npz`` is a zip of ``.npy`` members. What it says of itself is bounded before any memory is taken:

- members have plain names that end in ``.npy``, each once; they are stored or deflated, and not encrypted;
- all of them together expand to no more than :data:`TIMES_ITS_SIZE` the file (small ones to more), as the zip
  declares it. What a member really holds is counted while it is read: it is what was declared, and its CRC
  is right, and its numbers are finite;
- a member's header is text of the one form that numpy writes; dtype times shape is the length of its data;
- the members fill the file: nothing large is hidden between them.

A member of objects (a pickle) is refused by its name.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from math import prod
from typing import Any, NamedTuple

from distrust.checkpoint.format import ITEM_SIZES, is_valid_shape
from distrust.checkpoint.memory import available_bytes
from distrust.errors import CheckpointUnreadable, CorruptCheckpoint, shorten
from distrust.importers import finite

#: How many times as large as the file its arrays may be: random numbers, which weights are, hardly shrink.
TIMES_ITS_SIZE = 20
SMALL_BYTES = 16 << 20
#: Numpy's own bound for the header of an array.
MAX_HEADER_BYTES = 10_000
_MEMBER_OVERHEAD_BYTES = 4096
_FREE_OVERHEAD_BYTES = 128 << 10
_PIECE_BYTES = 1 << 20
_MAGIC = b"\x93NUMPY"
_HEADER = re.compile(
    r"\{'descr': ?'([^']{1,16})', 'fortran_order': (True|False), 'shape': \(([0-9, ]*)\),? ?\} *\n?", re.ASCII
)
_DTYPES = {
    "b1": "BOOL", "u1": "U8", "i1": "I8", "u2": "U16", "i2": "I16", "f2": "F16", "u4": "U32", "i4": "I32",
    "f4": "F32", "u8": "U64", "i8": "I64", "f8": "F64", "c8": "C64",
}  # fmt: skip
_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError, EOFError, ValueError,
    LookupError, OverflowError,
)  # fmt: skip


class Array(NamedTuple):
    """An array as its member describes it.

    Attributes:
        name: of the member, without ``.npy``.
        dtype: the format's name of it.
        shape: its dimensions.
        nbytes: of its data.
        swapped: whether its bytes stand in big-endian order.
        fortran: whether its first index runs fastest.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    swapped: bool
    fortran: bool


#: Takes each array and its pieces, in order.
Take = Callable[[Array, Iterator[bytes]], None]


def describe(descriptor: int, what: str) -> list[Array]:
    """The arrays of a file; their data is not read.

    Raises:
        CorruptCheckpoint: with the first member that is not one of an array of numbers.
    """
    found: list[Array] = []
    _walk(descriptor, what, lambda array, _: found.append(array))
    return found


def verify(descriptor: int, what: str, squares: str | None = None) -> dict[str, Array]:
    """Read every member to its end; returns how each array is described, by its name.

    Args:
        descriptor: of the file.
        what: for messages: its name.
        squares: what the names of arrays begin with that hold nothing below zero.

    Raises:
        CorruptCheckpoint: with the first member that is not what it says.
    """
    found: dict[str, Array] = {}

    def drop(array: Array, pieces: Iterator[bytes]) -> None:
        found[array.name] = array
        for piece in pieces:
            _require_numbers(piece, array, squares)

    _walk(descriptor, what, drop)
    return found


def read(descriptor: int, what: str, squares: str | None = None) -> dict[str, Any]:
    """Every array by its name, as :class:`~distrust.importers.state.Bytes`.

    Args:
        descriptor: of the file.
        what: for messages: its name.
        squares: what the names of arrays begin with that hold nothing below zero.

    Raises:
        CorruptCheckpoint: with the first member that is not what it says.
        CheckpointUnreadable: if there is not the memory for them.
    """
    import numpy as np

    from distrust.importers.state import Bytes

    wanted = sum(array.nbytes for array in describe(descriptor, what))
    if wanted > SMALL_BYTES and wanted > (free := available_bytes()):
        raise CheckpointUnreadable(f"{what} takes {wanted:,} bytes of memory, and {free:,} are free")
    found: dict[str, Any] = {}

    def keep(array: Array, pieces: Iterator[bytes]) -> None:
        data, offset = np.empty(array.nbytes, np.uint8), 0
        for piece in pieces:
            _require_numbers(piece, array, squares)
            data[offset : offset + len(piece)] = np.frombuffer(piece, np.uint8)
            offset += len(piece)
        found[array.name] = Bytes(_in_order(data, array), array.dtype, array.shape)

    _walk(descriptor, what, keep)
    return found


def _in_order(data: Any, array: Array) -> Any:
    """The same data in little-endian order and C layout, flat."""
    import numpy as np

    size = ITEM_SIZES[array.dtype]
    if array.swapped:
        part = size // 2 if array.dtype == "C64" else size  # a complex number is two
        data = data.reshape(-1, part)[:, ::-1].reshape(-1)
    if array.fortran and len(array.shape) > 1:
        data = data.view(np.dtype((np.void, size))).reshape(array.shape[::-1]).T
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def _walk(descriptor: int, what: str, take: Take) -> None:
    size = os.fstat(descriptor).st_size
    with _told(what), zipfile.ZipFile(_Reader(descriptor, size)) as zipped:
        members = zipped.infolist()
        _require_bounded(members, size, what)
        seen: set[str] = set()
        for member in members:
            name = _name(member, what)
            if name in seen:
                raise CorruptCheckpoint(f"{what}: the member {shorten(name)!r} stands there twice")
            seen.add(name)
            with _told(f"{what}: the member {shorten(name)!r}"), zipped.open(member) as stream:
                array = _array(stream, name, member.file_size)
                take(array, _pieces(stream, array.nbytes))


def _require_bounded(members: list[zipfile.ZipInfo], size: int, what: str) -> None:
    expanded = sum(member.file_size for member in members)
    if expanded > max(SMALL_BYTES, TIMES_ITS_SIZE * size):
        raise CorruptCheckpoint(
            f"{what} would expand from {size:,} bytes to {expanded:,}: that is no file of weights"
        )
    packed = sum(member.compress_size for member in members)
    overhead = _FREE_OVERHEAD_BYTES + sum(
        _MEMBER_OVERHEAD_BYTES + 2 * len(member.filename.encode()) for member in members
    )
    if not packed <= size <= packed + overhead:
        raise CorruptCheckpoint(f"{what}: its members hold {packed:,} bytes, and the file has {size:,}")


def _name(member: zipfile.ZipInfo, what: str) -> str:
    # Not `filename`, which zipfile has made fit: what was written counts.
    name = member.orig_filename
    if "/" in name or "\\" in name or "\0" in name:
        raise CorruptCheckpoint(f"{what}: the member {shorten(name)!r} is named like a path")
    if not name.endswith(".npy"):
        raise CorruptCheckpoint(f"{what}: the member {shorten(name)!r} is no .npy")
    if member.flag_bits & 1:
        raise CorruptCheckpoint(f"{what}: the member {shorten(name)!r} is encrypted")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CorruptCheckpoint(f"{what}: the member {shorten(name)!r} is neither stored nor deflated")
    return name.removesuffix(".npy")


def _array(stream: Any, name: str, declared: int) -> Array:
    """What the header of a member says; the stream stands at its data then."""
    start = stream.read(len(_MAGIC) + 2)
    if not start.startswith(_MAGIC) or len(start) < len(_MAGIC) + 2 or start[-2] not in (1, 2, 3):
        raise CorruptCheckpoint("it is no array of numpy")
    width = 2 if start[-2] == 1 else 4
    length = int.from_bytes(stream.read(width), "little")
    if length > MAX_HEADER_BYTES:
        raise CorruptCheckpoint(f"its header would have {length:,} bytes")
    text = stream.read(length).decode("latin-1")
    match = _HEADER.fullmatch(text)
    if match is None:
        raise CorruptCheckpoint("its header is not one that numpy writes for an array of numbers")
    descr, fortran, dimensions = match.groups()
    if "O" in descr:
        raise CorruptCheckpoint("it holds Python objects (a pickle), which are never loaded")
    dtype = _DTYPES.get(descr[1:]) if descr[0] in "<>|=" else None
    if dtype is None:
        raise CorruptCheckpoint(f"its dtype {shorten(descr)!r} is no number that a checkpoint can hold")
    shape = _shape(dimensions)
    nbytes = prod(shape) * ITEM_SIZES[dtype]
    begin = len(start) + width + length
    if begin + nbytes != declared:
        raise CorruptCheckpoint(
            f"by dtype and shape it has {nbytes:,} bytes, and there are {max(0, declared - begin):,}"
        )
    return Array(name, dtype, shape, nbytes, swapped=descr[0] == ">", fortran=fortran == "True")


def _shape(text: str) -> tuple[int, ...]:
    numbers = [number.strip() for number in text.split(",")]
    if numbers[-1] == "":
        numbers.pop()
    if not all(number.isdigit() and len(number) <= 18 for number in numbers):
        raise CorruptCheckpoint("its shape is no shape")
    shape = tuple(map(int, numbers))
    if not is_valid_shape(shape):
        raise CorruptCheckpoint("no array has its shape")
    return shape


def _pieces(stream: Any, nbytes: int) -> Iterator[bytes]:
    """The data, counted; reading the last of it has zipfile compare the CRC."""
    left = nbytes
    while left:
        piece = stream.read(min(left, _PIECE_BYTES))
        if not piece:
            raise CorruptCheckpoint(f"its data ends {left:,} bytes too early")
        left -= len(piece)
        yield piece
    if stream.read(1):
        raise CorruptCheckpoint("it is longer than it says")


def _require_numbers(piece: bytes, array: Array, squares: str | None) -> None:
    if array.dtype == "BOOL" and piece.translate(None, b"\0\1"):
        raise CorruptCheckpoint("it holds booleans that are neither true nor false")
    never_negative = squares is not None and array.name.startswith(squares)
    finite.require(piece, array.dtype, swapped=array.swapped, never_negative=never_negative)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Whatever zipfile raises for what is no zip, as an error of this library, with the member's name."""
    try:
        yield
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(
            error.reason if error.reason.startswith(what) else f"{what}: {error.reason}"
        ) from None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise CorruptCheckpoint(f"{what} cannot be read as a zip: {error.strerror}") from None
    except _ZIP_ERRORS as error:
        reason = shorten(str(error)) or type(error).__name__
        raise CorruptCheckpoint(f"{what} cannot be read as a zip: {reason}") from None


class _Reader(io.RawIOBase):
    """A file as zipfile wants it, through a descriptor that others read, too; never more than is there."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._size = size
        self._place = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        if place < 0:
            raise OSError(
                errno.EINVAL, "a place before the beginning"
            )  # as a file does: zipfile relies on it
        self._place = place
        return place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._place)
        data = os.pread(self._descriptor, left if size < 0 else min(size, left), self._place)
        self._place += len(data)
        return data
