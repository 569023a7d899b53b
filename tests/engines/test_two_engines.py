"""The engines of torch and mlx agree, and each takes up what the other trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

pytest.importorskip("mlx_lm")

from small_batches import a_batch
from test_conformance import digest, trained

from distrust import Checkpoint, CheckpointManager, DistrustWarning, TrainConfig
from distrust.contract import Engine, EngineState
from distrust.engines import config_of, create_engine, open_checkpoint
from distrust.errors import ConfigError, ResumeRefused
from distrust.training.events import StepEnded

pytestmark = pytest.mark.usefixtures("_only_what_is_new_is_searched")
AGREED = 1e-4
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "one micro-batch": {"gradient_accumulation": 1, "batch_size": 4},
    "dora": {"dora": True, "rslora": True, "weight_decay": 0.1},
    "all weights": {"lora_rank": 0, "weight_decay": 0.1},
    "the head, too": {"target_modules": ("q_proj", "down_proj", "lm_head")},
}
OTHER = {"torch": "mlx", "mlx": "torch"}
every_kind = pytest.mark.parametrize("kind", KINDS)
from_either = pytest.mark.parametrize("first", OTHER)
goes_on_elsewhere = "no longer bit-identical: the run was trained with --engine {}, and resumes with {}"


@pytest.fixture
def losses(train):
    """Trains without dropout, which each engine draws in its own way; the loss of each step by its number."""

    def losses(out: Path, **options: Any) -> dict[int, float]:
        _, events = train(out, lora_dropout=0.0, **options)
        return {event.step: event.loss for event in events if isinstance(event, StepEnded)}

    return losses


def in_form_of_mlx(model: Any, optimizer: Any) -> dict[str, Any]:
    """Weights, moments and steps of an engine of torch, as DESIGN says that they lie in one of mlx."""
    names = {
        number: name
        for group in optimizer["param_groups"]
        for number, name in zip(group["params"], group["param_names"], strict=True)
    }
    found = {f"weight of {name}": array for name, array in model.items()}
    for number, state in optimizer["state"].items():
        found[f"m of {names[number]}"], found[f"v of {names[number]}"] = state["exp_avg"], state["exp_avg_sq"]
    mapped = {}
    for name, array in found.items():
        inner = name.replace("base_model.model.", "").replace(".lora_magnitude_vector.weight", ".m")
        for end, other in ((".lora_A.weight", ".lora_a"), (".lora_B.weight", ".lora_b")):
            if inner.endswith(end):
                inner, array = inner.removesuffix(end) + other, array.T
        mapped[inner] = np.asarray(array)
    return {**mapped, "steps": {int(state["step"]) for state in optimizer["state"].values()} or {0}}


def as_it_lies_in_mlx(model: Any, optimizer: Any) -> dict[str, Any]:
    found = {f"weight of {name}": np.asarray(array) for name, array in model.items()}
    for moment in ("m", "v"):
        found |= {f"{moment} of {name}": np.asarray(array) for name, array in optimizer[moment].items()}
    return {**found, "steps": {optimizer["step"]}}


def compared(engine: str, model: Any, optimizer: Any) -> dict[str, Any]:
    return (in_form_of_mlx if engine == "torch" else as_it_lies_in_mlx)(model, optimizer)


def state_of(engine: Engine) -> dict[str, Any]:
    return compared(engine.framework, engine.state().model, engine.state().optimizer)


def take_up(manager: CheckpointManager, step: int, engine: Engine) -> None:
    loaded = manager.load(step, framework=engine.framework)
    engine.load_state(EngineState(loaded.model, loaded.optimizer, loaded.rng))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@every_kind
def test_the_first_steps_losses_are_equal(losses, tmp_path, kind):
    torch, mlx = (losses(tmp_path / engine, engine=engine, **KINDS[kind]) for engine in OTHER)
    assert mlx[1] == pytest.approx(torch[1], rel=1e-5)
    if kind == "all weights":  # adapters begin with numbers that each draws in its own way
        assert mlx == pytest.approx(torch, rel=1e-3)
    assert mlx[7] == pytest.approx(torch[7], rel=0.05)
    assert mlx[7] < mlx[1]


def test_the_base_is_the_same(tiny_model):
    configs = [TrainConfig(engine=engine, model=str(tiny_model), device="cpu") for engine in OTHER]
    torch, mlx = map(create_engine, configs)
    assert torch.fingerprint() == mlx.fingerprint()
    assert torch.parameters == mlx.parameters
    assert torch.context_length == mlx.context_length
    found, expected = (engine.evaluate(a_batch()).weighted for engine in (mlx, torch))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@every_kind
@from_either
def test_a_run_of_one_goes_on_with_the_other(losses, tmp_path, first, kind):
    options = KINDS[kind]
    losses(tmp_path / "run", engine=first, stop_after=3, **options)
    shutil.copytree(tmp_path / "run", tmp_path / "stays")
    expected = losses(tmp_path / "stays", engine=first, **options)

    manager = CheckpointManager(tmp_path / "run" / "checkpoints")
    taker = create_engine(replace(config_of(manager.inspect(3)), engine=OTHER[first]))
    take_up(manager, 3, taker)
    saved = manager.load(3)
    expected_state = compared(first, saved.model, saved.optimizer)
    assert expected_state["steps"] == {3}
    assert same(state_of(taker), expected_state)

    with pytest.warns(DistrustWarning, match=goes_on_elsewhere.format(first, OTHER[first])) as told:
        found = losses(tmp_path / "run", engine=OTHER[first], **options)
    assert len(told) == 1
    assert "random generator states are not" in str(told[0].message)
    assert sorted(found) == [4, 5, 6, 7]
    assert found[4] == pytest.approx(expected[4], rel=AGREED)
    assert found == pytest.approx(expected, rel=AGREED)  # the moments have their part in each that follows
    # And it is from then on the other's: the same command without a name goes on with it.
    assert open_checkpoint(tmp_path / "run")[0].framework == OTHER[first]


def handed_over(giver: Engine, taker: Engine, folder: Path) -> None:
    """The state of one engine, through a file."""
    manager, state = CheckpointManager(folder), giver.state()
    manager.save(Checkpoint(step=1, model=state.model, optimizer=state.optimizer, rng=state.rng))
    take_up(manager, 1, taker)


@pytest.mark.parametrize("steps", [0, 2])
@from_either
def test_there_and_back_no_bit_is_lost(tiny_model, tmp_path, first, steps):
    """Nor where no step was made, and torch has no moments yet."""
    config = TrainConfig(engine=first, model=str(tiny_model), lora_rank=4, dora=True, device="cpu", threads=1)
    engines = [create_engine(replace(config, engine=name)) for name in (first, OTHER[first], first)]
    if steps:
        trained(engines[0])
    handed_over(engines[0], engines[1], tmp_path / "there")
    handed_over(engines[1], engines[2], tmp_path / "back")
    begun, there, back = map(state_of, engines)
    assert same(back, begun)
    assert there["steps"] == begun["steps"] == {steps}
    np.testing.assert_allclose(
        engines[1].evaluate(a_batch()).weighted, engines[0].evaluate(a_batch()).weighted, rtol=1e-5
    )


def test_what_mlx_has_no_adapter_for_is_refused(losses, tmp_path):
    """Such as embeddings: nothing on the disk is changed, and torch goes on."""
    options = {"target_modules": ("embed_tokens", "q_proj")}
    losses(tmp_path, engine="torch", stop_after=2, **options)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    with pytest.raises(ConfigError, match=r"--target-modules .*: embed_tokens is no linear module"):
        losses(tmp_path, engine="mlx", **options)
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before
    assert losses(tmp_path, engine="torch", **options).keys() == {3, 4, 5, 6, 7}


@pytest.mark.parametrize(
    "optimizer", [{"step": 1, "m": {}}, {"m": {}, "v": {}}, {"state": {}}, {"exp_avg": {}, "step": 3}]
)
@from_either
def test_an_optimizer_of_neither_is_refused(tiny_model, tmp_path, first, optimizer):
    engine = create_engine(
        TrainConfig(engine=first, model=str(tiny_model), lora_rank=4, device="cpu", threads=1)
    )
    before = digest(engine, tmp_path)
    with pytest.raises(ResumeRefused, match="neither torch's nor mlx's"):
        engine.load_state(replace(engine.state(), optimizer=optimizer))
    assert digest(engine, tmp_path) == before


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
    """The same weights in another model."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def with_sharp_attention(model: Path, folder: Path) -> Path:
    """Positions matter in it, which attention at its first, even values hardly looks at."""
    shutil.copytree(model, folder)
    path = folder / "model.safetensors"
    weights = safetensors.numpy.load_file(path)
    sharp = {name: value * 10 if "self_attn" in name else value for name, value in weights.items()}
    safetensors.numpy.save_file(sharp, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("rotary", ROTARY)
def test_positions_turn_alike_however_the_config_says_it(tiny_model, tmp_path, rotary):
    """transformers 5 writes them into one entry, which few models of mlx-lm read."""
    batch = a_batch(seed=1, lengths=(40, 9))
    model = with_sharp_attention(tiny_model, tmp_path / "plain")
    turned = with_config(model, tmp_path / "turned", rope_parameters=ROTARY[rotary])
    plain, *found = [
        create_engine(TrainConfig(engine=engine, model=str(folder), device="cpu", threads=1)).evaluate(batch)
        for engine, folder in (("mlx", model), ("torch", turned), ("mlx", turned))
    ]
    np.testing.assert_allclose(found[0].cross_entropy, found[1].cross_entropy, rtol=1e-5)
    assert not np.allclose(plain.cross_entropy, found[1].cross_entropy, rtol=1e-4)


def test_a_window_that_mlx_does_not_apply_is_told(tiny_model, tmp_path):
    model = with_config(
        tiny_model,
        tmp_path / "model",
        model_type="mistral",
        architectures=["MistralForCausalLM"],
        sliding_window=8,
    )
    with pytest.warns(DistrustWarning, match="8 tokens back"):
        create_engine(TrainConfig(engine="mlx", model=str(model), device="cpu", max_length=16))
    create_engine(TrainConfig(engine="mlx", model=str(model), device="cpu", max_length=8))
