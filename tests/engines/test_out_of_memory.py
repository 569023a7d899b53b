"""Exhausted memory: one line that says what to lower, wherever it happens; other errors pass as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from small_batches import make_batch

from distrust import TrainConfig
from distrust.engines import create_engine, generate
from distrust.engines import runtime as engines_runtime
from distrust.engines.out_of_memory import out_of_memory
from distrust.engines.torch import adapter, layers, runtime
from distrust.engines.torch.model_runner import ModelRunner
from distrust.engines.torch.row import Row
from distrust.errors import OutOfMemory


def failed_call(code: int, text: str) -> torch.AcceleratorError:
    """What torch raises for a failed call of CUDA: its code is set after it is created."""
    error = torch.AcceleratorError(f"CUDA error: {text}\nCUDA kernel errors might be asynchronously reported")
    error.error_code = code
    return error


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1.00 GiB free")


@pytest.mark.parametrize(
    "error",
    [
        CUDA,
        MemoryError(),
        failed_call(2, "out of memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB, max allowed: 9 GB)"),
        RuntimeError("Invalid buffer size: 24.00 GiB"),
        RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum"),
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU)"),
    ],
    ids=repr,
)
def test_errors_that_say_so_become_one_line(error):
    with (
        pytest.raises(OutOfMemory, match=r"--batch-size.*--gradient-checkpointing") as caught,
        out_of_memory("step"),
    ):
        raise error
    assert "\n" not in str(caught.value)
    assert "()" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_what_a_cpu_raises_is_recognized():
    with pytest.raises(OutOfMemory, match="can't allocate memory"), out_of_memory("step"):
        torch.empty(1 << 60)


@pytest.mark.parametrize(
    "error",
    [
        failed_call(700, "an illegal memory access was encountered"),
        failed_call(701, "too many resources requested for launch"),
        failed_call(710, "device-side assert triggered"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        NotImplementedError("The operator is not implemented for the MPS device: out of memory"),
        RecursionError("maximum recursion depth exceeded"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),
    ],
    ids=repr,
)
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as caught, out_of_memory("step"):
        raise error
    assert caught.value is error
    assert error.__cause__ is None


@pytest.fixture
def config(tiny_model):
    return TrainConfig(engine="torch", device="cpu", model=str(tiny_model), lora_rank=2, threads=1)


@contextlib.contextmanager
def exhaust(target: object, name: str, *, match: str) -> Iterator[None]:
    """Makes a function raise torch's error for an exhausted GPU, which must become the one that matches."""

    def fail(*arguments: object, **options: object) -> None:
        raise CUDA

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, fail)
        with pytest.raises(OutOfMemory, match=match):
            yield


LOAD = r"to load the model: .*--model.*--quantization 4bit.*--dtype bfloat16 \(CUDA out of memory"


def test_loading(config):
    from transformers import PreTrainedModel

    with exhaust(torch.nn.Module, "to", match=LOAD):
        create_engine(config)
    with exhaust(PreTrainedModel, "from_pretrained", match=LOAD):
        create_engine(config)


def test_adding_an_adapter(config):
    with exhaust(adapter, "add_adapter", match=LOAD):
        create_engine(config)


def test_a_trial_that_does_not_fit_changes_nothing_silently(config):
    """It does not mean that the model cannot be packed or fused, which would change the bits of the run."""
    for method in ("_run_trial", "_run"):
        with exhaust(ModelRunner, method, match=LOAD):
            create_engine(config)
    with exhaust(layers, "_forward", match=LOAD):
        create_engine(config)


def test_a_failed_trial_of_packing_is_an_error_only_if_memory_ran_out():
    def fails_with(error: Exception) -> bool:
        def forward(*arguments: object) -> None:
            raise error

        return engines_runtime.keeps_examples_independent(forward, vocabulary=100)

    for error in (CUDA, failed_call(2, "out of memory")):
        with pytest.raises(type(error)):
            fails_with(error)
    assert fails_with(failed_call(710, "device-side assert triggered")) is False


def test_each_part_of_a_step(config):
    engine = create_engine(config)
    batch = make_batch()
    with exhaust(Row, "of", match="for a step: lower --batch-size"):
        engine.prepare(batch)
    with exhaust(runtime, "all_finite", match="for a step: lower --batch-size"):
        engine.is_finite()
    with exhaust(engine._runner, "evaluate", match="to evaluate a batch: lower --batch-size"):
        engine.evaluate(batch)
    with exhaust(engine.model, "generate", match="to generate: .*--max-new-tokens"):
        generate(engine, "The", max_new_tokens=1, temperature=0.0, seed=0)
    engine.begin_micro_step(seed=0, step=1, micro_step=0)
    engine.micro_step(batch, tokens=batch.tokens)
    with exhaust(torch.nn.utils, "clip_grad_norm_", match="for a step: lower --batch-size"):
        engine.clip_gradients(1.0)
    with exhaust(engine._optimizer, "step", match="for the optimizer and its moments: .*--lora-rank"):
        engine.update(learning_rate=1e-3)
    with exhaust(engine._optimizer, "load_state_dict", match=LOAD):
        engine.load_state(engine.state())
    with exhaust(engine._runner, "train", match="for a step: lower --batch-size"):
        engine.micro_step(batch, tokens=batch.tokens)


def test_memory_of_cuda_is_read_once(monkeypatch):
    calls = []

    def stats(device):
        calls.append(device)
        sizes = {"allocated_bytes": (1, 2), "reserved_bytes": (3, 4), "active_bytes": (5, 6)}
        return {
            f"{name}.all.{when}": size
            for name, pair in sizes.items()
            for when, size in zip(("current", "peak"), pair, strict=True)
        }

    monkeypatch.setattr(torch.cuda, "memory_stats", stats)
    use = runtime.device_memory(torch.device("cuda", 1))
    assert (use.allocated, use.allocated_peak, use.reserved, use.reserved_peak) == (1, 2, 3, 4)
    assert calls == [torch.device("cuda", 1)]


def test_memory_of_mps_has_no_peak_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 2)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 5)
    use = runtime.device_memory(torch.device("mps"))
    assert (use.allocated, use.allocated_peak, use.reserved, use.reserved_peak) == (2, 5, 5, 5)


def test_a_cpu_has_no_memory_of_its_own():
    assert runtime.device_memory(torch.device("cpu")) is None
