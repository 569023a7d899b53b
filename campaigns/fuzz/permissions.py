"""A save leaves nothing that is more open to others than the umask allows, not for an instant.

Checked are all files and directories that exist at the end, and the temporary file just before it is renamed:
an audit hook of the interpreter sees the call.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from campaigns.campaign import CounterExample
from campaigns.fuzz import costs
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import direct_io

UMASKS = (0o077, 0o027, 0o022, 0)
_ALLOWED_BYTES = 1 << 30
_FILE, _DIRECTORY = 0o666, 0o777
#: The lock, a checkpoint of each kind by each path, and the directories that were made for them.
_LEAST_PATHS = 7


def check(directory: Path, umask: int) -> int:
    """Save by every method under a umask; returns how many files and directories were checked."""
    folder = directory / "permissions"
    folder.mkdir()
    report = folder / "report"
    try:
        cost = costs.measure(lambda: _save_and_check(folder, umask, report), allowed=_ALLOWED_BYTES)
        if cost.answer != "ok":
            raise CounterExample(cost.answer)
        checked = report.read_text().splitlines()
        if len(checked) < _LEAST_PATHS or not any(name.endswith(".tmp") for name in checked):
            raise CounterExample(f"only these were checked: {checked}")
        return len(checked)
    except CounterExample as error:
        raise CounterExample(f"umask {umask:03o}: {error}") from error
    finally:
        shutil.rmtree(folder)


def _save_and_check(folder: Path, umask: int, report: Path) -> None:
    os.umask(umask)
    modes: list[tuple[str, int]] = []

    def before_rename(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename":
            modes.append((str(arguments[0]), os.stat(arguments[0]).st_mode & 0o7777))

    sys.addaudithook(before_rename)  # cannot be removed; the process ends soon
    state = {"a": np.zeros(5000, np.float32)}
    for path, flag in (("direct", direct_io.FLAG), ("buffered", 0)):
        direct_io.FLAG = flag
        with CheckpointManager(folder / path / "run" / "checkpoints") as manager:
            manager.save(Checkpoint(step=1, model=state))
            manager.save_async(Checkpoint(step=2, model=state)).wait()
            manager.save(Checkpoint(step=3, model=state), final=True)
        modes += [(str(file), file.stat().st_mode & 0o7777) for file in (folder / path).rglob("*")]
    for name, mode in modes:
        allowed = (_DIRECTORY if Path(name).is_dir() else _FILE) & ~umask
        if mode & ~allowed:
            raise CounterExample(f"{name} has the permissions {mode:03o}, more than {allowed:03o}")
    report.write_text("\n".join(name for name, _ in modes))
