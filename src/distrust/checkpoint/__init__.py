"""The checkpoint core: a standalone library, also for users of other trainers.

Needs only the standard library, numpy and blake3. Public names are loaded on first access, so that reading
headers does not import numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distrust.checkpoint.background import PendingSave
    from distrust.checkpoint.checkpoint import Checkpoint
    from distrust.checkpoint.checkpoint_file import CheckpointFile, DamagedFile, Scan
    from distrust.checkpoint.manager import CheckpointManager
    from distrust.checkpoint.single_file import FileSaver, load_file, save_file, save_file_async, verify_file

_MODULES = {
    "Checkpoint": "checkpoint",
    "CheckpointFile": "checkpoint_file",
    "CheckpointManager": "manager",
    "DamagedFile": "checkpoint_file",
    "FileSaver": "single_file",
    "PendingSave": "background",
    "Scan": "checkpoint_file",
    "load_file": "single_file",
    "save_file": "single_file",
    "save_file_async": "single_file",
    "verify_file": "single_file",
}

__all__ = [
    "Checkpoint", "CheckpointFile", "CheckpointManager", "DamagedFile", "FileSaver", "PendingSave", "Scan",
    "load_file", "save_file", "save_file_async", "verify_file",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'distrust.checkpoint' has no attribute {name!r}")
    return getattr(import_module(f"distrust.checkpoint.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
