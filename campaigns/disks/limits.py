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
from campaigns.disks.save_checker import SaveChecker
from campaigns.invariants import temporary_files
from distrust.checkpoint import CheckpointManager

_FILE_SIZE = "ulimit -f"
_OPEN_FILES = 512
_STATM = Path("/proc/self/statm")


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
    if code != -signal.SIGXFSZ:
        raise CounterExample(f"SIGXFSZ did not end the process: exit code {code}")
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
        raise Skipped("ulimit -v: this system does not report how much memory a process has")
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
    """Only so many files can be opened."""
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
    """Only so many bytes more than this process has now."""
    pages = int(_STATM.read_text().split()[0])
    with _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + extra):
        yield
