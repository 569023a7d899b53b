"""Everything that can happen to a checkpoint's file: kinds of damage, each a list of all there are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from distrust.checkpoint.files import checkpoint_file_name

STEP = 20  # of the damaged checkpoint
OLDER_STEP = 10  # of the one that must be loaded instead
NAME = checkpoint_file_name(STEP, "periodic")  # of the damaged file, unless the damage renames it
#: Of a file system, and of a disk.
BLOCK_SIZES = (4096, 512)
ZEROS_APPENDED = 4096  # at most
LENGTH_BYTES = 8  # before the header


class Files(NamedTuple):
    newer: bytes  # the file that is damaged, of :data:`STEP`
    older: bytes  # of the same run, of :data:`OLDER_STEP`
    foreign: bytes  # of another run: the same layout and step, another content
    final: bytes  # the same as ``newer``, saved as a final checkpoint


class Damage(NamedTuple):
    """One damage: the file's new content and its new name."""

    description: str
    content: bytes
    name: str = NAME
    misnamed: bool = False  # only the name is wrong; every byte is that of a checkpoint


class Kind(NamedTuple):
    """All damages of one kind: their name in the counts, how many there are, and a function of the number."""

    name: str
    size: int
    make: Callable[[int], Damage]


def kinds(files: Files) -> list[Kind]:
    return [*_byte_kinds(files.newer), *_block_kinds(files.newer), *_part_kinds(files), _name_kind(files)]


def _byte_kinds(raw: bytes) -> Iterator[Kind]:
    size = len(raw)

    def flip(number: int) -> Damage:
        at, bit = divmod(number, 8)
        return Damage(f"bit {bit} of byte {at} flipped", _overwrite(raw, at, bytes([raw[at] ^ 1 << bit])))

    def overwrite(value: bytes, description: str) -> Callable[[int], Damage]:
        return lambda at: Damage(f"byte {at} {description}", _overwrite(raw, at, value))

    def zero_tail(at: int) -> Damage:
        return Damage(f"zeros from byte {at} on", raw[:at] + bytes(size - at))

    def append_zeros(number: int) -> Damage:
        return Damage(f"{number + 1} zeros appended", raw + bytes(number + 1))

    yield Kind("bits flipped", 8 * size, flip)
    yield Kind("bytes zeroed", size, overwrite(b"\0", "zeroed"))
    yield Kind("bytes set to 0xFF", size, overwrite(b"\xff", "set to 0xFF"))
    yield Kind("lengths cut to", size, lambda length: Damage(f"cut to {length} bytes", raw[:length]))
    yield Kind("tails zeroed", size, zero_tail)
    yield Kind("tails of zeros appended", ZEROS_APPENDED, append_zeros)


def _block_kinds(raw: bytes) -> Iterator[Kind]:
    for size in BLOCK_SIZES:
        starts = range(0, len(raw), size)
        pairs = list(combinations(starts, 2))

        def zero(number: int, size: int = size) -> Damage:
            at = number * size
            zeros = bytes(len(raw[at : at + size]))
            return Damage(f"block of {size} at {at} zeroed", _overwrite(raw, at, zeros))

        def swap(number: int, size: int = size, pairs: Sequence[tuple[int, int]] = pairs) -> Damage:
            a, b = pairs[number]
            length = min(size, len(raw) - b)  # the last block may be a short one
            return Damage(f"blocks of {size} at {a} and {b} swapped", _swap(raw, a, b, length))

        yield Kind(f"blocks of {size} zeroed", len(starts), zero)
        yield Kind(f"blocks of {size} swapped", len(pairs), swap)


def _part_kinds(files: Files) -> Iterator[Kind]:
    raw, foreign, older = files.newer, files.foreign, files.older
    end, foreign_end, older_end = _data_begin(raw), _data_begin(foreign), _data_begin(older)
    tensors = list(_tensors(raw))
    grafted = (
        Damage(f"{name} is that of another file", _overwrite(raw, begin, foreign[begin:stop]))
        for name, begin, stop in tensors
    )
    yield _list_kind("tensors taken from another file", grafted)
    exchanged = (
        Damage(f"{a[0]} and {b[0]} exchanged", _swap(raw, a[1], b[1], a[2] - a[1]))
        for a, b in combinations(tensors, 2)
        if a[2] - a[1] == b[2] - b[1]
    )
    yield _list_kind("tensors exchanged within the file", exchanged)
    mixed = [
        Damage("the header of another run", foreign[:foreign_end] + raw[end:]),
        Damage("the data of another run", raw[:end] + foreign[foreign_end:]),
        Damage("the header of an older step", older[:older_end] + raw[end:]),
        Damage("the data of an older step", raw[:end] + older[older_end:]),
    ]
    yield _list_kind("headers on the data of another file", mixed)
    edited = (
        Damage(f"in the header: {description}", header + raw[end:])
        for description, header in _edited_headers(raw[:end])
    )
    yield _list_kind("header fields edited, the digest not", edited)
    tails = {
        "a byte 0xFF": b"\xff", "a line end": b"\n", "a space": b" ", "a page of 0xFF": b"\xff" * 4096,
        "a copy of itself": raw, "its header": raw[:end], "its data": raw[end:], "another file": foreign,
    }  # fmt: skip
    appended = (Damage(f"{name} appended", raw + tail) for name, tail in tails.items())
    yield _list_kind("tails appended", appended)


def _name_kind(files: Files) -> Kind:
    raw, older = files.newer, files.older
    final = checkpoint_file_name(STEP, "final")
    later, later_final = checkpoint_file_name(STEP + 1, "periodic"), checkpoint_file_name(10 * STEP, "final")
    misnamed = [
        Damage(f"step {OLDER_STEP} in its place", older),
        Damage("a final one in its place", files.final),
        Damage("renamed to a final one", raw, final),
        Damage("an older one renamed to a final one of its step", older, final),
        Damage("renamed to a later step", raw, later),
        Damage("renamed to a later final", raw, later_final),
    ]
    return _list_kind("files under another's name", (each._replace(misnamed=True) for each in misnamed))


def _list_kind(name: str, damages: Iterable[Damage]) -> Kind:
    listed = list(damages)
    return Kind(name, len(listed), listed.__getitem__)


def _overwrite(content: bytes, at: int, piece: bytes) -> bytes:
    return content[:at] + piece + content[at + len(piece) :]


def _swap(content: bytes, a: int, b: int, length: int) -> bytes:
    first, second = content[a : a + length], content[b : b + length]
    return _overwrite(_overwrite(content, a, second), b, first)


def _data_begin(content: bytes) -> int:
    return LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")


def _tensors(content: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, begin and end of each tensor, parsed without the library."""
    begin = _data_begin(content)
    for name, fields in json.loads(content[LENGTH_BYTES:begin]).items():
        if name != "__metadata__":
            first, last = fields["data_offsets"]
            yield name, begin + first, begin + last


def _edited_headers(header: bytes) -> Iterator[tuple[str, bytes]]:
    """The header with one thing changed, encoded as a writer does, with all its digests unchanged."""
    fields = json.loads(header[LENGTH_BYTES:])
    if _encode_header(fields) != header:
        raise ValueError("this campaign no longer knows how a header is encoded")
    for description, changed in _variants(fields):
        if changed.get("__metadata__", {}).get("digest") == fields["__metadata__"]["digest"]:
            yield description, _encode_header(changed)


def _variants(value: Any) -> Iterator[tuple[str, Any]]:
    """Every value that differs in one place: an item less, or another number, text or constant."""
    if isinstance(value, dict):
        for key, item in value.items():
            without = {name: member for name, member in value.items() if name != key}
            yield f"no {key}", without
            yield f"{key} renamed", {**without, f"{key}_": item}
            yield from ((f"{key}: {text}", {**value, key: changed}) for text, changed in _variants(item))
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield f"no item {at}", value[:at] + value[at + 1 :]
            for text, changed in _variants(item):
                yield f"{at}: {text}", [*value[:at], changed, *value[at + 1 :]]
        yield "one item more", [*value, 0]
    elif isinstance(value, str):
        yield from _text_variants(value)
    elif isinstance(value, bool) or value is None:
        yield f"{value} is {not value}", not value
    else:
        yield f"{value} is one more", value + 1
        yield f"{value} is text", str(value)


def _text_variants(text: str) -> Iterator[tuple[str, Any]]:
    if text.startswith("{"):  # JSON within JSON
        yield from ((name, _canonical(changed)) for name, changed in _variants(json.loads(text)))
        return
    yield f"{text[:20]!r} with another end", text[:-1] + ("0" if text[-1:] != "0" else "1")
    yield f"{text[:20]!r} longer", text + "0"
    yield f"{text[:20]!r} shorter", text[:-1]


def _encode_header(fields: dict[str, Any]) -> bytes:
    body = _canonical(fields).encode()
    length = -(-(LENGTH_BYTES + len(body)) // 4096) * 4096 - LENGTH_BYTES
    return length.to_bytes(LENGTH_BYTES, "little") + body.ljust(length)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
