"""The differences between two checkpoints, from their headers alone: no tensor is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from distrust.checkpoint.checkpoint_file import CheckpointFile
from distrust.checkpoint.format import TensorInfo
from distrust.checkpoint.tree import decode_key
from distrust.errors import shorten

#: Shown for a value that one side does not have.
ABSENT = "absent"

_MISSING = object()
_CONTAINERS = {"d": "a dict", "l": "a list", "t": "a tuple"}
_COMPARED_AS_TENSORS = {"a", ""}


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference between two checkpoints."""

    kind: str  # "tensor" or "state"
    name: str  # the tensor's label, or the path of a scalar in the state; shortened if very long
    a: str  # the value in the first checkpoint, as text
    b: str


def differences(a: CheckpointFile, b: CheckpointFile) -> list[Difference]:
    """Return the tensors and scalars that differ; empty if and only if the states are equal.

    Raises CheckpointError if a header does not match its digests, or one of them is in an older format.
    """
    a.require_intact()
    b.require_intact()
    # Read before the digests are compared: an older format has no sections, and raises here.
    sections_a, sections_b = a.header.sections, b.header.sections
    if a.state_digest == b.state_digest:
        return []
    result: list[Difference] = []
    _compare_nodes({"d": sections_a}, {"d": sections_b}, "", result)
    if a.step != b.step:
        result.append(Difference("state", "step", str(a.step), str(b.step)))
    result.sort(key=lambda difference: difference.name)
    tensors_a, tensors_b = _describe(a.tensors), _describe(b.tensors)
    result += [
        Difference("tensor", name, value_a, value_b)
        for name in sorted(tensors_a.keys() | tensors_b.keys())
        if (value_a := tensors_a.get(name, ABSENT)) != (value_b := tensors_b.get(name, ABSENT))
    ]
    # The digests differ, but neither tensors nor scalars do: the same arrays are at other paths.
    return result or [Difference("state", "skeleton", a.state_digest, b.state_digest)]


def _describe(tensors: Iterable[TensorInfo]) -> dict[str, str]:
    return {tensor.name: f"{tensor.dtype}{list(tensor.shape)} {tensor.digest}" for tensor in tensors}


def _compare_nodes(a: Any, b: Any, path: str, result: list[Difference]) -> None:
    """Append the differences below two nodes of the skeleton. Arrays are skipped: compared as tensors."""
    # Both trees at once: a list of all paths would need memory for their number times their length, and a
    # hostile file chooses both.
    kinds = {_kind(a), _kind(b)}
    if len(kinds) == 1 and kinds <= _CONTAINERS.keys():
        children_a, children_b = _children(a), _children(b)
        for key in {**children_a, **children_b}:
            # At the top the keys are the names of sections; in lists they are indices.
            name = key if not path or type(key) is int else decode_key(key)
            inner = shorten(f"{path}.{shorten(str(name))}") if path else key
            _compare_nodes(children_a.get(key, _MISSING), children_b.get(key, _MISSING), inner, result)
    elif not kinds <= _COMPARED_AS_TENSORS and (text_a := _text(a)) != (text_b := _text(b)):
        result.append(Difference("state", path, text_a, text_b))


def _kind(node: Any) -> str:
    """Return the letter of a container or an array, "s" for a scalar, "" if missing."""
    if node is _MISSING:
        return ""
    return next(iter(node)) if isinstance(node, dict) else "s"


def _children(node: Any) -> Mapping[Any, Any]:
    ((_, content),) = node.items()
    return content if isinstance(content, dict) else dict(enumerate(content))


def _text(node: Any) -> str:
    if node is _MISSING:
        return ABSENT
    if not isinstance(node, dict):
        return repr(node)  # distinguishes 1, 1.0 and "1"
    ((kind, content),) = node.items()
    return "an array" if kind == "a" else f"{_CONTAINERS[kind]} of {len(content)}"
