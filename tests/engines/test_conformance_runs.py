"""Complete runs of every engine: stopped and resumed, a run ends as if it had not been interrupted."""

from __future__ import annotations

import contextlib
import json
import re
import socket
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
from distrust.data import hub
from distrust.engines import create_engine, open_checkpoint
from distrust.errors import DistrustWarning, ModelError, NonFiniteLoss, ResumeRefused
from distrust.testing.models import make_model
from distrust.training.events import Evaluated, MemoryReset, RunEnded, StepEnded

#: test_exact_resume.py has the toy engine's runs.
either = pytest.mark.parametrize("engine", ENGINES[1:])
INSTALLED = ["torch", "mlx"] if find_spec("mlx_lm") else ["torch"]

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "all weights": {"lora_rank": 0, "weight_decay": 0.1},
    "bfloat16, all weights": {"lora_rank": 0, "dtype": "bfloat16"},
    "bfloat16, gradient checkpointing": {"dtype": "bfloat16", "gradient_checkpointing": True},
    "dora": {"dora": True, "rslora": True, "warmup_ratio": 0.3},
    "chosen modules": {
        "lora_rank": 2,
        "target_modules": ("re:.*_proj", "self_attn.*"),
        "exclude_modules": ("mlp.*",),
        "layers": "1",
        "schedule": "linear",
    },
    "packing": {"packing": True, "max_length": 60},
}
#: test_quantization.py has those of torch.
QUANTIZED: dict[str, dict[str, Any]] = {
    "8bit": {"quantization": "8bit"},
    "4bit": {"quantization": "4bit", "dtype": "bfloat16", "gradient_checkpointing": True},
}
RESET = ("lora", "all weights", *QUANTIZED)
OF_MLX = ["lora", "bfloat16, all weights", "dora", "packing", *QUANTIZED]


def losses(events):
    return {event.step: event.loss for event in events if isinstance(event, StepEnded)}


def moments(optimizer: Any) -> list[Any]:
    """All arrays in the state of an optimizer of any engine."""
    if isinstance(optimizer, dict):
        return [array for value in optimizer.values() for array in moments(value)]
    if isinstance(optimizer, list):
        return [array for value in optimizer for array in moments(value)]
    return [optimizer] if isinstance(optimizer, np.ndarray) else []


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        *[pytest.param("torch", kind, id=f"torch-{kind}", marks=pytest.mark.device) for kind in KINDS],
        *[pytest.param("mlx", kind, id=f"mlx-{kind}", marks=mlx_only) for kind in OF_MLX],
    ],
)
def test_a_stopped_and_resumed_run_ends_as_if_uninterrupted(train, eval_data, tmp_path, engine, kind):
    """Stopped in mid-epoch, with evaluations; with a reset, too, where weights are made in another way."""
    options = {"engine": engine, "max_steps": 4, **{**KINDS, **QUANTIZED}[kind]}
    uninterrupted, steps = train(tmp_path / "uninterrupted", save_every=0, **options)
    reset = {"reload_every": 3} if kind in RESET else {}
    disturbances = {"eval_data": str(eval_data), "eval_every": 2, **reset}
    step_losses = {}
    for stop in (2, None):
        ended, events = train(tmp_path / "stopped", stop_after=stop, **disturbances, **options)
        step_losses.update(losses(events))
    assert step_losses == losses(steps)
    assert [event.step for event in events if isinstance(event, Evaluated)] == [4]
    assert [event.step for event in events if isinstance(event, MemoryReset)] == [*reset.values()]
    assert ended.state_digest == uninterrupted.state_digest
    saved = CheckpointManager(ended.path.parent).load(4)
    assert {array.dtype.name for array in [*saved.model.values(), *moments(saved.optimizer)]} == {"float32"}
    assert step_losses[4] < step_losses[1]


@pytest.fixture(scope="module")
def references(train, tmp_path_factory) -> dict[str, RunEnded]:
    """Uninterrupted runs, by engine."""
    folder = tmp_path_factory.mktemp("reference")
    return {engine: train(folder / engine, engine=engine)[0] for engine in INSTALLED}


@either
@settings(max_examples=2)
@given(stops=st.lists(st.integers(1, 7), min_size=1, max_size=2).map(sorted), save_every=st.integers(0, 3))
def test_stopped_at_any_step(train, references, engine, stops, save_every):
    with tempfile.TemporaryDirectory() as folder:
        for stop in [*stops, None]:
            ended, _ = train(Path(folder), engine=engine, stop_after=stop, save_every=save_every)
        assert ended.state_digest == references[engine].state_digest


@either
def test_an_awaited_run_is_the_same_run(train, references, tmp_path, engine):
    """In its own thread, and resumed in another one."""
    stopped, _ = train(tmp_path, engine=engine, awaited=True, stop_after=4)
    assert (stopped.step, stopped.reason) == (4, "stop")
    assert train(tmp_path, engine=engine, awaited=True)[0].state_digest == references[engine].state_digest


@either
def test_another_seed_is_another_run(train, references, tmp_path, engine):
    assert train(tmp_path, engine=engine, seed=1)[0].state_digest != references[engine].state_digest


@either
def test_open_checkpoint_restores_the_trained_engine(references, tmp_path, engine):
    ended = references[engine]
    out = ended.path.parent.parent
    opened, file = open_checkpoint(out)
    assert (file.path, opened.environment()["engine"]) == (ended.path, engine)
    saved = CheckpointManager(ended.path.parent).load(7).model
    state = {name: np.asarray(array) for name, array in opened.state().model.items()}
    assert state.keys() == saved.keys()
    assert all(np.array_equal(state[name], saved[name]) for name in saved)
    with pytest.raises(ResumeRefused, match="--model"):
        open_checkpoint(out, model=str(make_model(tmp_path / "other", seed=1)))


@either
def test_a_huge_learning_rate_never_saves_nonfinite_values(train, tmp_path, engine):
    for rate in (1e4, 1e37):
        out = tmp_path / str(rate)
        with contextlib.suppress(NonFiniteLoss):
            train(
                out, engine=engine, learning_rate=rate, warmup_steps=0, max_steps=4, save_every=1, keep_last=9
            )
        manager = CheckpointManager(out / "checkpoints")
        for step in manager.list_checkpoints():
            saved = manager.load(step)
            for array in [*saved.model.values(), *moments(saved.optimizer), *saved.history.values()]:
                assert np.isfinite(array).all(), (rate, step)


@either
def test_a_loss_that_is_not_finite_stops_the_run_before_the_first_step(train, tmp_path, data, engine):
    from safetensors.torch import load_file, save_file

    broken = make_model(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = 100
    weights["lm_head.weight"][200, 0] = 3e38  # a logit is infinite
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        NonFiniteLoss, match=r"step 1: the loss is not finite; .* nothing was saved yet"
    ) as error:
        train(tmp_path / "run", engine=engine, model=str(broken))
    assert len(error.value.examples) == 4
    assert all(example.startswith(str(data)) for example in error.value.examples)
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def _remove_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _change_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))


DAMAGES = {
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:5000]
    ),
    "weights empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "a tensor missing": _remove_tensor,
    "another width": _change_width,
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "unknown kind of model": lambda folder: (folder / "config.json").write_text('{"model_type": "lama"}'),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "tokenizer no JSON": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "tokenizer of something else": lambda folder: (folder / "tokenizer.json").write_text('{"version": 1}'),
}


@either
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_model_that_cannot_be_loaded_is_a_one_line_error(tmp_path, damage, engine):
    folder = make_model(tmp_path / "model")
    DAMAGES[damage](folder)
    with pytest.raises(ModelError) as error:
        create_engine(TrainConfig(engine=engine, model=str(folder), threads=1))
    assert str(error.value).startswith(f"--model {folder}: ")
    assert "\n" not in str(error.value)


@either
@pytest.mark.parametrize("name", ["./nowhere", "nobody/nothing"])
def test_a_model_that_does_not_exist(monkeypatch, name, engine):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = "cannot be loaded: HF_HUB_OFFLINE=1, and it was not downloaded before; is the name right"
    reason = "no such file or directory" if name == "./nowhere" else offline
    with pytest.raises(ModelError, match=f"--model {re.escape(name)}: {reason}") as error:
        create_engine(TrainConfig(engine=engine, model=name, threads=1))
    assert "\n" not in str(error.value)


@either
def test_a_model_is_looked_up_on_the_hub_only_after_a_word_about_it(monkeypatch, engine):
    hub._announce_once.cache_clear()
    monkeypatch.setattr(socket, "getaddrinfo", None)  # contacting it would be another error
    with pytest.raises(DistrustWarning, match=r"^model nobody/nothing: .*, so it is looked up on the hub"):
        create_engine(TrainConfig(engine=engine, model="nobody/nothing", threads=1))
