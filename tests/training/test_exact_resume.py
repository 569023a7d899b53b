"""Exact resume: a run that is interrupted anywhere ends in the same state as an uninterrupted one."""

from __future__ import annotations

import copy
import pickle
import shutil
import signal
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distrust import Checkpoint, CheckpointManager, DistrustTrainer, DistrustWarning, TrainConfig
from distrust.config_text import from_mapping
from distrust.errors import NoIntactCheckpoint
from distrust.testing.toy_engine import ToyEngine
from distrust.training.events import CheckpointStarted, RunStarted, StepEnded

quick = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])


def steps_of(events):
    return [event.step for event in events if isinstance(event, StepEnded)]


def damage(path: Path) -> None:
    """Flip one bit of the data."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@quick
@given(
    stops=st.lists(st.integers(1, 12), max_size=3).map(sorted),
    save_every=st.integers(0, 5),
    batch=st.sampled_from([(1, 1), (2, 2), (3, 1), (4, 4)]),
    evaluated=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
def test_stopped_run_ends_in_the_same_state(run, eval_data, stops, save_every, batch, evaluated, seed):
    batch_size, accumulation = batch
    options = {
        "max_steps": 12,
        "batch_size": batch_size,
        "gradient_accumulation": accumulation,
        "seed": seed,
        "keep_last": 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        alone, events = run(Path(folder, "alone"), save_every=0, **options)
        assert steps_of(events) == list(range(1, 13))
        evaluation = {"eval_data": str(eval_data), "eval_every": 3} if evaluated else {}
        steps = []
        for stop in [*stops, None]:
            # Each session evaluates and saves at other steps, which must not change the result.
            ended, events = run(
                Path(folder, "stopped"), stop_after=stop, save_every=save_every, **evaluation, **options
            )
            steps += steps_of(events)
            evaluation = {} if evaluation else {"eval_data": str(eval_data), "eval_every": 2}
        assert steps == list(range(1, 13))  # SIGTERM saves first, so no step is repeated or omitted
        assert ended.step == 12
        assert ended.state_digest == alone.state_digest


@quick
@given(died_after=st.integers(1, 8), save_every=st.integers(1, 5))
def test_killed_run_ends_in_the_same_state(run, died_after, save_every):
    """As after SIGKILL, only the last checkpoint remains. tests/cli sends a real SIGKILL."""

    class Died(BaseException):  # not an Exception, so the loop cannot save
        pass

    def die(event):
        if isinstance(event, StepEnded) and event.step == died_after:
            raise Died

    with tempfile.TemporaryDirectory() as folder:
        alone, _ = run(Path(folder, "alone"), save_every=save_every)
        config = TrainConfig(
            **{**_options_of(alone.path), "out": str(Path(folder, "died")), "save_every": save_every}
        )
        with pytest.raises(Died):
            DistrustTrainer(config, engine=ToyEngine(), observers=[die]).train()
        ended, steps = run(Path(folder, "died"), save_every=save_every)
        saved = (died_after - 1) // save_every * save_every
        assert steps_of(steps) == list(range(saved + 1, 10))
        assert ended.state_digest == alone.state_digest


def _options_of(path: Path) -> dict[str, object]:
    header = CheckpointManager(path.parent).inspect(path).header
    saved = {**header.run_info["extra"], **header.config}
    for no_option in ("corpus", "elapsed_seconds", "environment", "evaluations", "fingerprints"):
        del saved[no_option]
    config = from_mapping(saved, where="here")
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_seed_and_batches_change_the_digest(run, tmp_path):
    """The digests that this file compares do depend on the run."""
    digests = {
        run(tmp_path / str(number), **options)[0].state_digest
        for number, options in enumerate(
            [{}, {"seed": 1}, {"batch_size": 4, "gradient_accumulation": 1}, {"weighting": "off"}]
        )
    }
    assert len(digests) == 4


def test_resumed_run_reports_its_checkpoint(run, tmp_path):
    stopped, _ = run(tmp_path, stop_after=5)
    _, events = run(tmp_path)
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    assert started.step == 5
    assert started.resumed_from == stopped.path
    assert stopped.path is not None
    assert stopped.path.name == "checkpoint-5.safetensors"


def test_same_trainer_resumes(run, alone, data, tmp_path):

    def stop_once(event):
        if isinstance(event, StepEnded) and event.step == 4:
            signal.raise_signal(signal.SIGUSR1)

    config = TrainConfig(**{**_options_of(alone.path), "out": str(tmp_path / "twice")})
    trainer = DistrustTrainer(config, engine=ToyEngine(), observers=[stop_once])
    assert trainer.train().step == 4
    assert trainer.train().state_digest == alone.state_digest


def test_finished_run_does_nothing(run, tmp_path):
    finished, _ = run(tmp_path)
    content = finished.path.read_bytes()
    again, events = run(tmp_path)
    assert again.already_finished
    assert not finished.already_finished
    assert (again.step, again.path, again.state_digest) == (9, finished.path, finished.state_digest)
    assert events == [again]  # nothing was loaded, trained or saved
    assert finished.path.read_bytes() == content


def test_more_epochs_continue_a_finished_run(run, tmp_path):
    once, _ = run(tmp_path, max_steps=None, epochs=1, schedule="constant")
    again, _ = run(tmp_path, max_steps=None, epochs=1, schedule="constant")
    assert again.already_finished
    twice, steps = run(tmp_path, max_steps=None, epochs=2, schedule="constant")
    assert once.step == 3  # 11 records in steps of 4
    assert steps_of(steps) == [4, 5, 6]
    assert twice.step == 6


def test_longer_run_keeps_the_earlier_steps(run, tmp_path):
    short, _ = run(tmp_path / "short", max_steps=5, schedule="constant")
    longer, _ = run(tmp_path / "short", max_steps=9, schedule="constant")
    assert longer.step == 9
    histories = [CheckpointManager(ended.path.parent).load(ended.path).history for ended in (short, longer)]
    for name, values in histories[0].items():
        assert values.shape == (5,)
        assert np.array_equal(histories[1][name][:5], values)
    # Equals a run that was started with the full length and that schedule.
    uninterrupted, _ = run(tmp_path / "whole", max_steps=9, schedule_steps=5, schedule="constant")
    assert uninterrupted.state_digest == longer.state_digest


def test_damaged_newest_checkpoint(run, alone, tmp_path):
    stopped, _ = run(tmp_path / "hurt", stop_after=5)
    damage(stopped.path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DistrustWarning)
        ended, steps = run(tmp_path / "hurt")
    assert "skipped a damaged checkpoint" in str(caught[0].message)
    assert str(stopped.path) in str(caught[0].message)
    assert steps_of(steps)[0] == 5  # from the one of step 4
    assert ended.state_digest == alone.state_digest


def test_damaged_final_checkpoint(run, tmp_path):
    finished, _ = run(tmp_path)
    damage(finished.path)
    with pytest.warns(DistrustWarning, match="skipped a damaged checkpoint"):
        ended, steps = run(tmp_path)
    assert steps_of(steps) == [9]
    assert not ended.already_finished
    assert (ended.path, ended.state_digest) == (finished.path, finished.state_digest)
    CheckpointManager(ended.path.parent).validate(9)


@pytest.mark.parametrize("how", ["bit", "cut", "empty", "zeros"])
def test_only_damaged_checkpoints_refuse_a_new_run(run, tmp_path, how):
    ended, _ = run(tmp_path, save_every=0)
    raw = ended.path.read_bytes()
    if how == "bit":
        damage(ended.path)
    else:
        ended.path.write_bytes({"cut": raw[: len(raw) // 2], "empty": b"", "zeros": bytes(len(raw))}[how])
    hurt = ended.path.read_bytes()
    with pytest.raises(NoIntactCheckpoint, match=r"checkpoint-9-final\.safetensors"):
        run(tmp_path, save_every=0)
    assert ended.path.read_bytes() == hurt
    assert [path.name for path in ended.path.parent.glob("*.safetensors")] == [ended.path.name]


def test_retention_of_a_run(run, eval_data, tmp_path):
    _, events = run(
        tmp_path, save_every=1, keep_last=2, keep_best=0, keep_every=4, max_steps=10, eval_data=str(eval_data)
    )
    saved = [event.step for event in events if isinstance(event, CheckpointStarted)]
    assert saved == list(range(1, 11))
    steps = CheckpointManager(tmp_path / "checkpoints", keep_last=None).list_checkpoints()
    assert steps == [4, 8, 9, 10]


def test_best_checkpoint_was_evaluated(run, eval_data, tmp_path):
    """A step without an evaluation has no eval loss, so it cannot be the best."""
    ended, _ = run(tmp_path, save_every=1, eval_every=4, keep_last=9, eval_data=str(eval_data))
    metrics = {file.step: file.metrics for file in CheckpointManager(ended.path.parent).scan().files}
    assert [step for step, values in metrics.items() if "eval_loss" in values] == [4, 8, 9]
    assert all("loss" in values for values in metrics.values())


def test_later_steps_do_not_change_a_pending_checkpoint(run, tmp_path):
    """Each checkpoint holds its own step, although the engine changes its arrays in place."""
    run(tmp_path / "every", save_every=1, keep_last=9)
    for step in (1, 4, 7):
        one, _ = run(tmp_path / str(step), stop_after=step, save_every=0)
        file = CheckpointManager(tmp_path / "every" / "checkpoints").inspect(step)
        assert file.state_digest == one.state_digest


def test_moved_run_resumes(run, alone, data, tmp_path):
    run(tmp_path / "here", stop_after=3)
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = str(shutil.copy(data, tmp_path / "moved.jsonl"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ended, _ = run(tmp_path / "there", data=moved)
    assert ended.state_digest == alone.state_digest


def test_the_name_of_the_machine_is_left_out_on_request(run, tmp_path, monkeypatch):
    monkeypatch.setattr("platform.node", lambda: "secret-machine")
    usual, _ = run(tmp_path / "usual")
    anonymous, _ = run(tmp_path / "anonymous", host=False)
    assert anonymous.state_digest == usual.state_digest
    assert b"secret-machine" in usual.path.read_bytes()
    assert b"secret-machine" not in anonymous.path.read_bytes()
    manager = CheckpointManager(tmp_path, record_host=False)
    for step, clone in enumerate((copy.deepcopy(manager), pickle.loads(pickle.dumps(manager)))):
        with clone:
            path = clone.save(Checkpoint(step=step))
        assert b"secret-machine" not in path.read_bytes()
