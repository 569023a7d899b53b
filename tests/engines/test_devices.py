"""``--device`` and ``--dtype``, and what a run records of a GPU, shown with a fake one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distrust import CheckpointManager, DistrustWarning, TrainConfig
from distrust.engines.torch import runtime
from distrust.errors import ConfigError
from distrust.run_record import RunRecord
from distrust.training.process import exclusive_run
from distrust.training.resume import merge_saved_options

CUDA = torch.device("cuda", 1)
#: Names by which torch reads the allocator's options, of CUDA or HIP.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


@pytest.fixture
def two_gpus(monkeypatch) -> None:
    """Fakes what torch says of two GPUs, the second without bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: ["Fast", "Slow"][device.index or 0])
    chosen = []

    @contextlib.contextmanager
    def device(device: torch.device):
        chosen.append(device.index or 0)
        yield

    def is_supported(*, including_emulation: bool) -> bool:
        return chosen[-1] == 0 or including_emulation

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    for name in (*ALLOCATOR, "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


def test_a_gpu_is_chosen_by_its_number(two_gpus):
    assert runtime.choose_device("cuda:1") == CUDA
    assert runtime.choose_device("auto") == runtime.choose_device("cuda") == torch.device("cuda")
    available = "give --device with one of: auto, cuda, cuda:0, cuda:1, cpu"
    with pytest.raises(ConfigError, match=f"^--device cuda:2: not available to torch here; {available}$"):
        runtime.choose_device("cuda:2")


def test_mlx_takes_no_number():
    pytest.importorskip("mlx.core")
    from distrust.engines.mlx.runtime import choose_device

    with pytest.raises(
        ConfigError, match=r"^--device cuda:1: not available to mlx here; give --device with .*$"
    ):
        choose_device("cuda:1")


def test_variables_are_set_for_cuda_only(two_gpus):
    runtime.choose_device("cpu")
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    runtime.choose_device("cuda")
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("name", ALLOCATOR)
def test_the_users_allocator_is_kept(two_gpus, monkeypatch, name):
    monkeypatch.setenv(name, "backend:native")
    runtime.choose_device("cuda")
    assert {n: v for n, v in os.environ.items() if "ALLOC_CONF" in n} == {name: "backend:native"}


def test_auto_is_bfloat16_where_the_device_has_instructions_for_it(two_gpus, recwarn):
    fast, slow, cpu = torch.device("cuda"), CUDA, torch.device("cpu")
    assert runtime.choose_dtype("auto", fast) == runtime.choose_dtype("bfloat16", fast) == "bfloat16"
    for dtype in ("float32", "bfloat16"):
        assert runtime.choose_dtype(dtype, cpu) == dtype
    for device in (fast, slow, cpu):
        assert runtime.choose_dtype("float32", device) == "float32"
    assert runtime.choose_dtype("auto", cpu) == runtime.choose_dtype("auto", torch.device("mps")) == "float32"
    assert not recwarn.list
    with pytest.warns(
        DistrustWarning,
        match="^--dtype auto: Slow has no instructions for bfloat16, so it computes in float32",
    ):
        assert runtime.choose_dtype("auto", slow) == "float32"
    with pytest.warns(
        DistrustWarning, match="^--dtype bfloat16: Slow has no instructions for bfloat16, so torch emulates"
    ):
        assert runtime.choose_dtype("bfloat16", slow) == "bfloat16"


def test_a_run_says_once_that_bfloat16_is_slow(two_gpus):
    """Although a memory reset builds the engine again."""
    for _run in range(2):
        with exclusive_run(Path("run")), pytest.warns(DistrustWarning) as caught:
            assert [runtime.choose_dtype("bfloat16", CUDA) for _ in range(3)] == ["bfloat16"] * 3
        assert len(caught) == 1


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_a_run_that_records_no_dtype_was_in_float32(dtype):
    config = TrainConfig(dtype=dtype)
    saved = {name: value for name, value in config.with_effect("result").items() if name != "dtype"}
    merged, differences = merge_saved_options(config, RunRecord(config=saved, settings={}))
    assert merged.dtype == "float32"
    assert differences == (["--dtype was float32, is bfloat16"] if dtype == "bfloat16" else [])


def record_of(out: Path) -> RunRecord:
    """The record of a run's newest checkpoint."""
    return RunRecord.from_header(CheckpointManager(out / "checkpoints").scan().files[-1].header)


def test_a_run_records_what_auto_was_and_keeps_it(train, tmp_path, monkeypatch):
    with monkeypatch.context() as on_gpu:  # which computes in bfloat16
        on_gpu.setattr(runtime, "choose_dtype", lambda requested, _: requested.replace("auto", "bfloat16"))
        train(tmp_path / "run", dtype="auto", stop_after=1, max_steps=2)
    assert record_of(tmp_path / "run").config["dtype"] == "bfloat16"
    assert 'dtype = "bfloat16"\n' in (tmp_path / "run" / "config.toml").read_text()
    ended, _ = train(tmp_path / "run", dtype="auto", max_steps=2)
    stated, _ = train(tmp_path / "stated", dtype="bfloat16", max_steps=2)
    assert ended.state_digest == stated.state_digest
    # On a CPU it is float32, and records the same as a run that says so.
    ended, _ = train(tmp_path / "cpu", dtype="auto", max_steps=2)
    assert record_of(tmp_path / "cpu").config["dtype"] == "float32"
    stated, _ = train(tmp_path / "float32", dtype="float32", max_steps=2)
    assert ended.state_digest == stated.state_digest


def test_what_computes_is_described(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    described = runtime.describe(CUDA, threads=3)
    described.pop("driver", None)  # where one is loaded
    assert described == {
        "device": "Slow",
        "matmul_precision": "highest",
        "cuda": "13.0",
        "cudnn": 91900,
        "attention_kernels": ["flash", "mem_efficient", "math"],
    }
    on_cpu = runtime.describe(torch.device("cpu"), threads=3)
    assert on_cpu.keys() == {"device", "matmul_precision", "cpu", "threads"}
    assert on_cpu["threads"] == 3


def test_a_resume_compares_what_both_sessions_recorded(train, tmp_path, monkeypatch, recwarn):
    def on_gpu(**entries: Any) -> Any:
        gpu = {"device": "Fast", "matmul_precision": "highest", "cudnn": 91900, "driver": "580.1"}
        return lambda device, threads: {name: v for name, v in {**gpu, **entries}.items() if v is not None}

    # An earlier version recorded the host, and neither cuDNN nor the driver.
    old = on_gpu(cudnn=None, driver=None, cpu="AVX512", threads=16)
    sessions = [(old, 1), (on_gpu(), 2), (on_gpu(driver="590.2", device="Slow"), 3)]
    for describe, step in sessions[:2]:
        monkeypatch.setattr(runtime, "describe", describe)
        train(tmp_path, stop_after=step)
    assert not recwarn.list
    monkeypatch.setattr(runtime, "describe", sessions[2][0])
    with pytest.warns(DistrustWarning) as caught:
        train(tmp_path, stop_after=3)
    assert [str(one.message) for one in caught] == [
        "no longer bit-identical: device was Fast, is Slow",
        "no longer bit-identical: driver was 580.1, is 590.2",
    ]


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
shapes = st.lists(st.lists(finite, max_size=4), min_size=1, max_size=4)


@given(shapes, st.sampled_from([float("nan"), float("inf"), float("-inf")]), st.data())
def test_all_finite_agrees_with_numpy(values, bad, data):
    """Also where a sum of finite numbers overflows, by both methods."""
    tensors = [torch.tensor(value, dtype=torch.float32) for value in values]
    for on_cpu in (True, False):
        assert runtime.all_finite(tensors, on_cpu=on_cpu)
        assert runtime.all_finite([*tensors, torch.full((3,), 3e38)], on_cpu=on_cpu)
    index = data.draw(st.integers(0, len(tensors) - 1))
    tensors[index] = torch.cat([tensors[index], torch.tensor([bad])])
    assert not np.isfinite(torch.cat(tensors).numpy()).all()
    for on_cpu in (True, False):
        assert not runtime.all_finite(tensors, on_cpu=on_cpu)
