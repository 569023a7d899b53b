"""mlx's generator of random numbers, seeded for each micro-step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from distrust.engines.seeds import micro_step_seed


def reseed(*, seed: int, step: int, micro_step: int) -> None:
    """Seed the generator by these three."""
    mx.random.seed(micro_step_seed(seed=seed, step=step, micro_step=micro_step))


def state() -> dict[str, Any]:
    """The generator's key: uint32[2]."""
    generator: Any = mx.random.state
    return {"mlx": generator[0]}


def load_state(states: Mapping[str, Any]) -> None:
    """The inverse of :func:`state`; what another engine left behind is ignored."""
    if "mlx" in states:
        high, low = (int(half) for half in states["mlx"].tolist())
        mx.random.seed(high << 32 | low)  # the key that a seed gives is the seed
