"""Direct I/O (O_DIRECT): reads and writes that bypass the page cache, where the file system supports it.

Memory, offsets and lengths must be multiples of a page. Support is determined by trying: some file systems
reject the flag when a file is opened, others each read or write with EINVAL: see :func:`transfer`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable

FLAG = getattr(os, "O_DIRECT", 0)  # macOS has none; F_NOCACHE takes its place


def is_enabled(descriptor: int) -> bool:
    """Return whether a descriptor uses direct I/O."""
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & FLAG)


def enable(descriptor: int) -> None:
    """Use direct I/O for a descriptor, if its file system allows that."""
    with contextlib.suppress(OSError):  # buffered I/O works everywhere
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | FLAG)


def disable(descriptor: int) -> None:
    """Use buffered I/O for a descriptor."""
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~FLAG)


def transfer(descriptor: int, make: Callable[[], int]) -> int:
    """Make one read or write, and return its bytes; with buffered I/O if the file system refuses direct I/O.

    Some refuse it only here, or the unaligned rest of a short transfer. Another thread may have disabled it
    meanwhile: EINVAL is final only if it comes twice.
    """
    try:
        return make()
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    disable(descriptor)
    return make()
