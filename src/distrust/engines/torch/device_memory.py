"""What torch has allocated on a device, and how it is given back."""

from __future__ import annotations

import gc

import torch

from distrust.checkpoint.memory import trim
from distrust.contract import MemoryUse


def allocated(device: torch.device) -> MemoryUse | None:
    """Bytes allocated on the device; None for the CPU, whose memory is the host's."""
    if device.type == "cuda":
        return MemoryUse(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        now = torch.mps.current_allocated_memory()
        return MemoryUse(now, now)  # it knows of no peak
    return None


def release(device: torch.device) -> None:
    """Give back what nobody holds any more: to the device, and to the system."""
    gc.collect()  # modules and hooks hold each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    trim()
