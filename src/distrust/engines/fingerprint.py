"""What tells base models apart: their weights, whichever framework loaded them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from distrust.checkpoint.format import tensor_hasher


def fingerprint(weights: Iterable[tuple[str, str, tuple[int, ...], Any]]) -> str:
    """BLAKE3 over name, dtype, shape and bytes of each weight: equal weights, equal fingerprint.

    Args:
        weights: name, dtype (such as ``float32``), shape, and a buffer of the bytes; by ascending name.
    """
    hasher = tensor_hasher(all_cores=True)
    for name, dtype, shape, data in weights:
        # Engines of torch were first: what their runs recorded stays comparable.
        hasher.update(f"{name} torch.{dtype} {shape}\n".encode())
        hasher.update(data)
    return hasher.hexdigest()
