"""Faults put into the product on purpose: a campaign that finds nothing must be able to find something.

Each is a mistake that is made elsewhere. It is put in by calling it, in the process that saves.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distrust.checkpoint import manager
from distrust.checkpoint.storage import AtomicFile


class _InPlace(AtomicFile):
    def __init__(self, path: Path, *rest: Any, **named: Any) -> None:
        super().__init__(path, *rest, **named)
        (temporary,) = path.parent.glob(f".{path.name}.*.tmp")
        path.unlink(missing_ok=True)
        os.link(temporary, path)


class _RemovedFirst(AtomicFile):
    def __init__(self, path: Path, *rest: Any, **named: Any) -> None:
        path.unlink(missing_ok=True)
        super().__init__(path, *rest, **named)


class _OneOnly(AtomicFile):
    def __init__(self, path: Path, *rest: Any, **named: Any) -> None:
        for older in path.parent.glob("checkpoint-*.safetensors"):
            older.unlink()
        super().__init__(path, *rest, **named)


def in_place() -> None:
    """The file has its final name before it is written."""
    vars(manager)["AtomicFile"] = _InPlace


def removed_first() -> None:
    """The file of the same name is removed before the new one is written."""
    vars(manager)["AtomicFile"] = _RemovedFirst


def one_only() -> None:
    """The older checkpoints are removed before the new one is written."""
    vars(manager)["AtomicFile"] = _OneOnly


FAULTS: dict[str, Callable[[], None]] = {
    "in-place": in_place,
    "removed-first": removed_first,
    "one-only": one_only,
}
