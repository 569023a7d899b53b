"""Hostile files by name: changes to a draft, and complete files; :func:`mutate` makes one of all at random.

All random choices come from the generator passed in.
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
    build,
    encode_json,
    frame,
    sign,
)

#: What a change raises if its target does not exist any more.
NOTHING_TO_CHANGE = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError)
#: Nothing random is deeper, so that thousands are tried in a second; deep files are tried one by one.
DEEP = 200  # levels

#: Numbers whose hash is that of 0: a dict or set of them takes n * n steps.
SAME_HASH = 2**61 - 1  # the modulus of the hash of an int

HOSTILE_TEXTS = (
    "", "a", "\0", "a\0b", "../../x", "/etc/passwd", "C:\\x", "%s%n{0}{}", "\x1b[2J\x1b]0;title\x07",
    "\x9b31m", "\u202egnp.exe", "\u2028", "\ufeff", "\ud800", "\udfff\ud800", "\U0010ffff", "é", "e\u0301",
    "\r\n", "\x7f", "__metadata__", "model.a", "model.a~1", "model", "optimizer.", "s", "i1", "bTrue", "n",
    "i01", "f1.0", "fnan", "F32", "F4", "F6_E2M3", "U8", "distrust", "periodic", "final", "1", "01", "-1",
    "²", "١", "9" * 18, "9" * 19, "9" * 5000, NO_DIGEST, "F" * 64, "0" * 63, "0" * 65, "{}", "[]", "null",
    "{", '"', "\\", '\\"', "a" * 5000,
)  # fmt: skip

HOSTILE_NUMBERS = (
    0, 1, -1, 2, 7, 8, 16, 20, 63, 64, 65, 255, 4095, 4096, 4097, 2**31 - 1, 2**31, 2**32, 2**53 + 1,
    2**61 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**65, -(2**63), 10**300, 10**4290, True, False,
    None, 1.0, -0.0, 1.5, 1e300, 5e-324, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip

DTYPES = (
    "F32", "F64", "BF16", "F16", "I8", "U8", "BOOL", "C64", "F8_E4M3", "F4", "F6_E2M3", "F6_E3M2", "I4", "U4",
    "U1", "F128", "f32", "F32 ", "", "STRING", "OBJECT",
)  # fmt: skip

#: JSON that Python's parser accepts and no writer makes, and text that is no JSON.
JSON_SNIPPETS = (
    b"1e999", b"-1e999", b"NaN", b"-Infinity", b"-0", b"1.0", b"1E5", b"00", b"1_0", b"0x10", b"+1", b"true",
    b"null", b"{}", b"[]", b'""', b"{", b"}", b"[", b"]", b'"', b",", b":", b" ", b"\t", b"\n", b"\\",
    b"\\u0041", b"\\ud800", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\0", b"//", b"9" * 40,
    b"9" * 5000, b"[" * 200, b'{"a":' * 200,
)  # fmt: skip


def mutate(specimen: Specimen, rng: Random) -> bytes:
    """A hostile file, most often one with correct digests."""
    draw = rng.random()
    if draw < 0.1:
        return FILES[rng.choice(_FILE_NAMES)](specimen, rng)
    try:
        draft = specimen.draft()
    except (ValueError, KeyError, TypeError, RecursionError):
        return splice(specimen, rng)  # the input was mutated before
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            CHANGES[rng.choice(_CHANGE_NAMES)](draft, rng)
        except NOTHING_TO_CHANGE:
            continue
    raw = draft.file(sign_state=rng.random() < 0.85)
    if draw < 0.3:
        raw = splice(Specimen(raw), rng)
    if draw > 0.97:
        raw = damage(Specimen(raw), rng)
    return raw


def any_value(rng: Random, depth: int = 0) -> Any:
    """A value of JSON, hostile more often than not."""
    draw = rng.random()
    if draw < 0.4:
        return rng.choice(HOSTILE_NUMBERS)
    if draw < 0.75 or depth > 3:
        return rng.choice(HOSTILE_TEXTS)
    inner = [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if draw < 0.85:
        return inner
    return {rng.choice((*"dltasi", *HOSTILE_TEXTS)): item for item in inner}


def any_node(rng: Random, depth: int = 0) -> Any:
    """A node of the skeleton, valid more often than not."""
    draw = rng.random()
    if draw < 0.35 or depth > 4:
        return rng.choice((*HOSTILE_NUMBERS, *HOSTILE_TEXTS))
    if draw < 0.45:
        return any_value(rng)
    if draw < 0.55:
        return {"a": rng.choice(("model.a", "model.b", *HOSTILE_TEXTS))}
    inner = [any_node(rng, depth + 1) for _ in range(rng.randrange(4))]
    if draw < 0.75:
        return {rng.choice("lt"): inner}
    return {"d": {rng.choice("sifbnx") + str(rng.choice(HOSTILE_TEXTS)): item for item in inner}}


def locations(tree: Any) -> list[tuple[Any, Any]]:
    """Every location in a tree of JSON, as container and key."""
    pairs: list[tuple[Any, Any]] = []
    pending = [tree]
    while pending:
        node = pending.pop()
        children = node.items() if type(node) is dict else enumerate(node) if type(node) is list else ()
        for key, child in children:
            pairs.append((node, key))
            pending.append(child)
    return pairs


def replace_one(tree: Any, rng: Random, value: Callable[[Random], Any]) -> None:
    """Replace, remove, add or double one node, anywhere in a tree."""
    parent, key = rng.choice(locations(tree))
    action = rng.randrange(6)
    if action <= 2:
        parent[key] = value(rng)
    elif action == 3:
        del parent[key]
    elif type(parent) is dict:
        new = rng.choice((*map(str, parent), *HOSTILE_TEXTS))
        parent[new] = parent[key] if action == 4 else value(rng)
    else:
        parent.insert(key, parent[key] if action == 4 else value(rng))


def splice(specimen: Specimen, rng: Random) -> bytes:
    """The text of a header with some bytes of it replaced, and signed."""
    body = specimen.body
    begin = rng.randrange(len(body) + 1)
    end = min(len(body), begin + rng.choice((0, 0, 1, 1, 2, 8, 64)))
    snippet = rng.choice((*JSON_SNIPPETS, rng.randbytes(rng.randrange(5)), _piece(body, rng)))
    return sign(frame(body[:begin] + snippet + body[end:])) + specimen.data


def damage(specimen: Specimen, rng: Random) -> bytes:
    """The file with some bytes changed, removed or added; its digests are unchanged."""
    raw = bytearray(specimen.raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(raw) + 1)
        action = rng.randrange(4)
        if action == 0:
            raw[at : at + 1] = bytes([rng.randrange(256)])
        elif action == 1:
            raw[at : at + rng.randrange(64)] = b""
        elif action == 2:
            raw[at:at] = _piece(specimen.raw, rng)
        else:
            raw = raw[:at]
    return bytes(raw)


def _piece(raw: bytes, rng: Random) -> bytes:
    begin = rng.randrange(len(raw) + 1)
    return raw[begin : begin + rng.randrange(1, 200)]


# Changes to a draft.


def _a_tensor(draft: Draft, rng: Random) -> Any:
    return draft.fields[rng.choice([name for name in draft.fields if name != METADATA])]


def _offsets(draft: Draft, rng: Random) -> None:
    tensor = _a_tensor(draft, rng)
    begin, end = tensor["data_offsets"]
    tensor["data_offsets"] = rng.choice(
        [
            [end, begin], [begin, begin], [begin + 1, end + 1], [begin - 1, end], [begin, end + 1],
            [-end, -begin], [begin, 2**63], [2**64 - end, 2**64 - begin], [2**63 - 1, 2**63], [begin],
            [begin, end, end], [], [float(begin), end], [bool(begin), end], [str(begin), str(end)], None,
        ]
    )  # fmt: skip


def _swap(draft: Draft, rng: Random) -> None:
    first, second = _a_tensor(draft, rng), _a_tensor(draft, rng)
    field = rng.choice(("data_offsets", "shape", "dtype"))
    first[field], second[field] = second[field], first[field]


def _shape(draft: Draft, rng: Random) -> None:
    tensor = _a_tensor(draft, rng)
    tensor["shape"] = rng.choice(
        [
            [2**16, 2**16], [2**31, 2], [2**32, 2**32], [2**62, 2, 2], [2**63, 2], [2**64, 0], [0, 2**63],
            [2**62, 2**62, 0], [-1, -4], [-4], [4, True], [True] * 64, [4.0], ["4"], [None], [[4]], "4", 4,
            {}, [1] * 64, [1] * 65, [1] * 1000, [10**4290], [SAME_HASH, 0], [0] * 64, tensor["shape"][::-1],
            [*tensor["shape"], 1], [rng.choice(HOSTILE_NUMBERS)],
        ]
    )  # fmt: skip


def _rename(draft: Draft, rng: Random) -> None:
    """The same new name everywhere, so that nothing but the name is hostile."""
    old = rng.choice([name for name in draft.fields if name != METADATA])
    new = rng.choice(HOSTILE_TEXTS)
    draft.fields[new] = draft.fields.pop(old)
    text = encode_json(draft.state).replace(encode_json(old), encode_json(new))
    draft.state = json.loads(text)


def _metadata(draft: Draft, rng: Random) -> None:
    metadata = draft.fields[METADATA]
    key = rng.choice([*metadata, rng.choice(HOSTILE_TEXTS)])
    action = rng.randrange(5)
    if action == 0:
        metadata.pop(key, None)
    else:
        metadata[key] = any_value(rng) if action == 1 else rng.choice(HOSTILE_TEXTS)


def _digests(draft: Draft, rng: Random) -> None:
    metadata = draft.fields[METADATA]
    key = rng.choice(("digest", "digests", "state_digest"))
    text = metadata[key]
    variants = [text.upper(), text[:-1], text + "0", text * 2, "", text[::-1], text[1:] + "g", " " + text[1:]]
    metadata[key] = rng.choice([*variants, 0, None])


def _section(draft: Draft, rng: Random) -> None:
    sections = draft.state["sections"]
    names = rng.choice(([*sections], ("zeta", "a", "models"), HOSTILE_TEXTS))
    sections[rng.choice(names)] = any_node(rng)


def _keys(draft: Draft, rng: Random) -> None:
    """Keys that Python takes for equal, or that no writer makes."""
    keys = (
        "i1", "i01", "i+1", "i 1", "i-0", "f1.0", "f1", "fnan", "fNaN", "finf", "bTrue", "btrue", "nNone",
        "n", "", "x", "i", "f", "b", "s", "i" + "9" * 4299, "i" + "9" * 4301, f"i{SAME_HASH}", "i0",
    )  # fmt: skip
    valid = ("i1", "f1.0", "bTrue", "s1", "i0", "f0.0", "bFalse", "fnan", "nNone", "f-0.0", "finf")
    chosen = rng.sample(rng.choice((keys, valid)), rng.randrange(1, 6))
    draft.state["sections"][rng.choice(("metadata", "config", "optimizer"))] = {
        "d": {key: rng.choice(HOSTILE_NUMBERS) for key in chosen}
    }


def _deep(draft: Draft, rng: Random) -> None:
    levels = rng.choice((49, 50, 51, 98, 99, 100, 101, 102, DEEP))
    if rng.random() < 0.3:
        levels = rng.choice((levels, 4 * DEEP))  # what can still be parsed
        draft.run = '{"extra":{"x":' + "[" * levels + "]" * levels + '},"metrics":{}}'
        return
    node: Any = rng.choice(HOSTILE_NUMBERS)
    kind = rng.choice("dlt[")
    for _ in range(levels):
        node = {kind: {"sx": node} if kind == "d" else [node]} if kind in "dlt" else [node]
    draft.state["sections"][rng.choice(("metadata", "optimizer"))] = {"d": {"sx": node}}


def _run(draft: Draft, rng: Random) -> None:
    key = rng.choice((*draft.run, rng.choice(HOSTILE_TEXTS)))
    draft.run[key] = rng.choice((any_value(rng), {"x": any_value(rng)}, {}))


def _metrics(draft: Draft, rng: Random) -> None:
    names = ("loss", "eval_loss", *HOSTILE_TEXTS)
    draft.run["metrics"] = {rng.choice(names): rng.choice((*HOSTILE_NUMBERS, "x")) for _ in range(4)}
    key = rng.choice(("seval_loss", "i1", "sx"))
    draft.state["sections"]["metadata"] = {"d": {key: rng.choice(HOSTILE_NUMBERS)}}


def _escapes(draft: Draft, rng: Random) -> None:
    """Control sequences of a terminal, in every field that a command prints."""
    texts = ("\x1b[2J", "\x1b]0;x\x07", "\x9b2J", "\u202eabc", "x\ry", "x\ny", "\x7f", "\u2066", "\x85")
    text = rng.choice(texts)
    draft.run.update(host=text, created=text, metrics={text: 1.5}, extra={text: text})
    for section in ("metadata", "config"):
        draft.state["sections"][section] = {"d": {f"s{text}": text}}


def _splice_text(value: Any, rng: Random) -> str:
    """The JSON of a value, with some characters replaced."""
    text = encode_json(value)
    at = rng.randrange(len(text))
    snippet = rng.choice(JSON_SNIPPETS).decode(errors="replace")
    return text[:at] + snippet + text[at + rng.randrange(9) :]


def _text_of(field: str) -> Callable[[Draft, Random], None]:
    return lambda draft, rng: setattr(draft, field, _splice_text(getattr(draft, field), rng))


def _data(draft: Draft, rng: Random) -> None:
    data = draft.data
    draft.data = rng.choice((b"", data[:-1], data + b"\0", data + bytes(4096), data[::-1], data[1:]))


CHANGES: dict[str, Callable[[Draft, Random], None]] = {
    "offsets": _offsets,  # reversed, overlapping, beyond the file, or no numbers
    "tensors exchanged": _swap,  # a field of two tensors
    "shape": _shape,  # too large, negative, or no numbers
    "dtype": lambda draft, rng: _a_tensor(draft, rng).update(dtype=rng.choice(DTYPES)),  # known or unknown
    "field of a tensor": lambda draft, rng: replace_one(_a_tensor(draft, rng), rng, any_value),
    "name": _rename,  # of a tensor, everywhere
    "metadata": _metadata,  # of the header, not of the state
    "digests": _digests,  # other letters, lengths or types
    "anything in the header": lambda draft, rng: replace_one(draft.fields, rng, any_value),
    "anything in the state": lambda draft, rng: replace_one(draft.state, rng, any_node),
    "any JSON in the state": lambda draft, rng: replace_one(draft.state, rng, any_value),
    "anything in run": lambda draft, rng: replace_one(draft.run, rng, any_value),
    "section": _section,  # of the state
    "keys": _keys,  # that are equal in Python, or invalid
    "deep": _deep,  # at the limit of the depth, and beyond
    "run": _run,  # a field of what is known of the run
    "metrics": _metrics,  # in the run, or in the metadata
    "escapes for a terminal": _escapes,
    "text of the state": _text_of("state"),
    "text of run": _text_of("run"),
    "data": _data,  # shorter, longer or reversed
}
_CHANGE_NAMES = (*CHANGES,)  # for random choices


# Complete files.

HEADER_LENGTHS = (
    0, 1, 2, 7, 8, 9, 4087, 4088, 4089, 8184, 99_999_992, 100_000_000, 100_000_001, 2**31 - 1, 2**31,
    2**32 - 8, 2**32, 2**53, 2**63 - 9, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1,
)  # fmt: skip


def _lengths(specimen: Specimen, rng: Random) -> bytes:
    raw = rng.choice(HEADER_LENGTHS).to_bytes(8, "little") + specimen.raw[8:]
    return raw if rng.random() < 0.5 else sign(raw)


def _key_twice(specimen: Specimen, rng: Random) -> bytes:
    """A key a second time, with another value."""
    quotes = [at for at in range(1, len(specimen.body)) if specimen.body[at : at + 2] == b'":']
    if not quotes:
        return specimen.raw
    end = rng.choice(quotes) + 2
    begin = specimen.body.rfind(b'"', 0, end - 2)
    duplicate = specimen.body[begin:end] + rng.choice(JSON_SNIPPETS) + b","
    return sign(frame(specimen.body[:begin] + duplicate + specimen.body[begin:])) + specimen.data


def _some_tensors(_: Specimen, rng: Random) -> bytes:
    """A valid file with hostile names: a reader may accept it, and then must handle it."""
    texts = {text for text in rng.choices(HOSTILE_TEXTS, k=6) if text != METADATA}
    shapes: list[tuple[int, ...]] = [(), (0,), (1,), (2, 3), (1,) * 64, (0, 2**60), (5, 0, 5)]
    dtypes = ("U8", "F32", "BF16", "F64", "BOOL", "F8_E5M2", "C64")
    return build(
        [Tensor(f"model.{text}", rng.choice(dtypes), rng.choice(shapes)) for text in texts],
        sections={"metadata": any_node(rng)} if rng.random() < 0.3 else None,
    )


def _skeleton(_: Specimen, rng: Random) -> bytes:
    sections = {
        section: {"d": {f"s{index}": any_node(rng) for index in range(3)}}
        for section in ("config", "metadata", "optimizer", "rng", "history")
        if rng.random() < 0.4
    }
    return build([Tensor("model.a", "F32", (4,)), Tensor("model.b", "U8", (3,))], sections=sections)


def _noise(_: Specimen, rng: Random) -> bytes:
    raw = rng.randbytes(rng.randrange(300))
    return frame(raw) if rng.random() < 0.5 else raw


FILES: dict[str, Callable[[Specimen, Random], bytes]] = {
    "header lengths": _lengths,  # of the first eight bytes
    "bytes of the header, signed": splice,  # past the digest
    "bytes of the file": damage,  # refused at the digest
    "a key twice": _key_twice,
    "hostile names, otherwise valid": _some_tensors,
    "skeletons": _skeleton,  # of all sections, with correct tensors
    "noise": _noise,  # framed or not
    "another writer's": lambda _, __: frame(b'{"a":{"data_offsets":[0,1],"dtype":"U8","shape":[1]}}') + b"\0",
}
_FILE_NAMES = (*FILES,)  # for random choices
