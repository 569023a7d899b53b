"""Host memory that is made once and used again, and touched before it is needed.

A copy into memory that was touched before runs at the speed of the memory; into fresh memory it waits for
the kernel to find and clear each page, which is several times slower and varies a lot.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from pathlib import Path

from distrust.checkpoint import parallel

_LINUX = os.uname().sysname == "Linux"
PAGE_BYTES = 4096
_LARGE_PAGE_BYTES = 2 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python has no name for it
_TOUCH_BYTES = 64 << 20
# Of glibc's malloc.h; larger blocks it does not keep.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_BLOCK_BYTES = 1 << 20
_LARGEST_BLOCK_BYTES = 32 << 20


def allocate(nbytes: int) -> mmap.mmap:
    """Zeroed memory of at least ``nbytes`` that begins on a page; nothing of it is touched yet.

    In pages of the system's own choice, for memory that is used once: on virtual machines that give large
    free pages back to their host, the first touch of each is several times slower.

    Raises:
        MemoryError: if there is none.
    """
    try:
        return mmap.mmap(-1, max(nbytes, PAGE_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for {nbytes:,} bytes: {error.strerror}") from None


def prefer_large_pages(memory: mmap.mmap) -> None:
    """For memory that is used again and again: direct I/O asks for each page of it, every time."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)


def address_of(memory: mmap.mmap) -> int:
    """Where it begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class ReusableMemory:
    """Memory that stays between uses, and grows where a use needs more.

    What it gave out before is not valid any more once it has grown.
    """

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._touched = 0

    @property
    def touched_bytes(self) -> int:
        """So many bytes of it cost no page fault any more."""
        return self._touched

    def acquire(self, nbytes: int) -> mmap.mmap:
        """At least ``nbytes``, all of it touched.

        Raises:
            MemoryError: if there is none.
        """
        if self._memory is None or len(self._memory) < nbytes:
            self.release()
            # Room to grow: states grow with their history, and what is not touched takes no memory.
            self._memory = allocate(round_up(nbytes + nbytes // 4, _LARGE_PAGE_BYTES))
            prefer_large_pages(self._memory)
        if self._touched < nbytes:
            end = min(round_up(nbytes, _LARGE_PAGE_BYTES), len(self._memory))
            _touch(address_of(self._memory), self._touched, end)
            self._touched = end
        return self._memory

    def release(self) -> None:
        """Give it back."""
        # Not closed: whoever still looks at it keeps it alive.
        self._memory = None
        self._touched = 0


def round_up(nbytes: int, unit: int) -> int:
    """The next multiple of ``unit``."""
    return -(-nbytes // unit) * unit


def _touch(address: int, start: int, end: int) -> None:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def touch(offset: int) -> None:
        length = min(_TOUCH_BYTES, end - offset)
        populated = _LINUX and not libc.madvise(address + offset, length, _MADV_POPULATE_WRITE)
        if not populated:
            ctypes.memset(address + offset, 0, length)

    parallel.run(touch, range(start, end, _TOUCH_BYTES), threads=parallel.cores())


def resident_bytes() -> int:
    """How much memory of the machine this process takes now."""
    if _LINUX:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return _resident_on_macos()


def peak_resident_bytes() -> int:
    """The most memory of the machine that this process ever took."""
    if _LINUX:
        # Not getrusage: what it tells goes on across exec, from the program that this one was forked of.
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes there, not kilobytes


def _resident_on_macos() -> int:
    usage = (ctypes.c_uint64 * 12)()  # rusage_info_v0: a UUID of 16 bytes, and numbers; the seventh of them
    if ctypes.CDLL(None).proc_pid_rusage(os.getpid(), 0, ctypes.byref(usage)):
        raise OSError(ctypes.get_errno(), "proc_pid_rusage tells nothing of this process")
    return usage[8]


def keep_freed_memory() -> None:
    """Have the allocator keep what is freed, for the next step to take again: fresh pages cost a tenth of it.

    glibc does so by itself for blocks of up to 32 MiB, once it has seen one, but gives back what lies free at
    the end. :func:`trim` gives back all of it.
    """
    if _LINUX:
        with contextlib.suppress(AttributeError):  # another C library
            tell = ctypes.CDLL(None).mallopt
            tell(_M_MMAP_THRESHOLD, _LARGEST_BLOCK_BYTES)
            tell(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Have the allocator give large blocks back as soon as they are freed: the opposite of :func:`hold`.

    For who keeps what it will take again by itself, such as mlx: what the allocator kept besides would lie
    between them, in pieces, and come on top.
    """
    if _LINUX:
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)


def trim() -> None:
    """Have the allocator give back what is free; glibc keeps it otherwise, until the process ends."""
    if _LINUX:
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def available_bytes(root: Path = Path("/")) -> int:
    """How much memory this process can still take, as far as the system and its cgroups say.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    limits = [_cgroup_bytes(directory) for directory in _cgroups(root)]
    return min([_system_bytes(root), *(limit for limit in limits if limit is not None)])


def _system_bytes(root: Path) -> int:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroups(root: Path) -> list[Path]:
    """The memory cgroups that this process is in, innermost first."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = root / "sys/fs/cgroup" / controllers
            inner = top / path.lstrip("/")
            found += [inner, *(parent for parent in inner.parents if parent.is_relative_to(top))]
    return found


def _cgroup_bytes(directory: Path) -> int | None:
    """What a cgroup still allows; None if it sets no limit. What it caches can be taken back."""
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
            return max(0, int(allowed) - used + int(stat.get(cached, 0)))
    return None
