"""JSON out of a file that nobody vouches for, read within bounds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from distrust.checkpoint.memory import available_bytes
from distrust.errors import CheckpointUnreadable, CorruptCheckpoint, shorten

#: One level less than a state may have: what stands here stands one or two levels deeper there.
MAX_DEPTH = 90
MAX_DIGITS = 4000
#: What Python's objects take of memory at most, as measured: for each byte of JSON, where it is numbers; and
#: besides for each mark in it. Of numbers it is 12 bytes for one, of lists in lists 49.
_BYTES_EACH = 14
_BESIDES = {b"[": 90, b"{": 150, b":": 120, b'"': 30}
_UNASKED_BYTES = 1 << 20


def parse_object(raw: bytes, what: str) -> dict[str, Any]:
    """An object of JSON. NaN and infinities are numbers, as Python writes them.

    Args:
        raw: UTF-8, behind a mark of its own (a BOM) or not: some editors write one.
        what: for messages: whose JSON it is.

    Raises:
        CorruptCheckpoint: if it is no JSON, no object, or nothing that a writer makes.
        CheckpointUnreadable: if there is not the memory for it.
    """
    if len(raw) > _UNASKED_BYTES and _most_memory(raw) > available_bytes():
        raise CheckpointUnreadable(f"{what}: {len(raw):,} bytes of JSON take more memory than is free")
    try:
        text = str(raw, "utf-8-sig")
        value = json.loads(text, object_pairs_hook=_each_key_once, parse_int=_integer)
    except UnicodeDecodeError:
        raise CorruptCheckpoint(f"{what} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{what} is no JSON that can be read: {shorten(str(error))}") from None
    if type(value) is not dict:
        raise CorruptCheckpoint(f"{what} is no JSON object")
    if _is_too_deep(value):
        raise CorruptCheckpoint(f"{what} is nested deeper than {MAX_DEPTH} levels")
    if b"\\u" in raw and not all(map(_is_text, _strings(value))):
        raise CorruptCheckpoint(f"{what} holds half a letter (a lone surrogate)")
    return value


def _most_memory(raw: bytes) -> int:
    return _BYTES_EACH * len(raw) + sum(raw.count(mark) * nbytes for mark, nbytes in _BESIDES.items())


def _strings(value: Any) -> Iterator[str]:
    left = [value]
    while left:
        node = left.pop()
        if type(node) is str:
            yield node
            continue
        if type(node) is dict:
            yield from node
        inner = node.values() if type(node) is dict else node
        left += [one for one in inner if type(one) in (str, list, dict)]


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shorten(twice)!r} stands twice")
    return made


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for node in level
            for inner in (node.values() if type(node) is dict else node)
            if type(inner) is dict or type(inner) is list
        ]
    return bool(level)
