"""Arrays of any framework <-> bytes in host memory.

A framework is asked about only if the program has imported it: nobody else can hold one of its arrays.
Nothing is converted: the bytes are the array's own, in little-endian order and C layout, so that NaN
payloads, negative zeros and padding-free strides come back as they were.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from distrust.errors import ConfigError, UnsupportedState

if TYPE_CHECKING:
    import numpy as np

Framework = Literal["numpy", "torch"]

#: Names of the dtypes that numpy itself has.
_NUMPY_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "F16": "float16",
    "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64",
    "C64": "complex64",
}  # fmt: skip
#: Names of the dtypes that ml_dtypes adds to numpy.
_ML_DTYPES_NAMES = {
    "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
_TORCH_NAMES = {**_NUMPY_NAMES, **_ML_DTYPES_NAMES}
_FROM_NUMPY = {name: dtype for dtype, name in (_NUMPY_NAMES | _ML_DTYPES_NAMES).items()}
_FROM_TORCH = {name: dtype for dtype, name in _TORCH_NAMES.items()}


@dataclass(frozen=True, slots=True)
class HostArray:
    """An array's bytes in host memory.

    Attributes:
        data: uint8[nbytes], C-contiguous.
        shared: whether ``data`` is the caller's own memory, which the caller may change.
    """

    data: np.ndarray[Any, Any]
    shared: bool


def is_array(value: Any) -> bool:
    """Whether ``value`` is an array or a numpy scalar, of whatever dtype."""
    return _adapter(value) is not None


def describe(value: Any, label: str) -> tuple[str, tuple[int, ...]]:
    """The format's name of an array's dtype, and its shape, without touching its data.

    Raises:
        UnsupportedState: if the array has no exact image in the format.
    """
    adapter = _adapter(value)
    assert adapter is not None  # noqa: S101 - callers ask is_array first
    return adapter.describe(value, label)


def to_host(value: Any) -> HostArray:
    """The bytes of an array that :func:`describe` accepts, copied only where its layout or device demands."""
    adapter = _adapter(value)
    assert adapter is not None  # noqa: S101 - callers ask is_array first
    return adapter.to_host(value)


def from_host(data: np.ndarray[Any, Any], dtype: str, shape: tuple[int, ...], *, framework: Framework) -> Any:
    """An array of ``framework`` on the memory of ``data``, uint8[nbytes]; no copy.

    Raises:
        ConfigError: if the framework, or a dtype of it, is not at hand.
    """
    try:
        build = {"numpy": _numpy_from_host, "torch": _torch_from_host}[framework]
    except KeyError:
        raise ConfigError(f"framework {framework!r} is none of numpy, torch") from None
    return build(data, dtype, shape)


@dataclass(frozen=True, slots=True)
class _Adapter:
    describe: Callable[[Any, str], tuple[str, tuple[int, ...]]]
    to_host: Callable[[Any], HostArray]


def _adapter(value: Any) -> _Adapter | None:
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        return _NUMPY
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _TORCH
    return None


def _describe_numpy(value: Any, label: str) -> tuple[str, tuple[int, ...]]:
    dtype = _FROM_NUMPY.get(value.dtype.name)
    if dtype is None:
        raise UnsupportedState(f"{label}: numpy arrays of {value.dtype} cannot be saved", label=label)
    if type(value).__module__ == "numpy.ma" or hasattr(value, "mask"):
        raise UnsupportedState(f"{label}: a masked array would lose its mask", label=label)
    return dtype, tuple(value.shape)


def _numpy_to_host(value: Any) -> HostArray:
    import numpy as np

    array = np.asarray(value)
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.dtype.byteorder == ">" or (flat.dtype.byteorder == "=" and sys.byteorder == "big"):
        flat = flat.byteswap()
    return HostArray(flat.view(np.uint8), shared=np.shares_memory(flat, array))


def _numpy_from_host(data: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    import numpy as np

    if dtype in _NUMPY_NAMES:
        return data.view(np.dtype(_NUMPY_NAMES[dtype]).newbyteorder("<")).reshape(shape)
    try:
        import ml_dtypes
    except ImportError:
        raise ConfigError(
            f'numpy itself has no {dtype}: pip install ml_dtypes, or load with framework="torch"'
        ) from None
    return data.view(getattr(ml_dtypes, _ML_DTYPES_NAMES[dtype])).reshape(shape)


def _describe_torch(value: Any, label: str) -> tuple[str, tuple[int, ...]]:
    import torch

    name = str(value.dtype).removeprefix("torch.")
    dtype = _FROM_TORCH.get(name)
    # A subclass (DTensor, a quantized weight) holds more than its bytes say.
    plain = type(value) in (torch.Tensor, torch.nn.Parameter) and not (
        value.is_nested or value.is_quantized or value.is_meta
    )
    if dtype is None or not plain or value.layout is not torch.strided:
        raise UnsupportedState(
            f"{label}: torch tensors of {name}, layout {value.layout}, device {value.device}, "
            f"type {type(value).__name__} cannot be saved",
            label=label,
        )
    return dtype, tuple(value.shape)


def _torch_to_host(value: Any) -> HostArray:
    import torch

    tensor = value.detach().resolve_conj().resolve_neg()
    flat = tensor.cpu().contiguous().reshape(-1)
    shared = flat.numel() > 0 and flat.data_ptr() == value.data_ptr()
    return HostArray(flat.view(torch.uint8).numpy(), shared=shared)


def _torch_from_host(data: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    import torch

    kind = getattr(torch, _TORCH_NAMES[dtype], None)
    if kind is None:
        raise ConfigError(f"this version of torch has no {dtype}: upgrade it")
    if (
        not data.size
    ):  # torch takes an empty array of numpy's for one with a stride of 0, and refuses to view it
        return torch.empty(shape, dtype=kind)
    return torch.from_numpy(data).view(kind).reshape(shape)


_NUMPY = _Adapter(_describe_numpy, _numpy_to_host)
_TORCH = _Adapter(_describe_torch, _torch_to_host)
