"""Whether the numbers of an array are finite, and none is below zero where none can be: without numpy.

No program goes on from a NaN, and none is saved here. Arrays are looked at in pieces, and of a number mostly
at its highest byte, which holds the sign and the better part of the exponent; only where one stands out is
all of the piece.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from math import isfinite

from distrust.errors import CorruptCheckpoint

#: Bytes of a number that is not finite: those of eight bits. And the highest byte of larger ones, which may
#: be one of the largest numbers there are, too.
_NO_NUMBERS = {
    "F8_E4M3": b"\x7f\xff", "F8_E5M2": b"\x7c\x7d\x7e\x7f\xfc\xfd\xfe\xff", "F8_E8M0": b"\xff",
    "F8_E4M3FNUZ": b"\x80", "F8_E5M2FNUZ": b"\x80",
}  # fmt: skip
_LARGEST = {
    "F16": b"\x7c\x7d\x7e\x7f\xfc\xfd\xfe\xff", "BF16": b"\x7f\xff", "F32": b"\x7f\xff", "F64": b"\x7f\xff",
    "C64": b"\x7f\xff",
}  # fmt: skip
_LETTERS = {"F16": "e", "F32": "f", "F64": "d", "C64": "f"}
_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "C64": 4}  # of a complex number each part


def require(
    piece: bytes | bytearray, dtype: str, *, swapped: bool = False, never_negative: bool = False
) -> None:
    """Check a piece of an array, which holds whole numbers of it; whatever is no float is well.

    Args:
        piece: its bytes.
        dtype: the format's name of it.
        swapped: whether they stand in big-endian order.
        never_negative: whether no number may be below zero.

    Raises:
        CorruptCheckpoint: if one is not what it should be.
    """
    if dtype in _NO_NUMBERS:
        if _holds(piece, _NO_NUMBERS[dtype]):
            raise _not_finite()
        return
    if dtype not in _LARGEST:
        return
    size = _BYTES[dtype]
    highest = piece[0 if swapped else size - 1 :: size]
    if _holds(highest, _LARGEST[dtype]) and not all(map(isfinite, _values(piece, dtype, swapped))):
        raise _not_finite()
    if never_negative and not highest.isascii() and min(_values(piece, dtype, swapped)) < 0:
        raise _negative()


def require_in(values: Iterable[float], dtype: str, *, never_negative: bool = False) -> None:
    """The same, of numbers that are to become those of a dtype: what is too large for it is infinite there.

    Raises:
        CorruptCheckpoint: if one is not what it should be.
    """
    values = [*values]
    if not all(map(isfinite, values)):
        raise _not_finite()
    try:
        struct.pack(f"<{_LETTERS[dtype]}", max(map(abs, values), default=0.0))
    except OverflowError:
        raise _not_finite() from None
    if never_negative and min(values, default=0.0) < 0:
        raise _negative()


def _holds(raw: bytes | bytearray, letters: bytes) -> bool:
    return len(raw.translate(None, letters)) != len(raw)


def _values(piece: bytes | bytearray, dtype: str, swapped: bool) -> tuple[float, ...]:
    if dtype == "BF16":  # the upper half of a float32
        wide = bytearray(2 * len(piece))
        wide[2::4], wide[3::4] = piece[::2], piece[1::2]
        piece, dtype = bytes(wide), "F32"
    letter = _LETTERS[dtype]
    return struct.unpack(f"{'>' if swapped else '<'}{len(piece) // _BYTES[dtype]}{letter}", piece)


def _not_finite() -> CorruptCheckpoint:
    return CorruptCheckpoint("it holds numbers that are not finite")


def _negative() -> CorruptCheckpoint:
    return CorruptCheckpoint("it holds numbers below zero, and squares are none")
