"""When to strike: after a time, once something was said, or once something was seen on the disk.

What is seen on the disk tells how far a save has come, from outside: its temporary file is there, has got
its space, is renamed, and an older checkpoint is removed. One looks again and again, a few thousand times a
second; a random delay after what was seen reaches what lies between.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from campaigns.processes import POLL_SECONDS, Session

#: Something that came to be true of a session; asked again and again, from its start on.
Trigger = Callable[[Session], Callable[[], bool]]
Seen = Literal["made", "reserved", "renamed", "removed"]


def after(seconds: float) -> Trigger:
    """So long after the start."""
    return lambda session: lambda: session.seconds >= seconds


def once_said(text: str, count: int = 1) -> Trigger:
    """Once it has printed so many lines with a text."""
    return lambda session: lambda: sum(text in line for line in session.said()) >= count


def once_seen(event: Seen, count: int = 1) -> Trigger:
    """Once something has happened in its directory for so many times."""

    def watched(session: Session) -> Callable[[], bool]:
        watch = _Watch(session.directory)
        return lambda: watch.look()[event] >= count

    return watched


def strike(session: Session, number: int, instant: Trigger, delay: float = 0.0) -> bool:
    """Send a signal at an instant, or so many seconds later; False if the process had ended by then."""
    come = instant(session)
    while session.running and not come():
        time.sleep(POLL_SECONDS)
    _pause(session, delay)
    if not session.running:
        return False
    session.send(number)
    return True


def _pause(session: Session, seconds: float) -> None:
    """Not by one long sleep: it is less exact, and the process may end meanwhile."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and session.running:
        time.sleep(min(POLL_SECONDS, max(0.0, end - time.monotonic())))


class _Look(NamedTuple):
    """What was there: temporary files with whether they had a size yet, and checkpoints."""

    temporary: dict[str, bool]
    checkpoints: set[str]


class _Watch:
    """Counts what happens in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._last = _look(directory)
        self._counts: dict[Seen, int] = {"made": 0, "reserved": 0, "renamed": 0, "removed": 0}

    def look(self) -> dict[Seen, int]:
        before, now = self._last, _look(self._directory)
        self._last = now
        self._counts["made"] += len(now.temporary.keys() - before.temporary.keys())
        self._counts["reserved"] += sum(
            sized and not before.temporary.get(name, False) for name, sized in now.temporary.items()
        )
        # A name that stood before may have got a new file: its temporary one is gone.
        self._counts["renamed"] += max(
            len(now.checkpoints - before.checkpoints), len(before.temporary.keys() - now.temporary.keys())
        )
        self._counts["removed"] += len(before.checkpoints - now.checkpoints)
        return self._counts


def _look(directory: Path) -> _Look:
    look = _Look({}, set())
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return look
    for name in names:
        if name.endswith(".safetensors"):
            look.checkpoints.add(name)
        elif name.endswith(".tmp"):
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile: the next look has its name
                look.temporary[name] = os.stat(directory / name).st_size > 0
    return look
