"""The checkpoint core: a library of its own, for people who train with something else too.

It imports the standard library, numpy and the digest library, and no framework. The public names are loaded
when they are first asked for: who only reads headers pays only for that.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distrust.checkpoint.background import PendingSave
    from distrust.checkpoint.checkpoint import Checkpoint
    from distrust.checkpoint.checkpoint_file import CheckpointFile, DamagedFile, Scan
    from distrust.checkpoint.manager import CheckpointManager

_HOMES = {
    "Checkpoint": "checkpoint",
    "CheckpointFile": "checkpoint_file",
    "CheckpointManager": "manager",
    "DamagedFile": "checkpoint_file",
    "PendingSave": "background",
    "Scan": "checkpoint_file",
}

__all__ = ["Checkpoint", "CheckpointFile", "CheckpointManager", "DamagedFile", "PendingSave", "Scan"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distrust.checkpoint' has no attribute {name!r}")
    return getattr(import_module(f"distrust.checkpoint.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
