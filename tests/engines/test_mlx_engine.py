"""What is specific to the engine of mlx: memory, compiled steps, quantized models, and no torch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

from small_batches import make_batch, select_examples  # noqa: E402 - after the skip
from test_conformance import digest, pass_through, same, step, train_two_steps  # noqa: E402

from distrust import TrainConfig  # noqa: E402
from distrust.engines import create_engine  # noqa: E402
from distrust.errors import ConfigError  # noqa: E402
from distrust.training.events import StepEnded  # noqa: E402

BATCH = make_batch()
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="mlx compiles by g++ on a CPU")


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> TrainConfig:
    return TrainConfig(engine="mlx", device="cpu", model=str(tiny_model), lora_rank=4, lora_alpha=8.0)


MEMORY = """
import gc, json, sys
import mlx.core as mx
from distrust import DistrustTrainer, TrainConfig
from distrust.engines import create_engine
from distrust.training.events import MemoryReset

def train(name, make=create_engine, **more):
    uses = []

    def watch(event):
        if isinstance(event, MemoryReset):
            uses.append((mx.get_active_memory(), mx.get_cache_memory()))

    config = TrainConfig(engine="mlx", device="cpu", model=sys.argv[1], data=sys.argv[2], batch_size=2,
                         lora_rank=4, lora_dropout=0.1, save_every=0, out=f"{sys.argv[3]}/{name}", **more)
    return DistrustTrainer(config, engine=make, observers=[watch]).train().state_digest, uses

def keep_model(config):
    engine = create_engine(config)
    models.append(engine.model)
    return engine

models = []
alone, _ = train("alone", max_steps=5)
gc.collect()
gc.freeze()  # exclude the libraries from collection: twice as fast
reset, uses = train("reset", reload_every=1, max_steps=5)
assert reset == alone, (reset, alone)
_, hoarded = train("hoarded", keep_model, reload_every=1, max_steps=3)
print(json.dumps([uses, hoarded]))
"""


def test_resets_do_not_accumulate_memory(run_python, forked_python, tiny_model, data, tmp_path):
    """Active memory to 2%, because mlx reuses a freed buffer for a slightly smaller array; the cache to 30%,
    because its size after an engine's first passes depends on the timing of threads.
    """
    process = run_python(MEMORY, tiny_model, data, tmp_path, python=forked_python)
    assert process.returncode == 0, process.stderr
    uses, hoarded = json.loads(process.stdout)
    assert len(uses) == 4
    (active, cached), (active_later, cached_later) = uses[0], uses[3]
    assert active_later == pytest.approx(active, rel=0.02)
    assert cached_later == pytest.approx(cached, rel=0.3)
    assert hoarded[1][0] > 1.3 * hoarded[0][0]  # the test detects a model that stays referenced


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"lora_rank": 0}, {"quantization": "4bit"}])
def test_checkpointed_layers_are_equivalent(config, options):
    plain = train_two_steps(create_engine(replace(config, **options)))
    again = create_engine(replace(config, gradient_checkpointing=True, **options))
    again.load_state(plain.state())
    for number in (3, 4):
        (losses, norm), expected = (step(engine, [BATCH], number=number) for engine in (again, plain))
        assert losses == pytest.approx(expected[0], rel=1e-5)
        assert norm == pytest.approx(expected[1], rel=1e-4)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_gradient_with_dropout_predicts_the_loss(config, checkpointed, compiled):
    """Forward and backward drop the same inputs: the loss changes as the gradient predicts."""
    options = {"gradient_checkpointing": checkpointed, "compile": compiled}
    engine = create_engine(replace(config, lora_dropout=0.3, **options))
    trained_state = train_two_steps(engine).state()

    def loss(state):
        engine.load_state(state)
        (losses,) = pass_through(engine, [BATCH])
        return losses.weighted.sum() / BATCH.tokens

    empty = {name: array * 0 for name, array in trained_state.model.items()}
    initial = loss(replace(trained_state, optimizer={**trained_state.optimizer, "m": empty}))
    engine.clip_gradients(0.0)
    engine.update(learning_rate=0.0)
    moments = engine.state().optimizer["m"]
    gradient = {name: moment / (1 - config.adam_beta1) for name, moment in moments.items()}
    squares = sum(float((slope * slope).sum()) for slope in gradient.values())
    length = 1e-3
    ends = []
    for step_length in (length, -length):
        moved = {name: v + step_length * gradient[name] for name, v in trained_state.model.items()}
        ends.append(loss(replace(trained_state, model=moved)))
    assert min(ends) < initial < max(ends)
    assert (ends[0] - ends[1]) / (2 * length) == pytest.approx(squares, rel=0.02)


@needs_compiler
def test_compiled_steps_equal_uncompiled_ones_and_resume_bit_for_bit(config, tmp_path):
    """Compiled rows are padded, so dropout has other shapes and differs from an uncompiled run."""
    plain, compiled = create_engine(config), create_engine(replace(config, compile=True))
    assert compiled.environment()["compiled"]
    batches = [select_examples(BATCH, [1]), select_examples(BATCH, [0, 3])]
    for number in (1, 2):
        (losses, norm), expected = (step(engine, batches, number=number) for engine in (compiled, plain))
        assert losses == pytest.approx(expected[0], rel=1e-5)
        assert norm == pytest.approx(expected[1], rel=1e-4)
    dropping = replace(config, compile=True, lora_dropout=0.2)
    first, later = train_two_steps(create_engine(dropping)), create_engine(dropping)
    later.load_state(first.state())
    assert step(later, batches, number=3) == step(first, batches, number=3)
    assert digest(later, tmp_path) == digest(first, tmp_path)


@pytest.fixture(scope="module")
def quantized_folder(tiny_model, tmp_path_factory) -> Path:
    """The tiny model in mlx's quantized layout, 4 bits."""
    import mlx.nn as nn
    from mlx_lm.utils import load_model, save_config, save_model

    folder = tmp_path_factory.mktemp("quantized")
    model, config = load_model(tiny_model)
    groups = {"group_size": 32, "bits": 4}

    def is_wide_enough(_: str, module: Any) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0

    nn.quantize(model, **groups, class_predicate=is_wide_enough)
    narrow = {f"model.layers.{layer}.mlp.down_proj": False for layer in range(2)}
    save_model(folder, model)
    save_config({**config, "quantization": {**groups, **narrow}}, folder / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, folder)
    return folder


def test_a_model_in_mlxs_quantized_layout_is_trained(train, config, quantized_folder, tmp_path):
    options: dict[str, Any] = {"engine": "mlx", "model": str(quantized_folder), "max_steps": 4}
    alone, events = train(tmp_path / "alone", **options)
    losses = [event.loss for event in events if isinstance(event, StepEnded)]
    assert losses[-1] < losses[0]
    train(tmp_path / "stopped", stop_after=2, **options)
    assert train(tmp_path / "stopped", **options)[0].state_digest == alone.state_digest
    # Quantizing the unquantized model gives the same.
    stored = create_engine(replace(config, model=str(quantized_folder)))
    requantized = create_engine(replace(config, quantization="4bit"))
    assert stored.parameters == requantized.parameters
    assert same(stored.evaluate(BATCH), requantized.evaluate(BATCH))
    with pytest.raises(ConfigError, match=r"--quantization 4bit: .* quantized already"):
        create_engine(replace(config, model=str(quantized_folder), quantization="4bit"))


def test_fewer_bits_change_the_losses_a_little(config):
    engines = {kind: create_engine(replace(config, quantization=kind)) for kind in ("none", "8bit", "4bit")}
    losses = {kind: engine.evaluate(BATCH).cross_entropy for kind, engine in engines.items()}
    for bits, off in (("8bit", 0.01), ("4bit", 0.1)):
        assert not np.array_equal(losses[bits], losses["none"])
        np.testing.assert_allclose(losses[bits], losses["none"], rtol=off)


def test_quantization_does_not_change_the_fingerprint(config):
    quantized = create_engine(replace(config, quantization="4bit"))
    assert quantized.fingerprint() == create_engine(config).fingerprint()


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_an_unavailable_device_is_refused(config, device):
    available = {"cuda": hasattr(mx, "cuda") and mx.cuda.is_available(), "mps": mx.metal.is_available()}
    if available[device]:
        pytest.skip("this machine has it")
    with pytest.raises(
        ConfigError, match=f"--device {device}: not available to mlx here; .* one of: auto, cpu"
    ):
        create_engine(replace(config, device=device))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": ("q_porj",)}, "--target-modules q_porj: .*not in the model.*adapt are: .*q_proj"),
        ({"target_modules": ("embed_tokens",)}, "--target-modules embed_tokens: .*no linear module"),
    ],
)
def test_invalid_target_modules_are_refused(config, options, said):
    with pytest.raises(ConfigError, match=said) as error:
        create_engine(replace(config, **options))
    assert "\n" not in str(error.value)


COMMAND = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in sys.argv[1].split() else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
from distrust.cli import main
lines = " ".join(sys.argv[2:]).split(" then ")
codes = [main(line.split()) for line in lines]
assert not {"torch", "peft"} & sys.modules.keys()
raise SystemExit(max(codes))
"""
TRAIN = ["--max-steps", 2, "--batch-size", 2, "--lora-rank", 2, "--device", "cpu"]


def test_mlx_trains_without_torch(run_python, tiny_model, data, tmp_path):
    """Without torch, mlx is the default engine, and the checkpoint records it."""
    train = ["train", "--model", tiny_model, "--data", data, *TRAIN]
    default, chosen = tmp_path / "default", tmp_path / "chosen"
    lines = [*train, "--out", default, "then", "eval", default, "--data", data]
    process = run_python(COMMAND, "torch peft", *lines, "then", *train, "--out", chosen, "--engine", "mlx")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.count("Finished step 2") == 2


def test_a_missing_mlx_lm_is_named(run_python, tiny_model, data, tmp_path):
    arguments = ["train", "--model", tiny_model, "--data", data, "--out", tmp_path, *TRAIN, "--engine", "mlx"]
    process = run_python(COMMAND, "mlx_lm", *arguments)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith("distrust: --engine mlx needs mlx_lm, which is not installed: pip install '")
    assert line.endswith("[mlx]'")
    assert not list(tmp_path.rglob("*.safetensors"))
