"""Warnings point at the line that called the public method, whatever the depth at which they arise."""

from __future__ import annotations

import numpy as np
import pytest

from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import snapshot
from distrust.errors import DamagedCheckpointWarning, DistrustWarning

CALLS = {
    "load": lambda manager: manager.load(30),
    "load_latest": lambda manager: manager.load_latest(),
    "cleanup": lambda manager: manager.cleanup(keep_last=1),
    "list_superseded": lambda manager: manager.list_superseded(),
    "save": lambda manager: manager.save(Checkpoint(step=40)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_warning_of_a_damaged_checkpoint_points_at_the_caller(tmp_path, name):
    with CheckpointManager(tmp_path, keep_last=None) as manager:
        for step in (10, 20, 30):
            path = manager.save(Checkpoint(step=step, model={"w": np.ones(8)}))
        raw = bytearray(path.read_bytes())
        if name == "load":  # the final one of the step is read instead
            manager.save(Checkpoint(step=30), final=True)
    raw[100 if name == "load" else -1] ^= 1
    path.write_bytes(raw)

    with (
        CheckpointManager(tmp_path, keep_last=2) as manager,
        pytest.warns(DamagedCheckpointWarning) as caught,
    ):
        CALLS[name](manager)

    assert {warning.filename for warning in caught} == {__file__}


def test_a_warning_of_a_synchronous_save_points_at_the_caller(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "available_bytes", lambda: 0)
    with (
        CheckpointManager(tmp_path) as manager,
        pytest.warns(DistrustWarning, match="sync") as caught,
    ):
        manager.save_async(Checkpoint(step=1, model={"w": np.ones(1 << 16)}))
    assert caught[0].filename == __file__
