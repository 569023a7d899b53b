"""A writer's child, forked or not: it uses what it inherited, and lives until it is released.

It holds an flock on a file of its own, which shows whether it lives, whichever process is its parent by then.
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
RELEASE, ALIVE, REPORT = "release", "alive", "report"


def live(folder: Path, name: str, manager: CheckpointManager | None) -> None:
    """Show that it lives, use the manager, and wait for the release."""
    alive = os.open(folder / f"{ALIVE}-{name}", os.O_RDWR | os.O_CREAT, 0o666)
    fcntl.flock(alive, fcntl.LOCK_EX)
    error = None
    try:
        if manager is not None:
            _use(manager)
    except BaseException:
        error = traceback.format_exc()
    report = folder / f"{REPORT}-{name}"
    report.with_suffix(".new").write_text(json.dumps({"pid": os.getpid(), "error": error}))
    report.with_suffix(".new").rename(report)
    deadline = time.monotonic() + 120  # should no release come, it does not live for ever
    while not (folder / RELEASE).exists() and time.monotonic() < deadline:
        time.sleep(0.005)


def end(ending: str) -> None:
    """End as a program does: through the interpreter's end, past it, or by an exception."""
    if ending == "_exit":
        os._exit(0)
    if ending == "exception":
        raise ZeroDivisionError
    raise SystemExit(0)


def is_alive(folder: Path, name: str) -> bool:
    """Whether the child of that name lives."""
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
