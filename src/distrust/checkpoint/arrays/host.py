"""What every framework's module speaks of: bytes in host memory, and the names of dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from distrust.checkpoint.memory import Room

#: Names of the dtypes that numpy itself has.
NUMPY_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "F16": "float16",
    "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64",
    "C64": "complex64",
}  # fmt: skip
#: Names of the dtypes that ml_dtypes adds to numpy.
ML_DTYPES_NAMES = {
    "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
#: The frameworks' names of every dtype, which they agree on, and back.
NAMES = {**NUMPY_NAMES, **ML_DTYPES_NAMES}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


class HostArray(NamedTuple):
    """An array's bytes in host memory, little-endian and in C layout.

    Attributes:
        address: of the first byte.
        nbytes: how many there are.
        owner: keeps the memory alive.
    """

    address: int
    nbytes: int
    owner: object


class Captured(NamedTuple):
    """Arrays that will be what they are now, whatever their owner does next, once they are copied.

    Attributes:
        sources: where their bytes are, or will be.
        copy: copies them there; what it reads may not change before it returns.
    """

    sources: list[HostArray]
    copy: Callable[[], None]


Description = tuple[str, tuple[int, ...]]


class Adapter(NamedTuple):
    """What the core needs of a framework; each of the modules beside this one has the same five functions.

    They take many arrays at once, for a training state has thousands of small ones, and training waits.

    Attributes:
        describe: (labels, arrays) -> for each the format's name of its dtype, and its shape; the data is not
            touched. Raises UnsupportedState if one has no exact image in the format.
        to_host: one array's bytes, copied only where its layout or device demands.
        room: how many bytes :attr:`capture` needs for arrays.
        capture: takes arrays into a snapshot; on the thread that owns them.
        from_host: (uint8[nbytes], dtype, shape) -> an array on that memory, or a copy where the framework
            has memory of its own.
    """

    describe: Callable[[Sequence[str], Sequence[Any]], list[Description]]
    to_host: Callable[[Any], HostArray]
    room: Callable[[Sequence[Any]], int]
    capture: Callable[[Sequence[Any], Room], Captured]
    from_host: Callable[[Any, str, tuple[int, ...]], Any]


def nothing_to_copy() -> None:
    """The copy of arrays that are held instead."""
