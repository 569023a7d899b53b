"""What every framework's module speaks of: flat arrays, and the names of dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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


Description = tuple[str, tuple[int, ...]]


class Adapter(NamedTuple):
    """What the core needs of a framework; each of the modules beside this one has these functions.

    They take many arrays at once, for a training state has thousands of small ones, and training waits.

    Attributes:
        describe: (labels, arrays) -> for each the format's name of its dtype, and its shape; the data is not
            touched. Raises UnsupportedState if one has no exact image in the format.
        settle: arrays -> the same as flat arrays of numpy or torch that any thread may read; on the thread
            that owns them. Copied only where layout or framework demand it.
        holds: whether what :attr:`settle` gives stays as it is, whatever their owner does with the arrays.
        from_host: (uint8[nbytes], dtype, shape) -> an array on that memory, or a copy where the framework
            has memory of its own.
    """

    describe: Callable[[Sequence[str], Sequence[Any]], list[Description]]
    flat_arrays: Callable[[Sequence[Any]], list[Any]]
    holds: bool
    from_host: Callable[[Any, str, tuple[int, ...]], Any]
