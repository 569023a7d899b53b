"""Full and failing disks, for real: small file systems that fill up, limits, directories taken away.

    python -m campaigns.failing_disks --seed 1 --seconds 60
    python -m campaigns.failing_disks --seed 1 --case 7
    python -m campaigns.failing_disks --seed 1 --cases 100 --only directory

Nothing is modelled here. A case makes a file system of some MiB (ext4, ext3, ext2, xfs, btrfs, a tmpfs, an
overlay), fills it, takes it away or has its device fail while checkpoints are saved, and requires:

- a save that fails raises SaveFailed, in one line: what, where, how many bytes were wanted and free;
- what stood before stands, bit for bit, and whatever was reported durable can be loaded;
- no temporary file, open file or thread is left;
- the next save works once there is room;
- a directory that another took over is never written to;
- a run warns of a failed save and goes on, tries again at the next interval, and stops at the third failure
  in a row with exit code 1 and what stands; the same command, once there is room, ends in the state of the
  run that was left alone.

Each case is a process of its own, with mounts of its own on memory of its own: the disks of the machine are
not touched, and nothing is left mounted, whatever happens. Root gets all cases; for others, those that they
cannot have are counted as skipped, with the reason.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from campaigns.campaign import Campaign, Case, CounterExample, parser, run
from campaigns.disks import devices, directories, full, isolated, limits, real_runs, toy_runs

CASES = 60
#: No case takes as long: one that does, hangs.
PATIENCE_SECONDS = 300.0

Kind = Callable[[random.Random, Path, Counter[str]], None]

#: Each kind of case, and how often it is drawn.
KINDS: dict[str, tuple[Kind, int]] = {
    "disk full": (full.disk_full, 12),
    "inodes used up": (full.inodes_used_up, 2),
    "quota used up": (full.quota_used_up, 2),
    "file size": (limits.file_size, 4),
    "killed by file size": (limits.killed_by_file_size, 1),
    "open files": (limits.open_files, 3),
    "memory": (limits.memory, 2),
    "directory taken away": (directories.directory_taken_away, 10),
    "device fails": (devices.device_fails, 5),
    "toy training": (toy_runs.toy_training, 6),
}
#: Every so often the real trainer, which takes much longer than all cases before it.
REAL_EVERY = 100
REAL = "real training"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit code."""
    made = parser(__doc__)
    made.add_argument("--only", help="run only the kinds of case with this in their name")
    return run("failing_disks", made, campaign, cases=CASES, arguments=arguments)


def campaign(running: Campaign) -> None:
    """Run the cases.

    Raises:
        CounterExample: for the first promise that was not kept.
    """
    for case in running.cases():
        kind = case.chance.choices(list(KINDS), [weight for _, weight in KINDS.values()])[0]
        if case.number % REAL_EVERY == REAL_EVERY - 1:
            kind = REAL
        if running.options.only is None or running.options.only in kind:
            _run_case(running, case, kind)


def _run_case(running: Campaign, case: Case, kind: str) -> None:
    if kind == REAL:
        real_runs.undisturbed()  # here, once: what the cases compute goes with them
    work = real_runs.real_training if kind == REAL else KINDS[kind][0]
    with tempfile.TemporaryDirectory(prefix="distrust-") as home:
        found = isolated.run(
            lambda counts: work(case.chance, Path(home).resolve(), counts), seconds=PATIENCE_SECONDS
        )
    for what, number in sorted(found.counts.items()):
        running.count(what, number)
    if found.skipped is not None:
        running.count(f"skipped: {kind}: {found.skipped.replace(f'{Path(home).resolve()}{os.sep}', '')}")
    else:
        running.count(f"cases: {kind}")
    if found.broken is not None:
        raise CounterExample(f"{kind}: {found.broken}")


if __name__ == "__main__":
    sys.exit(main())
