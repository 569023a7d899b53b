"""How fast training is, beside other trainers, and what weighting adds to a step."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.setting import Setting
from benchmarks.training.process import measure

Figures = dict[str, Any]
#: Of matrix products for a token and a frozen weight: forward, and backward to the activations.
FLOP_PER_WEIGHT = 4


def train(setting: Setting, size: str, trainer: str) -> Figures:
    """Tokens per second without padding, peak memory, and arithmetic per second as LoRA needs it at least."""
    work = setting.work(size)
    figures = measure(trainer, work, python=setting.python)
    tflops = FLOP_PER_WEIGHT * work.size.matrix_parameters * figures["speed"] / 1e12
    return {
        "dtype": work.dtype,
        "tokens_per_second": figures["speed"],
        "tflops": tflops,
        "peak_gib": figures["peak_bytes"] / 2**30,
        **({"reserved_gib": figures["reserved_bytes"] / 2**30} if "reserved_bytes" in figures else {}),
        "step_ms": figures["seconds"] / work.size.steps * 1e3,
        "first_step_s": figures["first_step_seconds"],
        **({"stall_ms": figures["stall_seconds"] * 1e3} if "stall_seconds" in figures else {}),
    }


def compare_weighting(setting: Setting, size: str) -> Figures:
    """What weighting adds to a step, in pairs of steps: the median and its 95 % interval, in percent."""
    from benchmarks.training import weighting as pairs

    work = setting.work(size)
    return {"dtype": work.dtype, **pairs.measure(work, 3 if setting.tiny else 24)}
