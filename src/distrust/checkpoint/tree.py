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

from collections.abc import Callable, Mapping
from typing import Any

from distrust.errors import CorruptCheckpoint, UnsupportedState

#: Deeper trees are refused when saved and when read, before any recursion limit is near.
MAX_DEPTH = 100
#: Python refuses to parse more than 4300 digits (unless told otherwise, which the reader may not be).
MAX_INTEGER_BITS = 14_000

_TYPE_LETTERS: dict[type, str] = {str: "s", int: "i", float: "f", bool: "b", type(None): "n"}


def flatten(
    tree: Mapping[str, Any], *, is_array: Callable[[Any], bool]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take a state apart.

    Args:
        tree: section name -> nested state.
        is_array: tells an array from a scalar or container.

    Returns:
        The skeleton of each section, and its arrays by label.

    Raises:
        UnsupportedState: for a value or key that would not come back exactly.
    """
    arrays: dict[str, Any] = {}
    skeleton = {name: _flatten(tree[name], name, 0, arrays, is_array) for name in sorted(tree)}
    return skeleton, arrays


def _flatten(
    value: Any, label: str, depth: int, arrays: dict[str, Any], is_array: Callable[[Any], bool]
) -> Any:
    if depth > MAX_DEPTH:
        raise UnsupportedState(f"{label}: nested deeper than {MAX_DEPTH} levels", label=label)
    if value is None or isinstance(value, (bool, int, float, str)):
        return _scalar(value, label)
    if is_array(value):
        label = _unique(_text(label, label), arrays)
        arrays[label] = value
        return {"a": label}
    if isinstance(value, Mapping):
        keyed = sorted((encode_key(key, label), key) for key in value)
        nodes = {
            encoded: _flatten(value[key], f"{label}.{key}", depth + 1, arrays, is_array)
            for encoded, key in keyed
        }
        if len(nodes) != len(value):
            raise UnsupportedState(f"{label}: two of its keys are NaN: they would become one", label=label)
        return {"d": nodes}
    if type(value) in (list, tuple):
        items = [
            _flatten(item, f"{label}.{index}", depth + 1, arrays, is_array)
            for index, item in enumerate(value)
        ]
        return {"l" if type(value) is list else "t": items}
    raise UnsupportedState(
        f"{label}: a {type(value).__module__}.{type(value).__qualname__} cannot be saved exactly; "
        "give dicts, lists, tuples, arrays, None, bools, ints, floats or strings",
        label=label,
    )


def _scalar(value: Any, label: str) -> Any:
    if isinstance(value, str):
        return _text(str(value), label)
    if isinstance(value, int):
        _bounded(value, label)
    return value


def _bounded(value: int, label: str) -> int:
    if value.bit_length() > MAX_INTEGER_BITS:
        raise UnsupportedState(f"{label}: an integer of {value.bit_length()} bits is too long", label=label)
    return value


def _text(text: str, label: str) -> str:
    try:
        text.encode()
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
        _bounded(key, label)
    return letter + (_text(key, label) if letter == "s" else repr(key))


def decode_key(text: str) -> Any:
    """The inverse of :func:`encode_key`."""
    letter, rest = text[:1], text[1:]
    if letter == "s":
        return rest
    if letter == "i":
        return int(rest)
    if letter == "f":
        return float(rest)
    constants = {"bTrue": True, "bFalse": False, "nNone": None}
    if text in constants:
        return constants[text]
    raise ValueError(f"no key begins like {text!r}")


def unflatten(node: Any, arrays: Callable[[str], Any], *, depth: int = 0) -> Any:
    """Put a state together again.

    Args:
        node: a node of the skeleton, as parsed from JSON: nothing about it is trusted.
        arrays: called once with the label of each array.
        depth: levels above this node.

    Raises:
        CorruptCheckpoint: for what :func:`flatten` never makes.
    """
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    if depth > MAX_DEPTH:
        raise CorruptCheckpoint(f"the state is nested deeper than {MAX_DEPTH} levels")
    if type(node) is dict and len(node) == 1:
        ((kind, content),) = node.items()
        if kind == "a" and type(content) is str:
            return arrays(content)
        if kind == "d" and type(content) is dict:
            try:
                keys = [decode_key(key) for key in content]
            except ValueError as error:
                raise CorruptCheckpoint(f"the state has a key that cannot be read: {error}") from None
            values = [unflatten(item, arrays, depth=depth + 1) for item in content.values()]
            return dict(zip(keys, values, strict=True))
        if kind in ("l", "t") and type(content) is list:
            items = [unflatten(item, arrays, depth=depth + 1) for item in content]
            return items if kind == "l" else tuple(items)
    raise CorruptCheckpoint("the state holds a node that no writer makes")
