"""What a save leaves behind is as open to others as the umask says, and never more, not for an instant.

Looked at are all files and directories that are there in the end, and the temporary file in the instant
before it gets its name: an audit hook of the interpreter sees the call.
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
#: The lock, a checkpoint of each kind by each way, and the directories that were made for them.
_LEAST = 7


def check(directory: Path, umask: int) -> int:
    """Save in every way under a umask; returns how many files and directories were looked at.

    Raises:
        CounterExample: with what is more open than it may be.
    """
    place = directory / "permissions"
    place.mkdir()
    seen = place / "seen"
    try:
        cost = costs.measured(lambda: _save_everything(place, umask, seen), allowed=_ALLOWED_BYTES)
        if cost.answer != "well":
            raise CounterExample(f"umask {umask:03o}: {cost.answer}")
        looked_at = seen.read_text().splitlines()
        if len(looked_at) < _LEAST or not any(name.endswith(".tmp") for name in looked_at):
            raise CounterExample(f"umask {umask:03o}: only these were there to be looked at: {looked_at}")
        return len(looked_at)
    except costs.Died as error:
        raise CounterExample(f"umask {umask:03o}: {error}") from error
    finally:
        shutil.rmtree(place)


def _save_everything(place: Path, umask: int, seen: Path) -> None:
    os.umask(umask)
    looked_at: list[tuple[str, int]] = []

    def before_renames(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename":
            looked_at.append((str(arguments[0]), os.stat(arguments[0]).st_mode & 0o7777))

    sys.addaudithook(before_renames)  # for good: the process is this one's own
    state = {"a": np.zeros(5000, np.float32)}
    for way, flag in (("direct", direct_io.FLAG), ("buffered", 0)):
        direct_io.FLAG = flag
        with CheckpointManager(place / way / "run" / "checkpoints") as manager:
            manager.save(Checkpoint(step=1, model=state))
            manager.save_async(Checkpoint(step=2, model=state)).wait()
            manager.save(Checkpoint(step=3, model=state), final=True)
        looked_at += [(str(path), path.stat().st_mode & 0o7777) for path in (place / way).rglob("*")]
    for name, mode in looked_at:
        allowed = (_DIRECTORY if Path(name).is_dir() else _FILE) & ~umask
        if mode & ~allowed:
            raise CounterExample(f"{name} has the permissions {mode:03o}, more than {allowed:03o}")
    seen.write_text("\n".join(name for name, _ in looked_at))
