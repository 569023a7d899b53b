"""Resumes that would change the run are refused, with all reasons; changes of the last bits warn."""

from __future__ import annotations

import os
import warnings
from dataclasses import fields

import pytest

from distrust import CheckpointManager, DistrustWarning, TrainConfig
from distrust.config import flag
from distrust.errors import (
    CheckpointDirectoryLocked,
    CheckpointNotFound,
    ConfigError,
    CorruptCheckpoint,
    NonFiniteLoss,
    ResumeRefused,
    SaveFailed,
)
from distrust.testing.models import write_records
from distrust.testing.toy_engine import ToyEngine
from distrust.training.events import CheckpointStarted, StepEnded

#: Another value of each option that changes the result.
OTHER = {
    "max_length": 64,
    "mix": (1.0,),
    "eval_fraction": 0.2,
    "weighting": "published",
    "alpha": 2.5,
    "lambda_": 0.7,
    "max_ratio": 3.0,
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "lora_dropout": 0.1,
    "target_modules": ("q_proj",),
    "exclude_modules": ("q_proj",),
    "layers": "0",
    "rslora": True,
    "dora": True,
    "batch_size": 1,
    "packing": True,
    "gradient_accumulation": 3,
    "learning_rate": 0.06,
    "warmup_steps": 3,
    "warmup_ratio": 0.5,
    "schedule": "linear",
    "schedule_steps": 11,
    "decay_ratio": 0.3,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.5,
    "clipping": "plain",
    "seed": 1,
    "dtype": "bfloat16",
    "quantization": "8bit",
}


def contents(folder):
    return {
        path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
    }


def test_every_option_that_changes_the_result_is_refused(run, tmp_path):
    run(tmp_path, stop_after=3)
    original = contents(tmp_path)
    for name, value in OTHER.items():
        with pytest.raises(ResumeRefused) as refused:
            run(tmp_path, **{name: value})
        (line,) = refused.value.differences
        assert line.startswith(f"{flag(name)} was ")
        assert line in str(refused.value)
    assert contents(tmp_path) == original
    assert set(OTHER) == {f.name for f in fields(TrainConfig) if f.metadata["effect"] == "result"}


def test_all_differences_are_reported_at_once(run, tmp_path):
    run(tmp_path, stop_after=3)
    with pytest.raises(ResumeRefused) as refused:
        run(tmp_path, learning_rate=0.1, batch_size=4, lambda_=0.0)
    assert refused.value.differences == (
        "--lambda was 0.6, is 0.0",
        "--batch-size was 2, is 4",
        "--learning-rate was 0.05, is 0.1",
    )


def test_finished_run_refuses_other_options(run, tmp_path):
    run(tmp_path)
    with pytest.raises(ResumeRefused, match="--seed was 0, is 1"):
        run(tmp_path, seed=1)


def test_omitted_bound_is_a_difference(run, tmp_path):
    """None means no bound, not the saved value."""
    run(tmp_path, stop_after=3, max_ratio=2.0)
    with pytest.raises(ResumeRefused, match=r"--max-ratio was 2\.0, is None"):
        run(tmp_path)


def test_options_fixed_at_start_are_restored(run, tmp_path):
    run(tmp_path, stop_after=3)
    config = CheckpointManager(tmp_path / "checkpoints").inspect(3).header.config
    assert (config["max_length"], config["schedule_steps"]) == (1024, 9)
    with pytest.raises(ResumeRefused, match="--schedule-steps was 9, is 10"):
        run(tmp_path, schedule_steps=10)
    assert run(tmp_path, schedule_steps=9, max_length=1024)[0].step == 9


def test_free_options_may_change(run, alone, eval_data, tmp_path):
    run(tmp_path / "changed", stop_after=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ended, _ = run(
            tmp_path / "changed",
            save_every=1,
            keep_last=7,
            keep_every=2,
            keep_best=0,
            metric="loss",
            metric_mode="max",
            log_every=1,
            eval_every=2,
            eval_data=str(eval_data),
            max_steps=9,
            epochs=1,
        )
    assert ended.state_digest == alone.state_digest


def test_other_data_is_refused(run, tmp_path):
    run(tmp_path / "run", stop_after=3)
    other_data = write_records(tmp_path / "other.jsonl", seed=1)
    original = contents(tmp_path / "run")
    with pytest.raises(ResumeRefused, match=r"--data .*other\.jsonl: its content is not that of the run"):
        run(tmp_path / "run", data=str(other_data))
    assert contents(tmp_path / "run") == original


def test_changed_provenance_is_other_data(run, data, tmp_path):
    run(tmp_path / "run", stop_after=3)
    other_data = tmp_path / "other.jsonl"
    text = data.read_text()
    other_data.write_text(text.replace('"authority_weight": 0.', '"authority_weight": 0.0', 1))
    assert other_data.read_text() != text
    with pytest.raises(ResumeRefused, match="--data"):
        run(tmp_path / "run", data=str(other_data))


def test_other_base_model_is_refused(run, tmp_path):
    run(tmp_path, stop_after=3)
    with pytest.raises(ResumeRefused, match="--model bundled: its content is not that of the run") as refused:
        run(tmp_path, engine=ToyEngine(base=1))
    assert len(refused.value.differences) == 1


@pytest.mark.parametrize("name", ["data", "model"])
def test_a_missing_fingerprint_is_not_the_same_content(run, tmp_path, name):
    """Only an imported checkpoint may lack one: the trainer always writes both."""
    run(tmp_path, stop_after=3)
    with CheckpointManager(tmp_path / "checkpoints") as manager:
        checkpoint = manager.load(3)
        del checkpoint.config["fingerprints"][name]
        manager.save(checkpoint)
    with pytest.raises(ResumeRefused, match=f"--{name} .*: its content is not that of the run"):
        run(tmp_path)


def test_changed_environment_warns(run, alone, tmp_path):
    run(tmp_path / "moved", stop_after=3)
    engine = ToyEngine(environment={"toy": "2", "threads": 1, "new": True})
    with pytest.warns(DistrustWarning, match="no longer bit-identical: toy was 1, is 2") as caught:
        ended, _ = run(tmp_path / "moved", engine=engine)
    assert len(caught) == 1  # equal threads and unrecorded keys are no difference
    assert engine.threads_restored == 1
    assert ended.state_digest == alone.state_digest


def test_threads_option_overrides_the_recorded_threads(run, tmp_path):
    run(tmp_path, stop_after=3)
    engine = ToyEngine(environment={"toy": "1", "threads": 2})
    with pytest.warns(DistrustWarning, match="no longer bit-identical: threads was 1, is 2"):
        run(tmp_path, engine=engine, threads=2)
    assert engine.threads_restored is None


def test_older_step_requires_a_branch(run, tmp_path):
    run(tmp_path / "run", stop_after=8)
    original = contents(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"--from-step 4: .* already continues to step 8.*--branch"):
        run(tmp_path / "run", from_step=4)
    assert contents(tmp_path / "run") == original


def test_branch_does_not_change_its_source(run, tmp_path):
    alone, _ = run(tmp_path / "run", keep_last=9)
    original = contents(tmp_path / "run")
    branch, events = run(tmp_path / "run", from_step=4, branch=str(tmp_path / "branch"))
    assert [event.step for event in events if isinstance(event, StepEnded)] == [5, 6, 7, 8, 9]
    assert branch.path.parent == tmp_path / "branch" / "checkpoints"
    assert branch.state_digest == alone.state_digest  # the same options give the same states
    assert contents(tmp_path / "run") == original


def test_stopped_branch_resumes_by_the_same_command(run, tmp_path):
    alone, _ = run(tmp_path / "run", keep_last=9)
    options = {"from_step": 2, "branch": str(tmp_path / "branch")}
    stopped, _ = run(tmp_path / "run", stop_after=5, **options)
    assert stopped.step == 5
    ended, events = run(tmp_path / "run", **options)
    assert [event.step for event in events if isinstance(event, StepEnded)] == [6, 7, 8, 9]
    assert ended.state_digest == alone.state_digest
    again, _ = run(tmp_path / "run", **options)
    assert (again.step, again.state_digest) == (9, alone.state_digest)


def test_branch_must_be_another_folder(run, tmp_path):
    run(tmp_path, stop_after=8, keep_last=9)
    original = contents(tmp_path)
    with pytest.raises(ConfigError, match="--branch"):
        run(tmp_path, from_step=4, branch=str(tmp_path))
    assert contents(tmp_path) == original


def test_newest_step_needs_no_branch(run, alone, tmp_path):
    run(tmp_path / "run", stop_after=4)
    assert run(tmp_path / "run", from_step=4)[0].state_digest == alone.state_digest


@pytest.mark.parametrize("branch", [False, True])
def test_missing_step(run, tmp_path, branch):
    run(tmp_path / "run", stop_after=4)
    options = {"branch": str(tmp_path / "branch")} if branch else {}
    with pytest.raises(CheckpointNotFound, match="no checkpoint of step 5; there are 2, 4"):
        run(tmp_path / "run", from_step=5, **options)


def test_damaged_step_is_refused(run, tmp_path):
    stopped, _ = run(tmp_path / "run", stop_after=4)
    raw = bytearray(stopped.path.read_bytes())
    raw[-1] ^= 1
    stopped.path.write_bytes(raw)
    with pytest.raises(CorruptCheckpoint, match="checkpoint-4"):
        run(tmp_path / "run", from_step=4)


def test_second_writer_is_refused(run, tmp_path):
    """test_asynchronous.py has the case of two trainers in one process."""
    refused = []

    def second(event):
        if isinstance(event, StepEnded) and event.step == 2:
            with pytest.raises(CheckpointDirectoryLocked, match=str(os.getpid())) as error:
                CheckpointManager(tmp_path / "checkpoints").acquire()
            refused.append(error)

    assert run(tmp_path, max_steps=3, observers=[second])[0].step == 3
    assert len(refused) == 1


def test_locked_folder_is_refused(run, tmp_path):
    with CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.acquire()
        with pytest.raises(CheckpointDirectoryLocked, match=str(os.getpid())):
            run(tmp_path)
    assert run(tmp_path, max_steps=3)[0].step == 3


def test_folder_that_cannot_be_created(run, tmp_path):
    (tmp_path / "file").write_text("here already")
    with pytest.raises(SaveFailed, match="file"):
        run(tmp_path / "file")


@pytest.mark.parametrize("example", [0, 3, 10])
def test_nan_loss_stops_before_the_step(run, data, tmp_path, example):
    ended, _ = run(tmp_path / "good", save_every=1, keep_last=9)
    events = []
    with pytest.raises(NonFiniteLoss) as error:
        run(
            tmp_path / "bad",
            save_every=1,
            keep_last=9,
            engine=ToyEngine(poisoned=[example]),
            observers=[events.append],
        )
    steps = [event.step for event in events if isinstance(event, StepEnded)]
    assert error.value.step == len(steps) + 1
    assert error.value.examples == (f"{data}:{example + 1}",)
    assert f"step {error.value.step}: the loss is not finite" in str(error.value)
    assert f"{data}:{example + 1}" in str(error.value)
    assert [event.step for event in events if isinstance(event, CheckpointStarted)] == steps
    # The checkpoints equal those of a run whose losses are finite.
    reference, stopped = (CheckpointManager(tmp_path / name / "checkpoints") for name in ("good", "bad"))
    assert stopped.list_checkpoints() == steps
    for step in steps:
        assert stopped.inspect(step).state_digest == reference.inspect(step).state_digest
        stopped.validate(step)
    assert ended.step == 9


def test_infinite_gradient_norm_stops_before_the_step(run, data, tmp_path):
    class Exploding(ToyEngine):
        def clip_gradients(self, max_norm):
            norm = super().clip_gradients(max_norm)
            return float("inf") if self._updates == 4 else norm

    with pytest.raises(NonFiniteLoss, match=r"step 5: the gradient norm \(inf\).*step 4 is saved") as error:
        run(tmp_path, engine=Exploding())
    assert len(error.value.examples) == 4  # the whole global batch: any of them may be the cause
    assert all(example.startswith(f"{data}:") for example in error.value.examples)
    assert CheckpointManager(tmp_path / "checkpoints").list_checkpoints() == [2, 4]


def test_infinite_weights_are_never_saved(run, tmp_path):
    """The loss and the gradient of the step are finite; only the updated weights are not."""

    class Overflowing(ToyEngine):
        def update(self, *, learning_rate):
            super().update(learning_rate=learning_rate)
            if self._updates == 4:
                self._table[0, 0] = float("inf")

    with pytest.raises(NonFiniteLoss, match=r"step 4: its update left weights .* step 2 is saved") as error:
        run(tmp_path, engine=Overflowing())
    assert error.value.step == 4
    assert CheckpointManager(tmp_path / "checkpoints").list_checkpoints() == [2]
