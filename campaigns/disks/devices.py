"""A device that fails: its writes, its journal, or all of it at once. Then the machine is started again.

- It has less room than it says: a file system on a thin device, whose own disk is full. Blocks that were
  reserved cannot be written; the system says so when they are written or synced, and the journal may end.
- The journal is aborted: the file system protects itself from writes.
- The file system is shut down, as by a power cut: every call from then on is an I/O error, and what was not
  synced is lost.

After each the file system is mounted again. Whatever was reported durable has to be there.
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
from campaigns.disks.volumes import MIB, Filler
from campaigns.disks.witness import SaveChecker

_SHUT_DOWN = 0x8004587D  # FS_IOC_SHUTDOWN
_LOSE_THE_JOURNAL = 2


def device_fails(chance: random.Random, home: Path, counts: Counter[str]) -> None:
    """Saves before, while and after it fails; then all that was reported durable is looked for."""
    volumes.private_mounts(home)
    what = chance.choice(list(_FAILURES))
    kind = chance.choice(_FAILURES[what][1])
    if what == "thin":
        home = volumes.make("tmpfs", home, mib=chance.randint(16, 24))
    root = volumes.make(kind, home, mib=64)
    witness = SaveChecker(root / "run", chance, counts, f"{kind}, device {what}")
    nbytes = int(10 ** chance.uniform(2, 6.4))
    step = 1
    for step in range(1, chance.randint(2, 4)):
        witness.save(step, nbytes)
    fail = _FAILURES[what][0]
    if chance.random() < 0.5:
        fail(root, chance)
        outcome = witness.try_to_save(step + 1, nbytes)
    else:
        delay = chance.choice([0, 10 ** chance.uniform(-5, -2)])

        def meanwhile() -> None:
            time.sleep(delay)
            fail(root, chance)

        outcome = witness.try_to_save(step + 1, nbytes, meanwhile=meanwhile)
    if outcome.error is None:
        witness.reported[step + 1] = outcome.checkpoint
    again = witness.try_to_save(step + 2, nbytes)
    if again.error is None:
        witness.reported[step + 2] = again.checkpoint
    witness.judge_message(outcome)
    witness.judge_message(again)
    _start_again(witness, kind, home, counts)
    witness.save(step + 3, nbytes)


def _start_again(witness: SaveChecker, kind: str, home: Path, counts: Counter[str]) -> None:
    witness.reopen()
    Filler(home).gone()
    volumes.mount_again(kind, home)
    witness.forget_removed()
    witness.require_newest()
    witness.require_all()
    counts["mounted again: all that was reported durable is there"] += 1


def _fill_what_is_below(root: Path, chance: random.Random) -> None:
    Filler(root.parent).leave(chance.choice([0, 4096, chance.randint(0, 2 * MIB)]))


def _abort_the_journal(root: Path, _chance: random.Random) -> None:
    volumes.command("mount", "-o", "remount,abort", str(root))


def _shut_down(root: Path, chance: random.Random) -> None:
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(descriptor, _SHUT_DOWN, struct.pack("I", chance.choice([0, 1, _LOSE_THE_JOURNAL])))
    except OSError as error:
        raise Skipped(f"shutting down a file system: {error.strerror}") from None
    finally:
        os.close(descriptor)


_FAILURES: dict[str, tuple[Callable[[Path, random.Random], None], tuple[str, ...]]] = {
    "thin": (_fill_what_is_below, ("ext4", "ext3", "ext2")),
    "without journal": (_abort_the_journal, ("ext4", "ext3")),
    "shut down": (_shut_down, ("ext4", "ext3", "xfs")),
}
