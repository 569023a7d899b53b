"""Arrays of jax, on any device. Weak types and device placement are not bytes, so they are not saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from distrust.checkpoint.arrays import DTYPES, Adapter, of_numpy
from distrust.checkpoint.format import Description
from distrust.errors import ConfigError, UnsupportedState


def _describe(labels: Sequence[str], values: Sequence[Any]) -> list[Description]:
    for label, value in zip(labels, values, strict=True):
        if obstacle := _obstacle(value):
            raise UnsupportedState(f"{label}: this jax array cannot be saved: {obstacle}", label=label)
    return [(DTYPES[value.dtype.name], tuple(value.shape)) for value in values]


def _flat_arrays(values: Sequence[Any]) -> list[Any]:
    for value in values:
        value.copy_to_host_async()  # transfers from all devices overlap; a no-op on a CPU
    # On a CPU a view, which jax tracks: it does not reuse the memory of a donated array that has views.
    return of_numpy.ADAPTER.flat_arrays([np.asarray(value) for value in values])


def _from_host(data: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    host = of_numpy.ADAPTER.from_host(data, dtype, shape)
    try:
        array = jax.device_put(host)
    except TypeError:
        raise ConfigError(f"this version of jax has no {host.dtype}: upgrade it") from None
    if array.dtype != host.dtype:  # without x64, jax silently narrows 64-bit dtypes
        raise ConfigError(
            f"jax would convert {host.dtype} to {array.dtype}: call "
            'jax.config.update("jax_enable_x64", True) first, or load with framework="numpy"'
        )
    return array


def _obstacle(value: Any) -> str | None:
    """Return why an array cannot be saved, and what to do."""
    if isinstance(value, jax.core.Tracer):
        return "it is being traced; save outside of jit, grad and vmap"
    if value.dtype.name not in DTYPES:
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            return "it is a PRNG key; save jax.random.key_data(key), and load with jax.random.wrap_key_data"
        return f"the format has no {value.dtype}; convert it to a dtype that holds its values"
    if value.is_deleted():
        return "it was deleted, or donated to a jitted function; save what that function returned"
    if not value.is_fully_addressable:
        gather = "jax.experimental.multihost_utils.process_allgather(array, tiled=True)"
        return f"other processes hold parts of it; save {gather}"
    return None


# jax arrays are immutable, so they need no copy.
ADAPTER = Adapter(_describe, _flat_arrays, of_numpy.fill, _from_host, zero_copy=True)
