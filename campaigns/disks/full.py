"""Disks, inodes and quotas that are used up: before a save, or by another process in the middle of it."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

from campaigns.disks import volumes
from campaigns.disks.volumes import MIB, Filler
from campaigns.disks.witness import SaveChecker

#: How often each is drawn. The larger ones take longer to make.
DISKS = {"ext4": 5, "tmpfs": 4, "ext3": 2, "ext2": 3, "overlay": 2, "xfs": 1, "btrfs": 1}
MOMENTS = ("before the directory", "before the lock", "between two saves", "during a save")


def disk_full(chance: random.Random, home: Path, counts: Counter[str]) -> None:
    """A disk without room: a save either fits or is refused, and fits again once there is room."""
    kind = chance.choices(list(DISKS), list(DISKS.values()))[0]
    mib = chance.randint(12, 48)
    volumes.private_mounts(home)
    root = volumes.make(kind, home, mib=mib)
    witness = SaveChecker(root / "run" / "checkpoints", chance, counts, kind)
    moment = chance.choice(MOMENTS)
    filler = Filler(root)
    nbytes = int(10 ** chance.uniform(0, 6.4))  # up to 2.5 MB: four of them always fit
    step = 1
    if moment == "before the lock":
        witness.directory.mkdir(parents=True)
    elif moment != "before the directory":
        for step in range(1, chance.randint(2, 3)):
            witness.save(step, nbytes)
        step += chance.randint(0, 1)  # the next one, or the last one again
    for _ in range(chance.randint(1, 3)):
        filler.leave(_left_over(chance, nbytes))
        if moment == "during a save":
            filler.in_the_background(after=10 ** chance.uniform(-5, -2), piece=chance.choice([4096, MIB]))
        witness.judge(witness.try_to_save(step, nbytes))
        if chance.random() < 0.3:
            witness.reopen()
        filler.gone()
    witness.save(step, nbytes)
    witness.save(step + 1, nbytes)


def inodes_used_up(chance: random.Random, home: Path, counts: Counter[str]) -> None:
    """Room, but no more files: the new one, the lock or the directory cannot be made."""
    kind = chance.choice(["ext4", "tmpfs", "ext2"])
    volumes.private_mounts(home)
    root = volumes.make(kind, home, mib=16, inodes=chance.randint(64, 200))
    witness = SaveChecker(root / "run" / "checkpoints", chance, counts, f"{kind}, no inodes")
    nbytes, step = chance.randint(1, 100_000), 1
    if chance.random() < 0.5:
        witness.save(step, nbytes)
        step = 2
    filler = Filler(root)
    filler.leave_inodes(chance.randint(0, 3))
    witness.judge(witness.try_to_save(step, nbytes))
    filler.gone()
    witness.save(step + 1, nbytes)


def quota_used_up(chance: random.Random, home: Path, counts: Counter[str]) -> None:
    """Room on the disk, but not for this user: the system says so when the file is reserved, or synced."""
    volumes.private_mounts(home)
    root, part = volumes.make_limited(home, mib=128)
    witness = SaveChecker(part / "checkpoints", chance, counts, "btrfs, quota")
    nbytes = int(10 ** chance.uniform(3, 6.4))
    witness.save(1, nbytes)
    os.sync()
    volumes.limit_bytes(root, nbytes + _left_over(chance, nbytes))
    witness.judge(witness.try_to_save(2, nbytes))
    volumes.limit_bytes(root, None)
    witness.save(3, nbytes)


def _left_over(chance: random.Random, nbytes: int) -> int:
    """So much stays free: nothing, little, a part of the checkpoint, or about as much as it needs."""
    about = nbytes + 4096 * chance.randint(-2, 8)
    choices = [0, chance.randint(1, 1 << 16), int(chance.random() * nbytes), about, about + nbytes // 8]
    return max(0, chance.choice(choices))
