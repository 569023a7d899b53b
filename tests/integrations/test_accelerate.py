"""A loop with accelerate: a run that is killed and started again ends as one that nobody disturbed."""

from __future__ import annotations

import json
import random

import pytest

pytest.importorskip("accelerate")

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, GradientState
from small_accelerate import Sums, prepare
from torch.utils.data import DataLoader

from distrust import Checkpoint, CheckpointManager
from distrust.errors import ConfigError, ResumeRefused
from distrust.integrations.accelerate import ResumableLoader, capture, restore

CASES = {
    "shuffled by the program's generator": {},
    "shuffled by a seed": {"seedable": True, "every": 1},
    "a worker": {"workers": 1},
    "a step that ends with the epoch": {"accumulation": 4, "every": 1},
    "streamed": {"streamed": True},
}


def test_killed_runs_end_as_undisturbed_ones(start_runs, tmp_path):
    """The digest covers weights, moments, buffers, scheduler, registered objects, loaders and generators."""
    run_job = start_runs("small_accelerate")
    for name, options in CASES.items():
        seed = random.randrange(10_000)
        chance = random.Random(seed)
        undisturbed, killed = tmp_path / name / "undisturbed", tmp_path / name / "killed"
        for folder in (undisturbed, killed):
            folder.mkdir(parents=True)
        assert run_job(folder=undisturbed, **options) == 0
        for _ in range(2):
            assert run_job(folder=killed, batches=chance.randrange(3, 15), **options) in (0, -9)
        assert run_job(folder=killed, **options) == 0
        first, second = (json.loads((folder / "result.json").read_text()) for folder in (undisturbed, killed))
        assert first == second, f"{name}, seed {seed}"


@pytest.fixture(autouse=True)
def _new_process_state():
    """An Accelerator's state is that of the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


OTHERS = {
    "gradient_accumulation_steps was 2 and is now 3": {"accumulation": 3},
    "the shape and type of 0.0.weight was [8, 4, 'torch.float32'] and is now [6, 4,": {"width": 6},
    "the shape and type of 0.0.weight was [8, 4, 'torch.float32'] and is now [8, 4, 'torch.bfloat16']": {
        "dtype": torch.bfloat16
    },
    "batches of loader 0 was ['RandomSampler', 22, 2, 11] and is now ['RandomSampler', 22, 4, 6]": {
        "batch_size": 4
    },
    "batches of loader 0 was ['RandomSampler', 22, 2, 11] and is now ['RandomSampler', 33, 3, 11]": {
        "batch_size": 3,
        "length": 33,
    },
    "loader 0 was ['RandomSampler', 22, 2, 11] and is now ['SeedableRandomSampler', 22, 2, 11]": {
        "seedable": True
    },
    "weight_decay of optimizer 0 was 0.01 and is now 0.1": {"weight_decay": 0.1},
}


@pytest.mark.parametrize("message", OTHERS)
def test_a_checkpoint_of_other_settings_is_refused_in_one_line(message):
    checkpoint = capture(prepare()[0], 3)
    GradientState._reset_state()
    accelerator, model, *_ = prepare(**OTHERS[message])
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ResumeRefused) as error:
        restore(accelerator, checkpoint)
    assert message in "\n".join(error.value.differences)
    assert "\n" not in str(error.value)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_frozen_weights_are_not_saved_and_metrics_are():
    checkpoint = capture(prepare()[0], 3, metrics={"eval_loss": 0.5}, metadata={"note": "first"})
    assert isinstance(checkpoint, Checkpoint)
    assert {"0.0.weight", "0.4.bias"} <= checkpoint.model.keys()
    assert not {"0.3.weight", "0.3.bias"} & checkpoint.model.keys()
    assert (checkpoint.metrics, checkpoint.metadata) == ({"eval_loss": 0.5}, {"note": "first"})


def test_an_option_that_changes_in_training_comes_back():
    accelerator, _, optimizer, *_ = prepare()
    optimizer.param_groups[0]["weight_decay"] = 0.02
    checkpoint = capture(accelerator, 3)
    GradientState._reset_state()
    accelerator, _, optimizer, *_ = prepare()
    assert restore(accelerator, checkpoint) == 3
    assert optimizer.param_groups[0]["weight_decay"] == 0.02


def test_a_seedable_sampler_goes_on_although_the_program_sets_no_seed():
    """Each process draws another seed in ``prepare``."""

    def begin(seed):
        GradientState._reset_state()
        accelerator, *_, loader, eval_loader, _ = prepare(seedable=True, seed=seed)
        return accelerator, ResumableLoader(accelerator, loader), eval_loader

    accelerator, data, eval_loader = begin(1)
    batches = iter(data)
    for _ in range(4):
        next(batches)
    checkpoint = capture(accelerator, 2)
    expected = [*(inputs for inputs, _ in batches), *(inputs for inputs, _ in eval_loader)]
    accelerator, data, eval_loader = begin(2)
    restore(accelerator, checkpoint)
    again = [*(inputs for inputs, _ in data), *(inputs for inputs, _ in eval_loader)]
    assert len(again) == 7 + 6
    assert all(map(torch.equal, again, expected))


def test_fields_that_are_the_states_are_refused():
    with pytest.raises(
        ConfigError, match=r"^capture\(\) takes no model, rng: register_for_checkpointing\(\)"
    ):
        capture(prepare()[0], 1, model={}, rng={}, metrics={})


def test_a_loader_without_batches_is_refused():
    accelerator, *_, loader, _, _ = prepare(batch_size=None)
    with pytest.raises(ConfigError, match=r"^accelerate cannot skip in a loader with batch_size=None: give"):
        ResumableLoader(accelerator, loader)


def test_accumulated_gradients_are_no_state_to_save():
    accelerator, model, optimizer, _, loader, *_ = prepare()
    for inputs, _ in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(inputs).sum())
            optimizer.step()
        with pytest.raises(ConfigError, match=r"^accumulated gradients .* accelerator\.sync_gradients"):
            capture(accelerator, 1)
        break


@pytest.mark.parametrize(
    "options",
    [{"stateful": True}, {"generator": torch.Generator()}, {"sampler_generator": torch.Generator()}],
    ids=["stateful", "generator", "generator of the sampler"],
)
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_loaders_with_a_state_of_their_own_are_refused(options):
    accelerator, *_, loader, _, _ = prepare(**options)
    with pytest.raises(ConfigError, match=r"^use_stateful_dataloader=True and generator= are not supported"):
        ResumableLoader(accelerator, loader)


def test_only_a_prepared_loader_can_be_resumed():
    accelerator, *_ = prepare()
    with pytest.raises(ConfigError, match=r"^give ResumableLoader the loader that accelerator\.prepare"):
        ResumableLoader(accelerator, DataLoader(Sums()))


def test_arrays_of_numpy_are_refused(tmp_path):
    accelerator = prepare()[0]
    with CheckpointManager(tmp_path) as manager:
        manager.save(capture(accelerator, 1))
        with pytest.raises(ConfigError, match=r'^the checkpoint has arrays of another library: .*"torch"$'):
            restore(accelerator, manager.load_latest())


@pytest.mark.parametrize("kind", [DistributedType.MULTI_GPU, DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_several_processes_are_refused(kind, monkeypatch):
    accelerator = prepare()[0]
    monkeypatch.setattr(type(accelerator), "distributed_type", kind)
    with pytest.raises(ConfigError, match=r"^\S*\.?\S+ is not supported: train in a single process$"):
        capture(accelerator, 0)
