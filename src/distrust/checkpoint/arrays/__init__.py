"""Arrays of any framework <-> bytes in host memory.

A framework is asked about only if the program has imported it: nobody else can hold one of its arrays.
Nothing is converted: the bytes are the array's own, in little-endian order and C layout, so that NaN
payloads, negative zeros and padding-free strides come back as they were.

An array is first settled: made flat, in numpy or torch, so that any thread may read it. Then its bytes are
copied, with others and in as few calls as possible, to where they belong (:func:`fill`).
"""

from __future__ import annotations

import functools
import itertools
import mmap
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args

from distrust.checkpoint.arrays.host import Adapter, Description
from distrust.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

Framework = Literal["numpy", "torch", "jax", "mlx"]

#: framework -> the modules and classes that its arrays are instances of.
_CLASSES = {
    "numpy": [("numpy", "ndarray"), ("numpy", "generic")],
    "torch": [("torch", "Tensor")],
    "jax": [("jax", "Array"), ("jax.core", "Tracer")],
    "mlx": [("mlx.core", "array")],
}


def is_array(value: Any) -> bool:
    """Whether ``value`` is an array or a numpy scalar, of whatever dtype; decided by its type."""
    kind: type = type(value)
    return _adapter_of(kind) is not None


def describe(arrays: Mapping[str, Any]) -> dict[str, Description]:
    """By label, the format's name of each array's dtype, and its shape, without touching its data.

    Raises:
        UnsupportedState: if an array has no exact image in the format.
    """
    described: dict[str, Description] = {}
    for adapter, group in _grouped(arrays).items():
        described.update(zip(group, adapter.describe(list(group), list(group.values())), strict=True))
    return described


def flat_arrays(arrays: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """By label, each array flat, and the labels of those that stay as they are without a copy."""
    settled: dict[str, Any] = {}
    held: set[str] = set()
    for adapter, group in _grouped(arrays).items():
        settled.update(zip(group, adapter.flat_arrays(list(group.values())), strict=True))
        if adapter.holds:
            held.update(group)
    return settled, held


def fill(memory: mmap.mmap, place: int, flats: Sequence[Any]) -> None:
    """Copy settled arrays into ``memory``, one behind the other from ``place`` on, with all cores."""
    from distrust.checkpoint.arrays import of_numpy  # here: who only lists checkpoints needs no numpy

    for kind, run in itertools.groupby(flats, key=type):
        arrays = list(run)
        if kind is of_numpy.Flat:
            place = of_numpy.fill(memory, place, arrays)
        else:
            from distrust.checkpoint.arrays import of_torch

            place = of_torch.fill(memory, place, arrays)


def versions(flats: Sequence[Any]) -> list[int]:
    """How often each settled array has been changed so far, where its framework counts that; else 0."""
    if "torch" not in sys.modules:
        return []
    from distrust.checkpoint.arrays import of_torch

    return of_torch.versions(flats)


def byte_range(flat: Any, begin: int, end: int) -> Any:
    """Some bytes of a settled array, as one: whole items."""
    return flat[begin // flat.itemsize : end // flat.itemsize]


def private_copy(flat: Any) -> Any:
    """A settled array that nobody else will change."""
    from distrust.checkpoint.arrays import of_numpy

    # To the host at once: a copy on a device would be made when the device comes to it.
    return flat.copy() if type(flat) is of_numpy.Flat else flat.to("cpu", copy=True)


def require_framework(framework: str) -> None:
    """That a framework is one of those there are, and installed.

    Raises:
        ConfigError: if it is not.
    """
    if framework not in get_args(Framework):
        raise ConfigError(f"framework {framework!r} is none of {', '.join(get_args(Framework))}")
    _adapter(framework)


def from_host(data: np.ndarray[Any, Any], dtype: str, shape: tuple[int, ...], *, framework: Framework) -> Any:
    """An array of ``framework`` with the bytes of ``data``, uint8[nbytes]; all but mlx may share its memory.

    Raises:
        ConfigError: if the framework, or a dtype of it, is not at hand.
    """
    return _adapter(framework).from_host(data, dtype, shape)


def _grouped(arrays: Mapping[str, Any]) -> dict[Adapter, Mapping[str, Any]]:
    kinds = {kind: _required(kind) for kind in set(map(type, arrays.values()))}
    adapters = set(kinds.values())
    if len(adapters) == 1:
        return {adapters.pop(): arrays}
    return {
        adapter: {label: array for label, array in arrays.items() if kinds[type(array)] is adapter}
        for adapter in adapters
    }


def _required(kind: type) -> Adapter:
    adapter = _adapter_of(kind)
    assert adapter is not None  # noqa: S101 - callers ask is_array first
    return adapter


@functools.cache
def _adapter_of(kind: type) -> Adapter | None:
    """The adapter for values of a type. A type exists only once its framework has been imported."""
    for framework, classes in _CLASSES.items():
        for module, name in classes:
            if module in sys.modules and issubclass(kind, getattr(sys.modules[module], name, ())):
                return _adapter(framework)
    return None


@functools.cache
def _adapter(framework: str) -> Adapter:
    try:
        return import_module(f"{__name__}.of_{framework}").ADAPTER  # type: ignore[no-any-return]
    except ImportError as error:
        raise ConfigError(f"framework {framework!r} is not installed: {error}") from None


__all__ = [
    "Description",
    "Framework",
    "byte_range",
    "describe",
    "fill",
    "flat_arrays",
    "from_host",
    "is_array",
    "private_copy",
    "require_framework",
    "versions",
]  # fmt: skip
