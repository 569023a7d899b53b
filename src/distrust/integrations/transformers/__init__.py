"""Checkpoints and weights of examples inside the Trainer of transformers, and those of TRL."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distrust.integrations.transformers.checkpoints import DistrustCheckpoints
    from distrust.integrations.transformers.weighted_loss import weighted

_MODULES = {"DistrustCheckpoints": "checkpoints", "weighted": "weighted_loss"}

__all__ = ["DistrustCheckpoints", "weighted"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'distrust.integrations.transformers' has no attribute {name!r}")
    return getattr(import_module(f"distrust.integrations.transformers.{_MODULES[name]}"), name)
