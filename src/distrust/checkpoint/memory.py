"""Reusable host memory that is pre-touched, and how much memory this process uses and may use.

A copy into touched memory runs at memory speed. In fresh memory the kernel first finds and clears each page,
which is several times slower and varies a lot.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path

from distrust.checkpoint import parallel

_LINUX = os.uname().sysname == "Linux"
PAGE_BYTES = 4096  # direct I/O needs memory, offsets and lengths in multiples of it
_LARGE_PAGE_BYTES = 2 << 20
_MADV_WIPEONFORK, _MADV_POPULATE_WRITE = 18, 23  # Linux 4.14, 5.14; Python does not define them
_TOUCH_BYTES = 64 << 20  # per task of a thread
_LOCK_BYTES = 64 << 20  # page-locked ahead: locking a large memory again takes long
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
_LARGE_BLOCK_BYTES = 1 << 20
_LARGEST_BLOCK_BYTES = 32 << 20  # glibc's upper bound of the threshold: it always unmaps larger blocks

#: (address, bytes) -> what unlocks that memory again. It is called in a thread of its own.
PageLock = Callable[[int, int], Callable[[], None]]


class Memory(mmap.mmap):
    """Memory that may be page-locked, until the last view of it is gone."""

    unlock: Callable[[], None] = staticmethod(lambda: None)

    def lock(self, nbytes: int, page_lock: PageLock) -> None:
        """Page-lock the first ``nbytes``, in one piece: a copy may not cross the edge of what is locked."""

        def lock_again() -> None:
            self.unlock()
            self.unlock = Memory.unlock
            self.unlock = page_lock(address_of(self), nbytes)

        context = contextvars.copy_context()  # which collects warnings
        thread = parallel.WorkerPool(1)  # no interrupt reaches it, between what is done and its record
        try:
            thread.submit(lambda: context.run(lock_again))
            thread.finish()
        finally:
            thread.stop()

    def __del__(self) -> None:
        self.unlock()  # before it is unmapped


def allocate(nbytes: int) -> Memory:
    """Return zeroed, page-aligned memory of at least ``nbytes``, not yet touched. Raises MemoryError."""
    # Without a request for large pages: on virtual machines that return free large pages to their host, the
    # first touch of each is several times slower.
    try:
        return Memory(-1, max(nbytes, PAGE_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for {nbytes:,} bytes: {error.strerror}") from None


def address_of(memory: mmap.mmap) -> int:
    """Return the address of its first byte."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class ReusableMemory:
    """A buffer that is kept between uses, and replaced by a larger one when a use needs more."""

    def __init__(self) -> None:
        self._memory: Memory | None = None
        self.touched_bytes = 0  # they cost no page fault any more
        self._locked_bytes = 0

    def acquire(self, nbytes: int, page_lock: PageLock | None = None) -> Memory:
        """Return at least ``nbytes``, all touched; memory returned before is invalid. Raises MemoryError.

        ``page_lock`` page-locks them for the copies of a device, unless they are already.
        """
        if self._memory is None or len(self._memory) < nbytes:
            self.release()
            # Room to grow with the history of a run: pages that are not touched use no memory.
            self._memory = allocate(round_up(nbytes + nbytes // 4, _LARGE_PAGE_BYTES))
            # Large pages, as this memory is reused: direct I/O pins each page of it, every time.
            with contextlib.suppress(OSError, AttributeError):  # a kernel without large pages, or macOS
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        if self.touched_bytes < nbytes:
            unit = _LOCK_BYTES if page_lock else _LARGE_PAGE_BYTES
            end = min(round_up(nbytes, unit), len(self._memory))
            _touch(address_of(self._memory), self.touched_bytes, end)
            self.touched_bytes = end
        if page_lock and self._locked_bytes < nbytes:
            with contextlib.suppress(OSError):
                # A forked child gets zeros. Shared pages would be copied, and the device keep the old ones.
                self._memory.madvise(_MADV_WIPEONFORK)
            self._memory.lock(self.touched_bytes, page_lock)
            self._locked_bytes = self.touched_bytes  # if that failed, too: it is not tried at every save
        return self._memory

    def release(self) -> None:
        """Return the memory to the system."""
        self._memory = None  # not closed: existing views keep it alive until they are gone
        self.touched_bytes = self._locked_bytes = 0


def round_up(nbytes: int, unit: int) -> int:
    """Return the next multiple of ``unit``."""
    return -(-nbytes // unit) * unit


def _touch(address: int, start: int, end: int) -> None:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def touch(offset: int) -> None:
        length = min(_TOUCH_BYTES, end - offset)
        # One system call, without a page fault for each page; older kernels refuse it.
        if not _LINUX or libc.madvise(address + offset, length, _MADV_POPULATE_WRITE):
            ctypes.memset(address + offset, 0, length)

    parallel.run(touch, range(start, end, _TOUCH_BYTES), threads=parallel.cores())


def resident_bytes() -> int:
    """Return the resident memory of this process, in bytes."""
    if _LINUX:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    usage = (ctypes.c_uint64 * 12)()  # rusage_info_v0: a UUID of 16 bytes, then numbers; resident is the 7th
    if ctypes.CDLL(None).proc_pid_rusage(os.getpid(), 0, ctypes.byref(usage)):
        raise OSError(ctypes.get_errno(), "proc_pid_rusage failed")
    return usage[8]


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process, in bytes."""
    if _LINUX:
        # Not getrusage: its maximum survives exec, so it may be that of the parent process.
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, not kilobytes


def keep_freed_memory() -> None:
    """Make the allocator keep freed memory for the next step: page faults cost a tenth of a step."""
    # glibc does so for blocks of up to 32 MiB once it has freed one, but returns what is free at the end of
    # the heap.
    _call_glibc("mallopt", _M_MMAP_THRESHOLD, _LARGEST_BLOCK_BYTES)
    _call_glibc("mallopt", _M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Make the allocator return large blocks when freed: for frameworks with a cache of their own."""
    _call_glibc("mallopt", _M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)


def trim() -> None:
    """Make the allocator return free memory to the system; glibc otherwise keeps it."""
    _call_glibc("malloc_trim", 0)


def _call_glibc(function: str, *arguments: int) -> None:
    if _LINUX:
        with contextlib.suppress(AttributeError):  # another C library, such as musl
            getattr(ctypes.CDLL(None), function)(*arguments)


def available_bytes(root: Path = Path("/")) -> int:
    """Return how many bytes this process can still allocate, by the system and its cgroups below ``root``."""
    limits = [_cgroup_bytes(directory) for directory in _cgroups(root)]
    return min([_system_bytes(root), *(limit for limit in limits if limit is not None)])


def _system_bytes(root: Path) -> int:
    with contextlib.suppress(OSError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroups(root: Path) -> list[Path]:
    """Return the memory cgroups that this process is in, innermost first."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    directories = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2, version 1
            top = root / "sys/fs/cgroup" / controllers
            inner = top / path.lstrip("/")
            # Any parent may set a lower limit. In a container, the path may not exist below its root.
            directories += [inner, *(parent for parent in inner.parents if parent.is_relative_to(top))]
    return directories


def _cgroup_bytes(directory: Path) -> int | None:
    """Return how many bytes a cgroup still allows; None if it sets no limit."""
    for limit, usage, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            allowed = (directory / limit).read_text().strip()
            used = int((directory / usage).read_text())
            stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if allowed != "max":
            # The page cache counts as used, but the kernel reclaims it on demand.
            return max(0, int(allowed) - used + int(stat.get(cached, 0)))
    return None
