"""The loop, and what it needs of a framework."""

from __future__ import annotations

from distrust.contract import Engine, EngineState, Losses, MemoryUse
from distrust.training.events import RunEnded
from distrust.training.state import RunState
from distrust.training.trainer import DistrustTrainer

__all__ = ["DistrustTrainer", "Engine", "EngineState", "Losses", "MemoryUse", "RunEnded", "RunState"]
