"""Checkpoints attached to a Trainer, in this process: rules, refusals, folders, callbacks, starts and ends.

That killed runs end as undisturbed ones is shown in test_disturbed_trainers.py, with real processes.
"""

from __future__ import annotations

import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from distrust import (
    CheckpointDirectoryLocked,
    CheckpointManager,
    ConfigError,
    DistrustWarning,
    ExportFailed,
    NoIntactCheckpoint,
    ResumeRefused,
    cli,
)
from distrust.checkpoint import snapshot
from distrust.checkpoint.step_snapshots import StepSnapshots
from distrust.integrations.transformers import DistrustCheckpoints
from tests.trainer_warnings import pytestmark  # noqa: F401

CONFIG = LlamaConfig(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    vocab_size=32,
    attention_dropout=0.1,
)
ROWS = np.random.default_rng(0).integers(0, 32, (12, 6)).tolist()
DATA = [{"input_ids": row, "labels": row} for row in ROWS]


class Interrupted(Exception):
    pass


class InterruptAt(TrainerCallback):
    """Ends training, as an error would, at the end of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Interrupted


def build(folder, *, lora=True, rank=2, alpha=8, callbacks=(), data=DATA, model_seed=1, **arguments):
    set_seed(model_seed)
    model = LlamaForCausalLM(CONFIG)
    if lora:
        model = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
        )
    arguments = {
        "per_device_train_batch_size": 2, "num_train_epochs": 2, "save_steps": 2, "logging_steps": 3,
        "learning_rate": 0.01, "report_to": [], "use_cpu": True, "disable_tqdm": True, **arguments,
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(folder / "output"), **arguments)
    return Trainer(
        model=model, args=args, train_dataset=data, eval_dataset=DATA[:4], callbacks=list(callbacks)
    )


@pytest.fixture
def attach(tmp_path):
    def attach(rules=None, **options):
        return DistrustCheckpoints(tmp_path / "saved", **rules or {}).attach(build(tmp_path, **options))

    return attach


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """The checkpoints of a run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    DistrustCheckpoints(folder / "saved").attach(build(folder, max_steps=2)).train()
    return folder / "saved"


def weights(trainer):
    return {
        name: value.detach().clone()
        for name, value in trainer.model.named_parameters()
        if value.requires_grad
    }


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def steps(tmp_path):
    return CheckpointManager(tmp_path / "saved").list_checkpoints()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"ignore_data_skip": True}, "ignore_data_skip"),
        ({"save_only_model": True}, "save_only_model"),
        (
            {"dataloader_persistent_workers": True, "dataloader_num_workers": 1},
            "dataloader_persistent_workers",
        ),
    ],
)
def test_arguments_that_no_exact_resume_is_possible_with(attach, tmp_path, options, problem):
    with pytest.raises(ConfigError, match=problem) as error:
        attach(**options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda trainer: setattr(trainer, "is_fsdp_enabled", True), "FSDP"),
        (lambda trainer: setattr(trainer, "is_deepspeed_enabled", True), "DeepSpeed"),
        (lambda trainer: setattr(trainer.args, "_n_gpu", 2), "GPUs"),
        (lambda trainer: setattr(trainer.args, "push_to_hub", True), "push_to_hub"),
        (lambda trainer: setattr(trainer, "_load_best_model", None), "_load_best_model: install a version"),
        (lambda trainer: setattr(trainer, "train_dataset", iter(DATA)), "pure_data"),
    ],
)
def test_trainers_that_are_not_supported(tmp_path, change, problem):
    trainer = build(tmp_path)
    change(trainer)
    methods = dict(vars(trainer))
    with pytest.raises(ConfigError, match=problem):
        DistrustCheckpoints(tmp_path / "saved", pure_data=problem == "pure_data").attach(trainer)
    assert vars(trainer) == methods  # nothing was replaced


def test_trainers_whose_own_ways_of_saving_would_be_ignored(tmp_path):
    class Mine(Trainer):
        def _save_checkpoint(self, model, trial=None):
            pass

    class Buffering(Trainer):
        pass

    Buffering.__module__ = "trl.trainer.grpo_trainer"
    for kind, problem in ((Mine, "Mine._save_checkpoint"), (Buffering, "Buffering.* keeps state of its own")):
        trainer = build(tmp_path)
        trainer.__class__ = kind
        with pytest.raises(ConfigError, match=problem):
            DistrustCheckpoints(tmp_path / "saved").attach(trainer)


def test_only_a_trainer_and_only_once(attach, tmp_path):
    with pytest.raises(ConfigError, match="not a SimpleNamespace"):
        DistrustCheckpoints(tmp_path).attach(SimpleNamespace())
    with pytest.raises(ConfigError, match="already"):
        DistrustCheckpoints(tmp_path).attach(attach())


@pytest.mark.parametrize(
    ("rules", "arguments", "remaining"),
    [
        ({}, {}, [2, 4, 6, 8, 10, 12]),
        ({}, {"save_total_limit": 2}, [10, 12]),
        ({"keep_last": 3}, {"save_total_limit": 1}, [8, 10, 12]),
        ({"keep_last": 1, "keep_every": 4}, {}, [4, 8, 12]),
        ({}, {"save_strategy": "no"}, [12]),
        ({}, {"save_strategy": "epoch"}, [6, 12]),
        ({}, {"max_steps": 7}, [2, 4, 6, 7]),
    ],
)
def test_when_is_saved_and_what_is_kept(attach, tmp_path, rules, arguments, remaining):
    attach(rules, **arguments).train()
    assert steps(tmp_path) == remaining
    kinds = [file.kind for file in CheckpointManager(tmp_path / "saved").scan().files]
    assert kinds == ["periodic"] * (len(kinds) - 1) + ["final"]


def test_the_metric_of_the_trainer_decides_which_is_best(attach, tmp_path):
    arguments = {"metric_for_best_model": "score", "greater_is_better": True, "save_total_limit": 1}
    trainer = attach(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, **arguments)
    scores = iter([1, 5, 3, 5, 2, 0])
    trainer.compute_metrics = lambda _: {"score": next(scores)}
    trainer.train()
    assert steps(tmp_path) == [4, 12]
    best = CheckpointManager(tmp_path / "saved").load(4, framework="torch")
    assert_equal(weights(trainer), best.model["parameters"])
    assert trainer.state.best_model_checkpoint == str(tmp_path / "saved/checkpoint-4.safetensors")
    with pytest.raises(ConfigError, match="metric_for_best_model"):
        attach({"metric": "other"}, **arguments)
    with pytest.raises(ConfigError, match="keep_best"):
        attach({"keep_best": 0}, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)


def test_a_metric_is_named_with_or_without_the_trainers_prefix(attach, tmp_path):
    trainer = attach(
        {"metric": "score", "metric_mode": "max", "keep_last": 1}, eval_strategy="steps", eval_steps=2
    )
    trainer.compute_metrics = lambda _: {"score": -abs(trainer.state.global_step - 4)}
    trainer.train()
    assert steps(tmp_path) == [4, 12]


def test_changed_intervals_are_used_after_a_resume(attach, tmp_path):
    with pytest.raises(Interrupted):
        attach(callbacks=[InterruptAt(3)]).train()
    trainer = attach(save_steps=5, logging_steps=4)
    trainer.train()
    assert steps(tmp_path) == [2, 5, 10, 12]
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [4, 8, 12]


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"learning_rate": 0.02}, "learning_rate was 0.01 and is now 0.02"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size was 2"),
        ({"seed": 5}, "seed was 42 and is now 5"),
        ({"data": DATA[:-1]}, "number of examples was 12 and is now 11"),
        ({"rank": 3}, "lora_A.default.weight was 'torch.float32[2, 16]' and is now 'torch.float32[3, 16]'"),
        ({"model_seed": 2}, "frozen weights was"),
        ({"alpha": 4}, "adapter.lora_alpha was 8 and is now 4"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "accelerator_config was"),
        ({"lora": False}, "lora_A.default.weight was 'torch.float32[2, 16]' and is now None"),
    ],
)
def test_another_run_is_refused_before_anything_changes(two_steps, tmp_path, options, difference):
    trainer = build(tmp_path, max_steps=2, **options)
    DistrustCheckpoints(two_steps).attach(trainer)
    initial = weights(trainer)
    with pytest.raises(ResumeRefused, match="of another run") as error:
        trainer.train()
    assert len(str(error.value)) < 700
    assert difference in "".join(error.value.differences)
    assert_equal(weights(trainer), initial)
    CheckpointManager(two_steps).acquire()  # the lock is free again


def test_more_steps_may_follow(attach, tmp_path):
    attach(max_steps=3, lr_scheduler_type="constant").train()
    trainer = attach(max_steps=5, lr_scheduler_type="constant")
    assert trainer.train().global_step == 5
    undisturbed = build(tmp_path, max_steps=5, lr_scheduler_type="constant")
    undisturbed.train()
    assert_equal(weights(trainer), weights(undisturbed))


def test_resume_from_checkpoint(attach, tmp_path):
    assert (
        attach(max_steps=4).train(resume_from_checkpoint=True).global_step == 4
    )  # nothing to resume from yet
    with pytest.raises(ConfigError, match="another directory"):
        attach(max_steps=4).train(resume_from_checkpoint=False)
    with pytest.warns(DistrustWarning, match="not from elsewhere"):
        attach(max_steps=4).train(resume_from_checkpoint="elsewhere")
    with pytest.raises(ConfigError, match="search"):
        attach(max_steps=4).train(trial=object())


def test_training_may_begin_in_a_folder_of_the_trainer(attach, tmp_path):
    expected = build(tmp_path, max_steps=6)
    expected.train()
    trainer = attach(max_steps=6, callbacks=[InterruptAt(5)])
    folder = str(tmp_path / "output/checkpoint-2")
    with pytest.raises(Interrupted):
        trainer.train(resume_from_checkpoint=folder)
    assert steps(tmp_path) == [4]
    trainer = attach(max_steps=6)
    with pytest.warns(DistrustWarning, match="step 4"):
        trainer.train(resume_from_checkpoint=folder)
    assert_equal(weights(trainer), weights(expected))


def test_one_process_trains_a_run(attach, tmp_path):
    trainer = attach()
    with CheckpointManager(tmp_path / "saved") as manager:
        manager.acquire()
        with pytest.raises(CheckpointDirectoryLocked):
            trainer.train()


def test_damage_is_never_resumed_from(attach, tmp_path):
    attach(max_steps=2).train()
    (path,) = (tmp_path / "saved").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(NoIntactCheckpoint):
        attach(max_steps=2).train()


def test_checkpoints_of_other_programs_are_refused(attach, tmp_path):
    from distrust import Checkpoint

    with CheckpointManager(tmp_path / "saved") as manager:
        manager.save(Checkpoint(step=1))
    with pytest.raises(ResumeRefused, match="not those of a Trainer"):
        attach().train()


@pytest.mark.parametrize("lora", [True, False])
def test_folders_of_transformers_and_peft(tmp_path, lora):
    trainer = build(tmp_path, lora=lora, max_steps=4)
    checkpoints = DistrustCheckpoints(tmp_path / "saved")
    with pytest.raises(ConfigError, match="attach"):
        checkpoints.to_folder(tmp_path / "folder")
    checkpoints.attach(trainer).train()
    for step in (2, 4):
        path = checkpoints.to_folder(tmp_path / str(step), step=step)
        base = build(tmp_path, lora=False).model
        model = PeftModel.from_pretrained(base, path) if lora else LlamaForCausalLM.from_pretrained(path)
        saved = CheckpointManager(tmp_path / "saved").load(step, framework="torch").model["parameters"]
        loaded = {name: value for name, value in model.named_parameters() if name in saved}
        assert_equal({name: value.detach() for name, value in loaded.items()}, dict(saved))
    with pytest.raises(ExportFailed, match="exists"):
        checkpoints.to_folder(tmp_path / "2")


def test_early_stopping_keeps_its_patience_and_its_end(attach, tmp_path):
    def options(*more):
        stop = EarlyStoppingCallback(early_stopping_patience=3)
        return {
            "callbacks": [stop, *more], "eval_strategy": "steps", "eval_steps": 2, "num_train_epochs": 9,
            "load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True,
        }  # fmt: skip

    def run(trainer):
        trainer.compute_metrics = lambda _: {"score": -abs(trainer.state.global_step - 4)}
        return trainer.train()

    assert run(build(tmp_path, **options())).global_step == 10
    with pytest.raises(Interrupted):
        run(attach(**options(InterruptAt(7))))
    result = run(attach(**options()))
    assert result.global_step == 10
    again = run(attach(**options()))  # nothing more
    assert (again.global_step, again.training_loss) == (10, result.training_loss)
    assert steps(tmp_path)[-1] == 10


class Counting(LlamaForCausalLM):
    """Has buffers: one that training changes, one that it does not, and one that no file has."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("constant", torch.ones(3))
        self.register_buffer("scratch", torch.zeros(()), persistent=False)

    def forward(self, input_ids, labels, **options):
        if self.training:
            self.calls += 1
            self.scratch += 1
        return super().forward(input_ids=input_ids, labels=labels, **options)


def test_buffers_that_training_changes_are_restored(tmp_path):
    def run(*callbacks):
        set_seed(1)
        args = build(tmp_path, max_steps=7).args
        trainer = Trainer(model=Counting(CONFIG), args=args, train_dataset=DATA, callbacks=list(callbacks))
        DistrustCheckpoints(tmp_path / "saved").attach(trainer).train()
        return trainer

    for step in (3, 6):
        with pytest.raises(Interrupted):
            run(InterruptAt(step))
    trainer = run()
    assert trainer.model.calls == 7
    saved = CheckpointManager(tmp_path / "saved").load_latest()
    assert saved.rng["buffers"] == {"calls": 7, "constant": pytest.approx(1)}


def test_the_next_step_waits_for_the_copy_of_what_it_changes(attach, tmp_path, monkeypatch):
    fill = snapshot.arrays.fill

    def fill_slowly(*arguments):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.1)
        fill(*arguments)

    monkeypatch.setattr(snapshot.arrays, "fill", fill_slowly)
    attach(max_steps=4, save_steps=1).train()
    assert steps(tmp_path) == [1, 2, 3, 4]  # a copy of what changes meanwhile would have failed


def test_evaluation_at_the_start_is_not_repeated(attach, tmp_path):
    options = {"max_steps": 4, "eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(Interrupted):
        attach(callbacks=[InterruptAt(3)], **options).train()
    trainer = attach(**options)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [0, 2, 4]
    assert trainer.args.eval_on_start


def test_the_trainers_own_state_is_in_the_file(attach, tmp_path):
    attach(max_steps=4, eval_strategy="steps", eval_steps=2).train()
    saved = CheckpointManager(tmp_path / "saved").load(4)
    state = json.loads(saved.history["trainer_state"].tobytes())
    assert state["global_step"] == 4
    assert not [key for entry in state["log_history"] for key in entry if "per_second" in key]
    assert saved.metrics.keys() == {"eval_loss"}


def test_the_commands_of_runs_say_what_it_is(two_steps, capfd):
    pytest.importorskip("tyro")  # of which the options are made
    for command, advice in (
        (["train", "--resume", str(two_steps)], "by the script that trains with transformers"),
        (
            ["export", str(two_steps), "--to", str(two_steps.parent / "folder")],
            "distrust convert --format trainer",
        ),
    ):
        assert cli.main(command) != 0
        assert advice in capfd.readouterr().err


def test_an_error_loses_at_most_the_step_in_progress(attach, tmp_path, monkeypatch):
    (tmp_path / "memory").mkdir()
    monkeypatch.setenv("DISTRUST_SHM", str(tmp_path / "memory"))
    is_due = StepSnapshots.is_due
    monkeypatch.setattr(StepSnapshots, "is_due", lambda self, _: is_due(self, 1e9))  # whatever it costs
    with pytest.raises(Interrupted):
        attach(save_steps=100, callbacks=[InterruptAt(5)]).train()
    trainer = attach(save_steps=100)
    trainer.train()
    assert CheckpointManager(tmp_path / "saved").list_checkpoints()[0] == 4
    undisturbed = build(tmp_path / "alone", save_steps=100)
    undisturbed.train()
    assert_equal(weights(trainer), weights(undisturbed))
