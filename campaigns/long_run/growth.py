"""The resources that a process uses, and what counts as growth or as a slowdown."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from campaigns.campaign import Campaign, require
from distrust.checkpoint.memory import resident_bytes

_THREAD_END_SECONDS = 0.2  # that a joined thread may still be listed
_LINUX = platform.system() == "Linux"  # has /proc


class Resources(NamedTuple):
    resident: int  # bytes of memory
    blocks: int  # that Python has allocated; exact, while resident memory changes by pages and arenas
    descriptors: int  # open ones
    threads: int  # as the system counts them, where it does


def read_resources(expected_threads: int | None = None) -> Resources:
    gc.collect()
    # The system may take a moment to remove a thread that was joined.
    deadline = time.monotonic() + _THREAD_END_SECONDS
    while (threads := count_threads()) != (expected_threads or threads) and time.monotonic() < deadline:
        time.sleep(0.001)
    descriptors = len(os.listdir("/proc/self/fd" if _LINUX else "/dev/fd"))
    return Resources(resident_bytes(), sys.getallocatedblocks(), descriptors, threads)


def count_threads() -> int:
    if _LINUX:
        return len(os.listdir("/proc/self/task"))
    return threading.active_count()


#: Bytes of resident memory that the last quarter may have more than the second. The allocator takes and
#: returns memory in arenas of 1 MiB and less, and threads have stacks of their own: a run without a leak was
#: seen to differ by 0.3 MiB. A leak of 250 bytes per save is found in 20,000 saves.
MEMORY_BOUND = 2 << 20
#: Python's blocks that the last quarter may have more than the second. Caches and free lists vary by about a
#: hundred. A leak of one object per save is found in 1,000 saves.
BLOCKS_BOUND = 300
#: How many times as long a save may take at the end, and how much processor time. Others who use the disk may
#: slow it down by more, so elapsed time may grow as much as that of a bare write, sync and rename.
LATENCY_BOUND = 1.5
#: Quarters of fewer samples are too small.
_LEAST_SAMPLES = 8

Samples = Sequence[dict[str, Any]]


def require_no_growth(
    campaign: Campaign, name: str, samples: Samples, *, allowed_bytes: int = 0, allowed_blocks: int = 0
) -> None:
    """Count what was measured, and find growth beyond the bounds and what is allowed for known reasons."""
    if len(samples) < _LEAST_SAMPLES:
        return
    quarter = len(samples) // 4
    second, last = samples[quarter : 2 * quarter], samples[-quarter:]
    for key in ("descriptors", "threads"):
        values = sorted({sample[key] for sample in samples[quarter:]})
        require(len(values) == 1, f"{name}: {key} differ from sample to sample: {values}")
        campaign.counts[f"{name}: {key}, at each sample"] = values[0]
    findings = []
    bounds = {"blocks": BLOCKS_BOUND + allowed_blocks, "resident": MEMORY_BOUND + allowed_bytes}
    for key, bound in bounds.items():
        growth = int(_median(last, key) - _median(second, key))
        campaign.counts[f"{name}: {key} at the end"] = int(_median(last, key))
        campaign.counts[f"{name}: {key} grown from the second quarter to the last"] = growth
        if growth > bound:
            findings.append(f"{key} grew by {growth:,} ({bound:,} allowed)")
    require(not findings, f"{name}: from the second quarter to the last, {', and '.join(findings)}")


def require_no_slowdown(campaign: Campaign, name: str, samples: Samples, *, enforce: bool) -> None:
    """Count how long saves took at the start and at the end; with ``enforce``, a slowdown is a finding."""
    if len(samples) < _LEAST_SAMPLES:
        return
    tenth = max(1, len(samples) // 10)
    first, last = samples[tenth : 2 * tenth], samples[-tenth:]
    ratios = {}
    for key in ("save", "returns", "disk", "cpu"):
        start, end = _median(first, key), _median(last, key)
        campaign.counts[f"{name}: {key}, µs at the start"] = round(start * 1e6)
        campaign.counts[f"{name}: {key}, µs at the end"] = round(end * 1e6)
        ratios[key] = end / start
    if enforce:
        save, disk, cpu = ratios["save"], ratios["disk"], ratios["cpu"]
        # A disk that others use now, and did not before, is slower for the probe, too.
        text = f"{name}: at the end, a save took {save:.2f} times as long, and the disk {disk:.2f} times"
        require(min(save, save / disk) <= LATENCY_BOUND, text)
        require(cpu <= LATENCY_BOUND, f"{name}: a save took {cpu:.2f} times the processor time at the end")


def _median(samples: Samples, key: str) -> float:
    return float(statistics.median(sample[key] for sample in samples))
