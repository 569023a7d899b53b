"""DistrustTrainer: fine-tunes language models, weighs every example by its provenance, never loses a run.

Public names are loaded on first use: ``import distrust`` imports no framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from distrust.checkpoint import foreign

if TYPE_CHECKING:
    from distrust.checkpoint import (
        Checkpoint,
        CheckpointManager,
        PendingSave,
        load_file,
        save_file,
        save_file_async,
        verify_file,
    )
    from distrust.checkpoint.foreign import ForeignReader
    from distrust.config import TrainConfig
    from distrust.errors import (  # isort: skip
        CheckpointDirectoryLocked, CheckpointError, CheckpointNotFound, CheckpointUnreadable, ConfigError,
        CorruptCheckpoint, DamagedCheckpointWarning, DataError, DistrustError, DistrustWarning,
        ExportFailed, MissingDependency, ModelError, NoIntactCheckpoint, NonFiniteLoss, OutOfMemory,
        RankLost, RanksDiffer, RemoteError, ResumeRefused, RunInProgress, RunNotFound, SaveFailed, TakenOver,
        UnsupportedState, UnsupportedVersion, WriteFailed, WrongResult,
    )  # fmt: skip
    from distrust.previews import preview
    from distrust.trainer import DistrustTrainer
    from distrust.training.events import RunEnded
    from distrust.training.progress import RunState

__version__ = "0.1.0"

#: The modules of the public names that are not errors.
_MODULES = {
    "Checkpoint": "distrust.checkpoint",
    "CheckpointManager": "distrust.checkpoint",
    "DistrustTrainer": "distrust.trainer",
    "PendingSave": "distrust.checkpoint",
    "RunEnded": "distrust.training.events",
    "RunState": "distrust.training.progress",
    "TrainConfig": "distrust.config",
    "load_file": "distrust.checkpoint",
    "preview": "distrust.previews",
    "save_file": "distrust.checkpoint",
    "save_file_async": "distrust.checkpoint",
    "verify_file": "distrust.checkpoint",
}

__all__ = [
    "Checkpoint", "CheckpointDirectoryLocked", "CheckpointError", "CheckpointManager",
    "CheckpointNotFound", "CheckpointUnreadable", "ConfigError", "CorruptCheckpoint",
    "DamagedCheckpointWarning", "DataError", "DistrustError", "DistrustTrainer", "DistrustWarning",
    "ExportFailed", "MissingDependency", "ModelError", "NoIntactCheckpoint", "NonFiniteLoss",
    "OutOfMemory", "PendingSave", "RankLost", "RanksDiffer", "RemoteError", "ResumeRefused", "RunEnded",
    "RunInProgress", "RunNotFound", "RunState", "SaveFailed", "TakenOver", "TrainConfig", "UnsupportedState",
    "UnsupportedVersion", "WriteFailed", "WrongResult", "load_file",
    "preview", "save_file", "save_file_async", "verify_file",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'distrust' has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "distrust.errors")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def _importers() -> ForeignReader:
    from distrust import importers  # late: only for a path that is not in the core's own format

    return importers


foreign.register(_importers)
