"""The loop, and what it needs of a framework."""

from __future__ import annotations

from distrust.training.engine import Engine, EngineState, Losses, MemoryUse
from distrust.training.trainer import DistrustTrainer

__all__ = ["DistrustTrainer", "Engine", "EngineState", "Losses", "MemoryUse"]
