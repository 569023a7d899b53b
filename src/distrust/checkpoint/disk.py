"""Every system call that changes a disk, each as one method.

``storage.py`` decides the order of the calls, this module makes them. A subclass can replace the disk: one
that records the calls, or fails on request.

Blocks are written with direct I/O if the file system supports it (``direct_io.py``): without the page cache
nothing is copied twice, and the memory stays free for others. Otherwise early write-back keeps the disk as
busy.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
import sys
from functools import partial
from pathlib import Path

from distrust.checkpoint import direct_io
from distrust.checkpoint.files import open_to_write

_SYNC_FILE_RANGE_WRITE = 2
_F_PREALLOCATE, _F_ALLOCATEALL, _F_PEOFPOSMODE = 42, 4, 3  # of macOS, without names in Python


class Disk:
    """The operating system's disk. Every method raises OSError; descriptors are the system's."""

    def make_directory(self, path: Path) -> None:
        """Create a directory; its parent exists."""
        os.mkdir(path)

    def open_lock(self, path: Path) -> int:
        """Open a lock file, creating it if needed; never a link, another file's name, or a pipe."""
        # Whoever can open it can lock it: only those who may write to the directory, and so replace it, too.
        is_shared = os.stat(path.parent).st_mode & stat.S_IWGRP
        return open_to_write(path, os.O_RDWR | os.O_CREAT, 0o660 if is_shared else 0o600)

    def write_lock_note(self, descriptor: int, text: str) -> None:
        """Replace the text of a lock file; never synced, as it is only for a message."""
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)

    def create(self, path: Path) -> int:
        """Create a new file and open it for writing, with direct I/O if its file system supports it.

        It is locked while it is open, so that others can tell it from the file of a dead writer.
        """
        # O_EXCL and O_NOFOLLOW: never write into an existing file or through a link.
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(path, flags | direct_io.FLAG, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            with contextlib.suppress(FileNotFoundError):  # Linux refuses only after creating the file
                os.unlink(path)
            descriptor = os.open(path, flags, 0o666)
        if sys.platform == "darwin":
            with contextlib.suppress(OSError):
                fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor

    def join(self, path: Path) -> int:
        """Open a file that another process has created, to write a part of it; never a link."""
        descriptor = open_to_write(path, os.O_WRONLY)
        direct_io.enable(descriptor)
        return descriptor

    def reserve(self, descriptor: int, size: int) -> None:
        """Reserve space for a file, or raise ENOSPC before a byte is written."""
        if size and sys.platform == "linux":
            # Not os.posix_fallocate: glibc emulates it by writing a byte into every block.
            fallocate = ctypes.CDLL(None, use_errno=True).fallocate
            fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
            if fallocate(descriptor, 0, 0, size) == 0:
                return
            code = ctypes.get_errno()
            if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EINTR):
                raise OSError(code, os.strerror(code))
        elif size and sys.platform == "darwin" and _preallocate(descriptor, size):
            return
        # Not supported: at least compare with the free space.
        status = os.fstatvfs(descriptor)
        if status.f_bavail * status.f_frsize < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(self, descriptor: int, view: memoryview, offset: int) -> None:
        """Write all of ``view``: whole pages, page-aligned, as is ``offset``."""
        begin, length = offset, len(view)
        while view:
            written = direct_io.transfer(descriptor, partial(os.pwrite, descriptor, view, offset))
            view = view[written:]
            offset += written
        _start_write_back(descriptor, begin, length)

    def truncate(self, descriptor: int, size: int) -> None:
        """Set the size of a file."""
        os.ftruncate(descriptor, size)  # works on a descriptor of direct I/O, at any size

    def sync(self, descriptor: int) -> None:
        """Make the content of a file durable."""
        _sync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a file."""
        os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file; atomically replaces an existing one."""
        os.replace(source, target)  # one system call: no instant without the file

    def unlink(self, path: Path) -> None:
        """Remove a name."""
        os.unlink(path)

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _sync(descriptor)
        finally:
            os.close(descriptor)


def _sync(descriptor: int) -> None:
    if sys.platform == "darwin":
        # fsync on macOS leaves the data in the drive's cache.
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EINVAL):  # not every file system supports it
                raise
    os.fsync(descriptor)


def _start_write_back(descriptor: int, offset: int, length: int) -> None:
    """Start writing cached pages to the disk now, so that the sync has less to do."""
    if sys.platform == "linux" and not direct_io.is_enabled(descriptor):
        start = ctypes.CDLL(None).sync_file_range
        start.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
        # The result does not matter: the sync reports failed writes.
        start(descriptor, offset, length, _SYNC_FILE_RANGE_WRITE)


def _preallocate(descriptor: int, size: int) -> bool:
    """Reserve space on macOS; returns whether that worked. The size of the file does not change."""
    request = struct.pack("@Iiqqq", _F_ALLOCATEALL, _F_PEOFPOSMODE, 0, size, 0)
    try:
        fcntl.fcntl(descriptor, _F_PREALLOCATE, request)
    except OSError:
        return False  # full, or not supported: the caller compares with the free space
    return True
