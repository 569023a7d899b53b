"""Resources that run out (disks, inodes, quotas, the process's own limits), and devices that fail.

A device fails as a thin one whose own disk is full, by an aborted journal, or by a shutdown of the file
system. It is mounted again afterwards, as after a restart of the machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import resource
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from campaigns.campaign import require
from campaigns.disks import volumes
from campaigns.disks.save_checker import SaveChecker
from campaigns.disks.volumes import MIB, Filler
from campaigns.invariants import temporary_files
from distrust.checkpoint import CheckpointManager

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
        filler.fill(_random_free_bytes(rng, nbytes))
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
    volumes.limit_bytes(root, nbytes + _random_free_bytes(rng, nbytes))
    checker.check(checker.attempt(2, nbytes))
    volumes.limit_bytes(root, None)
    checker.save(3, nbytes)


def _random_free_bytes(rng: random.Random, nbytes: int) -> int:
    """How much stays free: nothing, little, a part of the checkpoint, or about as much as it needs."""
    about = nbytes + 4096 * rng.randint(-2, 8)
    choices = [0, rng.randint(1, 1 << 16), int(rng.random() * nbytes), about, about + nbytes // 8]
    return max(0, rng.choice(choices))


_FILE_SIZE = "ulimit -f"  # label of the counts
_OPEN_FILES = 512  # the limit that is then used up
_STATM = Path("/proc/self/statm")  # the sizes of this process, in pages


def file_size(rng: random.Random, home: Path, counts: Counter[str]) -> None:
    """A limit on the size of files, which acts like a quota. Python ignores the signal that comes with it."""
    checker = SaveChecker(home / "run", rng, counts, _FILE_SIZE)
    nbytes = int(10 ** rng.uniform(0, 6.4))
    step = 1
    if rng.random() < 0.8:
        checker.save(step, nbytes)
        step += rng.randint(0, 1)
    sizes = [0, 1, 4095, 4096, 4097, nbytes - 1, nbytes, nbytes + 4096, nbytes + 8192]
    limit = max(0, rng.choice([*sizes, rng.randint(0, nbytes + 10_000)]))
    checker.check(checker.attempt(step, nbytes, context=_limit(resource.RLIMIT_FSIZE, limit)))
    checker.save(step + 1, nbytes)


def killed_by_file_size(rng: random.Random, home: Path, counts: Counter[str]) -> None:
    """The same limit where the signal is not ignored: it ends the process in the middle of the save."""
    checker = SaveChecker(home / "run", rng, counts, f"{_FILE_SIZE}, killed")
    nbytes = int(10 ** rng.uniform(4, 6.4))
    checker.save(1, nbytes)
    checker.reopen()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with _limit(resource.RLIMIT_FSIZE, rng.randint(0, nbytes)):
                checker.attempt(2, nbytes)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    require(code == -signal.SIGXFSZ, f"SIGXFSZ did not end the process: exit code {code}")
    counts["ulimit -f, killed: by SIGXFSZ during a save"] += 1
    if temporary_files(checker.directory):
        counts["ulimit -f, killed: half a file left, and removed by the next writer"] += 1
    checker.require_newest()
    checker.save(3, nbytes)


def open_files(rng: random.Random, home: Path, counts: Counter[str]) -> None:
    """No descriptor free, or only a few: for the lock, the file, or the directory that is to be synced."""
    checker = SaveChecker(home / "run", rng, counts, "ulimit -n")
    nbytes = int(10 ** rng.uniform(0, 6.4))
    step = 1
    if rng.random() < 0.7:
        checker.save(step, nbytes)
        step = 2
    checker.check(checker.attempt(step, nbytes, context=_free_descriptors(rng.randint(0, 4))))
    checker.save(step + 1, nbytes)


def memory(rng: random.Random, home: Path, counts: Counter[str]) -> None:
    """No memory for a copy of the state, or not even for the blocks that are written."""
    if not _STATM.exists():
        raise volumes.Skipped("ulimit -v: this system does not report how much memory a process has")
    checker = SaveChecker(home / "run", rng, counts, "ulimit -v")
    nbytes = rng.randint(1, 40) << 20
    step = 1
    if rng.random() < 0.7:
        checker.save(step, 1000)
        step = 2
        if rng.random() < 0.5:  # buffers of the earlier save are released
            checker.reopen()
    extra = int(rng.uniform(0, 2.2) * nbytes)
    checker.check(checker.attempt(step, nbytes, context=_limit_address_space(extra)))
    checker.save(step + 1, nbytes)
    CheckpointManager(checker.directory).validate(step + 1)


@contextlib.contextmanager
def _limit(which: int, limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))


@contextlib.contextmanager
def _free_descriptors(count: int) -> Iterator[None]:
    descriptors: list[int] = []
    with _limit(resource.RLIMIT_NOFILE, _OPEN_FILES):
        try:
            with contextlib.suppress(OSError):
                while True:
                    descriptors.append(os.open(os.devnull, os.O_RDONLY))
            for _ in range(count):
                os.close(descriptors.pop())
            yield
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


@contextlib.contextmanager
def _limit_address_space(extra: int) -> Iterator[None]:
    pages = int(_STATM.read_text().split()[0])
    with _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + extra):
        yield


_FS_IOC_SHUTDOWN = 0x8004587D  # an ioctl of ext4 and xfs
_LOSE_THE_JOURNAL = 2  # or flush it first: 0 and 1


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
    for each in (outcome, checker.attempt(step + 2, nbytes)):
        if each.error is None:
            checker.reported[each.checkpoint.step] = each.checkpoint
        checker.check_message(each)
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


def _shut_down(root: Path, rng: random.Random) -> None:
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(descriptor, _FS_IOC_SHUTDOWN, struct.pack("I", rng.choice([0, 1, _LOSE_THE_JOURNAL])))
    except OSError as error:
        raise volumes.Skipped(f"shutting down a file system: {error.strerror}") from None
    finally:
        os.close(descriptor)


_ABORT = ("-o", "remount,abort")  # of the journal
_FAILURES: dict[str, tuple[Callable[[Path, random.Random], None], tuple[str, ...]]] = {
    "thin": (_fill_backing_disk, ("ext4", "ext3", "ext2")),
    "without journal": (lambda root, _: volumes.command("mount", *_ABORT, str(root)), ("ext4", "ext3")),
    "shut down": (_shut_down, ("ext4", "ext3", "xfs")),
}
