"""Arrays and scalars of numpy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from distrust.checkpoint import parallel
from distrust.checkpoint.arrays.host import (
    DTYPES,
    ML_DTYPES_NAMES,
    NUMPY_NAMES,
    Adapter,
    Captured,
    Description,
    HostArray,
)
from distrust.checkpoint.memory import Room
from distrust.errors import ConfigError, UnsupportedState

#: Below it, starting threads costs more than they save.
_BYTES_FOR_THREADS = 8 << 20


def describe(labels: Sequence[str], values: Sequence[Any]) -> list[Description]:
    """See :class:`~distrust.checkpoint.arrays.host.Adapter`."""
    return [_describe(label, value) for label, value in zip(labels, values, strict=True)]


def to_host(value: Any) -> HostArray:
    """See :class:`~distrust.checkpoint.arrays.host.Adapter`."""
    flat = np.ascontiguousarray(value, _little_endian(value.dtype))
    return HostArray(flat.__array_interface__["data"][0], flat.nbytes, flat)


def room(values: Sequence[Any]) -> int:
    """See :class:`~distrust.checkpoint.arrays.host.Adapter`."""
    return sum(Room.of(value.nbytes) for value in values)


def capture(values: Sequence[Any], room: Room) -> Captured:
    """See :class:`~distrust.checkpoint.arrays.host.Adapter`."""
    sources, copies = [], []
    for value in values:
        offset = room.take(value.nbytes)
        sources.append(HostArray(room.address + offset, value.nbytes, room.memory))
        if value.nbytes:
            target = np.frombuffer(room.memory, _little_endian(value.dtype), value.size, offset)
            copies.append((target.reshape(value.shape), value))
    large = sum(source.nbytes for source in sources) >= _BYTES_FOR_THREADS
    threads = parallel.cores() if large else 1
    return Captured(sources, lambda: parallel.run(_copy, copies, threads=threads))


def from_host(data: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    """See :class:`~distrust.checkpoint.arrays.host.Adapter`."""
    if dtype in NUMPY_NAMES:
        return data.view(np.dtype(NUMPY_NAMES[dtype]).newbyteorder("<")).reshape(shape)
    try:
        import ml_dtypes
    except ImportError:
        raise ConfigError(
            f'numpy itself has no {dtype}: pip install ml_dtypes, or load with framework="torch"'
        ) from None
    return data.view(getattr(ml_dtypes, ML_DTYPES_NAMES[dtype])).reshape(shape)


def _describe(label: str, value: Any) -> Description:
    dtype = DTYPES.get(value.dtype.name)
    if dtype is None:
        raise UnsupportedState(f"{label}: numpy arrays of {value.dtype} cannot be saved", label=label)
    if type(value).__module__ == "numpy.ma" or hasattr(value, "mask"):
        raise UnsupportedState(f"{label}: a masked array would lose its mask", label=label)
    return dtype, tuple(value.shape)


def _copy(pair: tuple[Any, Any]) -> None:
    np.copyto(*pair)


def _little_endian(dtype: Any) -> Any:
    swapped = dtype.byteorder == ">" or (dtype.byteorder == "=" and sys.byteorder == "big")
    return dtype.newbyteorder("<") if swapped else dtype


ADAPTER = Adapter(describe, to_host, room, capture, from_host)
