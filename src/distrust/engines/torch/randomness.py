"""Every generator of random numbers that torch draws from, seeded for each micro-step.

Dropout in micro-step m of step s depends on (seed, s, m) alone: nothing that happened before, an evaluation
or a resume, can shift it. The generators' state is saved and restored all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from distrust.engines.seeds import micro_step_seed


def reseed(*, seed: int, step: int, micro_step: int) -> None:
    """Seed the generators of every device by these three."""
    torch.manual_seed(micro_step_seed(seed=seed, step=step, micro_step=micro_step))


def state(device: torch.device) -> dict[str, Any]:
    """The generators' state: uint8 arrays of the CPU's and of the device's."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def load_state(states: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of :func:`state`; what another device or engine left behind is ignored."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
