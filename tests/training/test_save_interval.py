"""When a run saves, if it saves by time: within its budgets, and without an effect on the result."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distrust import CheckpointManager, DistrustTrainer, DistrustWarning, TrainConfig
from distrust.checkpoint.background import BackgroundWriter
from distrust.reporting import summary
from distrust.reporting.console import ConsoleReporter
from distrust.reporting.metrics import MetricsWriter
from distrust.reporting.run_reader import read_run
from distrust.testing.toy_engine import ToyEngine
from distrust.training.events import CheckpointSaved, StepEnded
from distrust.training.save_interval import (
    EXPECTED_BYTES_PER_SECOND,
    LONGEST_SECONDS,
    SaveTimes,
    is_due,
    notice,
)
from tests.run_folders import step_line, write_lines


class Save(NamedTuple):
    """A save of a simulated run, in seconds."""

    began: float
    stall: float
    stall_before: float  # of all saves before it
    chosen: bool  # by its time


@dataclass
class Simulation:
    """A run that consists of times: each step lasts as drawn, each save stalls it and is written as drawn."""

    config: TrainConfig
    steps: list[float]
    stalls: list[float]
    written: float  # seconds until a save is durable
    nbytes: int
    best: frozenset[int] = frozenset()  # steps that are saved whatever the time
    saves: list[Save] = field(default_factory=list)
    notices: set[str] = field(default_factory=set)

    def run(self) -> Simulation:
        now, stalls, due = 0.0, iter(self.stalls * len(self.steps)), False
        self.times = times = SaveTimes(began=0.0, save_began=0.0, durable_since=0.0)
        for number, step in enumerate(self.steps):
            now += step
            times.step, times.nbytes = step, self.nbytes
            if due or number in self.best:
                times.save_began, times.stall = now, next(stalls)
                self.saves.append(Save(now, times.stall, times.total_stall, due and number not in self.best))
                times.saves, times.total_stall = times.saves + 1, times.total_stall + times.stall
                now += times.stall
                times.duration = times.stall + self.written
            due = is_due(self.config, times, now)
            self.notices.add(notice(self.config, times))
        self.elapsed = now
        return self

    @property
    def intervals(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise([0.0, *(save.began for save in self.saves)])]

    @property
    def spread(self) -> float:
        """How much a step may be shorter than the one before it, by which it was decided; with rounding."""
        return max(self.steps) - min(self.steps) + 1e-6

    @property
    def unavoidable(self) -> float:
        """What may add to an interval: a step before anything is measured, the stall, the last save."""
        return max(self.steps) + max(self.stalls) + max(self.stalls) + self.written


STEPS = st.floats(0.05, 90.0).flatmap(
    lambda longest: st.lists(st.floats(longest / 3, longest), min_size=1, max_size=3)
)

AUTO, GB = st.just("auto"), st.floats(1, 1e5)


@st.composite
def simulations(draw, save_every=AUTO, bytes_per_day=GB):
    steps = draw(STEPS)
    config = TrainConfig(
        save_every=draw(save_every),
        save_budget=draw(st.floats(0.1, 20)),
        save_bytes_per_day=draw(bytes_per_day),
    )
    stalls = draw(st.lists(st.floats(0, 8), min_size=1, max_size=4))
    nbytes = draw(st.integers(10**6, 10**10))
    return Simulation(config, steps * (300 // len(steps)), stalls, draw(st.floats(0.01, 500)), nbytes)


@given(simulations(), st.frozensets(st.integers(0, 299), max_size=5))
@settings(max_examples=60)
def test_auto_keeps_its_budgets(run, best):
    run.best = best
    run.run()
    share, per_second = run.config.save_budget / 100, run.config.save_bytes_per_day * 1e9 / 86400
    for number, (save, interval) in enumerate(zip(run.saves, run.intervals, strict=True)):
        if save.chosen:  # paid in advance, with those that were not chosen
            is_forced = interval + run.spread >= LONGEST_SECONDS
            assert is_forced or save.stall_before <= share * (save.began + run.spread)
            assert (number + 1) * run.nbytes <= per_second * (save.began + run.spread)
            if number:
                assert interval + run.spread >= run.saves[number - 1].stall + run.written
    if not best:
        latest = max(LONGEST_SECONDS, run.nbytes / per_second) + max(run.steps) + run.spread
        assert all(interval < latest + run.unavoidable for interval in run.intervals)
        assert run.elapsed < sum(run.intervals) + latest + run.unavoidable


@given(simulations(bytes_per_day=st.just(1e9)), st.floats(0.001, 3))
@settings(max_examples=40)
def test_auto_costs_its_share_of_the_time(run, stall):
    """If saves stall as expected, the whole run is within the budget, unless the 5 minutes forced saves."""
    run.stalls, run.nbytes = [stall], int(stall * EXPECTED_BYTES_PER_SECOND)
    run.run()
    share = run.config.save_budget / 100
    if stall <= LONGEST_SECONDS * share:
        assert run.times.total_stall <= share * (run.elapsed + run.spread)
        assert run.notices == {""}
    else:
        assert any("--save-budget" in text for text in run.notices) == bool(run.saves)


@given(simulations(save_every=st.sampled_from(["1s", "30s", "2m", "1h"])))
@settings(max_examples=40)
@example(Simulation(TrainConfig(save_every="30s"), [10.0] * 99, [0.0], 1.0, 1))
@example(Simulation(TrainConfig(save_every="30s"), [7.0] * 99, [0.0], 1.0, 1))
def test_a_time_is_kept_up_to_one_step(run):
    run.run()
    seconds = {"1s": 1, "30s": 30, "2m": 120, "1h": 3600}[run.config.save_every]
    for interval in run.intervals:
        assert seconds <= interval + run.spread
        assert interval < seconds + max(run.steps) + run.spread + run.unavoidable


def test_auto_says_once_what_contradicts_its_five_minutes():
    slow = Simulation(TrainConfig(save_every="auto"), [20.0] * 200, [4.1], 9.0, 10**9).run()
    assert slow.notices == {
        "",
        "--save-budget 1: a save stalls training for 4.1 s, more than this percentage of 5 minutes; "
        "--save-every auto saves every 5 minutes all the same",
    }
    assert set(map(round, slow.intervals[1:])) <= {300, 304, 320, 324}
    large = Simulation(TrainConfig(save_every="auto"), [20.0] * 200, [0.1], 9.0, 10**10).run()
    assert large.notices == {
        "--save-bytes-per-day 1000: a checkpoint has 10 GB, so --save-every auto saves every 14.4 minutes, "
        "not every 5"
    }
    assert min(large.intervals) >= 864


def test_a_failing_disk_gets_time_to_recover():
    times = SaveTimes(began=0.0, save_began=100.0, durable_since=0.0, saves=9, failures=2, step=1.0)
    config = TrainConfig(save_every="2s")
    assert [is_due(config, times, now) for now in (102.0, 218.9, 219.1)] == [False, False, True]


@pytest.fixture
def slow(monkeypatch):
    """A clock on which each step of an engine takes ten seconds, and a save one, for which training waits."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def save(writer, path, *, copy, write):
        nonlocal now
        now += 1.0
        return writer.run(path, lambda: (copy(), write()))

    monkeypatch.setattr(BackgroundWriter, "start", save)

    def slow(engine):
        def clip(*arguments):
            nonlocal now
            now += 10.0
            return original(*arguments)

        original = engine.clip_gradients
        monkeypatch.setattr(engine, "clip_gradients", clip)

    return slow


def test_intervals_do_not_change_the_result(slow, tiny_model, data, tmp_path):
    """A real model has the same bits whenever it is saved."""
    from distrust.engines.torch.engine import TorchEngine  # late: torch is slow to import

    slow(TorchEngine)
    options = {"max_steps": 5, "batch_size": 1, "max_length": 16, "lora_rank": 2, "lora_dropout": 0.1}
    digests, saved = set(), {}
    for save_every in (0, 2, "10s", "30s", "auto"):
        out = tmp_path / str(save_every)
        where = {"model": str(tiny_model), "data": str(data), "out": str(out), "device": "cpu", "threads": 1}
        config = TrainConfig(save_every=save_every, keep_last=9, **options, **where)
        digests.add(DistrustTrainer(config, observers=[]).train().state_digest)
        saved[save_every] = CheckpointManager(out / "checkpoints").list_checkpoints()
    assert len(digests) == 1
    each = [2, 3, 4, 5]  # the first step tells how long a step takes
    assert saved == {0: [5], 2: [2, 4, 5], "10s": each, "30s": [3, 5], "auto": [2, 5]}


def test_a_run_resumes_with_another_interval(slow, run, tmp_path):
    def train(out, **options):
        slow(engine := ToyEngine())
        ended, _ = run(tmp_path / out, engine=engine, keep_last=9, **options)
        return ended.state_digest, CheckpointManager(tmp_path / out / "checkpoints").list_checkpoints()

    alone, _ = train("alone")
    assert train("resumed", save_every="1m", stop_after=4)[1] == [4]
    assert train("resumed", save_every="20s") == (alone, [4, 6, 8, 9])


def test_work_at_risk_is_reported(slow, run, tmp_path):
    """Up to the moment at which a save is durable, all work since the save before it began can be lost."""
    stream, out = io.StringIO(), tmp_path / "run"
    slow(engine := ToyEngine())
    with ConsoleReporter(log_every=9, stream=stream) as console:
        observers = [console, MetricsWriter(TrainConfig())]
        _, events = run(out, engine=engine, save_every="20s", observers=observers)
    saved = {event.step: event.at_risk_seconds for event in events if isinstance(event, CheckpointSaved)}
    assert saved == {2: 21, 4: 22, 6: 22, 8: 22, 9: 12}
    assert stream.getvalue().count(" (stall 1 s; at most 22 s of work can be lost)\n") == 3
    steps = [event.at_risk_seconds for event in events if isinstance(event, StepEnded)]
    assert steps == [10, 20, 21, 21, 22, 21, 22, 21, 22]  # up to the end of a save in the step before
    assert ("work that can be lost", "at most 22 s") in [each[:2] for each in summary.facts(read_run(out))]


def test_logs_without_the_work_at_risk_are_read(tmp_path):
    write_lines(tmp_path, [step_line(step) for step in range(1, 9)])
    assert "at_risk_seconds" not in read_run(tmp_path).steps.columns
    assert not [fact for fact in summary.facts(read_run(tmp_path)) if "lost" in fact.name]


def test_steps_to_keep_are_saved_whatever_the_time(run, tmp_path):
    run(tmp_path, save_every="1h", keep_every=4, keep_last=1)
    assert CheckpointManager(tmp_path / "checkpoints").list_checkpoints() == [4, 8, 9]


def test_a_notice_is_a_warning_of_the_run(run, tmp_path):
    with pytest.warns(DistrustWarning, match="--save-bytes-per-day 1e-05: a checkpoint has") as caught:
        run(tmp_path, save_every="auto", save_bytes_per_day=1e-5)
    assert len(caught) == 1
