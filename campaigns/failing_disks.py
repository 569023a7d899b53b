"""Full and failing disks, for real: small file systems that fill up, limits, directories that are replaced.

    python -m campaigns.failing_disks --seed 1 --cases 100 --only directory

A save that fails raises SaveFailed in one line; existing checkpoints are unchanged, nothing is left open, and
the next save works. Each case is a process with private mounts on its own memory: the machine's disks are not
touched. Root gets all cases; those that another user cannot run are counted as skipped, with the reason.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from campaigns.campaign import Campaign, Case, parser, require, run
from campaigns.disks import directories, resources, runs, volumes

CASES = 60  # about a minute
#: No case takes this long, unless it hangs.
HANG_SECONDS = 300.0

Kind = Callable[[random.Random, Path, Counter[str]], None]

#: Each kind of case, and its weight.
KINDS: dict[str, tuple[Kind, int]] = {
    "disk full": (resources.disk_full, 12),  # before a save, or during it
    "inodes used up": (resources.inodes_used_up, 2),  # space, but no more files
    "quota used up": (resources.quota_used_up, 2),  # for this user alone
    "file size": (resources.file_size, 4),  # RLIMIT_FSIZE, with SIGXFSZ ignored
    "killed by file size": (resources.killed_by_file_size, 1),  # the same, with SIGXFSZ deadly
    "open files": (resources.open_files, 3),  # RLIMIT_NOFILE
    "memory": (resources.memory, 2),  # RLIMIT_AS
    "directory replaced": (directories.directory_replaced, 10),  # 14 accidents
    "device fails": (resources.device_fails, 5),  # then mounted again
    "toy training": (runs.toy_training, 6),  # the trainer on all of these
}
#: One case in so many is the real trainer, which takes longer than all cases before it together.
REAL_EVERY = 100
REAL = "real training"  # a kind of its own


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--only", help="run only the kinds of case with this in their name")
    return run("failing_disks", options, body, cases=CASES, arguments=arguments)


def body(campaign: Campaign) -> None:
    for case in campaign.cases():
        kind = case.rng.choices(list(KINDS), [weight for _, weight in KINDS.values()])[0]
        if case.number % REAL_EVERY == REAL_EVERY - 1:
            kind = REAL
        if campaign.options.only is None or campaign.options.only in kind:
            _run_case(campaign, case, kind)


def _run_case(campaign: Campaign, case: Case, kind: str) -> None:
    if kind == REAL:
        runs.real_reference()  # computed here, once: what a case computes is lost with its process
    work = runs.real_training if kind == REAL else KINDS[kind][0]
    with tempfile.TemporaryDirectory(prefix="distrust-") as folder:
        home = Path(folder).resolve()
        findings = volumes.run_case(lambda counts: work(case.rng, home, counts), seconds=HANG_SECONDS)
    campaign.count_all(dict(sorted(findings.counts.items())))
    if findings.skipped is not None:
        campaign.count(f"skipped: {kind}: {findings.skipped.replace(f'{home}{os.sep}', '')}")
    else:
        campaign.count(f"cases: {kind}")
    require(findings.violation is None, f"{kind}: {findings.violation}")


if __name__ == "__main__":
    sys.exit(main())
