"""What it costs to read files that are made to cost: whether the price grows with the size, and how steeply.

Each family (:data:`campaigns.fuzz.families.GROWING`) is made in three sizes,
each twice as large as the one before,
and read in each way by a process of its own, which may not take more memory than is promised.

- A file that was damaged after it was written, one bit is enough, is refused at its digest. Until then the
  reader has taken no more than the header's own size.
- A forged one is parsed. Python's objects are many times as large as their text, the worst of it being empty
  lists; what the reader adds may not be more than :data:`TIMES_ITS_SIZE` in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from campaigns.campaign import CounterExample
from campaigns.fuzz import costs, families, invariants, readers
from distrust import CheckpointManager
from distrust.checkpoint import catalog
from distrust.checkpoint.compare import differences
from distrust.checkpoint.format import DIGEST_SLICE

#: Forged: of address space, with all that Python's allocator holds in reserve.
TIMES_ITS_SIZE = 48
#: Four times the size may take twelve times as long before it counts as growing faster: caches are small.
STEEPEST = 12.0
#: Shorter times say nothing of how they grow.
LEAST_SECONDS = 0.2
_DAMAGED_FREE_BYTES = 4 << 20


def check(name: str, asked: readers.Directory, largest: int) -> int:
    """Read one family; returns how many answers were measured.

    Raises:
        CounterExample: if one took longer, or more memory, than is promised.
    """
    found: list[dict[str, costs.Cost]] = []
    size = 0
    for share in (4, 2, 1):
        raw = families.GROWING[name](largest // share)
        size = len(raw)
        _require_damage_is_cheap(name, raw, asked)
        asked.hostile.unlink(missing_ok=True)
        asked.hostile.write_bytes(raw)
        found.append({use: _measured(name, use, asked, size) for use in _uses(asked)})
    for use, last in found[-1].items():
        first = found[0][use].seconds
        if last.seconds > max(LEAST_SECONDS, STEEPEST * first):
            grew = f"{first:.2f} s, and {last.seconds:.2f} s where the file is four times as large"
            raise CounterExample(f"{name}: {use}: {grew}")
    slowest = max(found[-1].items(), key=lambda item: item[1].seconds)
    largest_use = max(found[-1].items(), key=lambda item: item[1].nbytes)
    print(
        f"{name}: {size:,} bytes: at most {slowest[1].seconds:.2f} s ({slowest[0]}) and "
        f"{largest_use[1].nbytes / size:.1f} times its size ({largest_use[0]}): {largest_use[1].answer}",
        flush=True,
    )
    return len(found) * (len(found[0]) + 1)


def _uses(asked: readers.Directory) -> dict[str, Callable[[], Any]]:
    path = asked.hostile
    manager = CheckpointManager(asked.path)
    return {
        "inspect": lambda: manager.inspect(path).tensors,
        "validate": lambda: manager.validate(path),
        "load": lambda: manager.load(path),
        "load lazily": lambda: readers.touched(manager.load(path, mmap=True, verify="lazy")),
        "differences": lambda: differences(catalog.read_header(path), asked.good),
        "distrust show": lambda: readers.command("show", path, "--tensors"),
    }


def _measured(name: str, use: str, asked: readers.Directory, size: int) -> costs.Cost:
    allowed = costs.FREE_BYTES + TIMES_ITS_SIZE * size
    cost = _cost(f"{name}: {use}", _uses(asked)[use], allowed)
    if cost.answer not in ("well", "CorruptCheckpoint"):
        raise CounterExample(f"{name}: {use}: {size:,} bytes, {allowed:,} allowed: {cost.answer}")
    if cost.seconds > invariants.bound(size):
        raise CounterExample(f"{name}: {use}: {cost.seconds:.1f} s for {size:,} bytes")
    return cost


def _require_damage_is_cheap(name: str, raw: bytes, asked: readers.Directory) -> None:
    """One bit of the header is another one: nobody comes past its digest."""
    damaged = bytearray(raw)
    damaged[DIGEST_SLICE.start] ^= 1
    asked.hostile.write_bytes(damaged)
    del damaged
    cost = _cost(
        f"{name}, damaged", lambda: catalog.read_header(asked.hostile), len(raw) + _DAMAGED_FREE_BYTES
    )
    if cost.answer != "CorruptCheckpoint":
        raise CounterExample(f"{name}, damaged: {cost.answer}")


def _cost(what: str, use: Callable[[], Any], allowed: int) -> costs.Cost:
    try:
        return costs.measured(use, allowed=allowed)
    except costs.Died as error:
        raise CounterExample(f"{what}: {error}") from error
