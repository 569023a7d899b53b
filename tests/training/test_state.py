"""``trainer.state``: typed, immutable, and correct before, during and after a run, in any thread."""

from __future__ import annotations

import threading
from dataclasses import FrozenInstanceError

import pytest

from distrust import DistrustTrainer, RunState, TrainConfig
from distrust.testing.toy_engine import TOY, ToyEngine
from distrust.training.events import CheckpointSaved, Evaluated, RunEnded, StepEnded


@pytest.fixture
def trainer(data, eval_data, tmp_path):
    def make(*observers, **options):
        paths = {"out": str(tmp_path), "data": str(data), "eval_data": str(eval_data)}
        config = TrainConfig(**{**TOY, **paths, "eval_every": 2, **options})
        return DistrustTrainer(config, engine=ToyEngine(), observers=observers)

    return make


def test_before_the_run(trainer, tmp_path):
    assert trainer().state == RunState(out=tmp_path, max_steps=9)
    assert trainer(max_steps=None).state.max_steps is None
    assert trainer().state.epoch is None
    assert not list(tmp_path.iterdir())
    with pytest.raises(FrozenInstanceError):
        trainer().state.step = 3


def test_state_matches_the_event(trainer, tmp_path):
    states = []

    def watch(event):
        state = mine.state
        assert state.running
        states.append(event)
        steps = [one for one in states if isinstance(one, StepEnded)]
        evaluations = {one.step: one.loss for one in states if isinstance(one, Evaluated)}
        saved = [one.path for one in states if isinstance(one, CheckpointSaved)]
        assert state.step == len(steps)
        assert state.tokens_seen == sum(one.tokens for one in steps)
        assert state.checkpoint == (saved[-1] if saved else None)
        if steps:
            assert (state.max_steps, state.epoch) == (9, state.step / (11 / 4))
            assert (state.metrics["loss"], state.learning_rate) == (steps[-1].loss, steps[-1].learning_rate)
        if evaluations:
            best = min(evaluations, key=evaluations.get)
            assert state.metrics["eval_loss"] == evaluations[max(evaluations)]
            assert (state.best.metric, state.best.value, state.best.step) == (
                "eval_loss",
                evaluations[best],
                best,
            )

    mine = trainer(watch)
    ended = mine.train()
    assert isinstance(states[-1], RunEnded)
    assert not mine.state.running
    assert (mine.state.step, mine.state.checkpoint) == (9, ended.path)


def test_state_of_a_resumed_run(trainer):
    stopped = trainer(lambda event: stopped.stop() if stopped.state.step == 3 else None)
    stopped.train()
    saved = stopped.state
    resumed = []
    later = trainer(lambda event: resumed.append(later.state))
    later.train()
    (began, *_) = [state for state in resumed if state.max_steps and state.epoch_steps]
    assert (began.step, began.tokens_seen, began.metrics, began.best, began.elapsed_seconds) == (
        3,
        saved.tokens_seen,
        saved.metrics,
        saved.best,
        saved.elapsed_seconds,
    )
    assert later.state.elapsed_seconds > saved.elapsed_seconds > 0
    assert began.checkpoint == saved.checkpoint
    again = trainer()  # finished: needs no engine
    again.train()
    for name in ("step", "tokens_seen", "metrics", "best", "checkpoint", "max_steps", "elapsed_seconds"):
        assert getattr(again.state, name) == getattr(later.state, name), name


def test_state_is_consistent_in_any_thread(trainer):
    """Every state that another thread reads is one that an observer received, or that of the start or end."""
    received, read = [], []
    mine = trainer(lambda event: received.append(mine.state), max_steps=60, save_every=0)
    over = threading.Event()

    def poll():
        while not over.is_set():
            read.append(mine.state)

    poller = threading.Thread(target=poll)
    poller.start()
    mine.train()
    over.set()
    poller.join()
    identities = {id(state) for state in received}
    assert read
    assert all(state.step in (0, 60) for state in read if id(state) not in identities)


def test_second_call_starts_from_disk(trainer, tmp_path):
    """Unsaved steps of the first call are also gone from memory."""

    class Died(BaseException):
        pass

    def die(event):
        if isinstance(event, StepEnded) and event.step == 3 and not died:
            died.append(True)
            raise Died

    died = []
    mine = trainer(die)
    with pytest.raises(Died):
        mine.train()
    assert mine.state.step == 3
    assert not mine.state.running
    alone = trainer(out=str(tmp_path / "alone"))
    assert mine.train().state_digest == alone.train().state_digest
    assert mine.state.tokens_seen == alone.state.tokens_seen
