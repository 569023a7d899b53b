"""DistrustTrainer: fine-tunes language models, weighs every example by its provenance, never loses a run.

The public names are loaded when they are first asked for: ``import distrust`` imports no framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from distrust.checkpoint import foreign

if TYPE_CHECKING:
    from distrust.checkpoint import Checkpoint, CheckpointManager, PendingSave
    from distrust.checkpoint.foreign import ForeignReader
    from distrust.config import TrainConfig
    from distrust.errors import DistrustError, DistrustWarning
    from distrust.training import DistrustTrainer, RunEnded, RunState

__version__ = "0.1.0"

_HOMES = {
    "Checkpoint": "distrust.checkpoint",
    "CheckpointManager": "distrust.checkpoint",
    "DistrustError": "distrust.errors",
    "DistrustTrainer": "distrust.training",
    "DistrustWarning": "distrust.errors",
    "PendingSave": "distrust.checkpoint",
    "RunEnded": "distrust.training",
    "RunState": "distrust.training",
    "TrainConfig": "distrust.config",
}

__all__ = [
    "Checkpoint",
    "CheckpointManager",
    "DistrustError",
    "DistrustTrainer",
    "DistrustWarning",
    "PendingSave",
    "RunEnded",
    "RunState",
    "TrainConfig",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distrust' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def _importers() -> ForeignReader:
    from distrust import importers  # only when a path is not in the core's own format

    return importers


foreign.register(_importers)
