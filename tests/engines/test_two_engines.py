"""The engines of torch and mlx agree, and each resumes what the other trained."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

pytest.importorskip("mlx_lm")

from small_batches import make_batch
from test_conformance import digest, pass_through, save, train_two_steps

from distrust import Checkpoint, CheckpointManager, DistrustWarning, TrainConfig
from distrust.contract import Engine, EngineState
from distrust.engines import config_of, create_engine, open_checkpoint
from distrust.errors import ConfigError, ResumeRefused
from distrust.training.events import StepEnded

AGREED = 1e-4
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "one micro-batch": {"gradient_accumulation": 1, "batch_size": 4},
    "dora": {"dora": True, "rslora": True, "weight_decay": 0.1},
    "all weights": {"lora_rank": 0, "weight_decay": 0.1},
    "the head, too": {"target_modules": ("q_proj", "down_proj", "lm_head")},
}
OTHER = {"torch": "mlx", "mlx": "torch"}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
from_either = pytest.mark.parametrize("first", OTHER)
OTHER_ENGINE_WARNING = "no longer bit-identical: the run was trained with --engine {}, and resumes with {}"


@pytest.fixture
def steps(train):
    """Train without dropout, which each engine samples differently; returns the events of the steps."""

    def steps(out: Path, **options: Any) -> list[StepEnded]:
        _, events = train(out, **{"lora_dropout": 0.0, "max_steps": 4, **options})
        return [event for event in events if isinstance(event, StepEnded)]

    return steps


@pytest.fixture
def losses(steps):
    """Train without dropout; returns the loss of each step."""
    return lambda out, **options: {event.step: event.loss for event in steps(out, **options)}


def torch_state_as_mlx(model: Any, optimizer: Any) -> dict[str, Any]:
    """Weights, moments and steps of an engine of torch in the form of mlx, written independently."""
    names = {
        number: name
        for group in optimizer["param_groups"]
        for number, name in zip(group["params"], group["param_names"], strict=True)
    }
    arrays = {f"weight of {name}": array for name, array in model.items()}
    for number, state in optimizer["state"].items():
        arrays[f"m of {names[number]}"] = state["exp_avg"]
        arrays[f"v of {names[number]}"] = state["exp_avg_sq"]
    mapped = {}
    for name, array in arrays.items():
        inner = name.replace("base_model.model.", "").replace(".lora_magnitude_vector.weight", ".m")
        for end, suffix in ((".lora_A.weight", ".lora_a"), (".lora_B.weight", ".lora_b")):
            if inner.endswith(end):
                inner, array = inner.removesuffix(end) + suffix, array.T
        mapped[inner] = np.asarray(array)
    return {**mapped, "steps": {int(state["step"]) for state in optimizer["state"].values()} or {0}}


def mlx_state(model: Any, optimizer: Any) -> dict[str, Any]:
    arrays = {f"weight of {name}": np.asarray(array) for name, array in model.items()}
    for moment in ("m", "v"):
        arrays |= {f"{moment} of {name}": np.asarray(array) for name, array in optimizer[moment].items()}
    return {**arrays, "steps": {optimizer["step"]}}


def comparable(engine: str, model: Any, optimizer: Any) -> dict[str, Any]:
    return (torch_state_as_mlx if engine == "torch" else mlx_state)(model, optimizer)


def state_of(engine: Engine) -> dict[str, Any]:
    return comparable(engine.framework, engine.state().model, engine.state().optimizer)


def load_step(manager: CheckpointManager, step: int, engine: Engine) -> None:
    loaded = manager.load(step, framework=engine.framework)
    engine.load_state(EngineState(loaded.model, loaded.optimizer, loaded.rng))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether states are equal bit for bit."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@every_variant
def test_losses_and_norms_are_equal(steps, tmp_path, variant, monkeypatch):
    """From the same initial adapter, which each engine would initialize differently."""
    initial: list[CheckpointManager] = []

    def create_in_one_state(config: TrainConfig, **_: Any) -> Engine:
        engine = create_engine(config)
        if initial:
            load_step(initial[0], 2, engine)
        else:
            initial.append(save(engine, tmp_path / "initial"))
        return engine

    monkeypatch.setattr("distrust.engines.create_engine", create_in_one_state)
    options = {"max_steps": 7, **VARIANTS[variant]}  # a gradient is clipped, and its effect shows
    torch, mlx = (steps(tmp_path / engine, engine=engine, **options) for engine in OTHER)
    for mlx_step, torch_step in zip(mlx, torch, strict=True):
        assert mlx_step.loss == pytest.approx(torch_step.loss, rel=AGREED)
        assert mlx_step.gradient_norm == pytest.approx(torch_step.gradient_norm, rel=AGREED)
    assert mlx[0].loss == pytest.approx(torch[0].loss, rel=1e-5)
    assert mlx[6].loss < mlx[0].loss


def update(engine: Engine, *, number: int, learning_rate: float) -> tuple[float, dict[str, Any]]:
    """Make a step without clipping; returns the gradient norm, and a copy of the state after it."""
    pass_through(engine, [make_batch()], number=number)
    norm = engine.clip_gradients(0.0)
    engine.update(learning_rate=learning_rate)
    return norm, copy.deepcopy(state_of(engine))


@pytest.mark.parametrize("name", OTHER)
def test_a_step_is_that_of_adamw_with_the_options_of_the_run(tiny_model, name):
    beta1, beta2, epsilon, decay, rate = 0.8, 0.98, 1e-3, 0.1, 0.02
    options = {"adam_beta1": beta1, "adam_beta2": beta2, "adam_epsilon": epsilon, "weight_decay": decay}
    config = TrainConfig(engine=name, model=str(tiny_model), lora_rank=0, device="cpu", threads=1, **options)
    engine = create_engine(config)
    old_state = copy.deepcopy(state_of(engine))
    for number in (1, 2):
        norm, new_state = update(engine, number=number, learning_rate=rate)
        squares = 0.0
        for weight in (entry for entry in new_state if entry.startswith("weight of ")):
            moments = [weight.replace("weight", moment, 1) for moment in "mv"]
            m, v = (new_state[moment].astype(float) for moment in moments)
            # torch has none before the first step.
            previous_m, previous_v = (old_state.get(moment, 0.0) for moment in moments)
            gradient = (m - beta1 * previous_m) / (1 - beta1)
            squares += np.square(gradient).sum()
            expected_v = beta2 * previous_v + (1 - beta2) * gradient**2
            np.testing.assert_allclose(v, expected_v, rtol=1e-3, atol=1e-6 * v.max())
            shrinkage = 1 - rate * decay if old_state[weight].ndim >= 2 else 1.0
            direction = m / (1 - beta1**number) / (np.sqrt(v / (1 - beta2**number)) + epsilon)
            np.testing.assert_allclose(
                new_state[weight], old_state[weight] * shrinkage - rate * direction, atol=1e-6
            )
        assert norm == pytest.approx(np.sqrt(squares), rel=1e-4)
        old_state = new_state


def test_both_engines_load_the_same_base(tiny_model):
    configs = [TrainConfig(engine=engine, model=str(tiny_model), device="cpu") for engine in OTHER]
    torch, mlx = map(create_engine, configs)
    assert torch.fingerprint() == mlx.fingerprint()
    assert torch.parameters == mlx.parameters
    assert torch.context_length == mlx.context_length
    actual, expected = (engine.evaluate(make_batch()).weighted for engine in (mlx, torch))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "variant", [name for name in VARIANTS if name != "one micro-batch"]
)  # which changes no state
@from_either
def test_a_run_resumes_with_the_other_engine(losses, tmp_path, first, variant):
    options = VARIANTS[variant]
    expected = losses(tmp_path / "stays", engine=first, save_every=2, **options)
    shutil.copytree(tmp_path / "stays", tmp_path / "run")
    manager = CheckpointManager(tmp_path / "run" / "checkpoints")
    manager.inspect(4).path.unlink()  # as if it had been killed
    receiver = create_engine(replace(config_of(manager.inspect(2)), engine=OTHER[first]))
    load_step(manager, 2, receiver)
    saved = manager.load(2)
    expected_state = comparable(first, saved.model, saved.optimizer)
    assert expected_state["steps"] == {2}
    assert same(state_of(receiver), expected_state)

    with pytest.warns(DistrustWarning, match=OTHER_ENGINE_WARNING.format(first, OTHER[first])) as caught:
        resumed = losses(tmp_path / "run", engine=OTHER[first], **options)
    assert len(caught) == 1
    assert "random generator states are not" in str(caught[0].message)
    assert sorted(resumed) == [3, 4]
    assert resumed[3] == pytest.approx(expected[3], rel=AGREED)
    assert resumed[4] == pytest.approx(expected[4], rel=AGREED)  # the moments affect every later step
    # From then on it is a run of the other engine, also without --engine.
    if variant == "lora":
        assert open_checkpoint(tmp_path / "run")[0].framework == OTHER[first]
    assert config_of(manager.inspect(4)).engine == OTHER[first]


def transfer(sender: Engine, receiver: Engine, folder: Path) -> None:
    """Transfer the state of one engine to the other through a file."""
    manager, state = CheckpointManager(folder), sender.state()
    manager.save(Checkpoint(step=1, model=state.model, optimizer=state.optimizer, rng=state.rng))
    load_step(manager, 1, receiver)


@pytest.mark.parametrize("steps", [0, 2])
@from_either
def test_converting_back_and_forth_is_lossless(tiny_model, tmp_path, first, steps):
    """Also before the first step, when torch has no moments."""
    config = TrainConfig(engine=first, model=str(tiny_model), lora_rank=4, dora=True, device="cpu", threads=1)
    engines = [create_engine(replace(config, engine=name)) for name in (first, OTHER[first], first)]
    if steps:
        train_two_steps(engines[0])
    transfer(engines[0], engines[1], tmp_path / "there")
    transfer(engines[1], engines[2], tmp_path / "back")
    original, converted, restored = map(state_of, engines)
    assert same(restored, original)
    assert converted["steps"] == original["steps"] == {steps}
    np.testing.assert_allclose(
        engines[1].evaluate(make_batch()).weighted, engines[0].evaluate(make_batch()).weighted, rtol=1e-5
    )


def test_targets_that_mlx_cannot_adapt_are_refused(losses, tmp_path):
    """Such as embeddings: no file changes, and torch can resume."""
    options = {"target_modules": ("embed_tokens", "q_proj")}
    losses(tmp_path, engine="torch", stop_after=2, **options)
    files = {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    with pytest.raises(ConfigError, match=r"--target-modules .*: embed_tokens is no linear module"):
        losses(tmp_path, engine="mlx", **options)
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == files
    assert losses(tmp_path, engine="torch", **options).keys() == {3, 4}


@pytest.mark.parametrize(
    "optimizer", [{"step": 1, "m": {}}, {"m": {}, "v": {}}, {"state": {}}, {"exp_avg": {}, "step": 3}]
)
@from_either
def test_an_optimizer_of_neither_engine_is_refused(tiny_model, tmp_path, first, optimizer):
    config = TrainConfig(engine=first, model=str(tiny_model), lora_rank=4, device="cpu", threads=1)
    engine = create_engine(config)
    digest_before = digest(engine, tmp_path)
    with pytest.raises(ResumeRefused, match="neither torch's nor mlx's"):
        engine.load_state(replace(engine.state(), optimizer=optimizer))
    assert digest(engine, tmp_path) == digest_before


def test_parameters_with_different_numbers_of_steps_are_refused(tiny_model, tmp_path):
    """mlx counts the steps of all parameters together."""
    config = TrainConfig(model=str(tiny_model), lora_rank=4, device="cpu", threads=1)
    sender, receiver = (create_engine(replace(config, engine=engine)) for engine in OTHER)
    state = copy.deepcopy(train_two_steps(sender).state())
    state.optimizer["state"][1]["step"] += 1
    digest_before = digest(receiver, tmp_path)
    with pytest.raises(ResumeRefused, match="different numbers of steps"):
        receiver.load_state(state)
    assert digest(receiver, tmp_path) == digest_before


ROTARY = {
    "another base": {"rope_theta": 50.0, "rope_type": "default"},
    "scaled": {
        "rope_theta": 500.0,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def with_config(model: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a model with changes in its config."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def with_sharp_attention(model: Path, folder: Path) -> Path:
    """A copy whose attention depends on positions; freshly initialized attention is almost uniform."""
    shutil.copytree(model, folder)
    path = folder / "model.safetensors"
    weights = safetensors.numpy.load_file(path)
    sharp = {name: value * 10 if "self_attn" in name else value for name, value in weights.items()}
    safetensors.numpy.save_file(sharp, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("rotary", ROTARY)
def test_rotary_settings_are_read_from_any_config(tiny_model, tmp_path, rotary):
    """transformers 5 writes all settings into one entry, which few models of mlx-lm read."""
    batch = make_batch(seed=1, lengths=(40, 9))
    model = with_sharp_attention(tiny_model, tmp_path / "plain")
    changed = with_config(model, tmp_path / "changed", rope_parameters=ROTARY[rotary])
    plain, *actual = [
        create_engine(TrainConfig(engine=engine, model=str(folder), device="cpu", threads=1)).evaluate(batch)
        for engine, folder in (("mlx", model), ("torch", changed), ("mlx", changed))
    ]
    np.testing.assert_allclose(actual[0].cross_entropy, actual[1].cross_entropy, rtol=1e-5)
    assert not np.allclose(plain.cross_entropy, actual[1].cross_entropy, rtol=1e-4)


def test_a_sliding_window_that_mlx_ignores_warns(tiny_model, tmp_path):
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}
    model = with_config(tiny_model, tmp_path / "model", **mistral)
    with pytest.warns(DistrustWarning, match="8 tokens back"):
        create_engine(TrainConfig(engine="mlx", model=str(model), device="cpu", max_length=16))
    create_engine(TrainConfig(engine="mlx", model=str(model), device="cpu", max_length=8))
