"""A device that fails: its writes, its journal, or all of it at once. Then the machine is restarted.

- It has less space than it reports: a file system on a thin device, whose own disk is full. Blocks that were
  reserved cannot be written; the system reports it at the write or the sync, and the journal may end.
- The journal is aborted: the file system protects itself from writes.
- The file system is shut down, as by a power cut: every later call is an I/O error, and what was not synced
  is lost.

After each the file system is mounted again. Whatever was reported durable must exist.
"""

from __future__ import annotations

import fcntl
import os
import random
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from campaigns.disks import volumes
from campaigns.disks.isolated import Skipped
from campaigns.disks.save_checker import SaveChecker
from campaigns.disks.volumes import MIB, Filler

_FS_IOC_SHUTDOWN = 0x8004587D
_LOSE_THE_JOURNAL = 2


def device_fails(rng: random.Random, home: Path, counts: Counter[str]) -> None:
    """Save before, during and after the failure; then require all that was reported durable."""
    volumes.private_mounts(home)
    failure = rng.choice(list(_FAILURES))
    fail, kinds = _FAILURES[failure]
    kind = rng.choice(kinds)
    if failure == "thin":
        home = volumes.make("tmpfs", home, mib=rng.randint(16, 24))
    root = volumes.make(kind, home, mib=64)
    checker = SaveChecker(root / "run", rng, counts, f"{kind}, device {failure}")
    nbytes = int(10 ** rng.uniform(2, 6.4))
    step = 1
    for step in range(1, rng.randint(2, 4)):
        checker.save(step, nbytes)
    if rng.random() < 0.5:
        fail(root, rng)
        outcome = checker.attempt(step + 1, nbytes)
    else:
        delay = rng.choice([0, 10 ** rng.uniform(-5, -2)])

        def during() -> None:
            time.sleep(delay)
            fail(root, rng)

        outcome = checker.attempt(step + 1, nbytes, during=during)
    if outcome.error is None:
        checker.reported[step + 1] = outcome.checkpoint
    second = checker.attempt(step + 2, nbytes)
    if second.error is None:
        checker.reported[step + 2] = second.checkpoint
    checker.check_message(outcome)
    checker.check_message(second)
    _restart(checker, kind, home, counts)
    checker.save(step + 3, nbytes)


def _restart(checker: SaveChecker, kind: str, home: Path, counts: Counter[str]) -> None:
    checker.reopen()
    Filler(home).remove()
    volumes.mount_again(kind, home)
    checker.forget_removed()
    checker.require_newest()
    checker.require_all()
    counts["mounted again: all that was reported durable exists"] += 1


def _fill_backing_disk(root: Path, rng: random.Random) -> None:
    Filler(root.parent).fill(rng.choice([0, 4096, rng.randint(0, 2 * MIB)]))


def _abort_journal(root: Path, _rng: random.Random) -> None:
    volumes.command("mount", "-o", "remount,abort", str(root))


def _shut_down(root: Path, rng: random.Random) -> None:
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(descriptor, _FS_IOC_SHUTDOWN, struct.pack("I", rng.choice([0, 1, _LOSE_THE_JOURNAL])))
    except OSError as error:
        raise Skipped(f"shutting down a file system: {error.strerror}") from None
    finally:
        os.close(descriptor)


_FAILURES: dict[str, tuple[Callable[[Path, random.Random], None], tuple[str, ...]]] = {
    "thin": (_fill_backing_disk, ("ext4", "ext3", "ext2")),
    "without journal": (_abort_journal, ("ext4", "ext3")),
    "shut down": (_shut_down, ("ext4", "ext3", "xfs")),
}
