"""The hyperparameters of a LoRA adapter as one value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from distrust.config import TrainConfig


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """A low-rank adapter: W·x + scale · B·A·x, with A [rank, in] and B [out, rank].

    LoRA: Hu et al. 2021, arXiv:2106.09685. rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. DoRA: Liu et al.
    2024, arXiv:2402.09353.
    """

    rank: int  # inner dimension of the product
    alpha: float  # numerator of the scale
    dropout: float = 0.0  # probability of dropping an input of A
    #: Names, or ends of names, of the modules to adapt; "all-linear": every linear layer but the head.
    target_modules: tuple[str, ...] = ("all-linear",)
    rslora: bool = False  # divide alpha by the root of the rank, not by the rank
    dora: bool = False  # also train the magnitude of each row of W + scale · B·A

    @classmethod
    def from_options(cls, config: TrainConfig) -> Self:
        """The adapter that a run's options describe."""
        return cls(
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            target_modules=tuple(config.target_modules),
            rslora=config.rslora,
            dora=config.dora,
        )

    @property
    def scale(self) -> float:
        """Factor of the adapter's product: alpha / rank, or alpha / √rank for rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def targets_flag(self) -> str:
        """The option that selects the target modules, for messages."""
        return f"--target-modules {' '.join(self.target_modules)}"
