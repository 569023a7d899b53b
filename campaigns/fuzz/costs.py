"""What it costs to read a file: time and memory, measured in a process of its own for each.

The memory bound is proven, not estimated: the process may not take more address space than it is allowed
(RLIMIT_AS), so a reader that needs more fails. How much it took is what the kernel counted.
"""

from __future__ import annotations

import gc
import resource
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from campaigns import child
from distrust.errors import DistrustError

#: What a process may take whatever the file: stacks of threads, pieces of the allocator.
FREE_BYTES = 16 << 20


class Cost(NamedTuple):
    """The cost of one answer."""

    answer: str  # ``ok``, or the kind of the error
    seconds: float  # of the processor
    nbytes: int  # the peak of resident memory, beyond what the process had before


def measure(use: Callable[[], Any], *, allowed: int) -> Cost:
    """Call a function in a forked process, which raises CounterExample if it dies or hangs.

    Args:
        use: what to do; an error of the library is an answer, too.
        allowed: bytes of address space beyond what the process has before.
    """
    cost = child.call(lambda: _measure(use, allowed))
    assert isinstance(cost, Cost)
    return cost


def worker(
    work: Callable[[int], Counter[str]], *, allowed: int, prepare: Callable[[], object] = tuple
) -> child.ForkedWorker:
    """A process for many cases, which may take so many bytes beyond what it has once it is prepared.

    Args:
        work: called with the number of each case; returns what was counted.
        allowed: bytes of address space.
        prepare: called at the beginning.
    """

    def setup() -> None:
        prepare()
        limit_memory(allowed)

    return child.ForkedWorker(work, setup=setup)


def limit_memory(allowed: int) -> None:
    """Limit the address space of this process to what it has now and so many bytes more."""
    limit = _status_bytes("VmSize") + allowed
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def _measure(use: Callable[[], Any], allowed: int) -> Cost:
    gc.collect()
    resident = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    limit_memory(allowed)
    began = time.process_time()
    try:
        use()
        answer = "ok"
    except DistrustError as error:
        answer = type(error).__name__
    except BaseException as error:
        answer = f"not allowed: {type(error).__name__}: {str(error)[:500]}"
    cost = Cost(answer, time.process_time() - began, max(0, _status_bytes("VmHWM") - resident))
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return cost


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)
