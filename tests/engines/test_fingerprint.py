"""The digest of the weights in a thread is the digest of the weights, and ends with the engine's creation."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrust import TrainConfig
from distrust.engines import create_engine
from distrust.engines.torch import fingerprint, model, quantization
from distrust.engines.torch.engine import TorchEngine
from distrust.errors import ConfigError, ModelError

CPU = torch.device("cpu")
#: dtype, shape, and whether it is a transposed view
_WEIGHTS = st.lists(
    st.tuples(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        st.lists(st.integers(0, 5), max_size=3),
        st.booleans(),
    ),
    max_size=4,
)


@pytest.fixture
def in_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: a thread digests, in small pieces."""
    monkeypatch.setattr(fingerprint, "runs_beside", lambda device: True)
    monkeypatch.setattr(fingerprint, "PIECE_BYTES", 40)


def no_thread_remains() -> bool:
    end = time.monotonic() + 10
    while any("fingerprint" in thread.name for thread in threading.enumerate()):
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def create(folder: Path, **options: Any) -> Any:
    options = {"device": "cpu", **options}
    return create_engine(TrainConfig(engine="torch", model=str(folder), threads=1, **options))


def _module(weights: list[tuple[torch.dtype, list[int], bool]]) -> torch.nn.Module:
    module = torch.nn.Module()
    generator = torch.Generator().manual_seed(0)
    for number, (dtype, shape, is_transposed) in enumerate(weights):
        weight = torch.randn(shape, generator=generator).to(dtype)
        weight = weight.mT if is_transposed and weight.dim() > 1 else weight
        module.register_parameter(f"weight{number}", torch.nn.Parameter(weight))
    return module


@settings(max_examples=40)
@given(weights=_WEIGHTS, piece_bytes=st.sampled_from([8, 24, 1000]))
def test_a_thread_reads_what_the_caller_would(weights, piece_bytes):
    module, config = _module(weights), TrainConfig()
    expected = fingerprint.start(module, config, dtype=torch.float32, device=CPU)()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "runs_beside", lambda device: True)
        patch.setattr(fingerprint, "PIECE_BYTES", piece_bytes)
        assert fingerprint.start(module, config, dtype=torch.float32, device=CPU)() == expected


@pytest.mark.parametrize("options", [{}, {"lora_rank": 0}, {"dtype": "bfloat16"}])
def test_an_engine_has_the_same_digest(tiny_model, request, options):
    expected = create(tiny_model, **options).fingerprint()
    request.getfixturevalue("in_thread")
    engine = create(tiny_model, **options)
    assert engine.fingerprint() == expected
    assert no_thread_remains()


@pytest.mark.device
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_device_has_the_digest_of_the_processor(tiny_model, device, dtype):
    expected = create(tiny_model, dtype=dtype).fingerprint()
    assert create(tiny_model, dtype=dtype, device=device).fingerprint() == expected


@pytest.mark.usefixtures("in_thread")
def test_training_waits_for_the_digest(tiny_model, monkeypatch):
    """The thread has read everything when the engine exists, whose first step may change the weights."""
    pieces, prepare = fingerprint._pieces, TorchEngine._prepare
    prepared, ended = threading.Event(), []

    def read_late(*arguments):
        prepared.wait()
        time.sleep(0.01)
        yield from pieces(*arguments)
        ended.append(None)

    def then_read(*arguments, **options):
        prepare(*arguments, **options)
        prepared.set()

    monkeypatch.setattr(fingerprint, "_pieces", read_late)
    monkeypatch.setattr(TorchEngine, "_prepare", then_read)
    engine = create(tiny_model, lora_rank=0)
    assert len(ended) == len(dict(engine.model.named_parameters()))


@pytest.mark.usefixtures("in_thread")
def test_weights_that_are_not_finite_have_one_error(tiny_model, monkeypatch):
    """Also where the trial of the model fails for them, in the caller's thread."""
    load = model.load_model

    def load_broken(*arguments, **options):
        loaded: Any = load(*arguments, **options)
        loaded.model.embed_tokens.weight.data[:] = float("nan")
        return loaded

    monkeypatch.setattr(model, "load_model", load_broken)
    with pytest.raises(ModelError, match=r"embed_tokens\.weight holds numbers that are not finite"):
        create(tiny_model)
    assert no_thread_remains()


@pytest.mark.usefixtures("in_thread")
def test_an_engine_that_cannot_be_created_leaves_no_thread(tiny_model):
    with pytest.raises(ConfigError, match="--target-modules"):
        create(tiny_model, target_modules=("nowhere",))
    assert no_thread_remains()


def test_a_model_loaded_to_its_device_is_the_model(tiny_model, monkeypatch):
    """As on CUDA: transformers puts each weight there, and leaves no hooks behind."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": CPU, "quantized": "none"}
    expected = model.load_model(str(tiny_model), **options)
    monkeypatch.setattr(quantization, "loading_options", lambda *_, **__: {"device_map": {"": CPU}})
    loaded = model.load_model(str(tiny_model), **options)
    ids = torch.arange(7)[None]
    assert torch.equal(loaded(ids).logits, expected(ids).logits)
    assert not any(hasattr(module, "_hf_hook") for module in loaded.modules())
    assert not loaded.training
