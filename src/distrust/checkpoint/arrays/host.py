"""The interface between the core and a framework, and the names of dtypes that frameworks share.

A *flat array* is one-dimensional and contiguous: a numpy array of uint8, or a torch tensor. Any thread may
read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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

Description = tuple[str, tuple[int, ...]]  # format dtype, shape


class Adapter(NamedTuple):
    """What the core needs of a framework; each ``of_*`` module provides one.

    The first two functions take many arrays per call: a training state has thousands of small ones, and the
    training loop waits.

    Attributes:
        describe: (labels, arrays) -> dtype and shape of each, without touching the data. Raises
            UnsupportedState for an array that the format cannot represent exactly.
        flat_arrays: arrays -> flat arrays, copied only where layout or framework require it. Must run on the
            thread that owns the arrays.
        zero_copy: whether the flat arrays stay unchanged whatever their owner does with the originals, so
            that a snapshot needs no copy.
        from_host: (uint8[nbytes], dtype, shape) -> an array on that memory, or a copy where the framework
            manages its own memory.
    """

    describe: Callable[[Sequence[str], Sequence[Any]], list[Description]]
    flat_arrays: Callable[[Sequence[Any]], list[Any]]
    zero_copy: bool
    from_host: Callable[[Any, str, tuple[int, ...]], Any]
