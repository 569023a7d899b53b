"""The content of checkpoints here, and a model of their directory.

The content is a function of the step, the version (the number of the save) and the size, so a reader can
compute what each byte must be. The model has no file, lock or thread: it is a dictionary and the oracle.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from campaigns.oracle import Rules, Saved, must_keep, one_per_step
from distrust import Checkpoint, CheckpointManager
from distrust.errors import CheckpointDirectoryLocked

METRIC = "eval_loss"  # that load_best ranks by


def make_checkpoint(step: int, version: int, size: int) -> Checkpoint:
    """The checkpoint of a step, of about ``8 * size`` bytes."""
    metadata, metrics = {"of": [step, version, size]}, {METRIC: metric_of(step)}
    return Checkpoint(step=step, **_arrays(step, version, size), metadata=metadata, metrics=metrics)


def is_locked(manager: CheckpointManager) -> bool:
    """Whether another session holds the directory; otherwise this one does from now on."""
    try:
        manager.acquire()
    except CheckpointDirectoryLocked:
        return True
    return False


def metric_of(step: int) -> float:
    """The metric of a step: the same whenever the step is saved, so the best one never gets worse."""
    return random.Random(step).random()


def saved_step(step: int, final: bool) -> Saved:
    return Saved(step, final, metric_of(step))


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


@dataclass
class Model:
    rules: Rules  # of all its managers
    files: dict[Saved, int] = field(default_factory=dict)  # versions by checkpoint
    holder: int | None = None  # the session that may write; None if any may
    #: By session, the checkpoint and version that it resumed from: that file is protected.
    resumed: dict[int, tuple[Saved, int]] = field(default_factory=dict)

    def may_write(self, session: int) -> bool:
        return self.holder in (None, session)

    def commit(self, session: int, saved: Saved, version: int) -> None:
        self.holder = session
        self.files[saved] = version
        if session in self.resumed and saved.step > self.resumed[session][0].step:
            del self.resumed[session]
        self.clean_up(session, written=saved)

    def clean_up(
        self, session: int, *, keep_last: int | None = None, written: Saved | None = None
    ) -> list[int]:
        """Remove what no rule retains; returns the steps of which nothing is left."""
        self.holder = session
        rules = self.rules if keep_last is None else self.rules._replace(keep_last=keep_last)
        keep = must_keep(self.files, rules)
        removed = [
            saved
            for saved, version in self.files.items()
            if saved not in keep and saved != written and self.resumed.get(session) != (saved, version)
        ]
        for saved in removed:
            del self.files[saved]
        return sorted({saved.step for saved in removed} - {saved.step for saved in self.files})

    def release(self, session: int) -> None:
        """The session closed, or its last manager was collected."""
        if self.holder == session:
            self.holder = None

    def resume(self, session: int, saved: Saved) -> None:
        self.resumed[session] = saved, self.files[saved]

    def by_step(self) -> dict[int, Saved]:
        """The checkpoint that is read for each step."""
        return one_per_step(self.files)

    def newest(self) -> Saved:
        """The checkpoint that a run resumes from."""
        return max(self.files)

    def best(self) -> Saved:
        return min(self.by_step().values(), key=lambda saved: saved.metric or 0.0)
