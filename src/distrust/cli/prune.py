"""The command ``distrust prune``: removes checkpoints."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, get_args

from distrust.checkpoint import CheckpointManager, DamagedFile, Scan, catalog
from distrust.checkpoint.remote.location import Location
from distrust.checkpoint.retention import MetricMode, Retention
from distrust.cli import targets
from distrust.cli.arguments import parser, print_json
from distrust.errors import ConfigError, DamagedCheckpointWarning, DistrustError, printable, warn
from distrust.paths import refuse_links
from distrust.reporting.display import pluralize, size

#: The unit of ``st_blocks``, whatever the block size of the file system.
BLOCK_BYTES = 512
#: The rules and the smallest value of each.
RULES = {"keep_last": 1, "keep_best": 0, "keep_every": 1}
NO_RULE = "no rule keeps it"


class RemovedFile(NamedTuple):
    """A file that was removed, or in a dry run would be."""

    path: str
    step: int  # of the checkpoint
    bytes: int  # disk space that the removal frees
    reason: str  # why it is removed


def main(arguments: list[str]) -> int:
    """Remove checkpoints that no rule keeps, damaged ones, or both."""
    options = _options(arguments)
    _require_valid(options)
    rules = Retention(
        keep_last=options.keep_last or 1,  # the newest intact one always stays
        keep_best=options.keep_best or 0,
        keep_every=options.keep_every,
        metric=options.metric or "eval_loss",
        metric_mode=options.metric_mode or "min",
    )
    removal = _Removal(options)
    try:
        if isinstance(options.target, Location):
            _prune_store(options.target, rules, removal, dry_run=options.dry_run)
        else:
            _prune_directory(options, rules, removal)
    except DistrustError:
        removal.print_total(if_empty=False)  # files were removed before the error
        raise
    removal.print_total(if_empty=True)
    return 0


def _prune_store(target: Location, rules: Retention, removal: _Removal, *, dry_run: bool) -> None:
    from distrust.checkpoint.remote.pruner import prune

    run = targets.remote(target)
    run.require_files()
    if rules.keep_best:
        _require_metric(run.scan(), rules.metric)
    for file in prune(run, rules, dry_run=dry_run):
        removal.add(file.path, file.step, file.bytes, NO_RULE)


def _prune_directory(options: argparse.Namespace, rules: Retention, removal: _Removal) -> None:
    catalog.resolve(options.target)  # the manager would create a directory that does not exist
    directory = catalog.checkpoint_directory(options.target)
    if directory != options.target:  # the run was named: its folder must not lead to another run
        refuse_links(directory)
    sizes = {entry.path.name: _freed_bytes(entry.path) for entry in catalog.list_names(directory)}

    def add(path: Path, step: int, reason: str) -> None:
        # Name the directory as the user did: the manager resolves it.
        removal.add(directory / path.name, step, sizes[path.name], reason)

    with CheckpointManager(directory, **asdict(rules)) as manager:
        if rules.keep_best:
            _require_metric(manager.scan(), rules.metric)  # before anything is removed
        _remove(manager, options, add)
    if removal.files and len(removal.files) == len(sizes):  # none is left
        verb = "would be" if options.dry_run else "is"
        warn(f"{directory}: no checkpoint {verb} left: the same training would start from the beginning")


def _remove(
    manager: CheckpointManager, options: argparse.Namespace, add: Callable[[Path, int, str], None]
) -> None:
    def add_damaged(file: DamagedFile) -> None:
        add(file.path, file.step, f"damaged: {file.reason}")

    if not options.dry_run:
        manager.acquire()  # fails while a training writes here
    if options.damaged and options.dry_run:
        for file in manager.list_damaged():
            add_damaged(file)
    elif options.damaged:
        manager.remove_damaged(add_damaged)  # reports each one as it goes
    if not _has_rule(options):
        return
    with warnings.catch_warnings():
        if options.damaged:  # already reported
            warnings.simplefilter("ignore", DamagedCheckpointWarning)
        superseded = manager.list_superseded()  # verifies every byte of the rest
    try:
        if not options.dry_run:
            manager.cleanup()  # removes the same files: nobody else writes, and each was verified
    finally:
        for superseded_file in superseded:
            if options.dry_run or not os.path.lexists(superseded_file.path):
                add(superseded_file.path, superseded_file.step, NO_RULE)


class _Removal:
    """Reports each removed file as it goes, and the total."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.files: list[RemovedFile] = []
        self._options = options

    def add(self, path: Path, step: int, nbytes: int, reason: str) -> None:
        """Report a file."""
        file = RemovedFile(str(path), step, nbytes, reason)
        self.files.append(file)
        if not self._options.json:
            verb = "would remove" if self._options.dry_run else "removed"
            print(printable(f"{verb} {file.path} ({size(file.bytes)}): {file.reason}"), flush=True)

    def print_total(self, *, if_empty: bool) -> None:
        """Print the total; with ``if_empty`` also if nothing was removed."""
        if not self.files and not if_empty:
            return
        count, freed = pluralize(len(self.files), "file"), sum(file.bytes for file in self.files)
        if self._options.json:
            rows = [file._asdict() for file in self.files]
            print_json({"dry_run": self._options.dry_run, "removed": rows, "bytes_freed": freed})
        elif not self.files:
            print("nothing to remove")
        elif self._options.dry_run:
            print(f"{count}, {size(freed)}: nothing removed (dry run)")
        else:
            print(f"{count} removed, {size(freed)} freed")


def _freed_bytes(path: Path) -> int:
    """The disk space that removing a file frees: none if another hard link exists."""
    try:
        status = os.lstat(path)  # a link frees only itself
    except OSError:
        return 0
    return status.st_blocks * BLOCK_BYTES if status.st_nlink == 1 else 0  # what du counts


def _require_valid(options: argparse.Namespace) -> None:
    if not options.damaged and not _has_rule(options):
        raise ConfigError(
            "prune: specify what to remove (--damaged) or what to keep: --keep-last N, --keep-best N, "
            "--keep-every N; --dry-run shows what would be removed"
        )
    for name, least in RULES.items():  # in terms of the flags
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: give {least} or more")
    for name in ("metric", "metric_mode"):
        if getattr(options, name) is not None and not options.keep_best:
            raise ConfigError(f"--{name.replace('_', '-')} needs --keep-best N, with N of 1 or more")
    if options.damaged and isinstance(options.target, Location):
        raise ConfigError(f"--damaged: {options.target} is in a store; delete what `distrust verify` names")
    if targets.is_one(options.target):
        raise ConfigError(f"prune needs a run or a directory of checkpoints; {options.target} is none")


def _has_rule(options: argparse.Namespace) -> bool:
    return any(getattr(options, name) is not None for name in RULES)


def _require_metric(contents: Scan, metric: str) -> None:
    """Check that a checkpoint has the metric: with a misspelt one, --keep-best would keep nothing."""
    names = {name for file in contents.files for name in file.metrics}  # of intact checkpoints
    if metric not in names:
        hint = f"there are {', '.join(sorted(names))}" if names else "there are no metrics at all"
        raise ConfigError(f"--keep-best: no checkpoint has the metric {metric!r}; {hint}; give --metric")


def _options(arguments: list[str]) -> argparse.Namespace:
    arg = parser(
        "prune",
        description="A checkpoint stays if any rule keeps it. Final checkpoints and the newest intact one "
        "always stay. Damaged ones count for no rule, and only --damaged removes them. Checkpoints in an "
        "older format are never removed. Refused while a training writes to the directory: it prunes by "
        "itself.",
        examples=[
            "distrust prune runs/train --keep-last 2 --dry-run",
            "distrust prune runs/train --keep-best 1 --metric loss --keep-every 1000",
            "distrust prune runs/train --damaged",
        ],
    )
    arg.add_argument("target", type=targets.target, help="a run, or a directory of checkpoints")
    arg.add_argument("--keep-last", type=int, metavar="N", help="keep the newest N; default: 1")
    arg.add_argument("--keep-best", type=int, metavar="N", help="also keep the best N by --metric")
    arg.add_argument("--keep-every", type=int, metavar="N", help="also keep each multiple of N steps")
    arg.add_argument("--metric", help="metric that chooses the best; default: eval_loss")
    arg.add_argument("--metric-mode", choices=get_args(MetricMode), help="min, the default: lower is better")
    arg.add_argument(
        "--damaged", action="store_true", help="read every byte of each file, and remove the damaged ones"
    )
    arg.add_argument("--dry-run", action="store_true", help="show what would be removed, and remove nothing")
    arg.add_argument("--json", action="store_true", help="print one object")
    return arg.parse_args(arguments)
