"""The published term as published: added to the loss, as a tensor, before the backward pass.

The product does not do this. It is here to show that it has no effect.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from distrust.config import TrainConfig
from distrust.engines.torch.engine import TorchEngine
from distrust.engines.torch.model_runner import ModelRunner
from distrust.engines.torch.row import DeviceRow, Row
from distrust.weighting import LAMBDA


class AddingPasses(ModelRunner):
    """Adds λ times the mean over the trained tokens of α·r², the term of each token's example."""

    objectives: list[float]

    def _losses(self, row: Row, arrays: DeviceRow, *, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        total, losses = super()._losses(row, arrays, scale=scale)
        sum_of_terms = np.sum(row.distrust * row.trained_tokens)
        term = torch.tensor(sum_of_terms * scale, dtype=total.dtype, device=total.device)
        objective = total + LAMBDA * term
        if objective.requires_grad:  # a training step, not an evaluation
            self.objectives.append(float(objective.detach()))
        return objective, losses


class AddingEngine(TorchEngine):
    """The product's engine, except for the loss that its backward pass starts from."""

    runner_class = AddingPasses

    def __init__(self, config: TrainConfig, objectives: list[float]) -> None:
        super().__init__(config)
        assert isinstance(self._runner, AddingPasses)
        self._runner.objectives = []
        self.environment()  # tries whether a pass is deterministic: no step
        self._runner.objectives = objectives


@dataclass
class Adding:
    """Creates the engine, and keeps the value that each micro-step called `backward` on.

    Attributes:
        objectives: of each micro-step: cross-entropy plus the term, in nats per token (which adds bits to
        nats).
    """

    objectives: list[float] = field(default_factory=list)

    def __call__(self, config: TrainConfig) -> TorchEngine:
        return AddingEngine(config, self.objectives)
