"""Whole runs, of every engine: stopped and resumed, they are the run that was left alone."""

from __future__ import annotations

import contextlib
import json
import math
import re
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conformance import ENGINES, mlx_only

from distrust import CheckpointManager, TrainConfig
from distrust.engines import create_engine, open_checkpoint
from distrust.errors import ModelError, NonFiniteLoss, ResumeRefused
from distrust.testing.models import make_model
from distrust.training.events import Evaluated, MemoryReset, StepEnded

pytestmark = pytest.mark.usefixtures("_only_what_is_new_is_searched")

#: The toy engine's runs are in test_exact_resume.py.
either = pytest.mark.parametrize("engine", ENGINES[1:])
INSTALLED = ["torch", "mlx"] if find_spec("mlx_lm") else ["torch"]

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "all weights": {"lora_rank": 0, "weight_decay": 0.1},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, all weights": {"lora_rank": 0, "dtype": "bfloat16"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "dora": {"dora": True, "rslora": True, "warmup_ratio": 0.3},
    "some modules": {"lora_rank": 2, "target_modules": ("q_proj", "v_proj"), "schedule": "linear"},
    "packing": {"packing": True, "max_length": 60},
}
#: Those of torch are in test_quantization.py, where bitsandbytes is.
QUANTIZED: dict[str, dict[str, Any]] = {
    "8bit": {"quantization": "8bit"},
    "4bit": {"quantization": "4bit", "dtype": "bfloat16", "gradient_checkpointing": True},
}
OF_MLX = ["lora", "all weights", "bfloat16", "bfloat16, all weights", "dora", "packing", *QUANTIZED]


def losses(events):
    return {event.step: event.loss for event in events if isinstance(event, StepEnded)}


def moments(optimizer: Any) -> list[Any]:
    """All arrays in an optimizer's state, whichever it is."""
    if isinstance(optimizer, dict):
        return [array for value in optimizer.values() for array in moments(value)]
    if isinstance(optimizer, list):
        return [array for value in optimizer for array in moments(value)]
    return [optimizer] if isinstance(optimizer, np.ndarray) else []


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        *[pytest.param("torch", kind, id=f"torch-{kind}") for kind in KINDS],
        *[pytest.param("mlx", kind, id=f"mlx-{kind}", marks=mlx_only) for kind in OF_MLX],
    ],
)
def test_stopped_and_resumed_it_ends_as_if_left_alone(train, eval_data, tmp_path, engine, kind):
    """Stopped twice, the second time in mid-epoch; evaluated, and its memory reset, besides."""
    options = {"engine": engine, **{**KINDS, **QUANTIZED}[kind]}
    alone, steps = train(tmp_path / "alone", save_every=0, **options)
    besides = {"eval_data": str(eval_data), "eval_every": 2, "reload_every": 3}
    made = {}
    for stop in (2, 5, None):
        ended, events = train(tmp_path / "stopped", stop_after=stop, **besides, **options)
        made.update(losses(events))
    assert made == losses(steps)
    assert [event.step for event in events if isinstance(event, Evaluated)] == [6, 7]
    assert [event.step for event in events if isinstance(event, MemoryReset)] == [6]
    assert ended.state_digest == alone.state_digest
    saved = CheckpointManager(ended.path.parent).load(7)
    assert {array.dtype.name for array in [*saved.model.values(), *moments(saved.optimizer)]} == {"float32"}
    assert made[7] < made[1]


@pytest.fixture(scope="module")
def alone(train, tmp_path_factory) -> dict[str, str]:
    """The state digests of the runs that nobody disturbs."""
    folder = tmp_path_factory.mktemp("alone")
    return {engine: train(folder / engine, engine=engine)[0].state_digest for engine in INSTALLED}


@either
@settings(max_examples=3, deadline=None)
@given(stops=st.lists(st.integers(1, 7), min_size=1, max_size=2).map(sorted), save_every=st.integers(0, 3))
def test_stopped_anywhere(train, alone, engine, stops, save_every):
    with tempfile.TemporaryDirectory() as folder:
        for stop in [*stops, None]:
            ended, _ = train(Path(folder), engine=engine, stop_after=stop, save_every=save_every)
        assert ended.state_digest == alone[engine]


@either
def test_awaited_it_is_the_same_run(train, alone, tmp_path, engine):
    """In a thread of its own, and resumed in another."""
    stopped, _ = train(tmp_path, engine=engine, awaited=True, stop_after=4)
    assert (stopped.step, stopped.reason) == (4, "stop")
    assert train(tmp_path, engine=engine, awaited=True)[0].state_digest == alone[engine]


@either
def test_another_seed_is_another_run(train, alone, tmp_path, engine):
    assert train(tmp_path, engine=engine, seed=1)[0].state_digest != alone[engine]


@either
def test_a_checkpoint_opens_as_what_was_trained(train, tmp_path, engine):
    ended, _ = train(tmp_path, engine=engine)
    opened, file = open_checkpoint(tmp_path)
    assert (file.path, opened.environment()["engine"]) == (ended.path, engine)
    saved = CheckpointManager(ended.path.parent).load(7).model
    state = {name: np.asarray(array) for name, array in opened.state().model.items()}
    assert state.keys() == saved.keys()
    assert all(np.array_equal(state[name], saved[name]) for name in saved)
    with pytest.raises(ResumeRefused, match="--model"):
        open_checkpoint(tmp_path, model=str(make_model(tmp_path / "other", seed=1)))


@either
def test_a_learning_rate_beyond_all_reason_saves_nothing_that_is_not_finite(train, tmp_path, engine):
    for rate in (1e4, 1e37):
        out = tmp_path / str(rate)
        with contextlib.suppress(NonFiniteLoss):
            train(out, engine=engine, learning_rate=rate, warmup_steps=0, save_every=1, keep_last=9)
        manager = CheckpointManager(out / "checkpoints")
        for step in manager.list_checkpoints():
            saved = manager.load(step)
            for array in [*saved.model.values(), *moments(saved.optimizer), *saved.history.values()]:
                assert np.isfinite(array).all(), (rate, step)


@either
def test_a_weight_that_is_no_number_is_found_before_the_first_step(train, tmp_path, data, engine):
    from safetensors.torch import load_file, save_file

    broken = make_model(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        NonFiniteLoss, match=r"step 1: the loss is not finite; .* nothing was saved yet"
    ) as error:
        train(tmp_path / "run", engine=engine, model=str(broken))
    assert len(error.value.examples) == 4
    assert all(example.startswith(str(data)) for example in error.value.examples)
    assert not list((tmp_path / "run").rglob("*.safetensors"))


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


@either
@pytest.mark.parametrize("how", SPOILED)
def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path, how, engine):
    folder = make_model(tmp_path / "model")
    SPOILED[how](folder)
    with pytest.raises(ModelError) as error:
        create_engine(TrainConfig(engine=engine, model=str(folder), threads=1))
    assert str(error.value).startswith(f"--model {folder}: ")
    assert "\n" not in str(error.value)


@either
@pytest.mark.parametrize("name", ["./nowhere", "nobody/nothing"])
def test_a_model_that_is_nowhere(monkeypatch, name, engine):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = "no such file or directory" if name == "./nowhere" else "cannot be loaded; there is no folder"
    with pytest.raises(ModelError, match=f"--model {re.escape(name)}: {said}") as error:
        create_engine(TrainConfig(engine=engine, model=name, threads=1))
    assert "\n" not in str(error.value)
