"""Device, random generators, memory and compiler of torch.

Dropout in micro-step m of step s depends on (seed, s, m) alone: nothing earlier, such as an evaluation or a
resume, can shift it. The generators' state is saved and restored all the same.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from distrust.checkpoint.memory import trim
from distrust.config import Device
from distrust.contract import MemoryUse
from distrust.engines import runtime
from distrust.errors import ConfigError, ErrorTranslator


def choose_device(requested: Device) -> torch.device:
    """The device that ``--device`` selects."""
    available: dict[Device, bool] = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    return torch.device(runtime.choose_device(requested, available, engine="torch"))


def prefer_determinism() -> None:
    """Select deterministic kernels; an operation that has none warns."""
    # cuBLAS reads this when it starts; without it, its matrix products may differ from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


@cache  # an earlier run of this process may have changed the number
def default_threads() -> int:
    """Threads that torch had chosen when the first engine of this process was created."""
    return torch.get_num_threads()


def reseed(*, seed: int, step: int, micro_step: int) -> None:
    """Seed the generators of every device by these three."""
    torch.manual_seed(runtime.micro_step_seed(seed=seed, step=step, micro_step=micro_step))


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of the generators of the CPU and of the device, as uint8 tensors."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = _accelerator(device).get_rng_state()
    return states


def load_rng_state(states: Mapping[str, Any], device: torch.device) -> None:
    """Inverse of :func:`rng_state`; ignores states of other devices and engines."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        _accelerator(device).set_rng_state(states[device.type])


def memory_use(device: torch.device) -> MemoryUse | None:
    """Bytes allocated on the device; None for the CPU, whose memory is the host's."""
    if device.type == "cuda":
        return MemoryUse(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        now = torch.mps.current_allocated_memory()
        return MemoryUse(now, now)  # MPS records no peak
    return None


def release_memory(device: torch.device) -> None:
    """Return unreferenced memory to the device and to the system."""
    gc.collect()  # modules and hooks form reference cycles
    if device.type != "cpu":
        _accelerator(device).empty_cache()
    trim()


def _accelerator(device: torch.device) -> Any:
    return getattr(torch, device.type)  # torch.cuda or torch.mps


def compile_layers(model: Any) -> int:
    """Have torch compile the repeated blocks of a model, each when it first runs; returns their number.

    One block at a time: blocks of one class share compiled code, and attention, which differs for each packed
    batch, stays outside the graphs.
    """
    block_classes = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in block_classes]
    if not blocks:
        raise ConfigError("--compile: this model does not declare its repeated blocks; leave it out")
    for block in blocks:
        block.compile(dynamic=True)  # one graph for all lengths
    return len(blocks)


def compiler_errors() -> ErrorTranslator:
    """Context manager that turns errors of torch's compiler into ConfigError."""

    def translate(error: Exception) -> Exception:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            return error
        reason = " ".join(str(error).split())[:200]
        return ConfigError(f"--compile: torch cannot compile this model here; leave it out ({reason})")

    return ErrorTranslator((Exception,), translate)
