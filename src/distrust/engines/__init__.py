"""The frameworks that can train, each behind the contract of ``training/engine.py``."""

from __future__ import annotations

from distrust.config import TrainConfig
from distrust.training.engine import Engine


def create(config: TrainConfig) -> Engine:
    """The engine that trains ``config``: model, tokenizer, adapter and optimizer, loaded.

    Raises:
        ModelError: if the model or tokenizer cannot be loaded.
        ConfigError: if an option does not fit the model or the machine.
    """
    from distrust.engines.torch.engine import TorchEngine

    return TorchEngine(config)
