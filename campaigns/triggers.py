"""When to send a signal: after a time, once a line was printed, or once something happened on the disk.

From outside, the disk shows how far a save has come. A random delay reaches the instants between two events.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from campaigns.session import POLL_SECONDS, Session

#: Given a session at its start, returns a condition that is polled until it holds.
Trigger = Callable[[Session], Callable[[], bool]]
DiskEvent = Literal["made", "reserved", "renamed", "removed"]  # of a save, in this order


def after(seconds: float) -> Trigger:
    return lambda session: lambda: session.seconds >= seconds


def once_printed(text: str, count: int = 1) -> Trigger:
    """Once it has printed so many lines with a text."""
    return lambda session: lambda: sum(text in line for line in session.output()) >= count


def once_on_disk(event: DiskEvent, count: int = 1) -> Trigger:
    """Once something has happened so many times in its directory."""

    def start(session: Session) -> Callable[[], bool]:
        watch = _Watch(session.directory)
        return lambda: watch.poll()[event] >= count

    return start


def random_disk_event(rng: random.Random, count: int) -> Trigger:
    """Once one of the events, chosen at random, has happened so many times."""
    return once_on_disk(rng.choice(get_args(DiskEvent)), count)


def send_at(session: Session, number: int, trigger: Trigger, delay: float = 0.0) -> bool:
    """Send a signal ``delay`` seconds after a trigger; False if the process had ended by then."""
    is_running = wait_for(session, trigger, delay)
    if is_running:
        session.send(number)
    return is_running


def wait_for(session: Session, trigger: Trigger, delay: float = 0.0) -> bool:
    """Wait until ``delay`` seconds after a trigger; False if the process had ended by then."""
    condition = trigger(session)
    while session.running and not condition():
        time.sleep(POLL_SECONDS)
    _pause(session, delay)
    return session.running


def _pause(session: Session, seconds: float) -> None:
    # Not one long sleep: that is less exact, and the process may end meanwhile.
    end = time.monotonic() + seconds
    while time.monotonic() < end and session.running:
        time.sleep(min(POLL_SECONDS, max(0.0, end - time.monotonic())))


class _Listing(NamedTuple):
    temporary: dict[str, bool]
    checkpoints: set[str]


class _Watch:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._previous = _list(directory)
        self._counts: dict[DiskEvent, int] = dict.fromkeys(get_args(DiskEvent), 0)

    def poll(self) -> dict[DiskEvent, int]:
        old, new = self._previous, _list(self._directory)
        self._previous = new
        self._counts["made"] += len(new.temporary.keys() - old.temporary.keys())  # a temporary file
        self._counts["reserved"] += sum(
            sized and not old.temporary.get(name, False) for name, sized in new.temporary.items()
        )
        # A name that existed may have a new file now: then only its temporary file is gone.
        self._counts["renamed"] += max(
            len(new.checkpoints - old.checkpoints), len(old.temporary.keys() - new.temporary.keys())
        )
        self._counts["removed"] += len(old.checkpoints - new.checkpoints)
        return self._counts


def _list(directory: Path) -> _Listing:
    listing = _Listing({}, set())
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return listing
    for name in names:
        if name.endswith(".safetensors"):
            listing.checkpoints.add(name)
        elif name.endswith(".tmp"):
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile: the next poll sees its name
                listing.temporary[name] = os.stat(directory / name).st_size > 0
    return listing
