"""Arrays of mlx. They belong to the thread that created them, so they are evaluated on the caller's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from distrust.checkpoint.arrays import NAMES, Adapter, of_numpy
from distrust.checkpoint.format import Description
from distrust.errors import ConfigError, UnsupportedState

_DTYPES = {
    dtype: getattr(mx, spelling)
    for dtype, name in NAMES.items()
    for spelling in (name, f"{name}_")  # bool_
    if hasattr(mx, spelling)
}
_NAMES = {mlx_dtype: dtype for dtype, mlx_dtype in _DTYPES.items()}
#: Item size -> the integer dtype that carries an array's bits to numpy, which has no bfloat16.
_CARRIERS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def _describe(labels: Sequence[str], values: Sequence[Any]) -> list[Description]:
    for label, value in zip(labels, values, strict=True):
        if value.dtype not in _NAMES:
            problem = f"mlx arrays of {value.dtype} cannot be saved"
            remedy = "convert it to a dtype that holds its values"
            raise UnsupportedState(f"{label}: {problem}; {remedy}", label=label)
    return [(_NAMES[value.dtype], tuple(value.shape)) for value in values]


def _flat_arrays(values: Sequence[Any]) -> list[Any]:
    # An alias, not a copy: `value += 1` gives `value` new memory, and the alias keeps the old contents.
    aliases = [mx.view(value, _CARRIERS[value.itemsize]) for value in values]
    try:
        mx.eval(aliases)  # now: mlx refuses to evaluate on another thread
    except (RuntimeError, ValueError) as error:
        raise UnsupportedState(
            f"mlx cannot compute these arrays here: {error} Call mx.eval on what is saved, "
            "in the thread that made it and outside of compiled functions",
            label="mlx arrays",
        ) from None
    # Reshaped in numpy: mlx counts items in 32 bits.
    return of_numpy.ADAPTER.flat_arrays([np.asarray(alias) for alias in aliases])


def _from_host(data: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    mlx_dtype = _DTYPES.get(dtype)
    if mlx_dtype is None:
        raise ConfigError(f'mlx has no {NAMES[dtype]}: load with framework="numpy" or "torch"')
    bits = mx.array(data.view(f"u{mlx_dtype.size}").reshape(shape))
    array = mx.view(bits, mlx_dtype, stream=mx.cpu)  # not on a GPU, which has no float64
    mx.eval(array)  # so that any thread may use it
    return array


# Aliases keep the contents, so they need no copy.
ADAPTER = Adapter(_describe, _flat_arrays, of_numpy.fill, _from_host, zero_copy=True)
