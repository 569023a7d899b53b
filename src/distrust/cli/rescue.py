"""The command ``distrust rescue``: what processes that died have left in shared memory."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from distrust.checkpoint import CheckpointManager, FileSaver, catalog, step_snapshots
from distrust.checkpoint.files import checkpoint_file_name
from distrust.checkpoint.lock import is_locked
from distrust.cli.arguments import parser
from distrust.errors import CheckpointNotFound, ConfigError, printable
from distrust.reporting.display import size


def main(arguments: list[str]) -> int:
    """List snapshots, or save or remove those of a run."""
    options = _options(arguments)
    if options.run is None:
        if options.to or options.remove:
            raise ConfigError("rescue: name the run: distrust rescue RUN")
        return _list()
    candidates = (options.run / catalog.RUN_SUBDIRECTORY, options.run)  # the run may exist no more
    folders = {path: step_snapshots.folder_of(path) for path in candidates}
    directory, folder = next((each for each in folders.items() if each[1] and each[1].exists()), (None, None))
    if directory is None or folder is None:
        raise CheckpointNotFound(f"{options.run}: no process has left a step of it in shared memory")
    with CheckpointManager(directory) if directory.exists() else contextlib.nullcontext() as manager:
        if manager is not None:
            manager.acquire()  # fails while a training writes there
        if options.remove:
            step_snapshots.remove_snapshots(folder)
        elif options.to is not None:
            print(printable(str(_save(folder, options.to))))
        elif manager is None or (path := manager.rescue()) is None:
            raise CheckpointNotFound(
                f"{options.run}: nothing in memory is intact and newer than its checkpoints, or they were "
                "removed since; --to FILE saves what is intact, --remove drops it"
            )
        else:
            print(printable(str(path)))
    return 0


def _save(folder: Path, target: Path) -> Path:
    files = step_snapshots.read_slots(folder, catalog.verify_content)
    if not files:
        raise CheckpointNotFound(f"{folder}: torn: the process died while it copied its first step")
    if target.is_dir():
        target /= checkpoint_file_name(files[0].step, "periodic")
    return FileSaver().copy(files[0], target)


def _list() -> int:
    folders = step_snapshots.list_folders()
    for folder in folders:
        files = step_snapshots.read_slots(folder, catalog.verify_content)
        facts = (
            f"step {files[0].step}, {size(files[0].bytes)}, {files[0].created}, verified" if files else "torn"
        )
        directory = step_snapshots.read_note(folder).directory
        user = ", of a process that still runs" if is_locked(Path(directory)) else ""
        print(printable(f"{directory}: {facts}{user}"))
    if not folders:
        print("no process has left a step in shared memory")
    return 0


def _options(arguments: list[str]) -> argparse.Namespace:
    arg = parser(
        "rescue",
        description="A training keeps its last step there. The same command resumes from it by itself.",
        examples=["distrust rescue", "distrust rescue runs/train --to step.safetensors"],
    )
    arg.add_argument("run", type=Path, nargs="?", help="saves its step into the run; default: list all runs")
    arg.add_argument("--to", type=Path, metavar="FILE", help="save it there, a file or a folder, instead")
    arg.add_argument("--remove", action="store_true", help="remove it from memory, and save nothing")
    return arg.parse_args(arguments)
