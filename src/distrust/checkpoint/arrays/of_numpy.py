"""Arrays and scalars of numpy."""

from __future__ import annotations

import itertools
import mmap
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from distrust.checkpoint import parallel
from distrust.checkpoint.arrays import DTYPES, ML_DTYPES_NAMES, NUMPY_NAMES, Adapter
from distrust.checkpoint.format import Description
from distrust.errors import ConfigError, UnsupportedState


def _describe(labels: Sequence[str], values: Sequence[Any]) -> list[Description]:
    for label, value in zip(labels, values, strict=True):
        if value.dtype.name not in DTYPES:
            raise UnsupportedState(f"{label}: numpy arrays of {value.dtype} cannot be saved", label=label)
        # By attribute, too: other libraries subclass ndarray with a mask of their own.
        if type(value).__module__ == "numpy.ma" or hasattr(value, "mask"):
            raise UnsupportedState(f"{label}: a masked array would lose its mask", label=label)
    return [(DTYPES[value.dtype.name], tuple(value.shape)) for value in values]


def _flat_arrays(values: Sequence[Any]) -> list[Any]:
    return [_bytes(value) for value in values]


def fill(memory: mmap.mmap, offset: int, flats: Sequence[Any]) -> int:
    """Implement :attr:`Adapter.fill`."""
    target = np.frombuffer(memory, np.uint8)
    edges: list[int] = list(itertools.accumulate((flat.nbytes for flat in flats), initial=offset))

    def copy(index: int) -> None:
        target[edges[index] : edges[index + 1]] = flats[index]  # numpy releases the GIL while it copies

    parallel.run(copy, range(len(flats)), threads=parallel.worthwhile_threads(edges[-1] - offset))
    return edges[-1]


def _from_host(data: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    if dtype in NUMPY_NAMES:
        return data.view(np.dtype(NUMPY_NAMES[dtype]).newbyteorder("<")).reshape(shape)
    try:
        import ml_dtypes
    except ImportError:
        remedy = 'pip install ml_dtypes, or load with framework="torch"'
        raise ConfigError(f"numpy itself has no {dtype}: {remedy}") from None
    return data.view(getattr(ml_dtypes, ML_DTYPES_NAMES[dtype])).reshape(shape)


def _bytes(value: Any) -> np.ndarray[Any, Any]:
    flat = np.ascontiguousarray(np.asarray(value)).reshape(-1)  # asarray: numpy scalars become arrays
    # The file is little-endian on every machine.
    if flat.dtype.byteorder == ">" or (flat.dtype.byteorder == "=" and sys.byteorder == "big"):
        flat = flat.byteswap()
    return flat.view(np.uint8)


ADAPTER = Adapter(_describe, _flat_arrays, fill, _from_host, zero_copy=False)  # owners write in place
