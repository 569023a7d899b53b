"""The content of checkpoints here: a function of the step, the version and the size, and of nothing else.

A version is the number of the save: a step that is saved again has a new one. So a reader can compute from a
checkpoint's metadata what each of its bytes must be.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from campaigns.oracle import Saved
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
    """The metric of a step: the same whenever the step is saved, so the best one never gets worse."""
    return random.Random(step).random()


def saved(step: int, final: bool) -> Saved:
    """The step as the retention oracle sees it."""
    return Saved(step, final, metric(step))


def version_of(checkpoint: Checkpoint, *, step: int | None = None) -> int:
    """Check every byte of a checkpoint, and raise ValueError for a wrong one; returns its version."""
    of = checkpoint.metadata["of"]
    if checkpoint.step != of[0] or step not in (None, of[0]):
        raise ValueError(f"step {checkpoint.step}, requested {step}, holds what step {of[0]} saved")
    for section, expected in _arrays(*of).items():
        loaded = getattr(checkpoint, section)
        if sorted(loaded) != sorted(expected):
            raise ValueError(f"{of}: {section} holds {sorted(loaded)}")
        for name, array in expected.items():
            if loaded[name].dtype != array.dtype or not np.array_equal(loaded[name], array):
                raise ValueError(f"{of}: {section}.{name} is not what was saved")
    return int(of[1])


def _arrays(step: int, version: int, size: int) -> dict[str, Any]:
    weights = np.arange(size, dtype=np.int64) * 2_654_435_761 + (step * 1_000_003 + version)
    return {
        "model": {"weights": weights, "odd": (weights[:77] % 251).astype(np.uint8)},
        "optimizer": {"moments": weights[: size // 4].astype(np.float32)},
        "history": {"versions": np.array([version])},
    }
