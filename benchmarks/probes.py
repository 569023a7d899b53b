"""Measures the memory of a process, and controls the page cache. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

BLOCK_BYTES = 16 << 20
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


class PeakMemory:
    """How far resident memory rises above its current level."""

    def __init__(self) -> None:
        gc.collect()
        # Freed memory would be reused, and the save's own use would not show.
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
        self._before: int | None = None
        with contextlib.suppress(OSError):
            _CLEAR_REFS.write_text(_RESET_PEAK)
            self._before = _resident("VmRSS")

    def figures(self) -> dict[str, float]:
        """``extra_bytes``, where the system reports them."""
        if self._before is None:
            return {}
        return {"extra_bytes": float(max(0, _resident("VmHWM") - self._before))}


def files(path: Path) -> Iterator[Path]:
    """The file, or the files of the folder."""
    if path.is_file():
        yield path
    else:
        yield from (inner for inner in sorted(path.rglob("*")) if inner.is_file())


def warm(path: Path) -> None:
    """Read everything into the page cache."""
    block = bytearray(BLOCK_BYTES)
    for file in files(path):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(block):
                pass


def drop(path: Path) -> None:
    """Drop everything from the page cache.

    Raises:
        RuntimeError: if the kernel kept more than 1 percent: the next read would not be cold.
    """
    for file in files(path):
        with file.open("rb", buffering=0) as opened:
            os.fsync(opened.fileno())  # a dirty page cannot be dropped
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        resident = resident_share(file)
        if resident > 0.01 and file.stat().st_size > BLOCK_BYTES:
            raise RuntimeError(
                f"{resident:.0%} of the file is still in the page cache: nothing cold to measure"
            )


def resident_share(file: Path) -> float:
    """The share of a file that is in the page cache, 0 to 1."""
    size = file.stat().st_size
    if size == 0:
        return 0.0
    pages = -(-size // mmap.PAGESIZE)
    answer = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, mmap.MAP_PRIVATE) as mapped:
        # Private and writable only because ctypes takes no address of read-only memory.
        start = ctypes.c_char.from_buffer(mapped)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), answer)
        del start
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in bytes(answer)) / pages


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
