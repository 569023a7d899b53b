"""What a checkpoint holds here: a function of its step, of its version and of its size, and of nothing else.

A version is the number of the save: a step that is saved again has a new one. Whoever loads a checkpoint can
tell from what it says of itself what every one of its bytes has to be.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from distrust import Checkpoint

METRIC = "eval_loss"


def make(step: int, version: int, size: int) -> Checkpoint:
    """The checkpoint of a step, of about ``8 * size`` bytes."""
    return Checkpoint(
        step=step,
        **_arrays(step, version, size),
        metadata={"of": [step, version, size]},
        metrics={METRIC: metric(step)},
    )


def metric(step: int) -> float:
    """Its metric: the same whenever the step is saved, so the best one never gets worse."""
    return random.Random(step).random()


def version_of(checkpoint: Checkpoint, *, step: int | None = None) -> int:
    """Check every byte of a checkpoint; returns its version.

    Raises:
        ValueError: if it is not what was saved.
    """
    of = checkpoint.metadata["of"]
    if checkpoint.step != of[0] or step not in (None, of[0]):
        raise ValueError(f"step {checkpoint.step}, asked for {step}, holds what step {of[0]} saved")
    for section, expected in _arrays(*of).items():
        found = getattr(checkpoint, section)
        if sorted(found) != sorted(expected):
            raise ValueError(f"{of}: {section} holds {sorted(found)}")
        for name, array in expected.items():
            if found[name].dtype != array.dtype or not np.array_equal(found[name], array):
                raise ValueError(f"{of}: {section}.{name} is not what was saved")
    return int(of[1])


def _arrays(step: int, version: int, size: int) -> dict[str, Any]:
    weights = np.arange(size, dtype=np.int64) * 2_654_435_761 + (step * 1_000_003 + version)
    return {
        "model": {"weights": weights, "odd": (weights[:77] % 251).astype(np.uint8)},
        "optimizer": {"moments": weights[: size // 4].astype(np.float32)},
        "history": {"versions": np.array([version])},
    }
