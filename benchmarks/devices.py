"""What a benchmark asks of the device it computes on: its name, its end of work, its memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

LIBRARIES = ("torch", "transformers", "peft", "trl", "liger-kernel", "bitsandbytes", "torch-checkpointing")

TRIAL = "import torch; print(torch.__version__, torch.version.cuda, flush=True); torch.ones(1, device='cuda')"
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC", "cuLaunchKernel")
ATTENTION = ("flash", "fmha", "cudnn", "sdpa", "attention", "attn")  # in the names of kernels


def describe_machine(device: str, python: str = sys.executable) -> dict[str, str]:
    """Card, driver, and the versions of what computes; torch, which takes seconds, only to see that it can.

    Raises:
        LookupError: there is no GPU, or the torch of ``python`` cannot use it.
    """
    machine = {"card": platform.machine(), "driver": platform.system(), "cores": str(os.cpu_count())}
    if device.startswith("cuda"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            answer = ""
        name, comma, driver = answer.partition("\n")[0].partition(",")
        if not comma:
            raise LookupError("nvidia-smi finds no GPU here; without one: --device cpu --tiny")
        machine |= {"card": name, "driver": driver.strip()}
        _try_torch(python)
    machine["python"] = platform.python_version()
    for library in LIBRARIES:
        try:
            machine[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return machine


def _try_torch(python: str) -> None:
    trial = subprocess.run([python, "-W", "ignore", "-c", TRIAL], capture_output=True, text=True)
    version, _, cuda = trial.stdout.strip().partition(" ")
    if cuda == "None":
        install = f"pip install --force-reinstall torch=={version.partition('+')[0]}"
        raise LookupError(f"torch {version} has no CUDA: install one that has, from PyPI on Linux: {install}")
    if trial.returncode:
        reasons = [line for line in trial.stderr.splitlines() if "Error" in line]
        raise LookupError(f"{python} cannot use the GPU: {reasons[-1] if reasons else trial.stderr[-200:]}")


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.startswith("cuda"):
        _torch().cuda.synchronize()


def release_memory(device: str) -> None:
    """Give back what the allocator keeps of a GPU's memory for later."""
    if device.startswith("cuda"):
        _torch().cuda.empty_cache()


def seconds(call: Callable[[], object], device: str, *, warm_up: int = 0, runs: int = 1) -> float:
    """The median time of a call until the device has done it, by the host's clock."""
    times = []
    for _ in range(warm_up + runs):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[warm_up:])


def count_kernels(call: Callable[[], object], device: str) -> dict[str, Any]:
    """How often a call launches a kernel, fills a tensor and waits for a number; its kernels of attention."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.startswith("cuda") else [])]
    with profile(activities=activities) as profiler:
        call()
        synchronize(device)
    counts = {row.key: row.count for row in profiler.key_averages()}
    return {
        "launches": sum(counts.get(name, 0) for name in LAUNCHES),
        "fills": counts.get("aten::fill_", 0),
        "waits": counts.get("aten::_local_scalar_dense", 0),
        "attention_kernels": sorted(key[:60] for key in counts if any(name in key for name in ATTENTION))[:6],
    }


def memory_figures(device: str) -> dict[str, float]:
    """The most bytes so far: ``peak_bytes`` of the process, or of its tensors on a GPU.

    On a GPU also ``reserved_bytes``, with what the allocator keeps for itself.
    """
    if device.startswith("cuda"):
        cuda = _torch().cuda
        return {"peak_bytes": cuda.max_memory_allocated(), "reserved_bytes": cuda.max_memory_reserved()}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def _torch() -> Any:
    import torch

    return torch
