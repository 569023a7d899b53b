"""A run whose process dies goes on from the step before, with the same digest at the end."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from distrust import CheckpointManager, OutOfMemory
from distrust.checkpoint.step_snapshots import StepSnapshots, list_folders
from distrust.testing.toy_engine import ToyEngine
from distrust.training.events import RunStarted, StepEnded

STEP = 5
OPTIONS = {"save_every": 0, "max_steps": 9}


@pytest.fixture(autouse=True)
def shared_memory(tmp_path, monkeypatch):
    (tmp_path / "memory").mkdir()
    monkeypatch.setenv("DISTRUST_SHM", str(tmp_path / "memory"))
    # Every step, whatever it costs on a busy machine.
    is_due = StepSnapshots.is_due
    monkeypatch.setattr(StepSnapshots, "is_due", lambda self, _: is_due(self, 1e9))


class Dies:
    """An observer that ends the process by a signal once a step has ended."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, event):
        if isinstance(event, StepEnded) and event.step == STEP:
            os.kill(os.getpid(), self.number)


class Fails(ToyEngine):
    """Runs out of memory in the step after."""

    def accumulate(self, batches, *, step, **options):
        if step == STEP:
            raise OutOfMemory("no memory")
        return super().accumulate(batches, step=step, **options)


def die(run, out, number, **options):
    pid = os.fork()
    if pid == 0:
        try:
            run(out, observers=[Dies(number)], **options)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == number


def first_step(events):
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    return started.step


@pytest.fixture
def digest(run, tmp_path):
    return run(tmp_path / "undisturbed", step_snapshots=False, save_every=0, max_steps=9)[0].state_digest


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_same_command_goes_on(run, tmp_path, digest, number):
    die(run, tmp_path / "run", number, **OPTIONS)
    with pytest.warns(UserWarning, match="was still in memory"):
        ended, events = run(tmp_path / "run", **OPTIONS)
    assert first_step(events) == STEP - 1, "the signal came before the snapshot of its step"
    assert ended.state_digest == digest
    assert not list_folders()


def test_an_error_within_a_step_leaves_the_step_before(run, tmp_path, digest):
    with pytest.raises(OutOfMemory):
        run(tmp_path / "run", engine=Fails(), **OPTIONS)
    with pytest.warns(UserWarning, match="was still in memory"):
        ended, events = run(tmp_path / "run", **OPTIONS)
    assert first_step(events) == STEP - 1
    assert ended.state_digest == digest


class Overflows(ToyEngine):
    """The update of a step leaves an infinite weight; the process dies in the next step, at the latest."""

    def accumulate(self, batches, *, step, **options):
        if step == STEP + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        self.is_last = step == STEP
        return super().accumulate(batches, step=step, **options)

    def update(self, **options):
        super().update(**options)
        if self.is_last:
            self._table[0, 0] = np.inf


def test_a_state_that_is_not_finite_is_not_rescued(run, tmp_path, digest):
    """It would become durable, and no step can be made from it."""
    pid = os.fork()
    if pid == 0:
        try:
            run(tmp_path / "run", engine=Overflows(), **OPTIONS)
        finally:
            os._exit(1)
    os.waitpid(pid, 0)
    with pytest.warns(UserWarning, match="was still in memory"):
        ended, events = run(tmp_path / "run", **OPTIONS)
    assert first_step(events) == STEP - 1
    assert ended.state_digest == digest


def test_an_older_step_that_is_asked_for_wins(run, tmp_path):
    out, options = tmp_path / "run", {**OPTIONS, "save_every": 2}
    run(out, stop_after=2, **options)
    die(run, out, signal.SIGKILL, **options | {"save_every": 0})
    with pytest.warns(UserWarning, match="step 4 was in memory and was not rescued: it is dropped"):
        _, events = run(out, from_step=2, **options)
    assert first_step(events) == 2


def test_switched_off(run, tmp_path):
    die(run, tmp_path / "run", signal.SIGKILL, **OPTIONS, step_snapshots=False)
    assert not list_folders()
    assert CheckpointManager(tmp_path / "run" / "checkpoints").rescue() is None
