"""What a writer's child does, forked or not: it uses what it inherited, and lives until it is let go of.

It holds an flock on a file of its own: whether it lives can be asked by that, whoever is its parent by then.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distrust import CheckpointManager

ENDINGS = ("exit", "_exit", "exception")
LET_GO, ALIVE, SAID = "let-go", "alive", "said"


def live(folder: Path, name: str, manager: CheckpointManager | None) -> None:
    """Say that it lives, use the manager, and wait until it is let go of."""
    alive = os.open(folder / f"{ALIVE}-{name}", os.O_RDWR | os.O_CREAT, 0o666)
    fcntl.flock(alive, fcntl.LOCK_EX)
    error = None
    try:
        if manager is not None:
            _use(manager)
    except BaseException:
        error = traceback.format_exc()
    said = folder / f"{SAID}-{name}"
    said.with_suffix(".new").write_text(json.dumps({"pid": os.getpid(), "error": error}))
    said.with_suffix(".new").rename(said)
    deadline = time.monotonic() + 120  # should nobody let go of it: it is not for ever
    while not (folder / LET_GO).exists() and time.monotonic() < deadline:
        time.sleep(0.005)


def end(how: str) -> None:
    """End as a program does: through the interpreter's end, past it, or by an exception."""
    if how == "_exit":
        os._exit(0)
    if how == "exception":
        raise ZeroDivisionError
    raise SystemExit(0)


def lives(folder: Path, name: str) -> bool:
    """Whether it still does."""
    descriptor = os.open(folder / f"{ALIVE}-{name}", os.O_RDWR)
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        return True
    finally:
        os.close(descriptor)


def _use(manager: CheckpointManager) -> None:
    """Read, and try to write: the parent lives, and holds the directory."""
    from campaigns.concurrency import content
    from distrust.checkpoint import lock
    from distrust.errors import CheckpointDirectoryLocked

    lock.WAIT_SECONDS = 0.02
    content.version_of(manager.load_latest())
    try:
        manager.save(content.make(999, 999, 16))
    except CheckpointDirectoryLocked:
        return
    raise ValueError("a child may write beside its parent")
