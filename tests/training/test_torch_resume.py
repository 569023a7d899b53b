"""Exact resume on a real model: adapter and all weights, float32 and bfloat16, with dropout."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrust import CheckpointManager, DistrustTrainer, DistrustWarning, TrainConfig
from distrust.engines import config_of, create, open_checkpoint
from distrust.errors import ConfigError, ModelError, NonFiniteLoss, ResumeRefused
from distrust.training.events import Evaluated, StepEnded
from models import make_model

STEPS = 7  # of four examples each: eleven make an epoch

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora_rank": 4, "lora_dropout": 0.2},
    "all weights": {"lora_rank": 0, "weight_decay": 0.1},
    "bfloat16": {"lora_rank": 4, "lora_dropout": 0.2, "dtype": "bfloat16"},
    "bfloat16, all weights": {"lora_rank": 0, "dtype": "bfloat16"},
    "gradient checkpointing": {"lora_rank": 4, "lora_dropout": 0.2, "gradient_checkpointing": True},
    "dora": {"lora_rank": 4, "lora_dropout": 0.2, "dora": True, "rslora": True, "warmup_ratio": 0.3},
    "some modules": {"lora_rank": 2, "target_modules": ("q_proj", "v_proj"), "schedule": "linear"},
}


@pytest.fixture(scope="module")
def train(tiny_model, data):
    def train(out: Path, *, stop_after: int | None = None, awaited: bool = False, **options: Any):
        events = []

        def watch(event):
            events.append(event)
            if isinstance(event, StepEnded) and event.step == stop_after:
                trainer.stop() if awaited else signal.raise_signal(signal.SIGTERM)

        config = TrainConfig(
            out=str(out),
            **{
                "model": str(tiny_model),
                "data": str(data),
                "max_steps": STEPS,
                "batch_size": 2,
                "gradient_accumulation": 2,
                "learning_rate": 5e-3,
                "warmup_steps": 2,
                "save_every": 3,
                "threads": 1,
                **options,
            },
        )
        trainer = DistrustTrainer(config, observers=[watch])
        return asyncio.run(trainer.train_async()) if awaited else trainer.train(), events

    return train


def losses(events):
    return {event.step: event.loss for event in events if isinstance(event, StepEnded)}


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_it_ends_as_if_left_alone(train, tmp_path, eval_data, kind):
    options = KINDS[kind]
    alone, steps = train(tmp_path / "alone", save_every=0, **options)
    evaluated = {"eval_data": str(eval_data), "eval_every": 2}
    made = {}
    for stop in (2, 5, None):  # 5 is in mid-epoch
        ended, events = train(tmp_path / "stopped", stop_after=stop, **evaluated, **options)
        made.update(losses(events))
    assert made == losses(steps)
    assert [event.step for event in events if isinstance(event, Evaluated)] == [6, 7]
    assert ended.state_digest == alone.state_digest
    saved = CheckpointManager(ended.path.parent).load(7, framework="torch")
    assert {tensor.dtype for tensor in saved.model.values()} == {torch.float32}
    moments = [value for state in saved.optimizer["state"].values() for value in state.values()]
    assert {value.dtype for value in moments} == {torch.float32}
    assert made[7] < made[1]


@settings(max_examples=4, deadline=None)
@given(
    stops=st.lists(st.integers(1, STEPS), min_size=1, max_size=2).map(sorted), save_every=st.integers(0, 3)
)
def test_stopped_anywhere(train, alone_digest, stops, save_every):
    with tempfile.TemporaryDirectory() as folder:
        for stop in [*stops, None]:
            ended, _ = train(Path(folder), stop_after=stop, save_every=save_every, **KINDS["lora"])
        assert ended.state_digest == alone_digest


@pytest.fixture(scope="module")
def alone_digest(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("alone"), **KINDS["lora"])[0].state_digest


def test_what_torch_drew_before_has_no_influence(train, alone_digest, tmp_path):
    torch.manual_seed(12345)
    torch.rand(7)
    assert train(tmp_path, **KINDS["lora"])[0].state_digest == alone_digest


def test_awaited_it_is_the_same_run(train, alone_digest, tmp_path):
    """In a thread of its own, and resumed in another."""
    stopped, _ = train(tmp_path, awaited=True, stop_after=4, **KINDS["lora"])
    assert (stopped.step, stopped.reason) == (4, "stop")
    assert train(tmp_path, awaited=True, **KINDS["lora"])[0].state_digest == alone_digest


def test_the_threads_of_one_run_are_not_those_of_the_next(tiny_model):
    def threads_of(chosen):
        return create(TrainConfig(model=str(tiny_model), threads=chosen)).environment()["threads"]

    first = threads_of(None)
    assert threads_of(first + 1) == first + 1
    assert threads_of(None) == first


def test_another_seed_is_another_run(train, alone_digest, tmp_path):
    assert train(tmp_path, seed=1, **KINDS["lora"])[0].state_digest != alone_digest


def test_threads_are_those_that_the_run_began_with(train, alone_digest, tmp_path):
    train(tmp_path, stop_after=3, **KINDS["lora"])
    torch.set_num_threads(2)
    try:
        ended, _ = train(tmp_path, threads=None, **KINDS["lora"])
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
    assert ended.state_digest == alone_digest


def test_what_may_change_bits_is_warned_of(train, tmp_path):
    train(tmp_path, stop_after=3, **KINDS["lora"])
    with pytest.warns(DistrustWarning, match="no longer bit-identical: gradient_checkpointing was False"):
        train(tmp_path, gradient_checkpointing=True, **KINDS["lora"])


def test_other_weights_are_another_model(train, tmp_path):
    train(tmp_path / "run", stop_after=3, **KINDS["lora"])
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(ResumeRefused, match=r"--model .*other: its content is not that of the run"):
        train(tmp_path / "run", model=str(other), **KINDS["lora"])
    # The same weights elsewhere are the same model.
    same = make_model(tmp_path / "same", seed=0)
    assert train(tmp_path / "run", model=str(same), **KINDS["lora"])[0].step == STEPS


def test_a_learning_rate_beyond_all_reason_saves_nothing_that_is_not_finite(train, tmp_path):
    for rate in (1e4, 1e30, 1e37):
        out = tmp_path / str(rate)
        with contextlib.suppress(NonFiniteLoss):
            train(out, learning_rate=rate, warmup_steps=0, save_every=1, keep_last=9, lora_rank=4)
        manager = CheckpointManager(out / "checkpoints")
        for step in manager.list_checkpoints():
            loaded = manager.load(step)
            for tensor in loaded.model.values():
                assert np.isfinite(tensor).all(), (rate, step)
            for state in loaded.optimizer["state"].values():
                assert all(np.isfinite(value).all() for value in state.values()), (rate, step)
            assert all(math.isfinite(value) for values in loaded.history.values() for value in values)


def test_a_weight_that_is_no_number_is_found_before_the_first_step(train, tmp_path, data):
    from safetensors.torch import load_file, save_file

    broken = make_model(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        NonFiniteLoss, match=r"step 1: the loss is not finite; .* nothing was saved yet"
    ) as error:
        train(tmp_path / "run", model=str(broken))
    assert len(error.value.examples) == 4
    assert all(example.startswith(str(data)) for example in error.value.examples)
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_a_checkpoint_knows_its_config(train, tmp_path, tiny_model, data):
    ended, _ = train(tmp_path, lambda_=0.5, max_ratio=3.0, target_modules=("q_proj",), lora_rank=2)
    manager = CheckpointManager(ended.path.parent)
    config = config_of(manager.inspect(STEPS))
    assert config == TrainConfig(
        out=str(tmp_path),
        model=str(tiny_model),
        data=str(data),
        max_steps=STEPS,
        batch_size=2,
        gradient_accumulation=2,
        learning_rate=5e-3,
        warmup_steps=2,
        save_every=3,
        threads=1,
        lambda_=0.5,
        max_ratio=3.0,
        target_modules=("q_proj",),
        lora_rank=2,
        max_length=128,  # the model's context
        schedule_steps=STEPS,
    )


def test_a_checkpoint_opens_as_what_was_trained(train, tmp_path, tiny_model):
    ended, _ = train(tmp_path, **KINDS["lora"])
    engine, file = open_checkpoint(tmp_path)
    assert file.path == ended.path
    loaded = CheckpointManager(file.path.parent).load(STEPS, framework="torch")
    state = engine.state().model
    assert state.keys() == loaded.model.keys()
    assert all(torch.equal(state[name], loaded.model[name]) for name in state)
    untrained = create(TrainConfig(model=str(tiny_model), threads=1, **KINDS["lora"])).state().model
    assert any(not torch.equal(state[name], untrained[name]) for name in state)
    with pytest.raises(ResumeRefused, match="--model"):
        open_checkpoint(tmp_path, model=str(make_model(tmp_path / "other", seed=1)))


@pytest.mark.parametrize("kind", ["lora", "all weights"])
def test_what_does_not_fit_is_refused(train, tmp_path, tiny_model, kind):
    ended, _ = train(tmp_path, **KINDS[kind])
    loaded = CheckpointManager(ended.path.parent).load(STEPS, framework="torch")
    engine = create(TrainConfig(model=str(tiny_model), lora_rank=3, threads=1))
    before = {name: tensor.clone() for name, tensor in engine.state().model.items()}
    with pytest.raises(ResumeRefused) as refused:
        engine.load_state(loaded)
    assert len(refused.value.differences) >= len(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.state().model.items())


def test_the_optimizer_of_an_earlier_version_is_gone_on_from_by_this_one(tiny_model):
    engine = create(TrainConfig(model=str(tiny_model), lora_rank=2, threads=1))
    state = engine.state()
    for group in state.optimizer["param_groups"]:
        group["fused"] = None  # AdamW of torch as it was by default
    engine.load_state(state)
    assert all(group["fused"] for group in engine.state().optimizer["param_groups"])


def test_a_compiled_run_is_opened_without_a_compiler(train, tmp_path, monkeypatch):
    def compile_layers(model):
        calls.append(model)
        return 1

    calls = []
    monkeypatch.setattr("distrust.engines.torch.engine.compile_layers", compile_layers)
    train(tmp_path / "run", compile=True, **KINDS["lora"])
    open_checkpoint(tmp_path / "run")
    assert len(calls) == 1


def test_packing_for_a_model_that_would_mix_the_examples_is_refused(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "eager"}))
    assert "padded" in create(TrainConfig(model=str(folder), threads=1)).environment()["attention"]
    with pytest.raises(ConfigError, match="--packing: this model cannot keep apart"):
        create(TrainConfig(model=str(folder), packing=True, threads=1))


def test_names_that_no_module_has(tiny_model):
    with pytest.raises(ConfigError, match=r"--target-modules q_porj.*\n?.*linear modules are:.*q_proj"):
        create(TrainConfig(model=str(tiny_model), target_modules=("q_porj",), threads=1))


def test_longer_than_the_model_sees(train, tmp_path):
    with pytest.raises(ConfigError, match="--max-length 129: the model sees 128 tokens at once"):
        train(tmp_path, max_length=129)


def _without_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _with_another_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))


SPOILED = {
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:5000]
    ),
    "weights empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "a tensor missing": _without_a_tensor,
    "another width": _with_another_width,
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "unknown kind of model": lambda folder: (folder / "config.json").write_text('{"model_type": "lama"}'),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "tokenizer no JSON": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "tokenizer of something else": lambda folder: (folder / "tokenizer.json").write_text('{"version": 1}'),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path, how):
    folder = make_model(tmp_path / "model")
    SPOILED[how](folder)
    with pytest.raises(ModelError) as error:
        create(TrainConfig(model=str(folder), threads=1))
    assert str(error.value).startswith(f"--model {folder}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["./nowhere", "nobody/nothing"])
def test_a_model_that_is_nowhere(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=f"--model {re.escape(name)}: .*there is no") as error:
        create(TrainConfig(model=name, threads=1))
    assert "\n" not in str(error.value)
