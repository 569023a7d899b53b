"""Direct I/O: reads and writes that go past the page cache, where the system and the file system have it.

It wants memory, offsets and lengths in whole pages. Whether a file system takes it is found out by trying:
some refuse it when a file is opened, others only when it is read or written; then :func:`drop` does without.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

#: 0 where the system has none.
FLAG = getattr(os, "O_DIRECT", 0)


def is_enabled(descriptor: int) -> bool:
    """Whether a descriptor uses it."""
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & FLAG)


def enable(descriptor: int) -> None:
    """Use it from now on, if the file system lets us."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | FLAG)


def disable(descriptor: int) -> None:
    """Use it no more."""
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~FLAG)
