"""Every generator of random numbers that torch draws from, seeded for each micro-step.

Dropout in micro-step m of step s depends on (seed, s, m) alone: nothing that happened before, an evaluation
or a resume, can shift it. The generators' state is saved and restored all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from blake3 import blake3


def reseed(*, seed: int, step: int, micro_step: int) -> None:
    """Seed the generators of every device by these three."""
    digest = blake3(f"micro-step {seed} {step} {micro_step}".encode()).digest(8)
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def state(device: torch.device) -> dict[str, Any]:
    """The generators' state: uint8 arrays of the CPU's and of the device's."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def load_state(states: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of :func:`state`; what another device left behind is ignored."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
