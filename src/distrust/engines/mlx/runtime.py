"""Device, random generator, memory and compiler of mlx."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from distrust.checkpoint.memory import trim
from distrust.config import TrainConfig
from distrust.contract import DeviceMemory
from distrust.engines import runtime
from distrust.errors import ConfigError


def choose_device(requested: str) -> mx.Device:
    """The device that ``--device`` selects."""
    cuda = getattr(mx, "cuda", None)  # not in every build
    available = {
        "mps": mx.metal.is_available(),
        "cuda": cuda is not None and bool(cuda.is_available()),
        "cpu": True,
    }
    on_cpu = runtime.choose_device(requested, available, engine="mlx") == "cpu"
    return mx.Device(mx.cpu if on_cpu else mx.gpu, 0)


def reseed(*, seed: int, step: int, micro_step: int) -> None:
    """Seed the generator by these three."""
    mx.random.seed(runtime.micro_step_seed(seed=seed, step=step, micro_step=micro_step))


def rng_state() -> dict[str, Any]:
    """Key of the generator: uint32[2]."""
    return {"mlx": mx.random.state[0]}  # type: ignore[index]


def load_rng_state(states: Mapping[str, Any]) -> None:
    """Inverse of :func:`rng_state`; ignores states of other engines."""
    if "mlx" in states:
        high, low = (int(half) for half in states["mlx"].tolist())
        mx.random.seed(high << 32 | low)  # the key that a seed produces is the seed itself


def device_memory(device: mx.Device) -> DeviceMemory | None:
    """Memory used on the device; None for the CPU, whose memory is the host's."""
    if device.type == mx.DeviceType.cpu:
        return None
    allocated, peak = mx.get_active_memory(), mx.get_peak_memory()
    reserved = allocated + mx.get_cache_memory()
    return DeviceMemory(allocated, peak, reserved, max(reserved, peak))  # no peak includes the cache


def release_memory() -> None:
    """Return unreferenced memory to the device and to the system."""
    gc.collect()  # modules and compiled functions form reference cycles
    mx.clear_cache()
    trim()


def should_compile(config: TrainConfig, device: mx.Device) -> bool:
    """Whether to compile the steps.

    Always on a GPU: kernels build instantly, and each saves a pass over memory. On a CPU only with
    ``--compile``: mlx runs a C++ compiler for every kernel there, and the steps are no faster.
    """
    if device.type != mx.DeviceType.cpu:
        return True
    if not config.compile:
        return False
    try:
        mx.eval(mx.compile(lambda x: mx.exp(x) * x)(mx.ones(3)))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"--compile: mlx cannot compile on this CPU; leave it out ({reason})") from error
    return True
