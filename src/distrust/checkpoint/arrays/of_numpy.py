"""Arrays and scalars of numpy."""

from __future__ import annotations

import mmap
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
    Description,
    Segment,
)
from distrust.errors import ConfigError, UnsupportedState

#: What a settled array is an instance of.
Flat = np.ndarray


def describe(labels: Sequence[str], values: Sequence[Any]) -> list[Description]:
    """See :class:`~distrust.checkpoint.arrays.host.Adapter`."""
    return [_describe(label, value) for label, value in zip(labels, values, strict=True)]


def settle(values: Sequence[Any]) -> list[Any]:
    """See :class:`~distrust.checkpoint.arrays.host.Adapter`: uint8[nbytes] of each."""
    return [_bytes(value) for value in values]


def fill(memory: mmap.mmap, segments: Sequence[Segment]) -> None:
    """Copy settled arrays, or parts of them, to their places in ``memory``."""
    target = np.frombuffer(memory, np.uint8)

    def copy(segment: Segment) -> None:
        place, flat, begin, end = segment
        target[place : place + end - begin] = flat[begin:end]

    total = sum(segment.end - segment.begin for segment in segments)
    parallel.run(copy, segments, threads=parallel.worthwhile_threads(total))


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


def _bytes(value: Any) -> np.ndarray[Any, Any]:
    flat = np.ascontiguousarray(np.asarray(value)).reshape(-1)
    if flat.dtype.byteorder == ">" or (flat.dtype.byteorder == "=" and sys.byteorder == "big"):
        flat = flat.byteswap()
    return flat.view(np.uint8)


ADAPTER = Adapter(describe, settle, holds=False, from_host=from_host)
