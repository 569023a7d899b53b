"""Nested state <-> named arrays and a JSON skeleton.

A skeleton node is a JSON scalar for a scalar, or an object with one key:

    {"d": {key: node}}   dict; the key's first letter is its type: s(tr), i(nt), f(loat), b(ool), n(one)
    {"l": [node]}        list
    {"t": [node]}        tuple
    {"a": "label"}       array: the name of a tensor in the file

so that no value can be taken for a node, nor the other way round. Labels are the path joined by dots, for
people and for other readers of the file; the skeleton alone says what belongs where, so a label needs only
to be unique. Where two paths give the same one ({"a.b": x} beside {"a": {"b": y}}), the later in the order
of keys gets a "~1". Walks go in sorted order: equal states give equal labels and an equal skeleton.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from operator import itemgetter
from typing import Any

from distrust.errors import CorruptCheckpoint, UnsupportedState, shorten

#: The sections of a state that may hold arrays; the label of every tensor begins with one of them.
ARRAY_SECTIONS = ("model", "optimizer", "rng", "history")
#: The sections that are the identity of a state: they enter ``state_digest``.
STATE_SECTIONS = (*ARRAY_SECTIONS, "config", "metadata")
#: Deeper trees are refused when saved and when read, before any recursion limit is near.
MAX_DEPTH = 100
#: Python refuses to parse more than 4300 digits (unless told otherwise, which the reader may not be).
MAX_INTEGER_BITS = 14_000

#: A dict that has more keys than this whose hash another of them has is refused when saved and when read.
#: Ints have hashes that anybody can foresee, and with n keys of one hash a dict takes n * n steps.
MAX_EQUAL_HASHES = 1000

_UNCHANGED = frozenset({type(None), bool, float})
_SCALARS = _UNCHANGED | {int, str}
_ONLY_TEXT = {str}
_TYPE_LETTERS: dict[type, str] = {str: "s", int: "i", float: "f", bool: "b", type(None): "n"}


def flatten(
    tree: Mapping[str, Any], *, is_array: Callable[[Any], bool]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take a state apart.

    Args:
        tree: section name -> nested state.
        is_array: tells an array from a scalar or container, by its type: asked once for each type.

    Returns:
        The skeleton of each section, and its arrays by label.

    Raises:
        UnsupportedState: for a value or key that would not come back exactly.
    """
    walk = _Walk(is_array)
    return {name: walk.node(tree[name], name, 0) for name in sorted(tree)}, walk.arrays


class _Walk:
    """One walk over a state. A training run waits for it: the commonest cases come first, and inline."""

    def __init__(self, is_array: Callable[[Any], bool]) -> None:
        self.arrays: dict[str, Any] = {}
        self._is_array = is_array
        self._array_types: set[type] = set()
        self._sorted_names: dict[tuple[str, ...], list[tuple[str, str]]] = {}

    def node(self, value: Any, label: str, depth: int) -> Any:
        """The skeleton of ``value``; its arrays go to :attr:`arrays`."""
        kind = type(value)
        if kind in _UNCHANGED:
            return value
        if kind is dict:
            return self._mapping(value, label, depth)
        if kind is list or kind is tuple:
            return self._sequence(value, label, depth)
        if kind in self._array_types:
            return self._array(value, label)
        return self._other(value, label, depth)

    def _other(self, value: Any, label: str, depth: int) -> Any:
        if isinstance(value, str):
            return _text(str(value), label)
        if isinstance(value, int):
            return _check_integer(value, label)
        if isinstance(value, float):
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
        label = _unique(_text(label, label), self.arrays)
        self.arrays[label] = value
        return {"a": label}

    def _mapping(self, value: Mapping[Any, Any], label: str, depth: int) -> dict[str, Any]:
        _require_depth(value, label, depth)
        arrays, array_types = self.arrays, self._array_types
        nodes: dict[str, Any] = {}
        for encoded, key in self._sorted_keys(value, label):
            item = value[key]
            inner = f"{label}.{key}"
            if type(item) in array_types and inner not in arrays:
                arrays[inner] = item
                nodes[encoded] = {"a": inner}
            else:
                nodes[encoded] = self.node(item, inner, depth + 1)
        if len(nodes) != len(value):
            raise UnsupportedState(f"{label}: two of its keys are NaN: they would become one", label=label)
        return {"d": nodes}

    def _sorted_keys(self, value: Mapping[Any, Any], label: str) -> Sequence[tuple[str, Any]]:
        """Each key as text with its type, and itself, sorted by that text."""
        if {*map(type, value)} != _ONLY_TEXT:
            encoded = sorted([(encode_key(key, label), key) for key in value], key=itemgetter(0))
            if equal_hashes(value) > MAX_EQUAL_HASHES:
                raise UnsupportedState(f"{label}: too many of its keys have the same hash", label=label)
            return encoded
        names = (*value,)  # an optimizer has the same ones for each of its parameters
        known = self._sorted_names.get(names)
        if known is None:
            known = self._sorted_names[names] = [("s" + _text(name, label), name) for name in sorted(names)]
        return known

    def _sequence(self, value: list[Any] | tuple[Any, ...], label: str, depth: int) -> dict[str, Any]:
        _require_depth(value, label, depth)
        items = [
            item if type(item) in _UNCHANGED else self.node(item, f"{label}.{index}", depth + 1)
            for index, item in enumerate(value)
        ]
        return {"l" if type(value) is list else "t": items}


def _require_depth(container: Sized, label: str, depth: int) -> None:
    if depth + bool(container) > MAX_DEPTH:  # what it holds lies one deeper
        raise UnsupportedState(f"{label}: nested deeper than {MAX_DEPTH} levels", label=label)


def _check_integer(value: int, label: str) -> int:
    if value.bit_length() > MAX_INTEGER_BITS:
        raise UnsupportedState(f"{label}: an integer of {value.bit_length()} bits is too long", label=label)
    return value


def _text(text: str, label: str) -> str:
    try:
        _ = text.isascii() or text.encode()
    except UnicodeEncodeError:
        raise UnsupportedState(
            f"{label!a}: lone surrogates have no place in UTF-8; encode the text otherwise", label=label
        ) from None
    return text


def _unique(label: str, taken: Mapping[str, Any]) -> str:
    candidate, number = label, 0
    while candidate in taken:
        number += 1
        candidate = f"{label}~{number}"
    return candidate


def encode_key(key: Any, label: str) -> str:
    """A dict's key as text with its type: ``0`` is ``i0``, ``"0"`` is ``s0``."""
    letter = _TYPE_LETTERS.get(type(key))
    if letter is None:
        raise UnsupportedState(
            f"{label}: the key {key!r} is a {type(key).__qualname__}; "
            "keys must be strings, ints, floats, bools or None",
            label=label,
        )
    if letter == "i":
        _check_integer(key, label)
    return letter + (_text(key, label) if letter == "s" else repr(key))


def decode_key(text: str) -> Any:
    """The inverse of :func:`encode_key`."""
    letter, rest = text[:1], text[1:]
    if letter == "s":
        return rest
    if letter in ("i", "f"):
        number = int(rest) if letter == "i" else float(rest)
        if repr(number) != rest:  # or two keys of a file could become one: "1" and "01"
            raise ValueError(f"{shorten(text)!r} is not how {shorten(repr(number))} is written")
        return number
    constants = {"bTrue": True, "bFalse": False, "nNone": None}
    if text in constants:
        return constants[text]
    raise ValueError(f"no key begins like {shorten(text)!r}")


def equal_hashes(keys: Collection[Any]) -> int:
    """How many of a dict's keys have the hash of another one. Those of text are a secret of the process."""
    if {*map(type, keys)} <= _ONLY_TEXT:
        return 0
    return len(keys) - len({*map(hash, keys)})


def is_too_deep(value: Any) -> bool:
    """Whether plain JSON is nested deeper than :data:`MAX_DEPTH` levels."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for node in level
            if isinstance(node, (dict, list, tuple))
            for inner in (node.values() if isinstance(node, dict) else node)
        ]
    return bool(level)


def unflatten(node: Any, arrays: Callable[[str], Any], depth: int = 0) -> Any:
    """Put a state together again.

    Args:
        node: a node of the skeleton, as parsed from JSON: nothing about it is trusted.
        arrays: called once with the label of each array.
        depth: levels above this node.

    Raises:
        CorruptCheckpoint: for what :func:`flatten` never makes.
    """
    if type(node) in _SCALARS:
        return node
    if depth > MAX_DEPTH:
        raise CorruptCheckpoint(f"the state is nested deeper than {MAX_DEPTH} levels")
    if type(node) is dict and len(node) == 1:
        ((kind, content),) = node.items()
        if kind == "a" and type(content) is str:
            return arrays(content)
        if kind == "d" and type(content) is dict:
            try:
                keys = [key[1:] if key.startswith("s") else decode_key(key) for key in content]
            except ValueError as error:
                raise CorruptCheckpoint(
                    f"the state has a key that cannot be read: {shorten(str(error))}"
                ) from None
            if equal_hashes(keys) > MAX_EQUAL_HASHES:
                raise CorruptCheckpoint("the state has a dict whose keys were chosen to make it slow")
            values = [unflatten(item, arrays, depth + 1) for item in content.values()]
            made = dict(zip(keys, values, strict=True))
            if len(made) != len(keys):
                raise CorruptCheckpoint(
                    "the state has a dict with two keys that are equal, such as 1 and True"
                )
            return made
        if kind in ("l", "t") and type(content) is list:
            items = [unflatten(item, arrays, depth + 1) for item in content]
            return items if kind == "l" else tuple(items)
    raise CorruptCheckpoint("the state holds a node that no writer makes")
