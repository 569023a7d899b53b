"""Failed saves: the next save succeeds, and errors describe the remaining checkpoints."""

from __future__ import annotations

import shutil
import signal
import threading
import time

import pytest

from distrust import CheckpointManager, DistrustWarning
from distrust.checkpoint import arrays, memory, snapshot
from distrust.errors import SaveFailed
from distrust.testing.toy_engine import ToyEngine
from distrust.training.events import CheckpointSaved


def test_failed_save_warns_and_the_next_succeeds(run, alone, tmp_path, failing_saves):
    failing_saves(2)
    with pytest.warns(DistrustWarning, match="checkpoint-4.* No space left.* the next save tries again"):
        ended, events = run(tmp_path / "run")
    assert ended.state_digest == alone.state_digest
    assert [event.step for event in events if isinstance(event, CheckpointSaved)] == [2, 6, 8, 9]


def test_three_failures_in_a_row_stop_the_run(run, tmp_path, failing_saves):
    failing_saves(2, 3, 4)
    with pytest.warns(DistrustWarning), pytest.raises(SaveFailed, match="checkpoint-8"):
        run(tmp_path)
    assert CheckpointManager(tmp_path / "checkpoints").list_checkpoints() == [2]


def test_failures_with_successes_between_them_do_not_stop_the_run(run, tmp_path, failing_saves):
    failing_saves(2, 4, 6, 8)
    with pytest.warns(DistrustWarning, match="the next save tries again") as caught:
        ended, _ = run(tmp_path, save_every=1)
    assert len(caught) == 4
    assert ended.step == 9


def test_error_names_the_remaining_checkpoint(run, tmp_path, failing_saves):
    failing_saves(2, 3, 4)
    with pytest.warns(DistrustWarning), pytest.raises(SaveFailed) as caught:
        run(tmp_path)
    message = str(caught.value)
    assert message.endswith(
        "Saving failed 3 times in a row, so training stopped at step 8; "
        "step 2 is saved: fix the cause, and the same command resumes from there"
    )
    assert "\n" not in message
    assert caught.value.needed > 10_000
    assert caught.value.free > 0
    assert "going on" not in message
    assert run(tmp_path)[0].step == 9


def test_error_says_if_the_checkpoint_is_gone(run, tmp_path):
    def remove(event):
        if isinstance(event, CheckpointSaved):
            shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)

    with pytest.warns(DistrustWarning), pytest.raises(SaveFailed) as caught:
        run(tmp_path, observers=[remove])
    assert "cannot be written to" in str(caught.value)
    assert str(caught.value).endswith("step 2 was saved, but its checkpoint no longer exists")
    assert not (tmp_path / "checkpoints").exists()


def test_error_says_if_nothing_was_saved(run, tmp_path, failing_saves):
    failing_saves(1, 2, 3)
    with pytest.warns(DistrustWarning), pytest.raises(SaveFailed, match=r"; nothing was saved yet$"):
        run(tmp_path)


def test_stop_after_a_failed_save_saves(run, tmp_path, failing_saves):
    """A stop after a failed save saves the steps since."""
    failing_saves(2)
    with pytest.warns(DistrustWarning):
        ended, _ = run(tmp_path, stop_after=5)
    assert (ended.signal, ended.step) == (signal.SIGTERM, 5)
    assert CheckpointManager(tmp_path / "checkpoints").list_checkpoints() == [2, 5]


def test_last_save_must_succeed(run, tmp_path, failing_saves):
    failing_saves(5)
    with pytest.raises(SaveFailed, match="checkpoint-9-final"):
        run(tmp_path)
    assert run(tmp_path)[0].path.name == "checkpoint-9-final.safetensors"


def test_run_shortened_to_its_last_step_is_finished(run, tmp_path):
    run(tmp_path, stop_after=5)
    ended, _ = run(tmp_path, max_steps=5)
    assert (ended.path.name, ended.already_finished) == ("checkpoint-5-final.safetensors", True)


def test_signal_after_the_last_step_has_no_effect(run, tmp_path):
    ended, _ = run(tmp_path, stop_after=9)
    assert (ended.signal, ended.path.name) == (None, "checkpoint-9-final.safetensors")


def test_gradients_of_an_interrupted_step_are_discarded(run, alone, tmp_path):
    class Interrupted(ToyEngine):
        interrupted = False

        def begin_micro_step(self, *, seed, step, micro_step):
            if (step, micro_step) == (5, 1) and not self.interrupted:
                self.interrupted = True
                raise KeyboardInterrupt
            super().begin_micro_step(seed=seed, step=step, micro_step=micro_step)

    engine = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", engine=engine)
    assert run(tmp_path / "run", engine=engine)[0].state_digest == alone.state_digest


def test_ignored_signal_stays_ignored(run, tmp_path):
    handler = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        ended, _ = run(tmp_path, observers=[lambda _: signal.raise_signal(signal.SIGUSR1)])
    finally:
        signal.signal(signal.SIGUSR1, handler)
    assert ended.signal is None


def test_snapshot_precedes_the_next_update(run, tmp_path, monkeypatch):
    """The loop waits for a slow copy before it updates."""
    run(tmp_path / "alone", save_every=1, keep_last=9)
    original = arrays.fill

    def late(*args):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.05)
        original(*args)

    monkeypatch.setattr(arrays, "fill", late)
    run(tmp_path / "late", save_every=1, keep_last=9)
    first, second = (CheckpointManager(tmp_path / name / "checkpoints") for name in ("alone", "late"))
    assert first.list_checkpoints() == second.list_checkpoints() == list(range(1, 10))
    for step in range(1, 10):
        assert first.inspect(step).state_digest == second.inspect(step).state_digest


def test_snapshot_memory_is_reserved_before_the_first_save(run, tmp_path, monkeypatch):
    """Memory is reserved after the first update; saves touch no new memory."""
    touched = []
    monkeypatch.setattr(memory, "_touch", lambda *range_: touched.append(threading.current_thread().name))
    reserve = CheckpointManager.reserve

    def reserving(manager, nbytes, **options):
        touched.clear()
        ready = reserve(manager, nbytes, **options)
        assert touched
        touched.clear()
        return ready

    monkeypatch.setattr(CheckpointManager, "reserve", reserving)
    run(tmp_path, save_every=2)
    assert touched == []


def test_failed_synchronous_save_warns_and_the_next_succeeds(run, tmp_path, failing_saves, monkeypatch):
    """Without memory for a snapshot, saves are synchronous; failures are reported in the same way."""
    monkeypatch.setattr(snapshot, "BUDGET", 0.0)
    failing_saves(2)
    with pytest.warns(DistrustWarning) as caught:
        _, events = run(tmp_path)
    assert any("the next save tries again" in str(warning.message) for warning in caught)
    assert [event.step for event in events if isinstance(event, CheckpointSaved)] == [2, 6, 8, 9]
