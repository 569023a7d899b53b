"""Blocks of memory on their way to the disk.

Direct I/O where the file system takes it (``direct.py``): it goes past the page cache, so that nothing is
copied twice, and the machine's memory is left to those who need it. Where it is refused, early write-back keeps the
disk as busy.

Threads, not asynchronous system calls: two of them, in a write most of the time, keep a disk busy, and they
are the same on every system.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import queue
import sys
import threading
from pathlib import Path

from distrust.checkpoint import direct

WRITES_IN_FLIGHT = 2
_SYNC_FILE_RANGE_WRITE = 2


class Writers:
    """Threads that write blocks of memory to a file, in the order in which they were handed over.

    Args:
        descriptor: of a file that :func:`create` opened.

    Raises:
        OSError: from every method but :meth:`stop`, if a write failed.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._blocks: queue.SimpleQueue[tuple[memoryview, int, threading.Event] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._threads = [threading.Thread(target=self._write_blocks) for _ in range(WRITES_IN_FLIGHT)]
        for thread in self._threads:
            thread.start()

    def put(self, block: memoryview, offset: int) -> threading.Event:
        """Have whole pages written at ``offset``; they stay as they are until the event is set."""
        self._raise_error()
        written = threading.Event()
        self._blocks.put((block, offset, written))
        return written

    def finish(self) -> None:
        """Wait until everything is written."""
        self.stop()
        self._raise_error()

    def stop(self) -> None:
        """Let the threads end, and wait for them: nobody may write to a descriptor that was closed."""
        for _ in self._threads:
            self._blocks.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _write_blocks(self) -> None:
        while (waiting := self._blocks.get()) is not None:
            block, offset, written = waiting
            try:
                if self._error is None:
                    _write_whole(self._descriptor, block, offset)
            except BaseException as error:
                self._error = error
            written.set()


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


def _write_whole(descriptor: int, view: memoryview, offset: int) -> None:
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
