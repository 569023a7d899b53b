"""Hostile files by name: what a draft is changed to, and files made whole.

- :data:`CHANGES`: something in a draft that a reader could fall for. They are combined, and signed.
- :data:`FILES`: whole files of a kind; most are forged, with digests that are right.
- :data:`GROWING`: files that grow with a number, each made to cost a reader more than it looks: time that
  grows faster than the file, or memory many times as large.

:func:`mutated` draws one from all of them. Everything comes out of the generator that is handed in.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from campaigns.fuzz.forging import (
    METADATA,
    NO_DIGEST,
    Draft,
    Specimen,
    Tensor,
    built,
    encodable,
    framed,
    signed,
)

#: What a change raises where what it wants to change is not there any more.
NOTHING_TO_CHANGE = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError)
#: Nothing random is deeper, so that thousands are tried in a second; what is deep is tried one by one.
DEEP = 200

#: Numbers whose hash is that of 0: a dict or set of them takes n * n steps.
SAME_HASH = 2**61 - 1

HOSTILE_TEXTS = (
    "", "a", "\0", "a\0b", "../../x", "/etc/passwd", "C:\\x", "%s%n{0}{}", "\x1b[2J\x1b]0;title\x07",
    "\x9b31m",
    "\u202egnp.exe", "\u2028", "\ufeff", "\ud800", "\udfff\ud800", "\U0010ffff", "é", "e\u0301", "\r\n",
    "\x7f",
    "__metadata__", "model.a", "model.a~1", "model", "optimizer.", "s", "i1", "bTrue", "n", "i01", "f1.0",
    "fnan",
    "F32", "F4", "F6_E2M3", "U8", "distrust", "periodic", "final", "1", "01", "-1", "²", "١", "9" * 18,
    "9" * 19,
    "9" * 5000, NO_DIGEST, "F" * 64, "0" * 63, "0" * 65, "{}", "[]", "null", "{", '"', "\\", '\\"',
    "a" * 5000,
)  # fmt: skip

HOSTILE_NUMBERS = (
    0, 1, -1, 2, 7, 8, 16, 20, 63, 64, 65, 255, 4095, 4096, 4097, 2**31 - 1, 2**31, 2**32, 2**53 + 1,
    2**61 - 1,
    2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**65, -(2**63), 10**300, 10**4290, True, False, None, 1.0,
    -0.0,
    1.5, 1e300, 5e-324, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip

DTYPES = (
    "F32", "F64", "BF16", "F16", "I8", "U8", "BOOL", "C64", "F8_E4M3", "F4", "F6_E2M3", "F6_E3M2", "I4", "U4",
    "U1", "F128", "f32", "F32 ", "", "STRING", "OBJECT",
)  # fmt: skip

#: JSON that Python's reader takes and no writer makes, and what is no JSON at all.
JSON_SNIPPETS = (
    b"1e999", b"-1e999", b"NaN", b"-Infinity", b"-0", b"1.0", b"1E5", b"00", b"1_0", b"0x10", b"+1", b"true",
    b"null", b"{}", b"[]", b'""', b"{", b"}", b"[", b"]", b'"', b",", b":", b" ", b"\t", b"\n", b"\\",
    b"\\u0041",
    b"\\ud800", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\0", b"//", b"9" * 40, b"9" * 5000,
    b"[" * 200, b'{"a":' * 200,
)  # fmt: skip


def mutated(specimen: Specimen, chance: Random) -> bytes:
    """A hostile file, most often one whose digests are right."""
    draw = chance.random()
    if draw < 0.1:
        return FILES[chance.choice(_FILE_NAMES)](specimen, chance)
    try:
        draft = specimen.draft()
    except (ValueError, KeyError, TypeError, RecursionError):
        return spliced(specimen, chance)  # a mutation of what was mutated before
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        try:
            CHANGES[chance.choice(_CHANGE_NAMES)](draft, chance)
        except NOTHING_TO_CHANGE:
            continue
    raw = draft.file(sign_state=chance.random() < 0.85)
    if draw < 0.3:
        raw = spliced(Specimen(raw), chance)
    if draw > 0.97:
        raw = damaged(Specimen(raw), chance)
    return raw


def any_value(chance: Random, depth: int = 0) -> Any:
    """A value of JSON, hostile more often than not."""
    draw = chance.random()
    if draw < 0.4:
        return chance.choice(HOSTILE_NUMBERS)
    if draw < 0.75 or depth > 3:
        return chance.choice(HOSTILE_TEXTS)
    inner = [any_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    if draw < 0.85:
        return inner
    return {chance.choice((*"dltasi", *HOSTILE_TEXTS)): item for item in inner}


def any_node(chance: Random, depth: int = 0) -> Any:
    """A node of the skeleton, right more often than not."""
    draw = chance.random()
    if draw < 0.35 or depth > 4:
        return chance.choice((*HOSTILE_NUMBERS, *HOSTILE_TEXTS))
    if draw < 0.45:
        return any_value(chance)
    if draw < 0.55:
        return {"a": chance.choice(("model.a", "model.b", *HOSTILE_TEXTS))}
    inner = [any_node(chance, depth + 1) for _ in range(chance.randrange(4))]
    if draw < 0.75:
        return {chance.choice("lt"): inner}
    return {"d": {chance.choice("sifbnx") + str(chance.choice(HOSTILE_TEXTS)): item for item in inner}}


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every place in a tree of JSON, as container and key."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        children = node.items() if type(node) is dict else enumerate(node) if type(node) is list else ()
        for key, child in children:
            found.append((node, key))
            waiting.append(child)
    return found


def replace_one(tree: Any, chance: Random, value: Callable[[Random], Any]) -> None:
    """Replace, remove, add or double one node, anywhere in a tree."""
    parent, key = chance.choice(places(tree))
    action = chance.randrange(6)
    if action <= 2:
        parent[key] = value(chance)
    elif action == 3:
        del parent[key]
    elif type(parent) is dict:
        new = chance.choice((*map(str, parent), *HOSTILE_TEXTS))
        parent[new] = parent[key] if action == 4 else value(chance)
    else:
        parent.insert(key, parent[key] if action == 4 else value(chance))


def spliced(specimen: Specimen, chance: Random) -> bytes:
    """The text of a header with some bytes of it replaced, and signed."""
    body = specimen.body
    begin = chance.randrange(len(body) + 1)
    end = min(len(body), begin + chance.choice((0, 0, 1, 1, 2, 8, 64)))
    snippet = chance.choice((*JSON_SNIPPETS, chance.randbytes(chance.randrange(5)), _piece(body, chance)))
    return signed(framed(body[:begin] + snippet + body[end:])) + specimen.data


def damaged(specimen: Specimen, chance: Random) -> bytes:
    """The file with some bytes changed, cut or added; its digests are as they were."""
    raw = bytearray(specimen.raw)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(raw) + 1)
        action = chance.randrange(4)
        if action == 0:
            raw[at : at + 1] = bytes([chance.randrange(256)])
        elif action == 1:
            raw[at : at + chance.randrange(64)] = b""
        elif action == 2:
            raw[at:at] = _piece(specimen.raw, chance)
        else:
            raw = raw[:at]
    return bytes(raw)


def _piece(raw: bytes, chance: Random) -> bytes:
    begin = chance.randrange(len(raw) + 1)
    return raw[begin : begin + chance.randrange(1, 200)]


# What is changed in a draft.


def _a_tensor(draft: Draft, chance: Random) -> dict[str, Any]:
    tensor: dict[str, Any] = draft.fields[chance.choice([name for name in draft.fields if name != METADATA])]
    return tensor


def _offsets(draft: Draft, chance: Random) -> None:
    tensor = _a_tensor(draft, chance)
    begin, end = tensor["data_offsets"]
    tensor["data_offsets"] = chance.choice(
        [
            [end, begin], [begin, begin], [begin + 1, end + 1], [begin - 1, end], [begin, end + 1], [-end,
            -begin],
            [begin, 2**63], [2**64 - end, 2**64 - begin], [2**63 - 1, 2**63], [begin], [begin, end, end], [],
            [float(begin), end], [bool(begin), end], [str(begin), str(end)], None,
        ]
    )  # fmt: skip


def _swapped(draft: Draft, chance: Random) -> None:
    one, other = _a_tensor(draft, chance), _a_tensor(draft, chance)
    field = chance.choice(("data_offsets", "shape", "dtype"))
    one[field], other[field] = other[field], one[field]


def _shape(draft: Draft, chance: Random) -> None:
    tensor = _a_tensor(draft, chance)
    tensor["shape"] = chance.choice(
        [
            [2**16, 2**16], [2**31, 2], [2**32, 2**32], [2**62, 2, 2], [2**63, 2], [2**64, 0], [0, 2**63],
            [2**62, 2**62, 0], [-1, -4], [-4], [4, True], [True] * 64, [4.0], ["4"], [None], [[4]], "4", 4,
            {},
            [1] * 64, [1] * 65, [1] * 1000, [10**4290], [SAME_HASH, 0], [0] * 64, tensor["shape"][::-1],
            [*tensor["shape"], 1], [chance.choice(HOSTILE_NUMBERS)],
        ]
    )  # fmt: skip


def _renamed(draft: Draft, chance: Random) -> None:
    """Everywhere alike, so that nothing but the name is hostile."""
    old = chance.choice([name for name in draft.fields if name != METADATA])
    new = chance.choice(HOSTILE_TEXTS)
    draft.fields[new] = draft.fields.pop(old)
    text = encodable(draft.state).replace(encodable(old), encodable(new))
    draft.state = json.loads(text)


def _metadata(draft: Draft, chance: Random) -> None:
    metadata = draft.fields[METADATA]
    key = chance.choice([*metadata, chance.choice(HOSTILE_TEXTS)])
    action = chance.randrange(5)
    if action == 0:
        metadata.pop(key, None)
    else:
        metadata[key] = any_value(chance) if action == 1 else chance.choice(HOSTILE_TEXTS)


def _digests(draft: Draft, chance: Random) -> None:
    metadata = draft.fields[METADATA]
    key = chance.choice(("digest", "digests", "state_digest"))
    text = metadata[key]
    metadata[key] = chance.choice(
        [
            text.upper(),
            text[:-1],
            text + "0",
            text * 2,
            "",
            text[::-1],
            text[1:] + "g",
            " " + text[1:],
            0,
            None,
        ]
    )


def _section(draft: Draft, chance: Random) -> None:
    sections = draft.state["sections"]
    names = chance.choice(([*sections], ("zeta", "a", "models"), HOSTILE_TEXTS))
    sections[chance.choice(names)] = any_node(chance)


def _keys(draft: Draft, chance: Random) -> None:
    """Keys that would become one, or that no writer gives."""
    keys = ("i1", "i01", "i+1", "i 1", "i-0", "f1.0", "f1", "fnan", "fNaN", "finf", "bTrue", "btrue",
    "nNone", "n",
            "", "x", "i", "f", "b", "s", "i" + "9" * 4299, "i" + "9" * 4301, f"i{SAME_HASH}",
            "i0")  # fmt: skip
    good = ("i1", "f1.0", "bTrue", "s1", "i0", "f0.0", "bFalse", "fnan", "nNone", "f-0.0", "finf")
    chosen = chance.sample(chance.choice((keys, good)), chance.randrange(1, 6))
    draft.state["sections"][chance.choice(("metadata", "config", "optimizer"))] = {
        "d": {key: chance.choice(HOSTILE_NUMBERS) for key in chosen}
    }


def _deep(draft: Draft, chance: Random) -> None:
    levels = chance.choice((49, 50, 51, 98, 99, 100, 101, 102, DEEP))
    if chance.random() < 0.3:
        levels = chance.choice((levels, 4 * DEEP))  # what can still be parsed
        draft.run = '{"extra":{"x":' + "[" * levels + "]" * levels + '},"metrics":{}}'
        return
    node: Any = chance.choice(HOSTILE_NUMBERS)
    kind = chance.choice("dlt[")
    for _ in range(levels):
        node = {kind: {"sx": node} if kind == "d" else [node]} if kind in "dlt" else [node]
    draft.state["sections"][chance.choice(("metadata", "optimizer"))] = {"d": {"sx": node}}


def _run(draft: Draft, chance: Random) -> None:
    key = chance.choice((*draft.run, chance.choice(HOSTILE_TEXTS)))
    draft.run[key] = chance.choice((any_value(chance), {"x": any_value(chance)}, {}))


def _metrics(draft: Draft, chance: Random) -> None:
    draft.run["metrics"] = {
        chance.choice(("loss", "eval_loss", *HOSTILE_TEXTS)): chance.choice((*HOSTILE_NUMBERS, "x"))
        for _ in range(4)
    }
    draft.state["sections"]["metadata"] = {
        "d": {chance.choice(("seval_loss", "i1", "sx")): chance.choice(HOSTILE_NUMBERS)}
    }


def _escapes(draft: Draft, chance: Random) -> None:
    """What commands a terminal, in every place that a command prints."""
    text = chance.choice(
        ("\x1b[2J", "\x1b]0;x\x07", "\x9b2J", "\u202eabc", "x\ry", "x\ny", "\x7f", "\u2066", "\x85")
    )
    draft.run.update(host=text, created=text, metrics={text: 1.5}, extra={text: text})
    for section in ("metadata", "config"):
        draft.state["sections"][section] = {"d": {f"s{text}": text}}


def _text_of_state(draft: Draft, chance: Random) -> None:
    text = encodable(draft.state)
    at = chance.randrange(len(text))
    snippet = chance.choice(JSON_SNIPPETS).decode(errors="replace")
    draft.state = text[:at] + snippet + text[at + chance.randrange(9) :]


def _text_of_run(draft: Draft, chance: Random) -> None:
    text = encodable(draft.run)
    at = chance.randrange(len(text))
    snippet = chance.choice(JSON_SNIPPETS).decode(errors="replace")
    draft.run = text[:at] + snippet + text[at + chance.randrange(9) :]


def _data(draft: Draft, chance: Random) -> None:
    draft.data = chance.choice(
        (b"", draft.data[:-1], draft.data + b"\0", draft.data + bytes(4096), draft.data[::-1], draft.data[1:])
    )


CHANGES: dict[str, Callable[[Draft, Random], None]] = {
    "offsets": _offsets,
    "tensors exchanged": _swapped,
    "shape": _shape,
    "dtype": lambda draft, chance: _a_tensor(draft, chance).update(dtype=chance.choice(DTYPES)),
    "field of a tensor": lambda draft, chance: replace_one(_a_tensor(draft, chance), chance, any_value),
    "name": _renamed,
    "metadata": _metadata,
    "digests": _digests,
    "anything in the header": lambda draft, chance: replace_one(draft.fields, chance, any_value),
    "anything in the state": lambda draft, chance: replace_one(draft.state, chance, any_node),
    "any JSON in the state": lambda draft, chance: replace_one(draft.state, chance, any_value),
    "anything in run": lambda draft, chance: replace_one(draft.run, chance, any_value),
    "section": _section,
    "keys": _keys,
    "deep": _deep,
    "run": _run,
    "metrics": _metrics,
    "escapes for a terminal": _escapes,
    "text of the state": _text_of_state,
    "text of run": _text_of_run,
    "data": _data,
}
_CHANGE_NAMES = (*CHANGES,)


# Whole files.

HEADER_LENGTHS = (
    0, 1, 2, 7, 8, 9, 4087, 4088, 4089, 8184, 99_999_992, 100_000_000, 100_000_001, 2**31 - 1, 2**31,
    2**32 - 8,
    2**32, 2**53, 2**63 - 9, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1,
)  # fmt: skip


def _lengths(specimen: Specimen, chance: Random) -> bytes:
    raw = chance.choice(HEADER_LENGTHS).to_bytes(8, "little") + specimen.raw[8:]
    return raw if chance.random() < 0.5 else signed(raw)


def _key_twice(specimen: Specimen, chance: Random) -> bytes:
    """Some key a second time, before or behind itself, with another value."""
    quotes = [at for at in range(1, len(specimen.body)) if specimen.body[at : at + 2] == b'":']
    if not quotes:
        return specimen.raw
    end = chance.choice(quotes) + 2
    begin = specimen.body.rfind(b'"', 0, end - 2)
    twice = specimen.body[begin:end] + chance.choice(JSON_SNIPPETS) + b","
    return signed(framed(specimen.body[:begin] + twice + specimen.body[begin:])) + specimen.data


def _some_tensors(_: Specimen, chance: Random) -> bytes:
    """A good file of hostile names: a reader may take it, and then has to bear it."""
    texts = {text for text in chance.choices(HOSTILE_TEXTS, k=6) if text != METADATA}
    shapes: list[tuple[int, ...]] = [(), (0,), (1,), (2, 3), (1,) * 64, (0, 2**60), (5, 0, 5)]
    dtypes = ("U8", "F32", "BF16", "F64", "BOOL", "F8_E5M2", "C64")
    return built(
        [Tensor(f"model.{text}", chance.choice(dtypes), chance.choice(shapes)) for text in texts],
        sections={"metadata": any_node(chance)} if chance.random() < 0.3 else None,
    )


def _skeleton(_: Specimen, chance: Random) -> bytes:
    sections = {
        section: {"d": {f"s{index}": any_node(chance) for index in range(3)}}
        for section in ("config", "metadata", "optimizer", "rng", "history")
        if chance.random() < 0.4
    }
    return built([Tensor("model.a", "F32", (4,)), Tensor("model.b", "U8", (3,))], sections=sections)


def _noise(_: Specimen, chance: Random) -> bytes:
    raw = chance.randbytes(chance.randrange(300))
    return framed(raw) if chance.random() < 0.5 else raw


FILES: dict[str, Callable[[Specimen, Random], bytes]] = {
    "header lengths": _lengths,
    "bytes of the header, signed": spliced,
    "bytes of the file": damaged,
    "a key twice": _key_twice,
    "hostile names, else good": _some_tensors,
    "skeletons": _skeleton,
    "noise": _noise,
    "another writer's": lambda _, __: (
        framed(b'{"a":{"data_offsets":[0,1],"dtype":"U8","shape":[1]}}') + b"\0"
    ),
}
_FILE_NAMES = (*FILES,)


# What grows: of a number of bytes, about.


def _nested(opening: str, closing: str, nbytes: int) -> str:
    levels = nbytes // len(opening + closing)
    return opening * levels + closing * levels


def _with_state(state: str) -> bytes:
    """A good file with another text for its state, signed."""
    draft = Specimen(built()).draft()
    draft.state = state
    return draft.file()


def _in_state(section: str, node: Any) -> bytes:
    return built(sections={section: {"d": {"s": node}}})


def _in_body(old: bytes, new: bytes) -> bytes:
    specimen = Specimen(built([Tensor("model.a")]))
    assert specimen.body.count(old) == 1  # else it would be a good file
    return signed(framed(specimen.body.replace(old, new)))


_LAST = b'[0,0],"dtype":"U8","shape":[0]'

GROWING: dict[str, Callable[[int], bytes]] = {
    "one large tensor": lambda n: built([Tensor("model.a", "F32", (n // 4,))]),
    "tensors without bytes": lambda n: built([Tensor(f"model.{at:07}") for at in range(n // 170)]),
    "tensors of a byte": lambda n: built([Tensor(f"model.{at:07}", "U8", (1,)) for at in range(n // 175)]),
    "shapes, all different": lambda n: built(
        [Tensor(f"model.{at:07}", "U8", (0, at)) for at in range(n // 175)]
    ),
    "shapes of one hash": lambda n: built(
        [Tensor(f"model.{at:07}", "U8", (0, at * SAME_HASH)) for at in range(n // 190)]
    ),
    "shapes of many digits": lambda n: built(
        [Tensor(f"model.{at:07}", "U8", (0, *(10**4290 + at,) * 4)) for at in range(n // 17_500)]
    ),
    "shapes of many dimensions": lambda n: built(
        [Tensor(f"model.{at:07}", "U8", (0, *(10**200 + at,) * 62)) for at in range(n // 12_800)]
    ),
    "names with one beginning": lambda n: built(
        [Tensor("model." + "x" * 2000 + f"{at:07}") for at in range(n // 4200)]
    ),
    "a name without end": lambda n: built([Tensor("model." + "x" * (n // 2))]),
    "names of quotes": lambda n: built([Tensor('model."' + '"' * (n // 7))]),
    "a table of commas and quotes": lambda n: _in_body(_LAST, _LAST + b'},"a":{"x":[' + b',"' * (n // 2)),
    "a table of backslashes": lambda n: _in_body(_LAST, _LAST + b'},"' + b"\\" * n),
    "a table of half members": lambda n: _in_body(
        _LAST, _LAST + b'},"' + b'a":{"data_offsets":[0,0],"' * (n // 26)
    ),
    "a table that is no table": lambda n: _in_body(_LAST, _LAST + b'},"":{"data_offsets":[' + b"0" * n),
    "digests of nothing": lambda n: _in_body(b'"digests":"', b'"digests":"' + b"0" * n),
    "spaces": lambda n: _in_body(b'"shape":[0]}}', b'"shape":[0]}}' + b" " * n),
    "empty lists in the optimizer": lambda n: _in_state("optimizer", {"l": [{"l": []}] * (n // 13)}),
    "nodes that are none": lambda n: _in_state("optimizer", {"l": [[]] * (n // 3)}),
    "nulls": lambda n: _in_state("optimizer", {"l": [None] * (n // 5)}),
    "objects": lambda n: _in_state("rng", {"l": [{}] * (n // 3)}),
    "metadata of many keys": lambda n: built(
        sections={"metadata": {"d": {f"s{at}": 0 for at in range(n // 14)}}}
    ),
    "metadata of empty lists": lambda n: _in_state("metadata", {"l": [{"l": []}] * (n // 13)}),
    "metadata of floats": lambda n: _in_state("metadata", {"l": [0.5] * (n // 4)}),
    "metadata of short texts": lambda n: _in_state("metadata", {"l": [f"{at}" for at in range(n // 12)]}),
    "ints of many digits": lambda n: _in_state("metadata", {"l": [10**4299] * (n // 4301)}),
    "an int without end": lambda n: _with_state(
        Specimen(built()).fields[METADATA]["state"][:-2] + "1" * n + "}"
    ),
    "keys of one hash": lambda n: built(
        sections={"metadata": {"d": {f"i{at * SAME_HASH}": 0 for at in range(n // 30)}}}
    ),
    "keys of many digits": lambda n: built(
        sections={"metadata": {"d": {f"i{10**4299 + at}": 0 for at in range(n // 4310)}}}
    ),
    "a key without end": lambda n: built(sections={"metadata": {"d": {"i" + "9" * n: 0}}}),
    "a float key without end": lambda n: built(sections={"metadata": {"d": {"f0." + "1" * n: 0}}}),
    "a long key above many values": lambda n: built(
        sections={"metadata": {"d": {"s" + "k" * (n // 2): {"l": [0] * (n // 100)}}}}
    ),
    "a text of escapes": lambda n: _in_state("metadata", "\x01" * (n // 8)),
    "a text of wide letters": lambda n: _in_state("metadata", "x" * n + "\U0001f600"),
    "a deep state": lambda n: _with_state('{"sections":{"config":' + _nested('{"l":[', "]}", n)),
    "an unclosed state": lambda n: _with_state('{"sections":{"config":' + "[" * n),
    "a deep run": lambda n: built(run='{"a":' + _nested("[", "]", n) + "}"),
    "a run of lists": lambda n: built(run={"metrics": {}, "extra": {"a": [[]] * (n // 3)}}),
    "a run of metrics": lambda n: built(run={"metrics": {str(at): 0 for at in range(n // 14)}, "extra": {}}),
    "a deep header": lambda n: _in_body(_LAST, _nested('{"a":', "}", n).encode()),
    "an unclosed metadata": lambda n: _in_body(b'"format":"distrust"', b'"format":' + b'{"a":[' * (n // 6)),
    "noise that begins well": lambda n: Specimen(built()).raw[:200] + bytes(n),
}
