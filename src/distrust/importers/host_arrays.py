"""Arrays in host memory that belong to no framework yet. Listing checkpoints works without numpy."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from distrust.checkpoint.arrays import NUMPY_NAMES
from distrust.checkpoint.format import ITEM_SIZES
from distrust.errors import CorruptCheckpoint

if TYPE_CHECKING:
    import numpy as np

#: What to read of an array: its description; all of it, to check it; or all of it, to return it.
Depth = Literal["headers", "verify", "load"]
#: Arrays are read and checked in pieces of this size: a multiple of every item size.
PIECE_BYTES = 1 << 20
#: numpy has no 8-bit floats. These are the bytes that encode NaN or infinity.
_NON_FINITE_F8 = {
    "F8_E4M3": b"\x7f\xff", "F8_E5M2": b"\x7c\x7d\x7e\x7f\xfc\xfd\xfe\xff", "F8_E8M0": b"\xff",
    "F8_E4M3FNUZ": b"\x80", "F8_E5M2FNUZ": b"\x80",
}  # fmt: skip


class HostArray(NamedTuple):
    """An array as its file describes it, with its data or without."""

    dtype: str  # the checkpoint format's name, a key of ITEM_SIZES
    shape: tuple[int, ...]
    data: Any = None  # uint8[nbytes], little-endian, in C layout; None if only described

    @property
    def nbytes(self) -> int:
        """The size of its data."""
        return prod(self.shape) * ITEM_SIZES[self.dtype]


def make_array(values: Iterable[Any], dtype: str) -> HostArray:
    """A one-dimensional array of Python numbers that fit the dtype."""
    import numpy as np

    array = np.array(values, np.dtype(NUMPY_NAMES[dtype]).newbyteorder("<"))
    return HostArray(dtype, array.shape, array.view(np.uint8))


def require_finite_bytes(data: np.ndarray[Any, Any], dtype: str, *, nonnegative: bool = False) -> None:
    """Check uint8[n], a whole number of little-endian items of ``dtype``; see :func:`require_finite`."""
    import numpy as np

    if dtype in _NON_FINITE_F8:
        # A boolean table is one lookup per byte, whatever the number of codes.
        is_non_finite = np.zeros(256, bool)
        is_non_finite[list(_NON_FINITE_F8[dtype])] = True
        if is_non_finite[data].any():
            raise CorruptCheckpoint("it holds numbers that are not finite")
    elif dtype == "BF16":  # the upper half of a float32
        require_finite((data.view("<u2").astype("<u4") << 16).view("<f4"), nonnegative=nonnegative)
    else:
        require_finite(data.view(np.dtype(NUMPY_NAMES[dtype]).newbyteorder("<")), nonnegative=nonnegative)


def require_finite(values: np.ndarray[Any, Any], *, nonnegative: bool = False) -> None:
    """Check numbers: no training continues from NaN, and a mean of squares is never negative.

    Raises:
        CorruptCheckpoint: if one is not finite, or is negative where ``nonnegative``. -0.0 is not negative.
    """
    import numpy as np

    if values.dtype.kind in "fc" and not np.isfinite(values).all():
        raise CorruptCheckpoint("it holds numbers that are not finite")
    if nonnegative and values.dtype.kind in "fi" and (values < 0).any():
        raise CorruptCheckpoint("it holds negative numbers, but is a mean of squares")
