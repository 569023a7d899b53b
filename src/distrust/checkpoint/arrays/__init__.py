"""Arrays of any framework <-> bytes in host memory.

- Values are never converted: bytes are little-endian, in C layout; NaN payloads and negative zeros survive.
- A framework is imported only if the program already imported it: otherwise none of its arrays can exist.
- Arrays are first made *flat* (one-dimensional and contiguous: a numpy array of uint8, or a torch tensor; any
  thread may read it), then copied in as few calls as possible (:func:`fill`).
"""

from __future__ import annotations

import functools
import itertools
import mmap
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

from distrust.checkpoint.format import Description
from distrust.checkpoint.memory import PageLock
from distrust.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from distrust.checkpoint.arrays.copy_streams import CopyStream

Framework = Literal["numpy", "torch", "jax", "mlx"]

#: Framework -> (module, class) of its arrays.
_CLASSES = {
    "numpy": [("numpy", "ndarray"), ("numpy", "generic")],
    "torch": [("torch", "Tensor")],
    "jax": [("jax", "Array"), ("jax.core", "Tracer")],  # a Tracer only to be rejected with a clear message
    "mlx": [("mlx.core", "array")],
}
#: Format dtype -> name in numpy.
NUMPY_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "F16": "float16",
    "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64",
    "C64": "complex64",
}  # fmt: skip
#: Format dtype -> name in ml_dtypes, which adds these dtypes to numpy.
ML_DTYPES_NAMES = {
    "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
#: Format dtype -> name in every framework (they agree), and the inverse.
NAMES = {**NUMPY_NAMES, **ML_DTYPES_NAMES}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


class Adapter(NamedTuple):
    """What the core needs of a framework; each ``of_*`` module provides one.

    Most functions take many arrays per call: a training state has thousands of small ones, and the training
    loop waits.
    """

    #: (labels, arrays) -> dtype and shape of each; the data is not touched. Raises UnsupportedState.
    describe: Callable[[Sequence[str], Sequence[Any]], list[Description]]
    #: arrays -> flat arrays, copied only where necessary. Must run on the thread that owns the arrays.
    flat_arrays: Callable[[Sequence[Any]], list[Any]]
    #: Copies flat arrays into memory, back to back from an offset (bytes); returns the end offset.
    fill: Callable[[mmap.mmap, int, Sequence[Any]], int]
    #: (uint8[nbytes], dtype, shape) -> an array on that memory, or a copy if the framework owns its memory.
    #: That of torch takes a tensor, too.
    from_host: Callable[[Any, str, tuple[int, ...]], Any]
    #: Whether flat arrays keep their contents whatever the owner does with the originals: no snapshot needed.
    zero_copy: bool


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's rows of an array that the ranks of a run have divided: those of :func:`rows_of`."""

    rows: Any  # an array of numpy or torch
    shape: tuple[int, ...]  # of the whole array, which has at least one dimension

    @property
    def nbytes(self) -> int:
        """Size of the rows, in bytes."""
        return int(self.rows.nbytes)


def rows_of(index: int, *, rows: int, count: int) -> range:
    """The rows that rank ``index`` of ``count`` has: equally many each, fewer or none at the last ranks."""
    size = -(-rows // count)
    return range(min(index * size, rows), min((index + 1) * size, rows))


def is_array(value: Any) -> bool:
    """Return whether ``value`` is an array, numpy scalar or shard; only its type is inspected."""
    array_type: type = type(value)
    return array_type is Shard or _adapter_of(array_type) is not None


def describe(arrays: Mapping[str, Any]) -> dict[str, Description]:
    """Return dtype and shape of each array by label; raise UnsupportedState if one cannot be represented."""
    descriptions: dict[str, Description] = {}
    for adapter, group in _by_adapter(arrays).items():
        descriptions.update(zip(group, adapter.describe(list(group), list(group.values())), strict=True))
    return descriptions


def flat_arrays(arrays: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Return the flat arrays by label, and the labels of those that stay unchanged without a copy."""
    flats: dict[str, Any] = {}
    zero_copy: set[str] = set()
    for adapter, group in _by_adapter(arrays).items():
        flats.update(zip(group, adapter.flat_arrays(list(group.values())), strict=True))
        if adapter.zero_copy:
            zero_copy.update(group)
    return flats, zero_copy


def fill(memory: mmap.mmap, offset: int, flats: Sequence[Any]) -> None:
    """Copy flat arrays into ``memory``, back to back from ``offset`` (bytes), using all cores."""
    for array_type, group in itertools.groupby(flats, key=type):
        adapter = cast(Adapter, _adapter_of(array_type))
        offset = adapter.fill(memory, offset, list(group))


def copy_stream(flats: Sequence[Any]) -> CopyStream | None:
    """Return the stream of copies from the CUDA device of flat arrays; None if there is none, or several."""
    tensor = getattr(sys.modules.get("torch"), "Tensor", ())  # without torch, nothing is an instance of ()
    devices = {flat.device for flat in flats if isinstance(flat, tensor)}
    if not devices:
        return None
    from distrust.checkpoint.arrays.copy_streams import STREAMS, shared_stream  # imports torch

    streams = [shared_stream(device) for device in devices if device.type in STREAMS]
    return streams[0] if len(streams) == 1 else None


def are_in_host_memory(arrays: Sequence[Any]) -> bool:
    """Whether any thread may flatten and copy arrays, later: until then the caller must not change them."""
    if any(cast(Adapter, _adapter_of(kind)).zero_copy for kind in {*map(type, arrays)}):
        return False  # the thread that owns them must evaluate them
    return all(getattr(array, "is_cpu", True) for array in arrays) and copy_stream(arrays) is None


def page_lock(device: str) -> PageLock | None:
    """Return what page-locks memory for copies from a device of torch; raise ConfigError if there is none."""
    require_framework("torch")
    from distrust.checkpoint.arrays import copy_streams

    return copy_streams.open_device(device).page_lock


def versions(flats: Sequence[Any]) -> list[int]:
    """Return how often each array, or its base, was modified in place; 0 where that is not counted."""
    tensor = getattr(sys.modules.get("torch"), "Tensor", ())  # without torch, nothing is an instance of ()
    return [flat._version if isinstance(flat, tensor) and not flat.is_inference() else 0 for flat in flats]


def byte_range(flat: Any, begin: int, end: int) -> Any:
    """Return bytes ``begin`` to ``end`` of a flat array, as a view; both are multiples of its item size."""
    return flat[begin // flat.itemsize : end // flat.itemsize]


def private_copy(flat: Any) -> Any:
    """Return a copy of a flat array that shares no memory with it."""
    # A tensor to the host at once: a copy on the device would only be queued, and could read later contents.
    return flat.to("cpu", copy=True) if hasattr(flat, "to") else flat.copy()


def require_framework(framework: str) -> None:
    """Raise ConfigError unless a framework is supported and installed."""
    _adapter(framework)


def from_host(data: np.ndarray[Any, Any], dtype: str, shape: tuple[int, ...], *, framework: Framework) -> Any:
    """Return an array with the bytes of ``data``, uint8[nbytes]; raise ConfigError if that is impossible."""
    return _adapter(framework).from_host(data, dtype, shape)


def _by_adapter(arrays: Mapping[str, Any]) -> dict[Adapter, Mapping[str, Any]]:
    # Never None: callers check is_array first.
    adapters = {kind: cast(Adapter, _adapter_of(kind)) for kind in set(map(type, arrays.values()))}
    distinct = set(adapters.values())
    if len(distinct) == 1:  # the common case: no pass over thousands of arrays
        return {distinct.pop(): arrays}
    return {
        adapter: {label: array for label, array in arrays.items() if adapters[type(array)] is adapter}
        for adapter in distinct
    }


@functools.cache
def _adapter_of(array_type: type) -> Adapter | None:
    for framework, classes in _CLASSES.items():
        for module, name in classes:
            # Caching None is safe: a type exists only once its framework is in sys.modules.
            if module in sys.modules and issubclass(array_type, getattr(sys.modules[module], name, ())):
                return _adapter(framework)
    return None


@functools.cache
def _adapter(framework: str) -> Adapter:
    if framework not in get_args(Framework):
        raise ConfigError(f"framework {framework!r} is none of {', '.join(get_args(Framework))}")
    try:
        return import_module(f"{__name__}.of_{framework}").ADAPTER  # type: ignore[no-any-return]
    except ImportError as error:
        raise ConfigError(f"framework {framework!r} is not installed: {error}") from None
