"""Power loss during a run: repeating the command ends in the same state as an uninterrupted run."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from random import Random

import pytest

from campaigns.power.cut import FATES, World, build
from campaigns.power.recording import Killed, RecordingDisk
from distrust import CheckpointManager
from distrust.training import recording


class Machine:
    """A simulated disk, and the runs on it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root.mkdir()
        self.root = root
        self.world = World(root, {})
        self.disk = RecordingDisk(self.world.apply)
        self._patch = monkeypatch

    def run(self, run, **options):
        """Train; returns None if the power was cut."""
        with self._patch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(
                recording, "CheckpointManager", functools.partial(CheckpointManager, disk=self.disk)
            )
            return run(self.root / "run", **options)[0]


def test_power_cut_at_any_call_ends_in_the_same_state(run, tmp_path, monkeypatch):
    alone = Machine(tmp_path / "alone", monkeypatch)
    short = {"max_steps": 5}  # two checkpoints and the final one
    ended = alone.run(run, **short)
    chance = Random(7)
    for number, calls in enumerate(range(0, alone.disk.calls, 4)):
        machine = Machine(tmp_path / f"machine-{number}", monkeypatch)
        machine.disk.dies_after = calls
        assert machine.run(run, **short) is None

        restored = tmp_path / f"after-{number}"
        image = machine.world.after_cut(chance.choice(FATES), chance.choice(FATES), chance)
        build(restored, machine.root, image)
        again, _ = run(restored / "run", **short)
        assert again.state_digest == ended.state_digest


def test_finished_run_survives_a_power_cut(run, tmp_path, monkeypatch):
    """The power is cut after the final rename, before the directory is synced."""
    alone = Machine(tmp_path / "alone", monkeypatch)
    alone.run(run)
    for calls in range(alone.disk.calls, 0, -1):
        machine = Machine(tmp_path / f"killed-{calls}", monkeypatch)
        machine.disk.dies_after = calls
        machine.run(run)
        final = machine.root / "run" / "checkpoints" / "checkpoint-9-final.safetensors"
        if final.exists() and not machine.world.is_certain(final):
            break
    else:
        pytest.fail("the final checkpoint was never there without its name being durable")
    machine.disk.dies_after = None
    assert machine.run(run).already_finished
    assert machine.world.is_certain(final)
