"""The command ``distrust prune``."""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path
from typing import NamedTuple, get_args

from distrust.checkpoint import DamagedFile, catalog
from distrust.checkpoint.manager import CheckpointManager
from distrust.checkpoint.retention import MetricMode
from distrust.cli.arguments import parser, print_json
from distrust.errors import CheckpointError, ConfigError, DistrustWarning
from distrust.reporting.display import printable, size

#: What ``st_blocks`` counts, whatever the file system's own blocks are.
BLOCK_BYTES = 512


class RemovedFile(NamedTuple):
    """A file that went, or would go.

    Attributes:
        path: where it was.
        step: of the checkpoint.
        bytes: what that frees.
        reason: why it goes.
    """

    path: str
    step: int
    bytes: int
    reason: str


def main(arguments: list[str]) -> int:
    """Remove checkpoints that no rule keeps, damaged ones, or both."""
    options = _options(arguments)
    _check(options)
    catalog.resolve(options.target)  # a wrong name is told, and nothing is made there
    directory = catalog.checkpoint_directory(options.target)
    account = _Account(directory, options)
    with CheckpointManager(
        directory,
        keep_last=options.keep_last or 1,
        keep_best=options.keep_best or 0,
        keep_every=options.keep_every,
        metric=options.metric or "eval_loss",
        metric_mode=options.metric_mode or "min",
    ) as manager:
        if options.keep_best:
            _require_metric(manager, options.metric or "eval_loss")
        try:
            _remove(manager, options, account)
        except CheckpointError:
            account.print_sum(if_empty=False)  # what went before is gone, whatever came then
            raise
        if account.removed and account.is_all:
            verb = "would be" if options.dry_run else "is"
            warnings.warn(
                f"{directory}: no checkpoint {verb} left: the same training would start from the beginning",
                DistrustWarning,
                stacklevel=1,
            )
    account.print_sum(if_empty=True)
    return 0


def _remove(manager: CheckpointManager, options: argparse.Namespace, account: _Account) -> None:
    """Remove, unless it is a dry run."""
    if not options.dry_run:
        manager.acquire()
    if options.damaged and options.dry_run:
        for file in manager.list_damaged():
            account.add_damaged(file)
    elif options.damaged:
        manager.remove_damaged(account.add_damaged)
    if _has_rule(options):
        with warnings.catch_warnings():
            if options.damaged:  # told of above
                warnings.filterwarnings("ignore", ".*it counts for nothing and was left", DistrustWarning)
            superseded = manager.list_superseded()
        try:
            if not options.dry_run:
                manager.cleanup()  # the same files: nobody else writes, and each was verified
        finally:
            for superseded_file in superseded:
                if options.dry_run or not os.path.lexists(superseded_file.path):
                    account.add(superseded_file.path, superseded_file.step, "no rule keeps it")


class _Account:
    """What went, or would go: told line by line, and summed up."""

    def __init__(self, directory: Path, options: argparse.Namespace) -> None:
        self.removed: list[RemovedFile] = []
        self._options = options
        self._directory = directory
        self._occupied = {path.name: _occupied(path) for path, _, _ in catalog.list_names(directory)}

    @property
    def is_all(self) -> bool:
        """Whether nothing else was there."""
        return len(self.removed) == len(self._occupied)

    def add_damaged(self, file: DamagedFile) -> None:
        """Tell of a damaged file."""
        self.add(file.path, file.step, f"damaged: {file.reason}")

    def add(self, path: Path, step: int, reason: str) -> None:
        """Tell of a file."""
        # As the user has named the directory, not as the manager has.
        one = RemovedFile(str(self._directory / path.name), step, self._occupied[path.name], reason)
        self.removed.append(one)
        if not self._options.json:
            verb = "would remove" if self._options.dry_run else "removed"
            print(printable(f"{verb} {one.path} ({size(one.bytes)}): {one.reason}"), flush=True)

    def print_sum(self, *, if_empty: bool) -> None:
        """Sum up; whether also that nothing went."""
        freed = sum(one.bytes for one in self.removed)
        if not self.removed and not if_empty:
            return
        if self._options.json:
            rows = [one._asdict() for one in self.removed]
            print_json({"dry_run": self._options.dry_run, "removed": rows, "bytes_freed": freed})
        elif self.removed:
            files = f"{len(self.removed)} file{'s' if len(self.removed) > 1 else ''}"
            print(
                f"{files}, {size(freed)}: nothing was removed yet"
                if self._options.dry_run
                else f"{files} removed, {size(freed)} freed"
            )
        else:
            print("nothing to remove")


def _occupied(path: Path) -> int:
    """What removing a file frees: nothing where another name holds it, too."""
    try:
        status = os.lstat(path)
    except OSError:
        return 0
    return status.st_blocks * BLOCK_BYTES if status.st_nlink == 1 else 0


def _check(options: argparse.Namespace) -> None:
    """Raise ConfigError for what makes no sense, in words of the command line."""
    if not options.damaged and not _has_rule(options):
        raise ConfigError(
            "prune: say what is to go: --damaged, or what is to stay: --keep-last N, --keep-best N, "
            "--keep-every N; --dry-run shows what would go"
        )
    for name, least in (("keep_last", 1), ("keep_best", 0), ("keep_every", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: give {least} or more")
    for name in ("metric", "metric_mode"):
        if getattr(options, name) is not None and not options.keep_best:
            raise ConfigError(f"--{name.replace('_', '-')} goes with --keep-best N, for 1 or more")
    if options.target.exists() and not catalog.is_directory(options.target):
        raise ConfigError(
            f"prune goes with a run or a directory of checkpoints; {options.target} is a file"
            if options.target.is_file()
            else f"prune goes with a run or a directory of checkpoints; {options.target} is one checkpoint"
        )


def _has_rule(options: argparse.Namespace) -> bool:
    return any(getattr(options, name) is not None for name in ("keep_last", "keep_best", "keep_every"))


def _require_metric(manager: CheckpointManager, metric: str) -> None:
    """A name that is wrong would let all of the best ones go."""
    known = {name for file in manager.scan().files for name in file.metrics}
    if metric not in known:
        there = f"there are {', '.join(sorted(known))}" if known else "there are no metrics at all"
        raise ConfigError(f"--keep-best: no checkpoint has the metric {metric!r}; {there}; give --metric")


def _options(arguments: list[str]) -> argparse.Namespace:
    arg = parser(
        "prune",
        description="What\n"
        "stays is what any rule keeps; finals and the newest good one always stay. Damaged ones count for\n"
        "nothing, and go by --damaged alone. Those in an older format are never removed.\n"
        "Refused where a training runs: that cleans up by itself.",
        examples=[
            "distrust prune runs/train --keep-last 2 --dry-run",
            "distrust prune runs/train --keep-best 1 --metric loss --keep-every 1000",
            "distrust prune runs/train --damaged",
        ],
    )
    arg.add_argument("target", type=Path, help="a run, or a directory of checkpoints")
    arg.add_argument("--keep-last", type=int, metavar="N", help="keep the newest N; default: the newest")
    arg.add_argument("--keep-best", type=int, metavar="N", help="keep the best N by --metric, besides")
    arg.add_argument("--keep-every", type=int, metavar="N", help="keep each step that N divides, besides")
    arg.add_argument("--metric", help="what tells the best; default: eval_loss")
    arg.add_argument("--metric-mode", choices=get_args(MetricMode), help="min, the default: lower is better")
    arg.add_argument(
        "--damaged",
        action="store_true",
        help="read every byte of each file; remove the damaged ones",
    )
    arg.add_argument("--dry-run", action="store_true", help="show what would go, and remove nothing")
    arg.add_argument("--json", action="store_true", help="print one object")
    return arg.parse_args(arguments)
