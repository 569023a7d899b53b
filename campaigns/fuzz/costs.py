"""What it costs to read a file: time and memory, measured in a process of its own for each.

The memory is proven, not estimated: the process may not take more address space than it is allowed
(RLIMIT_AS), so whoever wanted more would fail. How much it took is what the kernel counted.
"""

from __future__ import annotations

import gc
import os
import resource
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from distrust.errors import DistrustError

#: No file of a campaign takes as long to read, on the slowest machine: it hangs.
HANG_SECONDS = 300
#: What a process may take whatever the file: stacks of threads, pieces of the allocator.
FREE_BYTES = 16 << 20


class Cost(NamedTuple):
    """What one answer cost.

    Attributes:
        answer: ``well``, or the kind of the error.
        seconds: of the processor.
        nbytes: of memory beyond what the process had before: resident at the highest point.
    """

    answer: str
    seconds: float
    nbytes: int


class Died(Exception):
    """The process that was measured gave no answer; what it died of."""


def measured(use: Callable[[], Any], *, allowed: int) -> Cost:
    """Do something in a forked process, and say what it cost.

    Args:
        use: what to do; an error of the library is an answer, too.
        allowed: bytes of address space beyond what the process has before.

    Raises:
        Died: if there is no answer, or none in time.
    """
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(use, allowed, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(HANG_SECONDS):
            raise Died(f"no answer within {HANG_SECONDS} s")
        answer = receiver.recv()
    except EOFError:
        process.join()
        raise Died(f"the process died: exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    assert isinstance(answer, Cost)
    return answer


def limit_memory(allowed: int) -> None:
    """From now on this process gets so many bytes of address space beyond what it has, and no more."""
    limit = _of_this_process("VmSize") + allowed
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def _child(use: Callable[[], Any], allowed: int, sender: Connection) -> None:
    gc.collect()
    before = _of_this_process("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest point so far is forgotten
    limit_memory(allowed)
    began = time.process_time()
    try:
        use()
        answer = "well"
    except DistrustError as error:
        answer = type(error).__name__
    except BaseException as error:
        answer = f"not promised: {type(error).__name__}: {str(error)[:500]}"
    cost = Cost(answer, time.process_time() - began, max(0, _of_this_process("VmHWM") - before))
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    sender.send(cost)
    sender.close()
    os._exit(0)


def _of_this_process(what: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(what)
