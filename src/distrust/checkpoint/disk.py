"""Every system call that changes what is on a disk, each as one method: the seam below the commit protocol.

The protocol (``storage.py``) says in which order they are made, this module how. Another disk with the same
methods can take its place: one that records what was asked of it, or fails when it is told to.

Blocks go by direct I/O where the file system takes it (``direct.py``): past the page cache, so that nothing
is copied twice, and the machine's memory is left to those who need it. Where it is refused, early write-back
keeps the disk as busy.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import sys
from pathlib import Path

from distrust.checkpoint import direct_io

_SYNC_FILE_RANGE_WRITE = 2


class Disk:
    """The real one. Every method raises OSError; descriptors are the operating system's."""

    def make_directory(self, path: Path) -> None:
        """Make a directory; its parent is there."""
        os.mkdir(path)

    def open_lock(self, path: Path) -> int:
        """Open a file to be locked; made if it is not there, never followed if it is a link."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)

    def write_lock_note(self, descriptor: int, text: str) -> None:
        """Have a lock say who holds it; it is overwritten, and never synced."""
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)

    def create(self, path: Path) -> int:
        """Make a new file and open it to be written, for direct I/O if its file system has it."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(path, flags | direct_io.FLAG, 0o666)
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

    def reserve(self, descriptor: int, size: int) -> None:
        """Reserve space for a file, or raise ENOSPC before a byte is written."""
        if size and sys.platform == "linux":
            # Not os.posix_fallocate: where the file system cannot reserve, it writes a byte into every block.
            fallocate = ctypes.CDLL(None, use_errno=True).fallocate
            fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
            if fallocate(descriptor, 0, 0, size) == 0:
                return
            code = ctypes.get_errno()
            if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EINTR):
                raise OSError(code, os.strerror(code))
        elif size and sys.platform == "darwin" and _preallocate(descriptor, size):
            return
        status = os.fstatvfs(descriptor)
        if status.f_bavail * status.f_frsize < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(self, descriptor: int, view: memoryview, offset: int) -> None:
        """Write all of ``view``: whole pages that begin on one, as does ``offset``."""
        begin, length, refused = offset, len(view), False
        while view:
            try:
                written = os.pwrite(descriptor, view, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or refused:
                    raise
                # Direct I/O may be refused only here: by the file system, or for what a short write left.
                direct_io.disable(descriptor)
                refused = True
                continue
            view = view[written:]
            offset += written
        _start_write_back(descriptor, begin, length)

    def truncate(self, descriptor: int, size: int) -> None:
        """Cut a file, or let it grow."""
        os.ftruncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        """Have the disk hold what was written to a file."""
        _sync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a file."""
        os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name; a file of that name is replaced in the same instant."""
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a name."""
        os.unlink(path)

    def sync_directory(self, path: Path) -> None:
        """Have the disk hold the names in a directory."""
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
            if error.errno not in (errno.ENOTSUP, errno.EINVAL):  # not every file system has it
                raise
    os.fsync(descriptor)


def _start_write_back(descriptor: int, offset: int, length: int) -> None:
    """Have the disk begin now what the sync would otherwise find to do at the end."""
    if sys.platform == "linux" and not direct_io.is_enabled(descriptor):
        libc = ctypes.CDLL(None)
        libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
        # Advice only: whether it was written is for the sync to say.
        libc.sync_file_range(descriptor, offset, length, _SYNC_FILE_RANGE_WRITE)


def _preallocate(descriptor: int, size: int) -> bool:
    """macOS: whether the space was given. The file keeps its size: it grows as it is written."""
    allocate_all, from_the_end = 4, 3  # F_ALLOCATEALL, F_PEOFPOSMODE; Python has no names for them
    wanted = struct.pack("@Iiqqq", allocate_all, from_the_end, 0, size, 0)
    try:
        fcntl.fcntl(descriptor, 42, wanted)  # F_PREALLOCATE
    except OSError:
        return False  # full, or not this file system's: the free space tells
    return True
