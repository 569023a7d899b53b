"""The frozen base in 8 and 4 bits: it trains, takes less memory, and resumes exactly."""

from __future__ import annotations

import gc
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distrust import DistrustTrainer, TrainConfig
from distrust.engines import create_engine, open_checkpoint
from distrust.errors import MissingDependency, ResumeRefused
from distrust.training.events import Evaluated, MemoryReset, StepEnded

pytestmark = pytest.mark.device
BITS = ["8bit", "4bit"]


@pytest.fixture(scope="module")
def options(tiny_model, device) -> dict[str, Any]:
    usual = {"engine": "torch", "model": str(tiny_model), "lora_rank": 4, "threads": 1}
    return {**usual, "device": device, "dtype": "float32"}


def losses(events):
    return [event.loss for event in events if isinstance(event, StepEnded)]


@pytest.mark.parametrize(
    ("bits", "kind"), [("8bit", {}), ("4bit", {"gradient_checkpointing": True, "dtype": "bfloat16"})]
)
def test_a_disturbed_run_ends_as_if_uninterrupted(train, tmp_path, eval_data, bits, kind):
    """With evaluations, a stop and a memory reset."""
    options = {"quantization": bits, "max_steps": 4, **kind}
    uninterrupted, steps = train(tmp_path / "alone", **options)
    assert losses(steps)[-1] < losses(steps)[0]  # gradients pass through the frozen base
    disturbed_losses = []
    for stop in (2, None):
        ended, events = train(
            tmp_path / "disturbed",
            stop_after=stop,
            eval_data=str(eval_data),
            eval_every=1,
            reload_every=3,
            **options,
        )
        disturbed_losses += losses(events)
    assert [event.step for event in events if isinstance(event, MemoryReset)] == [3]
    assert sum(isinstance(event, Evaluated) for event in events) == 2
    assert disturbed_losses == losses(steps)
    assert ended.state_digest == uninterrupted.state_digest


def test_losses_are_close_to_those_of_unquantized_weights(train, tmp_path):
    losses_of = {
        kind: losses(train(tmp_path / kind, quantization=kind, max_steps=3, save_every=0)[1])
        for kind in ("none", *BITS)
    }
    for bits, off in (("8bit", 0.005), ("4bit", 0.03)):
        assert losses_of[bits] != losses_of["none"]
        assert losses_of[bits] == pytest.approx(losses_of["none"], rel=off)


def base_bytes(engine) -> int:
    frozen = [part for part in engine.model.parameters() if not part.requires_grad]
    states = [part.quant_state for part in frozen if getattr(part, "quant_state", None) is not None]
    scales = [tensor for state in states for tensor in (state.absmax, state.state2.absmax)]
    scales += [part.SCB for part in frozen if getattr(part, "SCB", None) is not None]
    return sum(tensor.nbytes for tensor in [*frozen, *scales])


def test_fewer_bits_take_less_memory(options):
    sizes, counts = {}, set()
    for kind in ("none", *BITS):
        engine = create_engine(TrainConfig(quantization=kind, **options))
        ends = (engine.model.get_input_embeddings(), engine.model.get_output_embeddings())
        sizes[kind] = base_bytes(engine) - sum(module.weight.nbytes for module in ends)  # unquantized
        counts.add(engine.parameters)
    assert sizes["8bit"] < 0.32 * sizes["none"]
    assert sizes["4bit"] < 0.20 * sizes["none"]
    assert len(counts) == 1  # the same number of parameters


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's proc")
@pytest.mark.parametrize("bits", BITS)
def test_the_file_of_the_weights_is_unmapped(options, tmp_path, bits):
    """Unquantized weights must not keep the whole file mapped and resident."""
    folder = tmp_path / "model"
    shutil.copytree(options["model"], folder)
    engine = create_engine(TrainConfig(**{**options, "model": str(folder), "quantization": bits}))
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert engine.parameters[0] > 0


def test_the_fingerprint_is_of_the_unquantized_weights(options, tmp_path):
    """Independent of quantization, and of the number of files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    expected = create_engine(TrainConfig(**options)).fingerprint()
    parts = tmp_path / "parts"
    AutoModelForCausalLM.from_pretrained(options["model"]).save_pretrained(parts, max_shard_size="40KB")
    AutoTokenizer.from_pretrained(options["model"]).save_pretrained(parts)
    assert len(list(parts.glob("*.safetensors"))) > 1
    for kind in BITS:
        config = TrainConfig(**{**options, "model": str(parts), "quantization": kind})
        assert create_engine(config).fingerprint() == expected


def test_open_checkpoint_quantizes_as_in_training(train, tmp_path):
    train(tmp_path, quantization="4bit", max_steps=1)
    engine, _ = open_checkpoint(tmp_path)
    kinds = {type(module).__name__ for module in engine.model.modules()}
    assert "Linear4bit" in kinds
    assert engine.environment()["bitsandbytes"]
    assert {tensor.dtype for tensor in engine.state().model.values()} == {torch.float32}


def test_other_bits_refuse_to_resume(train, tmp_path):
    train(tmp_path, quantization="8bit", stop_after=1)
    with pytest.raises(ResumeRefused, match="--quantization was 8bit, is none"):
        train(tmp_path)


def test_a_missing_library_is_named(options, monkeypatch):
    honest = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "bitsandbytes" else honest(name, *more),
    )
    with pytest.raises(MissingDependency) as refused:
        create_engine(TrainConfig(quantization="8bit", **options))
    assert "bitsandbytes, which is not installed: pip install" in str(refused.value)
    assert (refused.value.library, refused.value.extra) == ("bitsandbytes", "quantization")
    assert "\n" not in str(refused.value)


def test_packed_rows_in_8_bits_with_outliers(data, device, tmp_path):
    """The bundled model has outlier columns, which LLM.int8 keeps in full precision for a whole pass."""
    config = TrainConfig(
        data=str(data),
        out=str(tmp_path),
        quantization="8bit",
        packing=True,
        max_steps=1,
        threads=1,
        device=device,
    )
    ended = DistrustTrainer(config).train()
    assert ended.step == 1
