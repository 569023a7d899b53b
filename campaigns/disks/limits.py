"""The process's own limits: how large a file may be, how many may be open, how much memory there is."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from campaigns.campaign import CounterExample
from campaigns.disks.isolated import Skipped
from campaigns.disks.witness import SaveChecker, temporary
from distrust.checkpoint import CheckpointManager

_LIMITED_TO = "ulimit -f"
_MOST_FILES = 512
_SIZES = Path("/proc/self/statm")


def file_size(chance: random.Random, home: Path, counts: Counter[str]) -> None:
    """A limit of the size of files, which acts like a quota. Python ignores the signal that comes with it."""
    witness = SaveChecker(home / "run", chance, counts, _LIMITED_TO)
    nbytes = int(10 ** chance.uniform(0, 6.4))
    step = 1
    if chance.random() < 0.8:
        witness.save(step, nbytes)
        step += chance.randint(0, 1)
    outcome = witness.try_to_save(
        step, nbytes, within=_limited(resource.RLIMIT_FSIZE, _limit(chance, nbytes))
    )
    witness.judge(outcome)
    witness.save(step + 1, nbytes)


def killed_by_file_size(chance: random.Random, home: Path, counts: Counter[str]) -> None:
    """The same limit where nobody ignores the signal: it ends the process, in the middle of the save."""
    witness = SaveChecker(home / "run", chance, counts, "ulimit -f, killed")
    nbytes = int(10 ** chance.uniform(4, 6.4))
    witness.save(1, nbytes)
    witness.reopen()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with _limited(resource.RLIMIT_FSIZE, chance.randint(0, nbytes)):
                witness.try_to_save(2, nbytes)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) != -signal.SIGXFSZ:
        raise CounterExample(f"SIGXFSZ did not end the process, but {os.waitstatus_to_exitcode(status)}")
    counts["ulimit -f, killed: by SIGXFSZ in mid-save"] += 1
    if temporary(witness.directory):
        counts["ulimit -f, killed: half a file left, and swept by the next writer"] += 1
    witness.require_newest()
    witness.save(3, nbytes)


def open_files(chance: random.Random, home: Path, counts: Counter[str]) -> None:
    """No descriptor left, or only a few: for the lock, the file, or the directory that is to be synced."""
    witness = SaveChecker(home / "run", chance, counts, "ulimit -n")
    nbytes = int(10 ** chance.uniform(0, 6.4))
    step = 1
    if chance.random() < 0.7:
        witness.save(step, nbytes)
        step = 2
    witness.judge(witness.try_to_save(step, nbytes, within=_descriptors(chance.randint(0, 4))))
    witness.save(step + 1, nbytes)


def memory(chance: random.Random, home: Path, counts: Counter[str]) -> None:
    """No memory for a copy of the state, or not even for the blocks that are written."""
    if not _SIZES.exists():
        raise Skipped("ulimit -v: this system does not say how much memory a process has")
    witness = SaveChecker(home / "run", chance, counts, "ulimit -v")
    nbytes = chance.randint(1, 40) << 20
    step = 1
    if chance.random() < 0.7:
        witness.save(step, 1000)
        step = 2
        if chance.random() < 0.5:  # what a large save needs is not there any more
            witness.reopen()
    more = int(chance.uniform(0, 2.2) * nbytes)
    witness.judge(witness.try_to_save(step, nbytes, within=_address_space(more)))
    witness.save(step + 1, nbytes)
    CheckpointManager(witness.directory).validate(step + 1)


def _limit(chance: random.Random, nbytes: int) -> int:
    choices = [0, 1, 4095, 4096, 4097, nbytes - 1, nbytes, nbytes + 4096, nbytes + 8192]
    return max(0, chance.choice([*choices, chance.randint(0, nbytes + 10_000)]))


@contextlib.contextmanager
def _limited(what: int, limit: int) -> Iterator[None]:
    before, most = resource.getrlimit(what)
    resource.setrlimit(what, (limit, most))
    try:
        yield
    finally:
        resource.setrlimit(what, (before, most))


@contextlib.contextmanager
def _descriptors(left: int) -> Iterator[None]:
    """So many files can be opened, and no more."""
    taken: list[int] = []
    with _limited(resource.RLIMIT_NOFILE, _MOST_FILES):
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            for descriptor in taken[len(taken) - left :]:
                os.close(descriptor)
            del taken[len(taken) - left :]
            yield
        finally:
            for descriptor in taken:
                os.close(descriptor)


@contextlib.contextmanager
def _address_space(more: int) -> Iterator[None]:
    """So many bytes more than this process has now."""
    pages = int(_SIZES.read_text().split()[0])
    with _limited(resource.RLIMIT_AS, pages * resource.getpagesize() + more):
        yield
