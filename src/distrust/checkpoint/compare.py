"""What differs between two checkpoints, from their headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distrust.checkpoint.checkpoint_file import CheckpointFile
from distrust.checkpoint.format import TensorInfo
from distrust.checkpoint.tree import decode_key
from distrust.errors import shorten

#: Stands for a value that one side does not have.
ABSENT = "absent"

_NOTHING = object()
_CONTAINERS = {"d": "a dict", "l": "a list", "t": "a tuple"}
_COMPARED_AS_TENSORS = {"a", ""}


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that differs.

    Attributes:
        what: ``tensor`` or ``state``.
        name: the tensor's label, or the path of a scalar in the state; one without end is shortened.
        a: how the first checkpoint has it.
        b: how the second one has it.
    """

    kind: str
    name: str
    a: str
    b: str


def differences(a: CheckpointFile, b: CheckpointFile) -> list[Difference]:
    """Tensors and scalars that are not the same in both; empty if and only if the states are equal.

    Raises:
        CorruptCheckpoint: if one of them does not hold what its digest of the state says.
        CheckpointError: if one of them is in an older format.
    """
    a.require_intact()
    b.require_intact()
    sections_a, sections_b = (
        a.header.sections,
        b.header.sections,
    )  # an older format has none: it is not compared
    if a.state_digest == b.state_digest:
        return []
    found: list[Difference] = []
    _compare_nodes({"d": sections_a}, {"d": sections_b}, "", found)
    if a.step != b.step:
        found.append(Difference("state", "step", str(a.step), str(b.step)))
    found.sort(key=lambda difference: difference.name)
    mine = {tensor.name: _described(tensor) for tensor in a.tensors}
    theirs = {tensor.name: _described(tensor) for tensor in b.tensors}
    found += [Difference("tensor", name, was, now) for name, was, now in _unequal(mine, theirs)]
    # Where the same arrays stand in other places, that is all there is to say.
    return found or [Difference("state", "skeleton", a.state_digest, b.state_digest)]


def _unequal(a: dict[str, str], b: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    for name in sorted(a.keys() | b.keys()):
        was, now = a.get(name, ABSENT), b.get(name, ABSENT)
        if was != now:
            yield name, was, now


def _described(tensor: TensorInfo) -> str:
    return f"{tensor.dtype}{list(tensor.shape)} {tensor.digest}"


def _compare_nodes(a: Any, b: Any, path: str, found: list[Difference]) -> None:
    """Add what differs below two nodes of the skeleton. Arrays are left out: they are compared as tensors.

    Both are walked side by side, not listed and then compared: a list of paths is as large as their number
    times their length, and a hostile file has as many and as long ones as it likes.
    """
    kinds = {_kind(a), _kind(b)}
    if len(kinds) == 1 and kinds <= _CONTAINERS.keys():
        mine, theirs = _children(a), _children(b)
        for key in {**mine, **theirs}:
            name = key if not path or type(key) is int else decode_key(key)
            inner = shorten(f"{path}.{shorten(str(name))}") if path else key
            _compare_nodes(mine.get(key, _NOTHING), theirs.get(key, _NOTHING), inner, found)
    elif not kinds <= _COMPARED_AS_TENSORS and (was := _text(a)) != (now := _text(b)):
        found.append(Difference("state", path, was, now))


def _kind(node: Any) -> str:
    """Of a container or an array the letter of its kind, of a scalar an s."""
    if node is _NOTHING:
        return ""
    return next(iter(node)) if isinstance(node, dict) else "s"


def _children(node: Any) -> Mapping[Any, Any]:
    ((_, content),) = node.items()
    return content if isinstance(content, dict) else dict(enumerate(content))


def _text(node: Any) -> str:
    """A node as text that tells 1 from 1.0 from "1"."""
    if node is _NOTHING:
        return ABSENT
    if not isinstance(node, dict):
        return repr(node)
    ((kind, content),) = node.items()
    return "an array" if kind == "a" else f"{_CONTAINERS[kind]} of {len(content)}"
