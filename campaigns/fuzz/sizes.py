"""The cost of files that are made to be expensive: how it grows with the size of the file.

Each family (:data:`campaigns.fuzz.growing.GROWING`) is made in three sizes, each twice as large as the one
before, and read by each method in a process of its own with limited memory.

- A file that was damaged after it was written, by a single bit, is refused at its digest. Until then the
  reader has taken no more memory than the header's own size.
- A forged one is parsed. Python's objects are many times as large as their text, empty lists most of all; the
  reader may take :data:`TIMES_ITS_SIZE` in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from campaigns.campaign import CounterExample, require
from campaigns.fuzz import costs, growing, invariants, readers
from distrust import CheckpointManager
from distrust.checkpoint import catalog
from distrust.checkpoint.compare import differences
from distrust.checkpoint.format import DIGEST_SLICE

#: Of a forged file, in address space, with what Python's allocator holds in reserve.
TIMES_ITS_SIZE = 48
#: A file four times as large may take twelve times as long, since caches are small.
STEEPEST = 12.0
#: Shorter times are too inexact.
LEAST_SECONDS = 0.2
_DAMAGED_FREE_BYTES = 4 << 20  # beyond the size of the file


def check(name: str, directory: readers.Directory, largest: int) -> int:
    """Read one family; returns how many answers were measured."""
    measured: list[dict[str, costs.Cost]] = []
    size = 0
    for share in (4, 2, 1):
        raw = growing.GROWING[name](largest // share)
        size = len(raw)
        _require_damage_is_cheap(name, raw, directory)
        directory.hostile.unlink(missing_ok=True)
        directory.hostile.write_bytes(raw)
        measured.append({use: _measure(name, use, directory, size) for use in _uses(directory)})
    for use, last in measured[-1].items():
        first = measured[0][use].seconds
        require(
            last.seconds <= max(LEAST_SECONDS, STEEPEST * first),
            f"{name}: {use}: {first:.2f} s, and {last.seconds:.2f} s where the file is four times as large",
        )
    slowest, slowest_cost = max(measured[-1].items(), key=lambda item: item[1].seconds)
    heaviest, heaviest_cost = max(measured[-1].items(), key=lambda item: item[1].nbytes)
    print(
        f"{name}: {size:,} bytes: at most {slowest_cost.seconds:.2f} s ({slowest}) and "
        f"{heaviest_cost.nbytes / size:.1f} times its size ({heaviest}): {heaviest_cost.answer}",
        flush=True,
    )
    return len(measured) * (len(measured[0]) + 1)


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


def _measure(name: str, use: str, directory: readers.Directory, size: int) -> costs.Cost:
    allowed = costs.FREE_BYTES + TIMES_ITS_SIZE * size
    cost = _cost(f"{name}: {use}", _uses(directory)[use], allowed)
    if cost.answer not in ("ok", "CorruptCheckpoint"):
        raise CounterExample(f"{name}: {use}: {size:,} bytes, {allowed:,} allowed: {cost.answer}")
    if cost.seconds > invariants.bound(size):
        raise CounterExample(f"{name}: {use}: {cost.seconds:.1f} s for {size:,} bytes")
    return cost


def _require_damage_is_cheap(name: str, raw: bytes, directory: readers.Directory) -> None:
    """With one bit of the header flipped, the reader stops at its digest."""
    damaged = bytearray(raw)
    damaged[DIGEST_SLICE.start] ^= 1
    directory.hostile.write_bytes(damaged)
    del damaged
    allowed = len(raw) + _DAMAGED_FREE_BYTES
    cost = _cost(f"{name}, damaged", lambda: catalog.read_header(directory.hostile), allowed)
    if cost.answer != "CorruptCheckpoint":
        raise CounterExample(f"{name}, damaged: {cost.answer}")


def _cost(description: str, use: Callable[[], Any], allowed: int) -> costs.Cost:
    try:
        return costs.measure(use, allowed=allowed)
    except CounterExample as error:
        raise CounterExample(f"{description}: {error}") from error
