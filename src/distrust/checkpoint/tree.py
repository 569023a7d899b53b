"""Nested state <-> named arrays and a JSON skeleton.

A skeleton node is a JSON scalar for a scalar, or an object with one key:

    {"d": {key: node}}   dict; the key's first letter is its type: s(tr), i(nt), f(loat), b(ool), n(one)
    {"l": [node]}        list
    {"t": [node]}        tuple
    {"a": "label"}       array: the name of a tensor in the file

so no value can be confused with a node. A label is the path joined by dots, for people; the skeleton alone
defines the structure, so a label only has to be unique. If two paths give the same one ({"a.b": x} and
{"a": {"b": y}}), the later in the order of keys gets a "~1". Trees are walked in sorted order: equal states
give equal labels and equal skeletons.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from operator import itemgetter
from typing import Any

from distrust.errors import CorruptCheckpoint, UnsupportedState, shorten

#: The sections that may hold arrays; the label of every tensor begins with one of them.
ARRAY_SECTIONS = ("model", "optimizer", "rng", "history")
#: The sections that identify a state: ``state_digest`` covers them.
STATE_SECTIONS = (*ARRAY_SECTIONS, "config", "metadata")
#: Deeper trees are rejected when saved and when loaded, well before Python's recursion limit.
MAX_DEPTH = 100
#: 4300 digits, the most that Python parses by default; a reader must not depend on a changed setting.
MAX_INTEGER_BITS = 14_000
#: A dict with more keys whose hashes collide is rejected when saved and when loaded. Hashes of ints are
#: predictable, and with n colliding keys a dict takes O(n**2) steps: a hostile file could stall the reader.
MAX_EQUAL_HASHES = 1000

_UNCHANGED = frozenset({type(None), bool, float})  # their own skeleton, without any check
_SCALARS = _UNCHANGED | {int, str}
_ONLY_TEXT = {str}
_TYPE_LETTERS: dict[type, str] = {str: "s", int: "i", float: "f", bool: "b", type(None): "n"}


def flatten(
    tree: Mapping[str, Any], *, is_array: Callable[[Any], bool]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a state, by section, into the skeleton of each section and the arrays by label.

    ``is_array`` decides by the type of a value: it is called once per type. Raises UnsupportedState for a
    value or key that would not be restored exactly.
    """
    walk = _Walk(is_array)
    return {name: walk.node(tree[name], name, 0) for name in sorted(tree)}, walk.arrays


class _Walk:
    """One walk over a state. Training waits for it, so the common cases come first and are inlined."""

    def __init__(self, is_array: Callable[[Any], bool]) -> None:
        self.arrays: dict[str, Any] = {}
        self._is_array = is_array
        self._array_types: set[type] = set()
        self._sorted_names: dict[tuple[str, ...], list[tuple[str, str]]] = {}  # a cache: see _sorted_keys

    def node(self, value: Any, label: str, depth: int) -> Any:
        """Return the skeleton of ``value``; add its arrays to :attr:`arrays`."""
        value_type = type(value)
        if value_type in _UNCHANGED:
            return value
        if value_type is dict:
            return self._mapping(value, label, depth)
        if value_type is list or value_type is tuple:
            return self._sequence(value, label, depth)
        if value_type in self._array_types:
            return self._array(value, label)
        return self._uncommon(value, label, depth)

    def _uncommon(self, value: Any, label: str, depth: int) -> Any:
        """Handle text, ints, subclasses of scalars, other mappings, and the first array of a type."""
        if isinstance(value, str):
            return _check_text(str(value), label)
        if isinstance(value, int):
            return _check_integer(value, label)
        if isinstance(value, float):  # numpy's float64, too: before the test for arrays
            return value
        if self._is_array(value):
            self._array_types.add(type(value))
            return self._array(value, label)
        if isinstance(value, Mapping):
            return self._mapping(value, label, depth)
        raise UnsupportedState(
            f"{label}: a {type(value).__module__}.{type(value).__qualname__} cannot be saved exactly; "
            "give dicts, lists, tuples, arrays, None, bools, ints, floats or strings",
            label=label,
        )

    def _array(self, value: Any, label: str) -> dict[str, str]:
        label = _unique_label(_check_text(label, label), self.arrays)
        self.arrays[label] = value
        return {"a": label}

    def _mapping(self, value: Mapping[Any, Any], label: str, depth: int) -> dict[str, Any]:
        _require_depth(value, label, depth)
        arrays, array_types = self.arrays, self._array_types
        nodes: dict[str, Any] = {}
        for encoded, key in self._sorted_keys(value, label):
            item = value[key]
            inner = f"{label}.{key}"
            if type(item) in array_types and inner not in arrays:  # inlined from _array, for speed
                arrays[inner] = item
                nodes[encoded] = {"a": inner}
            else:
                nodes[encoded] = self.node(item, inner, depth + 1)
        if len(nodes) != len(value):  # NaN != NaN: a dict may hold several, but they have the same text
            raise UnsupportedState(f"{label}: two of its keys are NaN: they would become one", label=label)
        return {"d": nodes}

    def _sorted_keys(self, value: Mapping[Any, Any], label: str) -> Sequence[tuple[str, Any]]:
        """Return (encoded key, key) of each, sorted by the former."""
        if {*map(type, value)} != _ONLY_TEXT:
            encoded = sorted([(encode_key(key, label), key) for key in value], key=itemgetter(0))
            if count_hash_collisions(value) > MAX_EQUAL_HASHES:
                raise UnsupportedState(f"{label}: too many of its keys have the same hash", label=label)
            return encoded
        names = (*value,)  # an optimizer has the same names for each of its parameters: sort them once
        pairs = self._sorted_names.get(names)
        if pairs is None:
            pairs = [("s" + _check_text(name, label), name) for name in sorted(names)]
            self._sorted_names[names] = pairs
        return pairs

    def _sequence(self, value: list[Any] | tuple[Any, ...], label: str, depth: int) -> dict[str, Any]:
        _require_depth(value, label, depth)
        items = [
            item if type(item) in _UNCHANGED else self.node(item, f"{label}.{index}", depth + 1)
            for index, item in enumerate(value)
        ]
        return {"l" if type(value) is list else "t": items}


def _require_depth(container: Sized, label: str, depth: int) -> None:
    if depth + bool(container) > MAX_DEPTH:  # its items are one level deeper
        raise UnsupportedState(f"{label}: nested deeper than {MAX_DEPTH} levels", label=label)


def _check_integer(value: int, label: str) -> int:
    if value.bit_length() > MAX_INTEGER_BITS:
        raise UnsupportedState(f"{label}: an integer of {value.bit_length()} bits is too long", label=label)
    return value


def _check_text(text: str, label: str) -> str:
    try:
        _ = text.isascii() or text.encode()  # isascii() is much the faster, and nearly always true
    except UnicodeEncodeError:
        raise UnsupportedState(
            f"{label!a}: UTF-8 cannot represent lone surrogates; escape them before saving", label=label
        ) from None
    return text


def _unique_label(label: str, labels: Mapping[str, Any]) -> str:
    candidate, number = label, 0
    while candidate in labels:
        number += 1
        candidate = f"{label}~{number}"
    return candidate


def encode_key(key: Any, label: str) -> str:
    """Return a dict key as text with its type: ``0`` is ``i0``, ``"0"`` is ``s0``."""
    letter = _TYPE_LETTERS.get(type(key))
    if letter is None:
        raise UnsupportedState(
            f"{label}: the key {key!r} is a {type(key).__qualname__}; "
            "keys must be strings, ints, floats, bools or None",
            label=label,
        )
    if letter == "i":
        _check_integer(key, label)
    return letter + (_check_text(key, label) if letter == "s" else repr(key))


def decode_key(text: str) -> Any:
    """The inverse of :func:`encode_key`."""
    letter, literal = text[:1], text[1:]
    if letter == "s":
        return literal
    if letter in ("i", "f"):
        number = int(literal) if letter == "i" else float(literal)
        if repr(number) != literal:  # otherwise two keys of a file could become one: "1" and "01"
            raise ValueError(f"{shorten(text)!r} is not the canonical form of {shorten(repr(number))}")
        return number
    constants = {"bTrue": True, "bFalse": False, "nNone": None}
    if text in constants:
        return constants[text]
    raise ValueError(f"{shorten(text)!r} has no known key type")


def count_hash_collisions(keys: Collection[Any]) -> int:
    """Return how many of a dict's keys have the same hash as another one."""
    if {*map(type, keys)} <= _ONLY_TEXT:
        return 0  # hashes of text are randomized for each process: nobody can choose colliding ones
    return len(keys) - len({*map(hash, keys)})


def is_too_deep(value: Any) -> bool:
    """Return whether plain JSON is nested deeper than :data:`MAX_DEPTH` levels."""
    level = [value]  # breadth first, not recursive: the value may be nested deeper than the stack allows
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for node in level
            if isinstance(node, (dict, list, tuple))
            for inner in (node.values() if isinstance(node, dict) else node)
        ]
    return bool(level)


def unflatten(node: Any, arrays: Callable[[str], Any], depth: int = 0) -> Any:
    """Rebuild a state from parsed JSON, of which nothing is trusted; the inverse of :func:`flatten`.

    Calls ``arrays`` once with the label of each array. Raises CorruptCheckpoint for a node that
    :func:`flatten` never produces.
    """
    if type(node) in _SCALARS:
        return node
    if depth > MAX_DEPTH:  # defends against a RecursionError
        raise CorruptCheckpoint(f"the state is nested deeper than {MAX_DEPTH} levels")
    if type(node) is dict and len(node) == 1:
        ((kind, content),) = node.items()
        if kind == "a" and type(content) is str:
            return arrays(content)
        if kind == "d" and type(content) is dict:
            try:
                keys = [key[1:] if key.startswith("s") else decode_key(key) for key in content]
            except ValueError as error:
                reason = shorten(str(error))
                raise CorruptCheckpoint(f"the state has a key that cannot be read: {reason}") from None
            if count_hash_collisions(keys) > MAX_EQUAL_HASHES:  # before they go into a dict
                raise CorruptCheckpoint("the state has a dict with too many colliding keys")
            values = [unflatten(item, arrays, depth + 1) for item in content.values()]
            mapping = dict(zip(keys, values, strict=True))
            if len(mapping) != len(keys):  # a key would silently replace another
                raise CorruptCheckpoint("the state has a dict with two equal keys, such as 1 and True")
            return mapping
        if kind in ("l", "t") and type(content) is list:
            items = [unflatten(item, arrays, depth + 1) for item in content]
            return items if kind == "l" else tuple(items)
    raise CorruptCheckpoint("the state contains a node that no writer produces")
