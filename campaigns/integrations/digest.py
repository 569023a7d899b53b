"""The digest of a tree: equal for equal contents, whichever library holds the arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from blake3 import blake3


def digest(tree: Any) -> str:
    """Of dicts, lists, tuples, arrays of numpy or torch on the CPU, and what ``repr`` describes."""
    hasher = blake3()
    for part in _parts(tree):
        hasher.update(part)
    return hasher.hexdigest()


def _parts(tree: Any) -> Iterator[bytes]:
    """The contents in a fixed order, with marks between them."""
    if isinstance(tree, Mapping):
        for key in sorted(tree, key=repr):
            yield f"{key!r}:".encode()
            yield from _parts(tree[key])
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield b","
            yield from _parts(value)
    elif hasattr(tree, "__array__"):
        array = np.ascontiguousarray(tree.detach() if hasattr(tree, "detach") else tree)
        yield f"{array.dtype}{array.shape}".encode()
        yield array.tobytes()
    else:
        yield repr(tree).encode()
