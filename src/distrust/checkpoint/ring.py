"""Blocks on their way to the disk: one is filled while others are being written.

Direct I/O where the file system takes it (``direct.py``): it goes past the page cache, so that nothing is copied
twice, and the machine's memory is left to those who need it. It wants whole pages: the last block is therefore
written with what stands behind its end, and the file is cut afterwards. Where direct I/O is refused, early
write-back keeps the disk as busy.

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
from collections.abc import Iterator
from pathlib import Path

from distrust.checkpoint import direct
from distrust.checkpoint.memory import PAGE_BYTES, ReusableMemory, address_of

BLOCKS = 4
BLOCK_BYTES = 4 << 20
WRITES_IN_FLIGHT = 2
_SYNC_FILE_RANGE_WRITE = 2


class Ring:
    """Appends to a file through a few blocks.

    Args:
        descriptor: of a file that :func:`create` opened.
        size: of the file to be, in bytes: a small one gets small blocks.
        memory: where the blocks are; used again by the next ring.

    Raises:
        OSError: from every method, if a write failed.
    """

    def __init__(self, descriptor: int, size: int, memory: ReusableMemory) -> None:
        self._descriptor = descriptor
        self._block_bytes = min(BLOCK_BYTES, _whole_pages(size))
        held = memory.take(BLOCKS * self._block_bytes)
        self._address = address_of(held)
        self._view = memoryview(held)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[tuple[int, int, int] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        for block in range(BLOCKS):
            self._free.put(block)
        self._block = self._free.get()
        self._used = 0
        self._offset = 0
        self._writers = [threading.Thread(target=self._write_blocks) for _ in range(WRITES_IN_FLIGHT)]
        for writer in self._writers:
            writer.start()

    def seek(self, offset: int) -> None:
        """Go on at ``offset``, a multiple of 4096."""
        self._flush()
        self._offset = offset

    def append(self, address: int, nbytes: int) -> Iterator[memoryview]:
        """Copy memory into blocks; each piece is handed out before it is written.

        What the caller sees of a piece is what the disk gets, whatever happens to its source meanwhile.
        """
        while nbytes:
            start = self._block * self._block_bytes + self._used
            count = min(nbytes, self._block_bytes - self._used)
            ctypes.memmove(self._address + start, address, count)
            yield self._view[start : start + count]
            self._used += count
            address += count
            nbytes -= count
            if self._used == self._block_bytes:
                self._flush()

    def finish(self) -> None:
        """Wait until everything is written."""
        self._flush()
        self.stop()
        self._raise_error()

    def stop(self) -> None:
        """Let the writers end, and wait for them: nobody may write to a descriptor that was closed."""
        for _ in self._writers:
            self._filled.put(None)
        for writer in self._writers:
            writer.join()
        self._writers = []

    def _flush(self) -> None:
        if self._used:
            self._filled.put((self._block, self._used, self._offset))
            self._offset += self._used
            self._used = 0
            self._block = self._free.get()
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _write_blocks(self) -> None:
        while (filled := self._filled.get()) is not None:
            block, used, offset = filled
            start = block * self._block_bytes
            try:
                if self._error is None:
                    _write_whole(self._descriptor, self._view[start : start + _whole_pages(used)], offset)
            except BaseException as error:
                self._error = error
            self._free.put(block)


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


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def address_of_bytes(data: bytes) -> int:
    """Where immutable bytes lie; valid while they are held."""
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
