"""Signals stop a run after a save, and the previous handlers are restored."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from distrust import CheckpointManager, DistrustTrainer, TrainConfig
from distrust.activity import STOPPING
from distrust.testing.toy_engine import ToyEngine
from distrust.training.events import Preparing, RunEnded, StepEnded
from distrust.training.process import StopRequest


@pytest.fixture(autouse=True)
def _handled_hangup() -> Iterator[None]:
    """Under nohup this process ignores SIGHUP, and a run leaves an ignored signal ignored."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize("number", STOPPING)
def test_first_signal_is_recorded(number):
    with StopRequest() as stop:
        assert stop.signal is None
        signal.raise_signal(number)
        assert stop.signal == number


def test_later_signals_do_not_replace_the_first():
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
            signal.raise_signal(number)
    assert stop.signal == signal.SIGTERM


def test_second_interrupt_raises_at_once():
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_handlers_are_restored(error):
    received = []
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        mine = {number: signal.getsignal(number) for number in STOPPING}
        with pytest.raises(error or ZeroDivisionError), StopRequest():
            raise error or ZeroDivisionError
        assert {number: signal.getsignal(number) for number in STOPPING} == mine
        signal.raise_signal(signal.SIGUSR1)
        assert received == [signal.SIGUSR1]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_other_threads_handle_no_signals(run, tmp_path):
    ended = []
    thread = threading.Thread(target=lambda: ended.append(run(tmp_path)[0]))
    thread.start()
    thread.join()
    assert ended[0].step == 9


@pytest.mark.parametrize("number", STOPPING)
def test_stopped_run_is_saved_at_its_step(run, data, tmp_path, number):
    events = []

    def stop(event):
        events.append(event)
        if isinstance(event, StepEnded) and event.step == 3:
            signal.raise_signal(number)

    config = TrainConfig(out=str(tmp_path), data=str(data), batch_size=2, max_steps=9, save_every=0)
    ended = DistrustTrainer(config, engine=ToyEngine(), observers=[stop]).train()
    assert (ended.step, ended.signal, ended.already_finished) == (3, number, False)
    assert ended.path == tmp_path / "checkpoints" / "checkpoint-3.safetensors"
    manager = CheckpointManager(ended.path.parent)
    manager.validate(3)
    assert manager.inspect(3).state_digest == ended.state_digest
    assert isinstance(events[-1], RunEnded)


def test_stop_before_the_first_step_saves_nothing(data, tmp_path):
    def stop(event):
        if isinstance(event, Preparing):
            signal.raise_signal(signal.SIGTERM)

    config = TrainConfig(out=str(tmp_path), data=str(data), max_steps=9)
    ended = DistrustTrainer(config, engine=ToyEngine(), observers=[stop]).train()
    assert ended == RunEnded(
        step=0,
        path=None,
        state_digest=None,
        stall_seconds=0.0,
        reason="signal",
        signal=signal.SIGTERM,
        already_finished=False,
    )
    assert CheckpointManager(tmp_path / "checkpoints").list_checkpoints() == []


def test_stop_while_loading_keeps_a_resumed_run(run, data, tmp_path):
    stopped, _ = run(tmp_path, stop_after=3)
    content = stopped.path.read_bytes()

    class Stopping(ToyEngine):
        def load_state(self, state):
            super().load_state(state)
            signal.raise_signal(signal.SIGTERM)

    ended, _ = run(tmp_path, engine=Stopping())
    assert (ended.step, ended.path, ended.signal) == (3, stopped.path, signal.SIGTERM)
    assert stopped.path.read_bytes() == content


@pytest.mark.parametrize("number", STOPPING)
def test_stop_after_loading_the_model_skips_the_data(data, tmp_path, monkeypatch, number):
    loaded, events = [], []

    def load(config: TrainConfig, **_: object) -> ToyEngine:
        signal.raise_signal(number)  # native code runs here: an exception through it may end the process
        loaded.append(ToyEngine())
        return loaded[0]

    monkeypatch.setattr("distrust.engines.create_engine", load)
    config = TrainConfig(out=str(tmp_path), data=str(data), max_steps=9)
    ended = DistrustTrainer(config, observers=[events.append]).train()
    assert (ended.step, ended.path, ended.signal) == (0, None, number)
    assert len(loaded) == 1
    assert [type(event) for event in events] == [Preparing, Preparing, RunEnded]


def test_stop_before_loading_keeps_a_resumed_run(run, tmp_path):
    stopped, _ = run(tmp_path, stop_after=3)

    def stop(event):
        if isinstance(event, Preparing):
            signal.raise_signal(signal.SIGTERM)

    ended, _ = run(tmp_path, observers=[stop])
    assert (ended.step, ended.path, ended.signal) == (3, stopped.path, signal.SIGTERM)
    assert ended.state_digest == stopped.state_digest


def test_observer_error_of_a_stopped_run_is_raised(run, tmp_path):
    def fail(event):
        signal.raise_signal(signal.SIGTERM)
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run(tmp_path, observers=[fail])


def test_second_interrupt_damages_no_checkpoint(run, alone, tmp_path):

    def twice(event):
        if isinstance(event, StepEnded) and event.step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "left", observers=[twice])
    for thread in threading.enumerate():
        if thread.name.startswith("save "):
            thread.join()  # the write continues in the background
    manager = CheckpointManager(tmp_path / "left" / "checkpoints")
    assert manager.list_checkpoints() == [2, 4]
    manager.validate(4)
    assert run(tmp_path / "left")[0].state_digest == alone.state_digest


def test_stop_message_may_fail(run, tmp_path):
    """Ctrl-C also ends a `tee` that reads the output."""
    reader, words = os.pipe()
    os.close(reader)
    stderr = os.dup(2)

    def stop(event):
        if isinstance(event, StepEnded) and event.step == 3:
            os.dup2(words, 2)
            signal.raise_signal(signal.SIGINT)

    try:
        ended, _ = run(tmp_path, observers=[stop])
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(words)
    assert (ended.step, ended.signal) == (3, signal.SIGINT)


@pytest.mark.parametrize(
    ("kind", "when"), [(Preparing, "before the first step: nothing is lost"), (StepEnded, "after this step")]
)
def test_the_first_interrupt_says_when_the_run_stops(run, tmp_path, capfd, kind, when):
    def stop(event):
        if isinstance(event, kind):
            observers.clear()
            signal.raise_signal(signal.SIGINT)

    observers = [stop]
    run(tmp_path, observers=[lambda event: [observe(event) for observe in observers]])
    assert f"\nstopping {when}; press Ctrl-C again to exit at once\n" in capfd.readouterr().err
