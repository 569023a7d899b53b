"""What a process has taken of the system."""

from __future__ import annotations

import gc
import os
import platform
import sys
import threading
import time
from typing import NamedTuple

from distrust.checkpoint.memory import resident_bytes

_SETTLING_SECONDS = 0.2
_LINUX = platform.system() == "Linux"


class Gauges(NamedTuple):
    """What a process has taken.

    Attributes:
        resident: bytes of memory.
        blocks: that Python has given out: exact, where resident memory goes in pages and arenas.
        descriptors: open ones.
        threads: the system's, where it tells.
    """

    resident: int
    blocks: int
    descriptors: int
    threads: int


def read(usual_threads: int | None = None) -> Gauges:
    """What this process has taken, without its garbage.

    Args:
        usual_threads: as many as there were before. A thread that was joined may take the system a moment
            to take apart: it is waited for.
    """
    gc.collect()
    deadline = time.monotonic() + _SETTLING_SECONDS
    while (found := threads()) != (usual_threads or found) and time.monotonic() < deadline:
        time.sleep(0.001)
    return Gauges(resident_bytes(), sys.getallocatedblocks(), _descriptors(), found)


def threads() -> int:
    """How many there are."""
    if _LINUX:
        return len(os.listdir("/proc/self/task"))
    return threading.active_count()


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd" if _LINUX else "/dev/fd"))
