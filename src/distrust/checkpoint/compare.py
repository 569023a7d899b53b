"""What differs between two checkpoints, from their headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distrust.checkpoint.format import TensorInfo
from distrust.checkpoint.header import Header
from distrust.checkpoint.store import CheckpointFile
from distrust.checkpoint.tree import decode_key

#: Stands for a value that one side does not have.
ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that differs.

    Attributes:
        what: ``tensor`` or ``state``.
        name: the tensor's label, or the path of a scalar in the state.
        a: how the first checkpoint has it.
        b: how the second one has it.
    """

    what: str
    name: str
    a: str
    b: str


def differences(a: CheckpointFile, b: CheckpointFile) -> list[Difference]:
    """Tensors and scalars that are not the same in both; empty if and only if the states are equal.

    Raises:
        CorruptCheckpoint: if one of them does not hold what its digest of the state says.
    """
    a.require_whole()
    b.require_whole()
    if a.state_digest == b.state_digest:
        return []
    found = [
        Difference("state", name, was, now)
        for name, was, now in _unequal(_scalars_of(a.header), _scalars_of(b.header))
    ]
    mine = {tensor.name: _described(tensor) for tensor in a.tensors}
    theirs = {tensor.name: _described(tensor) for tensor in b.tensors}
    found += [Difference("tensor", name, was, now) for name, was, now in _unequal(mine, theirs)]
    return found


def _unequal(a: dict[str, str], b: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    for name in sorted(a.keys() | b.keys()):
        was, now = a.get(name, ABSENT), b.get(name, ABSENT)
        if was != now:
            yield name, was, now


def _described(tensor: TensorInfo) -> str:
    return f"{tensor.dtype}{list(tensor.shape)} {tensor.digest}"


def _scalars_of(header: Header) -> dict[str, str]:
    scalars = {"step": str(header.step)}
    for section, node in header.sections.items():
        scalars.update(_scalars(node, section))
    return scalars


def _scalars(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """The scalars below a node of the skeleton, as text that tells 1 from 1.0 from "1"."""
    if not isinstance(node, dict):
        yield path, repr(node)
        return
    ((kind, content),) = node.items()
    if kind == "a":
        return  # compared as a tensor
    if not content:
        yield path, {"d": "{}", "l": "[]", "t": "()"}[kind]
    named = [(decode_key(key), item) for key, item in content.items()] if kind == "d" else enumerate(content)
    for name, item in named:
        yield from _scalars(item, f"{path}.{name}")
