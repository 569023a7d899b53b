"""Everything that is done to a checkpoint's file: kinds of injuries, each a numbered list of all there are.

What a disk, a controller, a file system or a person does to a file: bits flip, a tail is missing, blocks are
zeros or another file's, something is appended, a header is edited, a file is renamed. An injury is the new
content of the file, and its new name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from distrust.checkpoint.files import checkpoint_file_name

STEP = 20
OLDER_STEP = 10
NAME = checkpoint_file_name(STEP, "periodic")
#: Of a file system, and of a disk.
BLOCK_SIZES = (4096, 512)
ZEROS_APPENDED = 4096
LENGTH_BYTES = 8


class Files(NamedTuple):
    """What injuries are made of.

    Attributes:
        good: the file that is injured, of :data:`STEP`.
        older: of the same run, of :data:`OLDER_STEP`.
        other: of another run: the same layout and step, another content.
        final: the same as ``good``, saved as a final.
    """

    good: bytes
    older: bytes
    other: bytes
    final: bytes


class Injury(NamedTuple):
    """What became of the file.

    Attributes:
        what: was done to it.
        content: of it now.
        name: of it now.
        misnamed: nothing else is wrong with it: every byte is that of a checkpoint.
    """

    what: str
    content: bytes
    name: str = NAME
    misnamed: bool = False


class Kind(NamedTuple):
    """All injuries of one kind.

    Attributes:
        name: in the plural, for the counts.
        size: how many there are.
        make: one of them, by its number.
    """

    name: str
    size: int
    make: Callable[[int], Injury]


def kinds(files: Files) -> list[Kind]:
    """Every kind, in a fixed order."""
    return [*_each_byte(files.good), *_blocks(files.good), *_pieces(files), *_whole_files(files)]


def _each_byte(good: bytes) -> Iterator[Kind]:
    size = len(good)

    def flipped(number: int) -> Injury:
        at, bit = divmod(number, 8)
        return Injury(f"bit {bit} of byte {at} flipped", _with(good, at, bytes([good[at] ^ 1 << bit])))

    yield Kind("bits flipped", 8 * size, flipped)
    yield Kind("bytes zeroed", size, lambda at: Injury(f"byte {at} zeroed", _with(good, at, b"\0")))
    yield Kind(
        "bytes set to 0xFF", size, lambda at: Injury(f"byte {at} set to 0xFF", _with(good, at, b"\xff"))
    )
    yield Kind("lengths cut to", size, lambda to: Injury(f"cut to {to} bytes", good[:to]))
    yield Kind(
        "tails zeroed", size, lambda at: Injury(f"zeros from byte {at} on", good[:at] + bytes(size - at))
    )
    yield Kind(
        "tails of zeros appended",
        ZEROS_APPENDED,
        lambda at: Injury(f"{at + 1} zeros appended", good + bytes(at + 1)),
    )


def _blocks(good: bytes) -> Iterator[Kind]:
    for size in BLOCK_SIZES:
        starts = range(0, len(good), size)
        pairs = list(combinations(starts, 2))

        def zeroed(number: int, size: int = size) -> Injury:
            at = number * size
            return Injury(
                f"block of {size} at {at} zeroed", _with(good, at, bytes(len(good[at : at + size])))
            )

        def swapped(number: int, size: int = size, pairs: Sequence[tuple[int, int]] = pairs) -> Injury:
            a, b = pairs[number]
            length = min(size, len(good) - b)  # the last block may be a short one
            return Injury(f"blocks of {size} at {a} and {b} swapped", _swapped(good, a, b, length))

        yield Kind(f"blocks of {size} zeroed", len(starts), zeroed)
        yield Kind(f"blocks of {size} swapped", len(pairs), swapped)


def _pieces(files: Files) -> Iterator[Kind]:
    good, other = files.good, files.other
    end, of_other = _data_begin(good), _data_begin(files.other)
    tensors = list(_tensors(good))
    yield _listed(
        "tensors taken from another file",
        (
            Injury(f"{name} is that of another file", _with(good, begin, other[begin:stop]))
            for name, begin, stop in tensors
        ),
    )
    yield _listed(
        "tensors exchanged within the file",
        (
            Injury(f"{a[0]} and {b[0]} exchanged", _swapped(good, a[1], b[1], a[2] - a[1]))
            for a, b in combinations(tensors, 2)
            if a[2] - a[1] == b[2] - b[1]
        ),
    )
    older_end = _data_begin(files.older)
    yield _listed(
        "headers on the data of another file",
        [
            Injury("the header of another run", other[:of_other] + good[end:]),
            Injury("the data of another run", good[:end] + other[of_other:]),
            Injury("the header of an older step", files.older[:older_end] + good[end:]),
            Injury("the data of an older step", good[:end] + files.older[older_end:]),
        ],
    )
    yield _listed(
        "header fields edited, the digest left",
        (Injury(f"in the header: {what}", header + good[end:]) for what, header in _edited(good[:end])),
    )
    tails = {
        "a byte 0xFF": b"\xff", "a line end": b"\n", "a space": b" ", "a page of 0xFF": b"\xff" * 4096,
        "a copy of itself": good, "its header": good[:end], "its data": good[end:], "another file": other,
    }  # fmt: skip
    yield _listed("tails appended", (Injury(f"{what} appended", good + tail) for what, tail in tails.items()))


def _whole_files(files: Files) -> Iterator[Kind]:
    good, older = files.good, files.older
    final = checkpoint_file_name(STEP, "final")
    yield _listed(
        "files under another's name",
        [
            Injury(f"step {OLDER_STEP} in its place", older, misnamed=True),
            Injury("a final one in its place", files.final, misnamed=True),
            Injury("renamed to a final one", good, final, misnamed=True),
            Injury("an older one renamed to a final one of its step", older, final, misnamed=True),
            Injury(
                "renamed to a later step", good, checkpoint_file_name(STEP + 1, "periodic"), misnamed=True
            ),
            Injury("renamed to a later final", good, checkpoint_file_name(10 * STEP, "final"), misnamed=True),
        ],
    )


def _listed(name: str, injuries: Iterable[Injury]) -> Kind:
    made = list(injuries)
    return Kind(name, len(made), made.__getitem__)


def _with(content: bytes, at: int, piece: bytes) -> bytes:
    return content[:at] + piece + content[at + len(piece) :]


def _swapped(content: bytes, a: int, b: int, length: int) -> bytes:
    one, two = content[a : a + length], content[b : b + length]
    return _with(_with(content, a, two), b, one)


def _data_begin(content: bytes) -> int:
    return LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")


def _tensors(content: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, and where it begins and ends in the file; read by none of the library's own means."""
    begin = _data_begin(content)
    for name, fields in json.loads(content[LENGTH_BYTES:begin]).items():
        if name != "__metadata__":
            first, last = fields["data_offsets"]
            yield name, begin + first, begin + last


def _edited(header: bytes) -> Iterator[tuple[str, bytes]]:
    """The header with one thing changed, framed as a writer does, all its digests as they were."""
    fields = json.loads(header[LENGTH_BYTES:])
    if _framed(fields) != header:
        raise ValueError("this campaign no longer knows how a header is encoded")
    for what, changed in _variants(fields):
        if changed.get("__metadata__", {}).get("digest") == fields["__metadata__"]["digest"]:
            yield what, _framed(changed)


def _variants(value: Any) -> Iterator[tuple[str, Any]]:
    """Every value that differs in one place: a member or item less, or another number, text or constant."""
    if isinstance(value, dict):
        for key, item in value.items():
            rest = {name: one for name, one in value.items() if name != key}
            yield f"no {key}", rest
            yield f"{key} renamed", {**rest, f"{key}_": item}
            yield from ((f"{key}: {what}", {**value, key: changed}) for what, changed in _variants(item))
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield f"no item {at}", value[:at] + value[at + 1 :]
            for what, changed in _variants(item):
                yield f"{at}: {what}", [*value[:at], changed, *value[at + 1 :]]
        yield "one item more", [*value, 0]
    elif isinstance(value, str):
        yield from _texts(value)
    elif isinstance(value, bool) or value is None:
        yield f"{value} is {not value}", not value
    else:
        yield f"{value} is one more", value + 1
        yield f"{value} is text", str(value)


def _texts(text: str) -> Iterator[tuple[str, Any]]:
    if text.startswith("{"):  # JSON within JSON
        yield from ((what, _canonical(changed)) for what, changed in _variants(json.loads(text)))
        return
    yield f"{text[:20]!r} with another end", text[:-1] + ("0" if text[-1:] != "0" else "1")
    yield f"{text[:20]!r} longer", text + "0"
    yield f"{text[:20]!r} shorter", text[:-1]


def _framed(fields: dict[str, Any]) -> bytes:
    body = _canonical(fields).encode()
    length = -(-(LENGTH_BYTES + len(body)) // 4096) * 4096 - LENGTH_BYTES
    return length.to_bytes(LENGTH_BYTES, "little") + body.ljust(length)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
