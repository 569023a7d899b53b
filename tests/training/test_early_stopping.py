"""Early stopping: a run ends at the same step, however it was interrupted."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from distrust import CheckpointManager, DistrustTrainer, TrainConfig
from distrust.testing.toy_engine import TOY, ToyEngine
from distrust.training.events import Evaluated, StepEnded
from distrust.training.progress import BestTracker

#: The toy model overfits: its eval loss is best at step 20.
EARLY = {"max_steps": 30, "early_stopping_patience": 2, "eval_every": 2, "learning_rate": 0.5}


def evaluation_events(events):
    return {event.step: event.loss for event in events if isinstance(event, Evaluated)}


def test_stops_after_patience_is_exhausted(run, eval_data, tmp_path):
    ended, events = run(tmp_path, eval_data=str(eval_data), **EARLY)
    losses = evaluation_events(events)
    best = min(losses, key=losses.get)
    assert (ended.reason, ended.finished, ended.signal) == ("early_stopping", True, None)
    assert ended.step == max(losses) == best + 2 * 2 < 30
    assert ended.path.name == f"checkpoint-{ended.step}-final.safetensors"
    manager = CheckpointManager(ended.path.parent)
    assert manager.load_best().step == best
    # The steps equal those of a run without evaluations.
    plain, _ = run(tmp_path / "plain", max_steps=ended.step, learning_rate=0.5, schedule_steps=30)
    assert plain.state_digest == ended.state_digest


def test_early_stopped_run_continues_with_more_patience(run, eval_data, tmp_path):
    ended, _ = run(tmp_path, eval_data=str(eval_data), **EARLY)
    again, events = run(tmp_path, eval_data=str(eval_data), **EARLY)
    assert (again.already_finished, again.reason, again.path) == (True, "early_stopping", ended.path)
    assert len(events) == 1
    longer, events = run(tmp_path, eval_data=str(eval_data), **{**EARLY, "early_stopping_patience": 3})
    assert (longer.step, longer.reason) == (ended.step + 2, "early_stopping")
    unlimited, _ = run(tmp_path, eval_data=str(eval_data), **{**EARLY, "early_stopping_patience": None})
    assert (unlimited.step, unlimited.reason) == (30, "finished")


def test_reduced_patience_ends_the_run_at_once(run, early, eval_data, tmp_path):
    patient = {**EARLY, "early_stopping_patience": 30}
    stopped, _ = run(tmp_path / "a", eval_data=str(eval_data), stop_after=early.step, **patient)
    assert stopped.reason == "signal"
    ended, events = run(tmp_path / "a", eval_data=str(eval_data), **EARLY)
    assert (ended.step, ended.reason, ended.already_finished) == (early.step, "early_stopping", True)
    assert ended.path.name == early.path.name
    assert ended.state_digest == stopped.state_digest
    assert not [event for event in events if isinstance(event, StepEnded)]


@pytest.fixture(scope="module")
def early(data, eval_data, tmp_path_factory):
    """The end of an undisturbed run that stops early."""
    where = {"data": str(data), "eval_data": str(eval_data), "out": str(tmp_path_factory.mktemp("early"))}
    return DistrustTrainer(TrainConfig(**{**TOY, **EARLY, **where}), engine=ToyEngine(), observers=[]).train()


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stops=st.lists(st.integers(1, 23), max_size=3).map(sorted), save_every=st.integers(0, 3))
@example(stops=[22], save_every=1)  # after the best evaluation: the resume must know it
def test_interrupted_run_stops_at_the_same_step(run, early, eval_data, stops, save_every):
    with tempfile.TemporaryDirectory() as folder:
        for stop in [*stops, None]:
            ended, _ = run(
                Path(folder, "stopped"),
                stop_after=stop,
                eval_data=str(eval_data),
                **{**EARLY, "save_every": save_every},
            )
        assert (ended.step, ended.reason) == (early.step, "early_stopping")
        assert ended.state_digest == early.state_digest


values = st.floats(width=32) | st.sampled_from([1.0, 2.0, math.nan])


@given(
    st.lists(st.dictionaries(st.sampled_from(["loss", "eval_loss"]), values)),
    st.sampled_from(["loss", "eval_loss"]),
    st.sampled_from(["min", "max"]),
    st.data(),
)
def test_tracker_does_not_depend_on_restores(rows, metric, mode, data):
    cut = data.draw(st.integers(0, len(rows)))
    uninterrupted = divided = BestTracker(metric, mode)
    for step, row in enumerate(rows):
        uninterrupted = uninterrupted.update(row, step=step)
        if step == cut:
            divided = BestTracker(metric, mode).restore(json.loads(json.dumps(asdict(divided))))
        divided = divided.update(row, step=step)
    assert repr(divided) == repr(uninterrupted)  # by repr: NaN is NaN
    measured = [(row[metric], step) for step, row in enumerate(rows) if metric in row]
    numbers = [value for value, _ in measured if not math.isnan(value)]
    if numbers:
        best = min(numbers) if mode == "min" else max(numbers)
        first = next(index for index, (value, _) in enumerate(measured) if value == best)
        assert (uninterrupted.best, uninterrupted.best_step) == measured[first]
        assert uninterrupted.unimproved == len(measured) - 1 - first


def test_changed_metric_resets_the_tracker():
    saved = asdict(BestTracker("eval_loss", "min", best=1.0, best_step=4, unimproved=3))
    assert BestTracker("loss", "min").restore(saved) == BestTracker("loss", "min")
    assert BestTracker("eval_loss", "max").restore(saved) == BestTracker("eval_loss", "max")
    assert BestTracker().restore(None) == BestTracker()


@pytest.mark.parametrize("stop", [None, 3])
def test_eval_at_start_happens_once(run, eval_data, tmp_path, stop):
    options = {"eval_data": str(eval_data), "eval_at_start": True, "eval_every": 4}
    _, first = run(tmp_path, stop_after=stop, **options)
    _, second = run(tmp_path, **options)
    assert [*evaluation_events(first), *evaluation_events(second)] == [0, 4, 8, 9]


def test_nan_evaluations_never_improve():
    tracker = BestTracker()
    for step in range(1, 5):
        tracker = tracker.update({"eval_loss": math.nan}, step=step)
    assert (tracker.best_step, tracker.out_of_patience(3)) == (1, True)
    assert tracker.update({"eval_loss": 9.0}, step=5).best_step == 5
