"""What is listed and loaded, and what cleanup keeps and removes."""

from __future__ import annotations

import math
import os
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distrust import Checkpoint, CheckpointManager, DistrustWarning
from distrust.checkpoint.retention import (
    Candidate,
    Retention,
    rank_by_metric,
    steps_that_displace,
    steps_to_keep,
)
from distrust.errors import CheckpointNotFound, ConfigError, CorruptCheckpoint, NoIntactCheckpoint

pytestmark = pytest.mark.usefixtures("no_fsync")


def state(step: int, mark: float = 0, **fields) -> Checkpoint:
    return Checkpoint(step=step, model={"w": np.full(8, step + mark, np.float32)}, **fields)


def damage(path: Path, *, header: bool = False) -> None:
    raw = bytearray(path.read_bytes())
    raw[100 if header else -1] ^= 1
    path.write_bytes(raw)


def names(manager: CheckpointManager) -> list[str]:
    return sorted(
        (
            path.name.removeprefix("checkpoint-").removesuffix(".safetensors")
            for path in manager.directory.glob("c*")
        ),
        key=lambda name: (int(name.split("-")[0]), name),
    )


@pytest.fixture
def make(tmp_path):
    managers = []

    def make(**rules) -> CheckpointManager:
        managers.append(CheckpointManager(tmp_path, **rules))
        return managers[-1]

    yield make
    for manager in managers:
        manager.close()


def test_keep_last(make):
    manager = make(keep_last=2)
    for step in (10, 20, 30):
        path = manager.save(state(step))
        assert path == manager.directory / f"checkpoint-{step}.safetensors"
        assert path.exists()

    assert manager.list_checkpoints() == [20, 30]
    assert names(manager) == ["20", "30"]
    assert [manager.load(step).model["w"][0] for step in (20, 30)] == [20, 30]


def test_steps_are_listed_in_numeric_order(make):
    manager = make(keep_last=None)
    for step in (100, 9, 0, 20):
        manager.save(state(step))
    assert manager.list_checkpoints() == [0, 9, 20, 100]
    assert manager.load_latest().step == 100


@pytest.mark.parametrize(("mode", "best"), [("min", 10), ("max", 30)])
def test_keep_best_and_load_best(make, mode, best):
    manager = make(keep_last=1, keep_best=1, metric="loss", metric_mode=mode)
    for step, loss in [(10, 0.1), (20, 0.5), (30, 0.9), (40, math.nan), (50, 0.4), (60, None)]:
        manager.save(state(step, metrics={} if loss is None else {"loss": loss}))

    assert manager.list_checkpoints() == [best, 60]
    assert manager.load_best().step == best
    assert manager.load_latest().step == 60


def test_numbers_of_any_size_in_the_metadata_are_metrics(make):
    manager = make(keep_last=1, keep_best=2, metric="loss")
    for step, loss in [(1, 10**400), (2, -(10**400)), (3, 0.5), (4, math.inf), (5, "0"), (6, True)]:
        manager.save(state(step, metadata={"loss": loss}))

    assert manager.list_checkpoints() == [2, 3, 6]
    assert manager.load_best().step == 2
    assert manager.load(2).metadata == {"loss": -(10**400)}


def test_keep_every(make):
    manager = make(keep_last=1, keep_every=20)
    for step in range(5, 75, 5):
        manager.save(state(step))
    assert manager.list_checkpoints() == [20, 40, 60, 70]


def test_finals_are_kept(make):
    manager = make(keep_last=1)
    for step in (10, 20, 30):
        path = manager.save(state(step), final=True)
        assert path.name == f"checkpoint-{step}-final.safetensors"
    manager.save(state(40))
    manager.save(state(50))

    assert names(manager) == ["10-final", "20-final", "30-final", "50"]
    assert manager.cleanup(keep_last=1) == []
    assert [file.kind for file in manager.scan().files] == ["final"] * 3 + ["periodic"]


def test_the_final_of_a_step_takes_precedence(make):
    manager = make(keep_last=3)
    manager.save(state(10))
    manager.save(state(20))
    manager.save(state(20, mark=0.5), final=True)

    assert manager.list_checkpoints() == [10, 20]
    assert manager.load(20).model["w"][0] == 20.5
    assert manager.load_latest().model["w"][0] == 20.5
    assert manager.inspect(20).kind == "final"
    assert names(manager) == ["10", "20-final"]


def test_a_step_saved_again_is_replaced(make):
    manager = make()
    manager.save(state(20))
    old = manager.load(20)
    manager.save(state(20, mark=0.5))

    assert manager.list_checkpoints() == [20]
    assert (old.model["w"][0], manager.load(20).model["w"][0]) == (20, 20.5)


def test_cleanup_returns_the_removed_steps(make):
    manager = make(keep_last=None)
    for step in (10, 20, 30, 40):
        manager.save(state(step), final=step == 10)

    assert manager.cleanup() == []
    assert manager.cleanup(keep_last=2) == [20]
    assert manager.cleanup(keep_last=1) == [30]
    assert manager.list_checkpoints() == [10, 40]


LOADS = {
    "load": lambda manager: manager.load(10),
    "load by path": lambda manager: manager.load(manager.directory / "checkpoint-10.safetensors"),
    "choose": lambda manager: manager.choose(step=10),
    "load_best": lambda manager: manager.load_best(),
}


@pytest.mark.parametrize("load", LOADS)
def test_what_was_loaded_is_kept_until_a_newer_one_is_saved(make, load):
    """The run may have to resume from it again."""
    with make(keep_last=None) as manager:
        for step in (10, 20, 30):
            manager.save(state(step, metrics={"eval_loss": step}))
    manager = make(keep_last=1, keep_best=0)
    LOADS[load](manager)
    assert manager.cleanup() == [20]
    assert manager.list_checkpoints() == [10, 30]
    manager.save(state(5))  # no later than the one that was loaded
    assert manager.list_checkpoints() == [5, 10, 30]
    manager.save(state(40))
    assert manager.list_checkpoints() == [40]


def test_files_with_other_names_are_ignored(make, tmp_path):
    other_names = [
        "best",
        "model.safetensors",
        "xcheckpoint-5.safetensors",
        "checkpoint-.safetensors",
        "checkpoint-05.safetensors",
        "checkpoint--5.safetensors",
        "checkpoint-²5.safetensors",
        "checkpoint-5-best.safetensors",
        "checkpoint-5-FINAL.safetensors",
        "checkpoint-5.safetensors.bak",
        "checkpoint-5.safetensors\n",
    ]
    for name in other_names:
        (tmp_path / name).write_text(name)
    manager = make(keep_last=1)
    manager.save(state(1))
    manager.save(state(2))

    assert manager.list_checkpoints() == [2]
    assert manager.scan().damaged == ()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name in other_names) == sorted(other_names)


@pytest.mark.parametrize("header", [True, False], ids=["header", "data"])
def test_damaged_files_are_left_and_count_towards_no_rule(make, tmp_path, header):
    """They must not displace an intact one from the last N, wherever the damage is."""
    manager = make(keep_last=None)
    for step in (10, 20, 30):
        manager.save(state(step))
    damage(tmp_path / "checkpoint-30.safetensors", header=header)
    manager.close()
    manager = make(keep_last=2)
    if header:
        manager.cleanup()
    else:
        with pytest.warns(DistrustWarning, match=r"checkpoint-30.*counts towards no rule"):
            manager.cleanup()
    assert names(manager) == ["10", "20", "30"]

    manager.save(state(40))
    manager.save(state(50))

    assert names(manager) == ["30", "40", "50"]


def test_a_damaged_final_does_not_displace_its_periodic_twin(make, tmp_path):
    manager = make()
    manager.save(state(10))
    shutil.copy(tmp_path / "checkpoint-10.safetensors", tmp_path / "retained")
    manager.save(state(10), final=True)
    manager.close()
    os.rename(tmp_path / "retained", tmp_path / "checkpoint-10.safetensors")
    damage(tmp_path / "checkpoint-10-final.safetensors")

    manager = make()
    with pytest.warns(DistrustWarning, match="10-final"):
        assert manager.cleanup() == []
    assert names(manager) == ["10", "10-final"]
    with pytest.warns(DistrustWarning, match="10-final"):
        assert manager.load_latest().step == 10


def test_an_intact_copy_in_another_directory_proves_nothing(make, tmp_path, tmp_path_factory):
    manager = make(keep_last=None)
    for step in (10, 20):
        manager.save(state(step))
    manager.close()
    newest = tmp_path / "checkpoint-20.safetensors"
    backup = shutil.copy(newest, tmp_path_factory.mktemp("backup") / newest.name)
    damage(newest)

    manager = make(keep_last=1)
    manager.validate(backup)
    manager.load(backup)
    with pytest.warns(DistrustWarning, match="checkpoint-20"):
        assert manager.cleanup() == []
    assert names(manager) == ["10", "20"]


def test_load_latest_falls_back_with_a_warning_for_each_damaged_file(make, tmp_path):
    manager = make(keep_last=None)
    for step in (10, 20, 30, 40):
        manager.save(state(step))
    damage(tmp_path / "checkpoint-40.safetensors", header=True)
    damage(tmp_path / "checkpoint-30.safetensors")

    with pytest.warns(DistrustWarning) as warned:
        loaded = manager.load_latest()

    assert loaded.step == 20
    assert loaded.model["w"].tolist() == [20] * 8
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == 2
    assert "checkpoint-40.safetensors" in messages[0]
    assert "header" in messages[0]
    assert "checkpoint-30.safetensors" in messages[1]
    assert "model.w" in messages[1]
    with pytest.raises(CorruptCheckpoint, match=r"model\.w"):
        manager.load(30)
    with pytest.raises(CorruptCheckpoint, match=r"checkpoint-40\.safetensors"):
        manager.load(40)


def test_load_best_falls_back_to_the_next_best_with_a_warning(make, tmp_path):
    manager = make(keep_last=None)
    for step, loss in [(10, 0.3), (20, 0.1), (30, 0.2)]:
        manager.save(state(step, metrics={"eval_loss": loss}))
    damage(tmp_path / "checkpoint-20.safetensors")

    with pytest.warns(DistrustWarning, match=r"checkpoint-20.*model\.w"):
        assert manager.load_best().step == 30


def test_if_no_checkpoint_is_intact_loading_raises(make, tmp_path):
    manager = make()
    for step in (10, 20):
        manager.save(state(step, metrics={"eval_loss": 1}))
    damage(tmp_path / "checkpoint-10.safetensors")
    damage(tmp_path / "checkpoint-20.safetensors")
    with pytest.raises(NoIntactCheckpoint, match=r"model\.w"):
        manager.load_best()
    damage(tmp_path / "checkpoint-20.safetensors", header=True)

    with pytest.raises(NoIntactCheckpoint) as caught:
        manager.load_latest()

    assert "checkpoint-10.safetensors" in str(caught.value)
    assert "checkpoint-20.safetensors" in str(caught.value)
    assert names(manager) == ["10", "20"]


def test_the_error_for_a_missing_checkpoint_lists_the_existing_ones(make, tmp_path):
    manager = make()
    for method in (manager.load, manager.inspect, manager.validate):
        with pytest.raises(CheckpointNotFound, match="none"):
            method(20)
    with pytest.raises(CheckpointNotFound):
        manager.load_latest()
    for step in (10, 30):
        manager.save(state(step, metrics={"accuracy": 1}))

    for method in (manager.load, manager.inspect, manager.validate):
        with pytest.raises(CheckpointNotFound, match=r"step 20; there are 10, 30"):
            method(20)
        with pytest.raises(CheckpointNotFound, match="nowhere"):
            method(tmp_path / "nowhere.safetensors")
    with pytest.raises(CheckpointNotFound, match=r"eval_loss.*accuracy.*10, 30"):
        manager.load_best()


def test_reading_does_not_create_a_missing_directory(tmp_path):
    manager = CheckpointManager(tmp_path / "a" / "b")
    assert manager.list_checkpoints() == []
    with pytest.raises(CheckpointNotFound):
        manager.load_latest()
    assert not (tmp_path / "a").exists()
    with manager:
        manager.save(state(1))
    assert manager.list_checkpoints() == [1]


def test_a_relative_directory_is_resolved_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with CheckpointManager("run") as manager:
        monkeypatch.chdir("/")
        assert manager.save(state(1)) == tmp_path / "run" / "checkpoint-1.safetensors"
        monkeypatch.chdir(tmp_path / "run")
        assert manager.load("checkpoint-1.safetensors").step == 1


def test_a_renamed_file_does_not_count_as_another_step(make, tmp_path):
    manager = make()
    manager.save(state(10)).rename(tmp_path / "checkpoint-99.safetensors")

    assert manager.list_checkpoints() == []
    with pytest.raises(CorruptCheckpoint, match="step 10"):
        manager.load(99)
    assert manager.load(tmp_path / "checkpoint-99.safetensors").step == 10


@pytest.mark.parametrize(
    "invalid",
    [{"keep_last": 0}, {"keep_last": -1}, {"keep_best": -1}, {"keep_every": 0}, {"metric_mode": "lowest"}],
    ids=str,
)
def test_invalid_rules_are_refused(tmp_path, invalid):
    with pytest.raises(ConfigError, match=next(iter(invalid))):
        CheckpointManager(tmp_path, **invalid)


metrics = st.dictionaries(st.just("m"), st.floats() | st.integers(-(10**400), 10**400))
candidates = st.lists(
    st.builds(Candidate, st.integers(0, 60), st.booleans(), metrics),
    unique_by=lambda candidate: candidate.step,
)
rules = st.builds(
    Retention,
    st.none() | st.integers(1, 5),
    st.integers(0, 3),
    st.none() | st.integers(1, 20),
    st.just("m"),
    st.sampled_from(["min", "max"]),
)


@given(candidates, rules)
def test_the_rules(existing, rules):
    steps = sorted(candidate.step for candidate in existing)
    retained = steps_to_keep(existing, rules)

    assert retained <= set(steps)
    assert steps_that_displace(existing, rules) <= retained
    assert retained >= {candidate.step for candidate in existing if candidate.final}
    assert retained >= set(steps if rules.keep_last is None else steps[-rules.keep_last :])
    if rules.keep_every is not None:
        assert retained >= {step for step in steps if step % rules.keep_every == 0}
    values = {
        c.step: c.metrics["m"] for c in existing if "m" in c.metrics and c.metrics["m"] == c.metrics["m"]
    }
    best = rank_by_metric(existing, rules)
    assert sorted(best) == sorted(values)
    assert retained >= set(best[: rules.keep_best])
    sign = 1 if rules.metric_mode == "min" else -1
    assert all(sign * values[a] <= sign * values[b] for a, b in pairwise(best))
    # Nothing is kept without a rule: each keeps at most this many.
    if rules.keep_last is not None:
        by_rule = [
            c
            for c in existing
            if c.final or (rules.keep_every is not None and c.step % rules.keep_every == 0)
        ]
        assert len(retained) <= rules.keep_last + rules.keep_best + len(by_rule)
    # Idempotent: cleaning up twice removes nothing more.
    assert steps_to_keep([c for c in existing if c.step in retained], rules) == retained


@settings(max_examples=40)
@given(
    saves=st.lists(st.tuples(st.integers(0, 12), st.booleans(), st.none() | st.floats(0, 1)), max_size=10),
    keep_last=st.none() | st.integers(1, 3),
    keep_best=st.integers(0, 2),
    keep_every=st.none() | st.integers(2, 5),
)
@example(saves=[(10, False, None), (3, False, None)], keep_last=1, keep_best=0, keep_every=None)
def test_a_directory_contains_what_the_rules_keep_after_every_save(
    tmp_path_factory, saves, keep_last, keep_best, keep_every
):
    rules = Retention(keep_last, keep_best, keep_every)
    existing: dict[int, Candidate] = {}
    with CheckpointManager(
        tmp_path_factory.mktemp("rules"), keep_last=keep_last, keep_best=keep_best, keep_every=keep_every
    ) as manager:
        for step, final, loss in saves:
            if step in existing and existing[step].final and not final:
                continue  # the final one takes precedence
            metrics = {} if loss is None else {"eval_loss": loss}
            manager.save(state(step, metrics=metrics), final=final)
            existing[step] = Candidate(step, final, metrics)
            retained = steps_to_keep(existing.values(), rules) | {
                step
            }  # a save never removes its own checkpoint
            existing = {step: candidate for step, candidate in existing.items() if step in retained}
            assert manager.list_checkpoints() == sorted(existing)
            assert names(manager) == [
                f"{step}-final" if existing[step].final else f"{step}" for step in sorted(existing)
            ]
        shutil.rmtree(manager.directory)


def test_a_pinned_step_stays_until_another_is_pinned(make):
    manager = make(keep_last=1, keep_best=0)
    manager.pin(2)
    for step in range(1, 5):
        manager.save(state(step))
    assert manager.list_checkpoints() == [2, 4]
    manager.pin(4)
    manager.save(state(5))
    assert manager.list_checkpoints() == [4, 5]
    manager.pin(None)
    assert manager.cleanup() == [4]
