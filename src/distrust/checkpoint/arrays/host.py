"""The interface between the core and a framework, and the names of dtypes that frameworks share.

A *flat array* is one-dimensional and contiguous: a numpy array of uint8, or a torch tensor. Any thread may
read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from distrust.checkpoint.format import Description

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

    The first two functions take many arrays per call: a training state has thousands of small ones, and the
    training loop waits.
    """

    #: (labels, arrays) -> dtype and shape of each; the data is not touched. Raises UnsupportedState.
    describe: Callable[[Sequence[str], Sequence[Any]], list[Description]]
    #: arrays -> flat arrays, copied only where necessary. Must run on the thread that owns the arrays.
    flat_arrays: Callable[[Sequence[Any]], list[Any]]
    #: Whether flat arrays keep their contents whatever the owner does with the originals: no snapshot needed.
    zero_copy: bool
    #: (uint8[nbytes], dtype, shape) -> an array on that memory, or a copy if the framework owns its memory.
    from_host: Callable[[Any, str, tuple[int, ...]], Any]
