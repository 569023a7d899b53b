"""Reads a numpy ``.npz`` from an untrusted file: nothing is unpickled, and sizes are bounded before reading.

An ``.npz`` is a zip of ``.npy`` members. Invariants:

- each has a plain name ending in ``.npy``, used once; it is stored or deflated, and not encrypted;
- together they expand to at most :data:`MAX_EXPANSION` times the file (small files to :data:`SMALL_BYTES`);
- they have as many bytes as the zip declares, the right CRC, and only finite numbers;
- dtype times shape is the length of the data. An array of objects (a pickle) is refused;
- the members fill the file: nothing large is hidden between them.
"""

from __future__ import annotations

import errno
import io
import os
import warnings
import zipfile
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from distrust.checkpoint.arrays import NUMPY_NAMES
from distrust.checkpoint.format import is_valid_shape
from distrust.checkpoint.memory import available_bytes
from distrust.errors import CheckpointUnreadable, CorruptCheckpoint, ErrorTranslator, shorten
from distrust.importers.host_arrays import PIECE_BYTES, Depth, HostArray, require_finite

#: How many times its size a file may expand to: weights look random, and hardly compress.
MAX_EXPANSION = 20
SMALL_BYTES = 16 << 20
#: Enough for a shape of 64 dimensions. A short text also bounds what numpy's parser of literals can do.
MAX_HEADER_BYTES = 2048
#: What the zip format may add for each member, and for the file: names, padding, a comment.
_MEMBER_OVERHEAD_BYTES = 4096
_FILE_OVERHEAD_BYTES = 128 << 10
_DTYPES = {numpy_name: dtype for dtype, numpy_name in NUMPY_NAMES.items()}


def read(descriptor: int, file_name: str, depth: Depth, *, nonnegative: str = "") -> dict[str, HostArray]:
    """The arrays of an open file by name; they have data only if ``depth`` is "load".

    The position of the file changes. Arrays whose names begin with ``nonnegative``, unless it is empty, must
    not hold negative numbers.

    Raises:
        CorruptCheckpoint: naming the first invalid member.
        CheckpointUnreadable: if there is not enough memory.
    """
    arrays: dict[str, HostArray] = {}
    with (
        _zip_errors(file_name),
        open(descriptor, "rb", closefd=False) as file,
        zipfile.ZipFile(file) as archive,
    ):
        members = archive.infolist()
        expanded = sum(member.file_size for member in members)
        _require_bounded(members, expanded, os.fstat(descriptor).st_size, file_name)
        if depth == "load" and expanded > SMALL_BYTES and expanded > (free := available_bytes()):
            message = f"{file_name} takes {expanded:,} bytes of memory, and {free:,} are free"
            raise CheckpointUnreadable(message)
        for member in members:
            name = _member_name(member, file_name)
            label = f"{file_name}: the member {shorten(name)!r}"
            if name in arrays:
                raise CorruptCheckpoint(f"{label} occurs twice")
            is_square = bool(nonnegative) and name.startswith(nonnegative)
            with _zip_errors(label), archive.open(member) as stream:
                arrays[name] = _read_member(stream, member.file_size, depth, nonnegative=is_square)
    return arrays


def _require_bounded(members: list[zipfile.ZipInfo], expanded: int, size: int, file_name: str) -> None:
    if expanded > max(SMALL_BYTES, MAX_EXPANSION * size):  # a decompression bomb
        raise CorruptCheckpoint(f"{file_name} would expand from {size:,} bytes to {expanded:,}")
    packed = sum(member.compress_size for member in members)
    name_bytes = sum(len(member.filename.encode()) for member in members)
    overhead = _FILE_OVERHEAD_BYTES + _MEMBER_OVERHEAD_BYTES * len(members) + 2 * name_bytes
    if not packed <= size <= packed + overhead:  # overlapping members, or data outside of them
        raise CorruptCheckpoint(f"{file_name}: its members hold {packed:,} bytes, but the file has {size:,}")


def _member_name(member: zipfile.ZipInfo, file_name: str) -> str:
    name = member.orig_filename  # as written: zipfile changes `filename`
    problem = ""
    if "/" in name or "\\" in name or "\0" in name:
        problem = "is named like a path"
    elif not name.endswith(".npy"):
        problem = "is not an .npy file"
    elif member.flag_bits & 1:
        problem = "is encrypted"
    elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        problem = "is neither stored nor deflated"
    if problem:
        raise CorruptCheckpoint(f"{file_name}: the member {shorten(name)!r} {problem}")
    return name.removesuffix(".npy")


def _read_member(stream: IO[bytes], declared: int, depth: Depth, *, nonnegative: bool) -> HostArray:
    shape, is_fortran, dtype, header_bytes = _read_header(stream)
    if dtype.hasobject:
        raise CorruptCheckpoint("it holds Python objects (a pickle), which are never loaded")
    if dtype.name not in _DTYPES:
        shown = shorten(str(dtype))
        raise CorruptCheckpoint(f"its dtype {shown!r} is not a number that a checkpoint can hold")
    if not is_valid_shape(shape):
        raise CorruptCheckpoint("its shape is not that of an array")
    array = HostArray(_DTYPES[dtype.name], shape)  # a description; memory is allocated below
    if header_bytes + array.nbytes != declared:  # checked before memory is allocated for it
        available = max(0, declared - header_bytes)
        raise CorruptCheckpoint(f"dtype and shape need {array.nbytes:,} bytes, but it has {available:,}")
    if depth == "headers":
        return array
    data, offset = np.empty(array.nbytes if depth == "load" else 0, np.uint8), 0
    for piece in _read_pieces(stream, array.nbytes):
        if dtype == np.bool_ and piece.translate(None, b"\0\1"):
            raise CorruptCheckpoint("it holds booleans that are neither true nor false")
        require_finite(np.frombuffer(piece, dtype), nonnegative=nonnegative)
        if depth == "load":
            data[offset : offset + len(piece)] = np.frombuffer(piece, np.uint8)
            offset += len(piece)
    if depth == "verify":
        return array
    values: Any = data.view(dtype)
    values = values.reshape(shape[::-1]).T if is_fortran else values.reshape(shape)
    # uint8[nbytes] of the same values, little-endian and in C layout.
    flat = np.ascontiguousarray(values, dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
    return array._replace(data=flat)


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, Fortran order, dtype, and the length of the header; the stream is then at the data."""
    magic = stream.read(npy.MAGIC_LEN)
    if not magic.startswith(npy.MAGIC_PREFIX):
        raise CorruptCheckpoint("it is not an array of numpy")
    # Version 3 exists for the names of fields alone, which arrays of numbers do not have.
    if magic[-2:] not in (b"\1\0", b"\2\0"):
        raise CorruptCheckpoint(f"it is in version {[*magic[-2:]]} of numpy's format")
    width, parse = (2, npy.read_array_header_1_0) if magic[-2] == 1 else (4, npy.read_array_header_2_0)
    length = stream.read(width)
    nbytes = int.from_bytes(length, "little")
    if nbytes > MAX_HEADER_BYTES:  # numpy would read as much as a header claims before it complains
        raise CorruptCheckpoint(f"its header would have {nbytes:,} bytes")
    text = length + stream.read(nbytes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy repairs headers of Python 2; Python warns of odd literals
            shape, is_fortran, dtype = parse(io.BytesIO(text), max_header_size=MAX_HEADER_BYTES)
    # The parser evaluates a literal: SyntaxError, TokenError, MemoryError, RecursionError and others.
    except Exception:
        raise CorruptCheckpoint("its header is not valid") from None
    return shape, is_fortran, dtype, len(magic) + len(text)


def _read_pieces(stream: IO[bytes], nbytes: int) -> Iterator[bytes]:
    remaining = nbytes
    while remaining:
        piece = stream.read(min(remaining, PIECE_BYTES))
        if not piece:  # the zip declares more than it holds
            raise CorruptCheckpoint(f"its data ends {remaining:,} bytes too early")
        remaining -= len(piece)
        yield piece
    if stream.read(1):  # at the end of the stream zipfile compares the CRC
        raise CorruptCheckpoint("it is longer than its header says")


def _zip_errors(what: str) -> ErrorTranslator:
    """Errors of zipfile become CorruptCheckpoint; each message begins with the file or member."""

    def translate(error: Exception) -> Exception:
        match error:
            case CorruptCheckpoint():
                return CorruptCheckpoint(
                    error.reason if error.reason.startswith(what) else f"{what}: {error.reason}"
                )
            case CheckpointUnreadable() | MemoryError():
                return error
            case OSError(errno=number) if number != errno.EINVAL:
                return error
            case OSError():  # EINVAL: zipfile was led to an offset before the file
                details = str(error.strerror)
            case _:  # BadZipFile, zlib.error, struct.error, NotImplementedError and others
                details = shorten(str(error)) or type(error).__name__
        return CorruptCheckpoint(f"{what} is not a valid zip: {details}")

    return ErrorTranslator((Exception,), translate)
