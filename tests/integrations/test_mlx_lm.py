"""mlx-lm's own loop: a run that is killed and started again ends as one that nobody disturbed."""

from __future__ import annotations

import functools
import inspect
import json
import random
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx
from mlx import optimizers
from mlx.utils import tree_flatten
from mlx_lm.tuner import trainer
from small_mlx import Log, SmallModel, adamw, arguments, examples, fingerprint

from distrust import CheckpointManager
from distrust.errors import CheckpointDirectoryLocked, ConfigError, ResumeRefused
from distrust.integrations.mlx_lm import DistrustCheckpoints

CASES = {
    "accumulation": {},
    "single batches": {"grad_accumulation_steps": 1, "steps_per_report": 1, "every": 3},
    "many evaluations": {"val_batches": -1, "steps_per_eval": 1, "every": 2},
    "saves at ends of epochs": {"every": 10, "steps_per_report": 5},
}


def test_killed_runs_end_as_plain_undisturbed_ones(start_runs, tmp_path):
    """Weights, moments, generators, reports and adapter files; the kills fall on random batches."""
    run_job = start_runs("small_mlx", MLX_DISABLE_COMPILE="1")
    for name, options in CASES.items():
        folder, seed = tmp_path / name, random.randrange(10_000)
        folder.mkdir()
        chance = random.Random(seed)
        assert run_job(folder=folder / "plain", plain=True, **options) == 0
        for _ in range(2):
            assert run_job(folder=folder / "killed", reads=chance.randrange(11, 40), **options) in (0, -9)
        assert run_job(folder=folder / "killed", **options) == 0
        plain, killed = (
            json.loads((folder / kind / "result.json").read_text()) for kind in ("plain", "killed")
        )
        assert killed == plain, f"{name}, seed {seed}"


@pytest.fixture(autouse=True, scope="module")
def _no_compiler():
    """Compiling takes seconds, and is not what is tested here; the example compiles."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def train(
    folder: Path, *, model=None, optimizer=None, data=11, validation=5, every=4, seed=0, rules=None, **options
):
    """Train in this process; returns model, optimizer and reports."""
    model, optimizer, log = model or SmallModel(), optimizer or adamw(), Log()
    checkpoints = DistrustCheckpoints(folder / "checkpoints", every=every, seed=seed, **(rules or {}))
    datasets = (examples(data), examples(validation))
    checkpoints.train(model, optimizer, *datasets, args=arguments(folder, **options), training_callback=log)
    return model, optimizer, log


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The folder of a finished run; its checkpoints are at 16, 20 and 23."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder)
    return folder


def other_in_step_3(step):
    return mx.where(step == 3, 5.0, optimizers.cosine_decay(0.02, 20)(step))


OTHERS = {
    "args.batch_size was 2 and is now 3": {"batch_size": 3},
    "args.steps_per_eval was 5 and is now 6": {"steps_per_eval": 6},
    "seed was 0 and is now 1": {"seed": 1},
    "len(train_dataset) was 11 and is now 12": {"data": 12},
    "len(val_dataset) was 5 and is now 6": {"validation": 6},
    "the shape of output.lora_a was (8, 2) and is now (8, 3)": {"model": lambda: SmallModel(rank=3)},
    "the digest of the model's layers was ": {"model": lambda: SmallModel(dropout=0.3)},
    "AdamW.weight_decay was 0.01 and is now 0.1": {"optimizer": lambda: adamw(weight_decay=0.1)},
    "the first learning rate of AdamW, and the digest of all was [0.0": {
        "optimizer": lambda: adamw(steps=25)
    },
    ", and the digest of all was ": {"optimizer": lambda: optimizers.AdamW(other_in_step_3)},
    "Lion.betas was None and is now [0.9, 0.99]": {"optimizer": lambda: optimizers.Lion(0.02)},
    "the run ended at iteration 23: it cannot go on to args.iters=22": {"iters": 22},
    "the run ended at iteration 23: it cannot go on to args.iters=24": {"iters": 24},
}


@pytest.mark.parametrize("message", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_in_one_line(finished_run, message):
    changes = {name: value() if callable(value) else value for name, value in OTHERS[message].items()}
    listing = sorted(finished_run.rglob("*"))
    with pytest.raises(ResumeRefused) as error:
        train(finished_run, **changes)
    assert message in "\n".join(error.value.differences or [str(error.value)])
    assert "\n" not in str(error.value)
    assert sorted(finished_run.rglob("*")) == listing


def test_a_finished_run_only_loads_its_weights(finished_run):
    times = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*.safetensors")}
    model, optimizer, log = train(finished_run)
    assert log.reports == {}
    assert optimizer.step.item() == 11
    saved = mx.load(str(finished_run / "adapters.safetensors"))
    assert all(
        mx.array_equal(saved[name], array) for name, array in tree_flatten(model.trainable_parameters())
    )
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*.safetensors")} == times


def test_a_finished_run_goes_on_if_iters_is_raised(tmp_path):
    at_once = train(tmp_path / "once", iters=20, validation=0)
    train(tmp_path / "twice", iters=12, validation=0)
    again = train(tmp_path / "twice", iters=20, validation=0)
    assert fingerprint(*again[:2]) == fingerprint(*at_once[:2])
    assert again[2].reports.items() <= at_once[2].reports.items()


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(tmp_path):
    rules = {"keep_last": 1, "keep_best": 1}
    _, _, log = train(tmp_path, every=2, steps_per_eval=2, rules=rules, optimizer=adamw(rate=0.5))
    losses = {
        int(name.split()[1]) + 1: loss for name, (loss, *_) in log.reports.items() if name.startswith("val")
    }
    best = CheckpointManager(tmp_path / "checkpoints").load_best()
    saved = {step: loss for step, loss in losses.items() if step in (*range(2, 23, 2), 23)}
    assert best.metrics == {"eval_loss": min(saved.values())}
    assert losses[best.step] == min(saved.values())


def test_the_directory_is_locked_before_training_begins(tmp_path):
    with CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.acquire()
        with pytest.raises(CheckpointDirectoryLocked):
            train(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("options", [{"steps_per_report": 0}, {"grad_accumulation_steps": 0}])
def test_intervals_of_0_are_refused(tmp_path, options):
    with pytest.raises(ConfigError, match=r"args\.steps_per_report, each at least 1: give one of 1$"):
        train(tmp_path, **options)


def test_a_run_without_iterations_can_go_on(tmp_path):
    train(tmp_path, iters=0)
    again, at_once = train(tmp_path, iters=8), train(tmp_path / "once", iters=8)
    assert fingerprint(*again[:2]) == fingerprint(*at_once[:2])


def test_a_finished_run_writes_a_missing_adapter_file(tmp_path):
    train(tmp_path, iters=4)
    path = tmp_path / "adapters.safetensors"
    content = path.read_bytes()
    path.unlink()
    train(tmp_path, iters=4)
    assert path.read_bytes() == content


@pytest.mark.parametrize("every", [0, 1, 3, 6])
def test_checkpoints_inside_an_accumulation_or_report_are_refused(tmp_path, every):
    with pytest.raises(ConfigError, match=f"^every={every} .*: give one of 4$"):
        train(tmp_path, every=every, steps_per_report=4)


class Trainers:
    def train(self, *arguments, **options):
        raise AssertionError


@functools.wraps(trainer.train)
def train_as_before(*arguments, **options):
    return loop(*arguments, **options)


loop = trainer.train
REPLACED = [functools.partial(loop), mock.Mock(), Trainers().train, train_as_before]


@pytest.mark.parametrize("replaced", REPLACED, ids=["partial", "mock", "method", "decorated"])
def test_a_loop_that_is_wrapped_is_refused(tmp_path, monkeypatch, replaced):
    monkeypatch.setattr(trainer, "train", replaced)
    with pytest.raises(
        ConfigError, match=r"^mlx-lm has another loop: .*, and leave trainer\.train as it is$"
    ):
        train(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_copy_of_the_loop_with_more_in_it_works(tmp_path, monkeypatch):
    """A patched one: its names are those of its own module, and it counts other things, too."""
    names = {**vars(trainer), "calls": (calls := [])}
    source = inspect.getsource(loop).replace("    model.train()\n", "    calls.extend(range(1, 3))\n", 1)
    exec(source, names)
    monkeypatch.setattr(trainer, "train", names["train"])
    _, _, log = train(tmp_path / "copy")
    assert calls == [1, 2]
    monkeypatch.undo()
    assert log.reports == train(tmp_path / "plain")[2].reports


def test_another_loop_of_mlx_lm_is_refused(tmp_path, monkeypatch):
    def other_loop(model, optimizer, train_dataset, val_dataset, args, iterate_batches, training_callback):
        for _ in iterate_batches(train_dataset, args.batch_size, max_seq_length=8, loop=True):
            pass

    monkeypatch.setattr(trainer, "train", other_loop)
    with pytest.raises(ConfigError, match=r"another loop: install 0\.32\.2"):
        train(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
