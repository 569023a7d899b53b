"""What is specific to runs of the engine of torch: threads, other options, its optimizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from distrust import CheckpointManager, DistrustWarning, TrainConfig
from distrust.engines import config_of, create_engine, open_checkpoint
from distrust.engines.torch.engine import TorchEngine
from distrust.errors import ConfigError, ResumeRefused
from distrust.testing.models import make_model


def create(model: Path, *, threads: int | None = 1, **options: Any) -> Any:
    return create_engine(TrainConfig(engine="torch", model=str(model), threads=threads, **options))


def test_threads_of_a_run_do_not_affect_the_next(tiny_model):
    def threads_of(chosen):
        return create(tiny_model, threads=chosen).environment()["threads"]

    first = threads_of(None)
    assert threads_of(first + 1) == first + 1
    assert threads_of(None) == first


def test_a_resumed_run_keeps_its_threads(train, tmp_path):
    train(tmp_path / "run", stop_after=1, max_steps=3)
    torch.set_num_threads(2)
    try:
        ended, _ = train(tmp_path / "run", threads=None, max_steps=3)
        assert torch.get_num_threads() == 2  # of the program
    finally:
        torch.set_num_threads(1)
    assert ended.state_digest == train(tmp_path / "alone", max_steps=3)[0].state_digest


@pytest.mark.device
def test_options_that_may_change_bits_warn(train, tmp_path):
    train(tmp_path, stop_after=1, max_steps=2)
    with pytest.warns(DistrustWarning, match="no longer bit-identical: gradient_checkpointing was False"):
        train(tmp_path, gradient_checkpointing=True, max_steps=2)


@pytest.mark.device
def test_other_weights_are_another_model(train, tmp_path):
    train(tmp_path / "run", stop_after=1, max_steps=2)
    model = make_model(tmp_path / "other", seed=1)
    with pytest.raises(ResumeRefused, match=r"--model .*other: its content is not that of the run"):
        train(tmp_path / "run", model=str(model), max_steps=2)
    # Equal weights in another folder are the same model.
    same = make_model(tmp_path / "same", seed=0)
    assert train(tmp_path / "run", model=str(same), max_steps=2)[0].step == 2


@pytest.mark.device
def test_a_checkpoint_records_what_it_trained(train, tmp_path, tiny_model, data):
    ended, _ = train(tmp_path, lambda_=0.5, max_ratio=3.0, target_modules=("q_proj",), lora_rank=2)
    manager = CheckpointManager(ended.path.parent)
    config = config_of(manager.inspect(7))
    assert config == TrainConfig(  # not of its machine: out, save_every, threads, device
        model=str(tiny_model),
        data=str(data),
        max_steps=7,
        batch_size=2,
        gradient_accumulation=2,
        learning_rate=5e-3,
        warmup_steps=2,
        lora_dropout=0.2,
        engine="torch",
        lambda_=0.5,
        max_ratio=3.0,
        target_modules=("q_proj",),
        lora_rank=2,
        max_length=128,  # the model's context
        schedule_steps=7,
        weighting="monotone",  # what "auto" was, and the day of the run
        dtype="float32",
        date=config.date,
    )


def test_an_unfused_optimizer_resumes_fused(tiny_model):
    engine = create(tiny_model, lora_rank=2)
    state = engine.state()
    for group in state.optimizer["param_groups"]:
        group["fused"] = None  # AdamW of torch as it was by default
    engine.load_state(state)
    assert all(group["fused"] for group in engine.state().optimizer["param_groups"])


def test_open_checkpoint_does_not_compile(train, tmp_path, monkeypatch):
    def compile_layers(model):
        calls.append(model)
        return 1

    calls = []
    monkeypatch.setattr("distrust.engines.torch.runtime.compile_layers", compile_layers)
    train(tmp_path / "run", compile=True, max_steps=1)
    open_checkpoint(tmp_path / "run")
    assert len(calls) == 1


def test_packing_is_refused_for_a_model_that_mixes_examples(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "eager"}))
    assert "padded" in create(folder).environment()["attention"]
    refusal = "--packing: this model cannot keep the examples of one row independent"
    with pytest.raises(ConfigError, match=refusal):
        create(folder, packing=True)


def test_invalid_target_modules(tiny_model):
    with pytest.raises(
        ConfigError, match=r"--target-modules q_porj: q_porj is not in the model.* adapt are: .*q_proj"
    ):
        create(tiny_model, target_modules=("q_porj",))


def test_a_length_beyond_the_models_context_is_refused(train, tmp_path):
    with pytest.raises(ConfigError, match="--max-length 129: the model's context is 128 tokens"):
        train(tmp_path, max_length=129)


def test_a_state_that_is_loaded_to_the_device_resumes_bit_for_bit(train, tmp_path, monkeypatch):
    """A run loads to the device that its engine names: here the CPU, by the way of other devices."""
    loads: list[Any] = []
    original = CheckpointManager.load, CheckpointManager.load_latest

    def load(manager: CheckpointManager, *arguments: Any, **options: Any) -> Any:
        loads.append(options["device"])
        return original[not arguments](manager, *arguments, **options)

    steps = {"max_steps": 4}
    alone = train(tmp_path / "alone", **steps)[0]
    train(tmp_path / "run", stop_after=2, **steps)
    shutil.copytree(tmp_path / "run", tmp_path / "full")
    monkeypatch.setattr(CheckpointManager, "load", load)
    monkeypatch.setattr(CheckpointManager, "load_latest", load)
    sizes = []
    monkeypatch.setattr(TorchEngine, "device_for", lambda _, nbytes: sizes.append(nbytes) or "cpu")
    assert train(tmp_path / "run", reload_every=3, **steps)[0].state_digest == alone.state_digest
    assert loads == ["cpu", "cpu"]
    file = CheckpointManager(alone.path.parent).inspect(4)
    assert [size for size in sizes if size] == pytest.approx([file.bytes] * 2, rel=0.1)

    loads.clear()
    monkeypatch.setattr(TorchEngine, "device_for", lambda *_: None)  # no room
    assert train(tmp_path / "full", **steps)[0].state_digest == alone.state_digest
    assert loads == [None]
