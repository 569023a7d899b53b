"""The system resources that a process uses."""

from __future__ import annotations

import gc
import os
import platform
import sys
import threading
import time
from typing import NamedTuple

from distrust.checkpoint.memory import resident_bytes

_THREAD_END_SECONDS = 0.2
_LINUX = platform.system() == "Linux"


class Resources(NamedTuple):
    """What a process uses."""

    resident: int  # bytes of memory
    blocks: int  # that Python has allocated; exact, while resident memory changes by pages and arenas
    descriptors: int  # open ones
    threads: int  # as the system counts them, where it does


def read(expected_threads: int | None = None) -> Resources:
    """What this process uses, after a garbage collection.

    Args:
        expected_threads: the usual number; the system may take a moment to remove a thread that was joined.
    """
    gc.collect()
    deadline = time.monotonic() + _THREAD_END_SECONDS
    while (threads := count_threads()) != (expected_threads or threads) and time.monotonic() < deadline:
        time.sleep(0.001)
    descriptors = len(os.listdir("/proc/self/fd" if _LINUX else "/dev/fd"))
    return Resources(resident_bytes(), sys.getallocatedblocks(), descriptors, threads)


def count_threads() -> int:
    if _LINUX:
        return len(os.listdir("/proc/self/task"))
    return threading.active_count()
