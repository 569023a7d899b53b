"""What it costs to read a file: time and memory, and how they grow with the size of the file.

The memory bound is proven, not estimated: each measurement is a process with a limited address space
(RLIMIT_AS), so a reader that needs more fails. A damaged file is refused at its digest with no more memory
than its own size; a forged one is parsed, and may take :data:`TIMES_ITS_SIZE`.
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
from campaigns.campaign import CounterExample, never, require
from campaigns.fuzz import growing, invariants, readers
from distrust import CheckpointManager
from distrust.checkpoint import catalog
from distrust.checkpoint.compare import differences
from distrust.checkpoint.format import DIGEST_SLICE
from distrust.errors import DistrustError

#: What a process may take whatever the file: stacks of threads, pieces of the allocator.
FREE_BYTES = 16 << 20


class Cost(NamedTuple):
    """The cost of one answer."""

    answer: str  # ``ok``, or the kind of the error
    seconds: float  # of the processor
    nbytes: int  # the peak of resident memory, beyond what the process had before


def measure(use: Callable[[], Any], *, allowed: int) -> Cost:
    """Call a function in a forked process, with ``allowed`` bytes of address space beyond what it has before.

    An error of the library is an answer, too. Raises CounterExample if the process dies or hangs.
    """
    cost: Cost = child.call(lambda: _measure(use, allowed))
    return cost


def worker(
    work: Callable[[int], Counter[str]], *, allowed: int, prepare: Callable[[], object] = tuple
) -> child.ForkedWorker:
    """A process for many cases, which may take so many bytes beyond what it has once it is prepared."""

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
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


#: Of a forged file, in address space, with what Python's allocator holds in reserve.
TIMES_ITS_SIZE = 48
#: A file four times as large may take twelve times as long, since caches are small.
STEEPEST = 12.0
#: Shorter times are too inexact.
LEAST_SECONDS = 0.2
_DAMAGED_FREE_BYTES = 4 << 20  # beyond the size of the file


def check_growth(name: str, directory: readers.Directory, largest: int) -> int:
    """Read one family; returns how many answers were measured."""
    measured: list[dict[str, Cost]] = []
    size = 0
    for share in (4, 2, 1):
        raw = growing.GROWING[name](largest // share)
        size = len(raw)
        _require_damage_is_cheap(name, raw, directory)
        directory.hostile.unlink(missing_ok=True)
        directory.hostile.write_bytes(raw)
        measured.append({})
        for use in _uses(directory):
            measured[-1][use] = _measure_use(name, use, directory, size)
            if share == 1:
                _require_no_steeper(f"{name}: {use}", measured[0][use].seconds, measured[-1][use].seconds)
    slowest, slowest_cost = max(measured[-1].items(), key=lambda item: item[1].seconds)
    heaviest, heaviest_cost = max(measured[-1].items(), key=lambda item: item[1].nbytes)
    print(
        f"{name}: {size:,} bytes: at most {slowest_cost.seconds:.2f} s ({slowest}) and "
        f"{heaviest_cost.nbytes / size:.1f} times its size ({heaviest}): {heaviest_cost.answer}",
        flush=True,
    )
    return len(measured) * (len(measured[0]) + 1)


def _require_no_steeper(description: str, first: float, last: float) -> None:
    text = f"{first:.2f} s, and {last:.2f} s where the file is four times as large"
    require(last <= max(LEAST_SECONDS, STEEPEST * first), f"{description}: {text}")


def _uses(directory: readers.Directory) -> dict[str, Callable[[], Any]]:
    path = directory.hostile
    manager = CheckpointManager(directory.path)
    return {
        "inspect": lambda: manager.inspect(path).tensors,
        "validate": lambda: manager.validate(path),
        "load": lambda: manager.load(path),
        "load lazily": lambda: readers.touch_all(manager.load(path, mmap=True, verify="lazy")),
        "differences": lambda: differences(catalog.read_header(path), directory.valid),
        "distrust show": lambda: readers.command("show", path, "--tensors"),
    }


def _measure_use(name: str, use: str, directory: readers.Directory, size: int) -> Cost:
    allowed = FREE_BYTES + TIMES_ITS_SIZE * size
    cost = _cost(f"{name}: {use}", _uses(directory)[use], allowed)
    text = f"{name}: {use}: {size:,} bytes, {allowed:,} allowed: {cost.answer}"
    require(cost.answer in ("ok", "CorruptCheckpoint"), text)
    require(cost.seconds <= invariants.bound(size), f"{name}: {use}: {cost.seconds:.1f} s for {size:,} bytes")
    return cost


def _require_damage_is_cheap(name: str, raw: bytes, directory: readers.Directory) -> None:
    """With one bit of the header flipped, the reader stops at its digest."""
    damaged = bytearray(raw)
    damaged[DIGEST_SLICE.start] ^= 1
    directory.hostile.write_bytes(damaged)
    del damaged
    allowed = len(raw) + _DAMAGED_FREE_BYTES
    cost = _cost(f"{name}, damaged", lambda: catalog.read_header(directory.hostile), allowed)
    require(cost.answer == "CorruptCheckpoint", f"{name}, damaged: {cost.answer}")


def _cost(description: str, use: Callable[[], Any], allowed: int) -> Cost:
    with never(CounterExample, f"{description}: "):
        return measure(use, allowed=allowed)
