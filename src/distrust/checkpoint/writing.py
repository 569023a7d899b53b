"""Blocks of memory on their way to the disk.

Direct I/O where the file system takes it (``direct.py``): it goes past the page cache, so that nothing is
copied twice, and the machine's memory is left to those who need it. Where it is refused, early write-back
keeps the disk as busy.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import sys
from pathlib import Path

from distrust.checkpoint import direct

_SYNC_FILE_RANGE_WRITE = 2


def create(path: Path) -> int:
    """A new file, for direct I/O if its file system has it."""
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags | direct.FLAG, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        with contextlib.suppress(FileNotFoundError):  # Linux refuses after it has made the file
            os.unlink(path)
        descriptor = os.open(path, flags, 0o666)
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
    return descriptor


def write(descriptor: int, view: memoryview, offset: int) -> None:
    """Write all of ``view``: whole pages that begin on one, as does ``offset``."""
    begin, length, refused = offset, len(view), False
    while view:
        try:
            written = os.pwrite(descriptor, view, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or refused:
                raise
            # Direct I/O may be refused only here: by the file system, or for what a short write left over.
            direct.drop(descriptor)
            refused = True
            continue
        view = view[written:]
        offset += written
    _start_write_back(descriptor, begin, length)


def _start_write_back(descriptor: int, offset: int, length: int) -> None:
    """Have the disk begin now what the sync would otherwise find to do at the end."""
    if sys.platform == "linux" and not direct.is_on(descriptor):
        libc = ctypes.CDLL(None)
        libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
        # Advice only: whether it was written is for the sync to say.
        libc.sync_file_range(descriptor, offset, length, _SYNC_FILE_RANGE_WRITE)
