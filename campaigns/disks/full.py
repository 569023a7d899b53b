"""Disks, inodes and quotas that are used up: before a save, or by another process during it."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

from campaigns.disks import volumes
from campaigns.disks.save_checker import SaveChecker
from campaigns.disks.volumes import MIB, Filler

#: The weight of each. The larger ones take longer to make.
DISKS = {"ext4": 5, "tmpfs": 4, "ext3": 2, "ext2": 3, "overlay": 2, "xfs": 1, "btrfs": 1}
MOMENTS = ("before the directory", "before the lock", "between two saves", "during a save")


def disk_full(rng: random.Random, home: Path, counts: Counter[str]) -> None:
    """A disk without space: a save either fits or is refused, and fits again once there is space."""
    kind = rng.choices(list(DISKS), list(DISKS.values()))[0]
    mib = rng.randint(12, 48)
    volumes.private_mounts(home)
    root = volumes.make(kind, home, mib=mib)
    checker = SaveChecker(root / "run" / "checkpoints", rng, counts, kind)
    moment = rng.choice(MOMENTS)
    filler = Filler(root)
    nbytes = int(10 ** rng.uniform(0, 6.4))  # up to 2.5 MB: four of them always fit
    step = 1
    if moment == "before the lock":
        checker.directory.mkdir(parents=True)
    elif moment != "before the directory":
        for step in range(1, rng.randint(2, 3)):
            checker.save(step, nbytes)
        step += rng.randint(0, 1)  # the next one, or the last one again
    for _ in range(rng.randint(1, 3)):
        filler.fill(_free_bytes(rng, nbytes))
        if moment == "during a save":
            filler.fill_in_background(delay=10 ** rng.uniform(-5, -2), piece=rng.choice([4096, MIB]))
        checker.check(checker.attempt(step, nbytes))
        if rng.random() < 0.3:
            checker.reopen()
        filler.remove()
    checker.save(step, nbytes)
    checker.save(step + 1, nbytes)


def inodes_used_up(rng: random.Random, home: Path, counts: Counter[str]) -> None:
    """Space, but no more files: the new one, the lock or the directory cannot be made."""
    kind = rng.choice(["ext4", "tmpfs", "ext2"])
    volumes.private_mounts(home)
    root = volumes.make(kind, home, mib=16, inodes=rng.randint(64, 200))
    checker = SaveChecker(root / "run" / "checkpoints", rng, counts, f"{kind}, no inodes")
    nbytes, step = rng.randint(1, 100_000), 1
    if rng.random() < 0.5:
        checker.save(step, nbytes)
        step = 2
    filler = Filler(root)
    filler.fill_inodes(rng.randint(0, 3))
    checker.check(checker.attempt(step, nbytes))
    filler.remove()
    checker.save(step + 1, nbytes)


def quota_used_up(rng: random.Random, home: Path, counts: Counter[str]) -> None:
    """Space on the disk, but not for this user: the system reports it at the reservation, or at the sync."""
    volumes.private_mounts(home)
    root, part = volumes.make_limited(home, mib=128)
    checker = SaveChecker(part / "checkpoints", rng, counts, "btrfs, quota")
    nbytes = int(10 ** rng.uniform(3, 6.4))
    checker.save(1, nbytes)
    os.sync()
    volumes.limit_bytes(root, nbytes + _free_bytes(rng, nbytes))
    checker.check(checker.attempt(2, nbytes))
    volumes.limit_bytes(root, None)
    checker.save(3, nbytes)


def _free_bytes(rng: random.Random, nbytes: int) -> int:
    """How much stays free: nothing, little, a part of the checkpoint, or about as much as it needs."""
    about = nbytes + 4096 * rng.randint(-2, 8)
    choices = [0, rng.randint(1, 1 << 16), int(rng.random() * nbytes), about, about + nbytes // 8]
    return max(0, rng.choice(choices))
