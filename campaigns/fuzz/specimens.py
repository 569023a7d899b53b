"""The valid checkpoints that hostile files are made of: small, real, and written by the manager."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from campaigns.fuzz.forging import Specimen
from distrust import Checkpoint, CheckpointManager


def make(directory: Path) -> tuple[bytes, list[Specimen]]:
    """The bytes of a valid checkpoint of step 0, and specimens of step 1, written in an empty directory."""
    with CheckpointManager(directory, keep_last=None) as manager:
        valid = manager.save(Checkpoint(step=0, model={"a": np.zeros(4, np.float32)})).read_bytes()
        return valid, [Specimen.of(manager.save(checkpoint)) for checkpoint in _checkpoints()]


def _checkpoints() -> list[Checkpoint]:
    model = {"a": np.arange(4, dtype=np.float32), "b": np.arange(3, dtype=np.uint8)}
    return [
        Checkpoint(step=1, model=model, optimizer={"n": [1, (2.5, None)]}, metadata={"m": "x"}),
        Checkpoint(step=1),
        Checkpoint(
            step=1,
            model={"": np.float64(1.5), "a.b": np.zeros((2, 0, 3), np.int16), "ü": np.ones(5, np.complex64)},
            optimizer={
                "state": {0: {"step": np.float32(3), "lr": 0.1}, 1: {}},
                "groups": [{"betas": (0.9, 0.99)}],
            },
            rng={"torch": np.arange(16, dtype=np.uint8), "python": (3, [1, 2], None)},
            history={"loss": np.linspace(1, 0, 7)},
            config={"rank": 8, "deep": {True: [1.0, "x", {None: -0.0}]}},
            metadata={"best_loss": float("inf"), "note": 'say "ü\n"'},
            metrics={"eval_loss": 0.25},
            run={"paths": ["a", "b"], "every": 10},
        ),
    ]
