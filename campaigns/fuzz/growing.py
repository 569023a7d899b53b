"""Files that cost a reader more time or memory than their size suggests; ``costs`` measures them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from campaigns.fuzz.families import SAME_HASH
from campaigns.fuzz.forging import METADATA, Specimen, Tensor, build, frame, sign


def _nest(opening: str, closing: str, nbytes: int) -> str:
    levels = nbytes // len(opening + closing)
    return opening * levels + closing * levels


def _with_state(state: str) -> bytes:
    """A valid file with another text for its state, signed."""
    draft = Specimen(build()).draft()
    draft.state = state
    return draft.file()


def _in_state(section: str, node: Any) -> bytes:
    return build(sections={section: {"d": {"s": node}}})


def _in_body(old: bytes, new: bytes) -> bytes:
    specimen = Specimen(build([Tensor("model.a")]))
    assert specimen.body.count(old) == 1  # else the file would be valid
    return sign(frame(specimen.body.replace(old, new)))


def _many(count: int, shape: Callable[[int], tuple[int, ...]] = lambda at: (0,)) -> bytes:
    return build([Tensor(f"model.{at:07}", "U8", shape(at)) for at in range(count)])


def _metadata(node: dict[str, Any]) -> bytes:
    return build(sections={"metadata": {"d": node}})


_LAST = b'[0,0],"dtype":"U8","shape":[0]'  # the end of the only tensor's entry

#: A number of bytes -> a file of about that size.
GROWING: dict[str, Callable[[int], bytes]] = {
    "one large tensor": lambda n: build([Tensor("model.a", "F32", (n // 4,))]),  # all data, to compare with
    "tensors without bytes": lambda n: _many(n // 170),  # all header
    "tensors of a byte": lambda n: _many(n // 175, lambda at: (1,)),  # a digest for each
    "shapes, all different": lambda n: _many(n // 175, lambda at: (0, at)),  # no shape can be shared
    "shapes of one hash": lambda n: _many(n // 190, lambda at: (0, at * SAME_HASH)),  # quadratic in a set
    "shapes of many digits": lambda n: _many(n // 17_500, lambda at: (0, *(10**4290 + at,) * 4)),
    "shapes of many dimensions": lambda n: _many(n // 12_800, lambda at: (0, *(10**200 + at,) * 62)),
    "names with one beginning": lambda n: build(  # each comparison reads 2,000 characters
        [Tensor("model." + "x" * 2000 + f"{at:07}") for at in range(n // 4200)]
    ),
    "a name without end": lambda n: build([Tensor("model." + "x" * (n // 2))]),
    "names of quotes": lambda n: build([Tensor('model."' + '"' * (n // 7))]),  # each one is escaped
    "a table of commas and quotes": lambda n: _in_body(_LAST, _LAST + b'},"a":{"x":[' + b',"' * (n // 2)),
    "a table of backslashes": lambda n: _in_body(_LAST, _LAST + b'},"' + b"\\" * n),
    "a table of half members": lambda n: _in_body(  # a search for the end of each could be quadratic
        _LAST, _LAST + b'},"' + b'a":{"data_offsets":[0,0],"' * (n // 26)
    ),
    "a table that is no table": lambda n: _in_body(_LAST, _LAST + b'},"":{"data_offsets":[' + b"0" * n),
    "digests of nothing": lambda n: _in_body(b'"digests":"', b'"digests":"' + b"0" * n),
    "spaces": lambda n: _in_body(b'"shape":[0]}}', b'"shape":[0]}}' + b" " * n),
    "empty lists in the optimizer": lambda n: _in_state("optimizer", {"l": [{"l": []}] * (n // 13)}),
    "nodes that are none": lambda n: _in_state("optimizer", {"l": [[]] * (n // 3)}),  # invalid
    "nulls": lambda n: _in_state("optimizer", {"l": [None] * (n // 5)}),
    "objects": lambda n: _in_state("rng", {"l": [{}] * (n // 3)}),  # 64 bytes of memory for 3 of text
    "metadata of many keys": lambda n: _metadata({f"s{at}": 0 for at in range(n // 14)}),
    "metadata of empty lists": lambda n: _in_state("metadata", {"l": [{"l": []}] * (n // 13)}),  # the worst
    "metadata of floats": lambda n: _in_state("metadata", {"l": [0.5] * (n // 4)}),
    "metadata of short texts": lambda n: _in_state("metadata", {"l": [f"{at}" for at in range(n // 12)]}),
    "ints of many digits": lambda n: _in_state("metadata", {"l": [10**4299] * (n // 4301)}),  # quadratic
    "an int without end": lambda n: _with_state(  # more digits than Python converts
        Specimen(build()).fields[METADATA]["state"][:-2] + "1" * n + "}"
    ),
    "keys of one hash": lambda n: _metadata({f"i{at * SAME_HASH}": 0 for at in range(n // 30)}),
    "keys of many digits": lambda n: _metadata({f"i{10**4299 + at}": 0 for at in range(n // 4310)}),
    "a key without end": lambda n: _metadata({"i" + "9" * n: 0}),
    "a float key without end": lambda n: _metadata({"f0." + "1" * n: 0}),
    "a long key above many values": lambda n: _metadata(  # a path that is built for each value
        {"s" + "k" * (n // 2): {"l": [0] * (n // 100)}}
    ),
    "a text of escapes": lambda n: _in_state("metadata", "\x01" * (n // 8)),
    "a text of wide letters": lambda n: _in_state("metadata", "x" * n + "\U0001f600"),  # 4 bytes a letter
    "a deep state": lambda n: _with_state('{"sections":{"config":' + _nest('{"l":[', "]}", n)),  # recursion
    "an unclosed state": lambda n: _with_state('{"sections":{"config":' + "[" * n),
    "a deep run": lambda n: build(run='{"a":' + _nest("[", "]", n) + "}"),
    "a run of lists": lambda n: build(run={"metrics": {}, "extra": {"a": [[]] * (n // 3)}}),
    "a run of metrics": lambda n: build(run={"metrics": {str(at): 0 for at in range(n // 14)}, "extra": {}}),
    "a deep header": lambda n: _in_body(_LAST, _nest('{"a":', "}", n).encode()),
    "an unclosed metadata": lambda n: _in_body(b'"format":"distrust"', b'"format":' + b'{"a":[' * (n // 6)),
    "noise with a valid beginning": lambda n: Specimen(build()).raw[:200] + bytes(n),
}
