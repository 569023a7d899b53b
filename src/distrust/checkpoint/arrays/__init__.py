"""Arrays of any framework <-> bytes in host memory.

A framework is asked about only if the program has imported it: nobody else can hold one of its arrays.
Nothing is converted: the bytes are the array's own, in little-endian order and C layout, so that NaN
payloads, negative zeros and padding-free strides come back as they were.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args

from distrust.checkpoint.arrays.host import Adapter, Description, HostArray
from distrust.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

Framework = Literal["numpy", "torch", "jax", "mlx"]

#: framework -> the module and the class that its arrays are instances of.
_CLASSES = {
    "numpy": [("numpy", "ndarray"), ("numpy", "generic")],
    "torch": [("torch", "Tensor")],
    "jax": [("jax", "Array")],
    "mlx": [("mlx.core", "array")],
}


def is_array(value: Any) -> bool:
    """Whether ``value`` is an array or a numpy scalar, of whatever dtype."""
    kind: type = type(value)
    return _adapter_of(kind) is not None


def describe(arrays: Mapping[str, Any]) -> dict[str, Description]:
    """By label, the format's name of each array's dtype, and its shape, without touching its data.

    Raises:
        UnsupportedState: if an array has no exact image in the format.
    """
    described: dict[str, Description] = {}
    for adapter, group in grouped(arrays).items():
        described.update(zip(group, adapter.describe(list(group), list(group.values())), strict=True))
    return described


def to_host(value: Any) -> HostArray:
    """The bytes of an array that :func:`describe` accepts, copied only where its layout or device demands."""
    return _required(type(value)).to_host(value)


def grouped(arrays: Mapping[str, Any]) -> dict[Adapter, Mapping[str, Any]]:
    """Arrays by framework, and then by label."""
    kinds = {kind: _required(kind) for kind in set(map(type, arrays.values()))}
    adapters = set(kinds.values())
    if len(adapters) == 1:
        return {adapters.pop(): arrays}
    return {
        adapter: {label: array for label, array in arrays.items() if kinds[type(array)] is adapter}
        for adapter in adapters
    }


def from_host(data: np.ndarray[Any, Any], dtype: str, shape: tuple[int, ...], *, framework: Framework) -> Any:
    """An array of ``framework`` with the bytes of ``data``, uint8[nbytes]; numpy and torch share its memory.

    Raises:
        ConfigError: if the framework, or a dtype of it, is not at hand.
    """
    if framework not in get_args(Framework):
        raise ConfigError(f"framework {framework!r} is none of {', '.join(get_args(Framework))}")
    return _adapter(framework).from_host(data, dtype, shape)


@functools.cache
def _adapter(framework: str) -> Adapter:
    try:
        return import_module(f"{__name__}.of_{framework}").ADAPTER  # type: ignore[no-any-return]
    except ImportError as error:
        raise ConfigError(f"framework {framework!r} is not installed: {error}") from None


@functools.cache
def _adapter_of(kind: type) -> Adapter | None:
    """The adapter for values of a type. A type exists only once its framework has been imported."""
    for framework, classes in _CLASSES.items():
        for module, name in classes:
            if module in sys.modules and issubclass(kind, getattr(sys.modules[module], name, ())):
                return _adapter(framework)
    return None


def _required(kind: type) -> Adapter:
    adapter = _adapter_of(kind)
    assert adapter is not None  # noqa: S101 - callers ask is_array first
    return adapter


__all__ = ["Framework", "HostArray", "describe", "from_host", "grouped", "is_array", "to_host"]
