"""JSON from untrusted files, parsed within bounds of memory, depth and digits."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from distrust.checkpoint.memory import available_bytes
from distrust.errors import CheckpointUnreadable, CorruptCheckpoint, shorten

#: Below the bound of a state: values end up one or two levels deeper in the checkpoint.
MAX_DEPTH = 90
#: Python itself refuses to parse more than 4300 digits, unless it was configured otherwise.
MAX_DIGITS = 4000
#: An upper bound of the memory that Python's objects take, measured: bytes for each byte of JSON, and in
#: addition for each of these characters. Plain numbers need 12 per byte; lists within lists need 49.
_BYTES_EACH = 14
_EXTRA_BYTES = {b"[": 90, b"{": 150, b":": 120, b'"': 30}
_UNCHECKED_BYTES = 1 << 20


def parse_object(raw: bytes, what: str) -> dict[str, Any]:
    """Parse the JSON object ``what``, in UTF-8. NaN and infinities are numbers, as Python writes them.

    Raises:
        CorruptCheckpoint: if it is not a JSON object within the bounds, or a key occurs twice.
        CheckpointUnreadable: if there is not enough memory.
    """
    extra_bytes = sum(raw.count(mark) * nbytes for mark, nbytes in _EXTRA_BYTES.items())
    if len(raw) > _UNCHECKED_BYTES and _BYTES_EACH * len(raw) + extra_bytes > available_bytes():
        raise CheckpointUnreadable(f"{what}: {len(raw):,} bytes of JSON take more memory than is free")
    try:
        text = str(raw, "utf-8-sig")  # some editors on Windows write a byte order mark
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_int=_bounded_int)
    except UnicodeDecodeError:
        raise CorruptCheckpoint(f"{what} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{what} is not valid JSON: {shorten(str(error))}") from None
    if type(value) is not dict:
        raise CorruptCheckpoint(f"{what} is not a JSON object")
    if _is_too_deep(value):  # later code is recursive
        raise CorruptCheckpoint(f"{what} is nested deeper than {MAX_DEPTH} levels")
    if rb"\ud" in raw.lower():  # half of a surrogate pair: no checkpoint could store it as UTF-8
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise CorruptCheckpoint(f"{what} contains a lone surrogate") from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):  # readers differ in which of two values they take
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {shorten(max(counts, key=lambda key: counts[key]))!r} occurs twice")
    return fields


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:  # converting takes quadratic time
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if type(node) is dict else node)
            if type(child) is dict or type(child) is list
        ]
    return bool(level)
