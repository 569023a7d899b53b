"""Arrays of mlx."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from distrust.checkpoint.arrays import of_numpy
from distrust.checkpoint.arrays.host import NAMES, Adapter, Description
from distrust.errors import ConfigError, UnsupportedState

_DTYPES = {
    dtype: getattr(mx, spelling)
    for dtype, name in NAMES.items()
    for spelling in (name, f"{name}_")  # bool_
    if hasattr(mx, spelling)
}
_NAMES = {kind: dtype for dtype, kind in _DTYPES.items()}
#: What an array is viewed as on its way, by item size: numpy has these, and nothing makes other bits of them.
_CARRIERS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def describe(labels: Sequence[str], values: Sequence[Any]) -> list[Description]:
    """See :class:`~distrust.checkpoint.arrays.host.Adapter`."""
    for label, value in zip(labels, values, strict=True):
        if value.dtype not in _NAMES:
            raise UnsupportedState(
                f"{label}: mlx arrays of {value.dtype} cannot be saved; "
                "convert it to a dtype that holds its values",
                label=label,
            )
    return [(_NAMES[value.dtype], tuple(value.shape)) for value in values]


def flat_arrays(values: Sequence[Any]) -> list[Any]:
    """See :class:`~distrust.checkpoint.arrays.host.Adapter`."""
    # An array of its own on the same memory: `value += 1` gives `value` other memory, and leaves this one's.
    aliases = [mx.view(value, _CARRIERS[value.itemsize]) for value in values]
    try:
        mx.eval(aliases)  # here: in another thread mlx refuses
    except (RuntimeError, ValueError) as error:
        raise UnsupportedState(
            f"mlx cannot compute these arrays here: {error} Call mx.eval on what is saved, "
            "in the thread that made it and outside of compiled functions",
            label="mlx arrays",
        ) from None
    # Flat in numpy, as bytes too: mlx counts items in 32 bits.
    return of_numpy.flat_arrays([np.asarray(alias) for alias in aliases])


def from_host(data: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    """See :class:`~distrust.checkpoint.arrays.host.Adapter`."""
    kind = _DTYPES.get(dtype)
    if kind is None:
        raise ConfigError(f'mlx has no {NAMES[dtype]}: load with framework="numpy" or "torch"')
    carried = mx.array(data.view(f"u{kind.size}").reshape(shape))
    # Not on a GPU: that knows no float64. Evaluated, so that any thread may use it.
    array = mx.view(carried, kind, stream=mx.cpu)
    mx.eval(array)
    return array


ADAPTER = Adapter(describe, flat_arrays, holds=True, from_host=from_host)
