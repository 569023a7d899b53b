"""What mlx has allocated, and how it is given back."""

from __future__ import annotations

import gc

import mlx.core as mx

from distrust.checkpoint.memory import trim
from distrust.contract import MemoryUse


def allocated(device: mx.Device) -> MemoryUse | None:
    """Bytes allocated on the device, mlx's cache included; None for the CPU, whose memory is the host's."""
    if device.type == mx.DeviceType.cpu:
        return None
    now = mx.get_active_memory() + mx.get_cache_memory()
    return MemoryUse(now, max(now, mx.get_peak_memory()))


def release() -> None:
    """Give back what nobody holds any more: to the device, and to the system."""
    gc.collect()  # modules and compiled functions hold each other
    mx.clear_cache()
    trim()
