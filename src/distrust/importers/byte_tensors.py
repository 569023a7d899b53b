"""The single file: a safetensors file with its metadata and its optimizer as JSON in tensors of bytes.

``_metadata`` is uint8[n], the JSON object of :mod:`distrust.importers.fields`. ``_optimizer``, which
may be absent, is uint8[n], JSON in one of the spellings of :mod:`distrust.importers.moments`. Every
other tensor is one of the model. The format has no checksums: what does not contradict itself is taken.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrust.checkpoint.files import errors_with_path, open_regular, parse_checkpoint_name, read_into
from distrust.checkpoint.format import (
    ITEM_SIZES,
    LENGTH_BYTES,
    METADATA,
    TensorInfo,
    is_valid_shape,
)
from distrust.checkpoint.header import header_length
from distrust.checkpoint.memory import available_bytes
from distrust.errors import CheckpointUnreadable, CorruptCheckpoint, quote_untrusted, shorten
from distrust.importers import agreement, fields, finite, moments
from distrust.importers.bounded import parse_object
from distrust.importers.fields import together
from distrust.importers.header import NO_DIGEST, OlderHeader

if TYPE_CHECKING:
    from distrust.checkpoint.arrays import Framework
    from distrust.checkpoint.checkpoint import Checkpoint
    from distrust.importers.state import Bytes

METADATA_TENSOR, OPTIMIZER_TENSOR = "_metadata", "_optimizer"
#: The numbers of a hundred million moments.
MAX_OPTIMIZER_BYTES = 2 << 30
_PIECE_BYTES = 1 << 20


def header(path: Path) -> OlderHeader:
    """See :func:`distrust.importers.read_header`."""
    with _opened(path) as file:
        return file.header


def verify(path: Path) -> OlderHeader:
    """See :func:`distrust.importers.verify`."""
    with _opened(path) as file:
        file.optimizer()
        file.require_finite()
        return file.header


def read(path: Path, framework: Framework) -> tuple[OlderHeader, Checkpoint]:
    """See :func:`distrust.importers.read`."""
    from distrust.importers import state

    with _opened(path) as file:
        optimizer = file.optimizer()
        return file.header, state.assemble(file.header, file.model(), optimizer, framework=framework)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_File]:
    with open_regular(path) as (descriptor, status):
        yield _File(path, descriptor, status.st_size)


class _File:
    """A file whose header makes sense, and its metadata."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._tensors = _tensors(descriptor, size)
        self._shapes = {name: info.shape for name, info in self._tensors.items()}
        self._of_model = [info for name, info in self._tensors.items() if name not in _OURS]
        named = parse_checkpoint_name(path)
        raw = self._bytes(METADATA_TENSOR, fields.MAX_METADATA_BYTES)
        self.header = OlderHeader(
            "byte tensors",
            fields.parse(raw, METADATA_TENSOR, path),
            kind=named[2] if named else "periodic",
            file_size=size,
            tensors=lambda: _described(path),
            lacks_arrays=self._tensors.keys() == {METADATA_TENSOR},
        )

    def optimizer(self) -> dict[str, Any]:
        """The optimizer's tree, its moments still lists of numbers."""
        found: dict[str, Any] = {}
        if OPTIMIZER_TENSOR in self._tensors:
            raw = self._bytes(OPTIMIZER_TENSOR, MAX_OPTIMIZER_BYTES)
            found = moments.parse(parse_object(raw, OPTIMIZER_TENSOR), self._shapes)
        scalars = self.header.fields.optimizer_scalars
        # A scalar that is told twice, and is the same, is one.
        again = {name for name in scalars.keys() & found.keys() if scalars[name] == found[name]}
        told_once = {name: value for name, value in scalars.items() if name not in again}
        tree = together(told_once, found, f"{METADATA_TENSOR} and {OPTIMIZER_TENSOR}")
        told_there = agreement.STEP in told_once
        agreement.require(
            tree,
            {info.name: info.shape for info in self._of_model},
            step=self.header.step,
            of_moments=OPTIMIZER_TENSOR,
            of_step=f"{METADATA_TENSOR}: optimizer_scalars.step"
            if told_there
            else f"{OPTIMIZER_TENSOR}: step",
        )
        return tree

    def require_finite(self) -> None:
        """Read the model to its end, a piece at a time, and check that its numbers are finite."""
        for info in self._of_model:
            for offset in range(0, info.nbytes, _PIECE_BYTES):
                piece = bytearray(min(_PIECE_BYTES, info.nbytes - offset))
                read_into(self._descriptor, memoryview(piece), info.offset + offset)
                _require_finite(piece, info)

    def model(self) -> dict[str, Bytes]:
        """Every tensor but those two."""
        import numpy as np

        from distrust.importers.state import Bytes

        total = sum(info.nbytes for info in self._of_model)
        if total > (free := available_bytes()):
            raise CheckpointUnreadable(f"its tensors take {total:,} bytes of memory, and {free:,} are free")
        found = {}
        for info in self._of_model:
            data = np.empty(info.nbytes, np.uint8)
            read_into(self._descriptor, data.data, info.offset)
            for offset in range(0, info.nbytes, _PIECE_BYTES):
                _require_finite(data[offset : offset + _PIECE_BYTES].tobytes(), info)
            found[info.name] = Bytes(data, info.dtype, info.shape)
        return found

    def described(self) -> tuple[TensorInfo, ...]:
        """The tensors as a listing shows them."""
        model = [info._replace(name=f"model.{info.name}") for info in self._of_model]
        return tuple(sorted(model + moments.described(self.optimizer(), "optimizer")))

    def _bytes(self, name: str, most: int) -> bytes:
        info = self._tensors.get(name)
        if info is None or info.dtype != "U8" or len(info.shape) != 1:
            raise CorruptCheckpoint(f"the tensor {name} is no row of bytes")
        if info.nbytes > most:
            raise CorruptCheckpoint(
                f"the tensor {name} has {info.nbytes:,} bytes, and at most {most:,} are read"
            )
        raw = bytearray(info.nbytes)
        read_into(self._descriptor, memoryview(raw), info.offset)
        return bytes(raw)


_OURS = {METADATA_TENSOR, OPTIMIZER_TENSOR}


def _require_finite(piece: bytes | bytearray, info: TensorInfo) -> None:
    try:
        finite.require(piece, info.dtype)
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(
            f"tensor {quote_untrusted(info.name)}: {error.reason}", tensor=f"model.{info.name}"
        ) from None


def _described(path: Path) -> tuple[TensorInfo, ...]:
    with errors_with_path(path), _opened(path) as file:
        return file.described()


def _tensors(descriptor: int, size: int) -> dict[str, TensorInfo]:
    """Every tensor by its name; together they fill the file, as safetensors wants it."""
    end = header_length(os.pread(descriptor, LENGTH_BYTES, 0), size)
    raw = bytearray(end - LENGTH_BYTES)
    read_into(descriptor, memoryview(raw), LENGTH_BYTES)
    described = parse_object(bytes(raw), "the header")
    if type(described.pop(METADATA, {})) is not dict:
        raise CorruptCheckpoint(f"the header's {METADATA} is no object")
    found = {name: _tensor(name, value, end) for name, value in described.items()}
    place = end
    for info in sorted(found.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != place:
            raise CorruptCheckpoint(
                f"tensor {quote_untrusted(info.name)} does not begin where the one before it ends"
            )
        place += info.nbytes
    if place != size:
        raise CorruptCheckpoint(f"the tensors end at byte {place:,}, and the file has {size:,}")
    return found


def _tensor(name: str, value: Any, begin: int) -> TensorInfo:
    known = type(value) is dict and value.keys() == {"dtype", "shape", "data_offsets"}
    offsets = value["data_offsets"] if known else None
    shape = value["shape"] if known else None
    dtype = value["dtype"] if known else None
    if (
        type(shape) is not list
        or type(offsets) is not list
        or type(dtype) is not str
        or dtype not in ITEM_SIZES
        or not is_valid_shape(tuple(shape))
        or {*map(type, offsets)} != {int}
        or len(offsets) != 2
        or not 0 <= offsets[0] <= offsets[1]
        or offsets[1] - offsets[0] != prod(shape) * ITEM_SIZES[dtype]
    ):
        raise CorruptCheckpoint(
            f"tensor {quote_untrusted(shorten(name))} is not described as safetensors does"
        )
    return TensorInfo(name, dtype, tuple(shape), begin + offsets[0], offsets[1] - offsets[0], NO_DIGEST)
