"""The limits of the hardware: the least time that saving or loading so many bytes takes.

Memory is touched beforehand, except where fresh memory is the point; buffers are page-aligned, thread pools
exist before the clock starts, and nothing is hashed, named or assembled.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import probes
from benchmarks.devices import seconds
from benchmarks.states import Spec

BLOCK_BYTES = 16 << 20
BLOCKS = 4
PAGE = 4096
CORES = os.cpu_count() or 1

Figures = dict[str, float]


def copy(spec: Spec, threads: int) -> Figures:
    """One copy from touched into touched memory."""
    import numpy as np

    source, target = _touched_buffer(spec.nbytes), np.zeros(spec.nbytes, np.uint8)
    target[:] = 1  # zeros are mapped lazily
    share = -(-spec.nbytes // threads)
    parts = [slice(index * share, (index + 1) * share) for index in range(threads)]
    if threads == 1:  # a pool would cost the copy of a small state 0.1 ms
        return _time(lambda: np.copyto(target, source))
    with _pool(threads) as pool:
        return _time(lambda: list(pool.map(lambda part: np.copyto(target[part], source[part]), parts)))


def write(spec: Spec, folder: Path, in_flight: int) -> Figures:
    """Reserve space, write 16 MiB blocks with O_DIRECT, then fsync."""
    blocks = _blocks()
    size = _round_up_to_page(spec.nbytes)

    def work() -> None:
        descriptor = os.open(folder / "raw", os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_DIRECT, 0o666)
        os.posix_fallocate(descriptor, 0, size)
        jobs = pool.map(
            lambda offset: os.pwrite(descriptor, _block(blocks, offset, size), offset),
            range(0, size, BLOCK_BYTES),
        )
        if sum(jobs) != size:
            raise OSError("a write was cut short")
        os.fsync(descriptor)
        os.close(descriptor)

    with _pool(in_flight) as pool:
        return _time(work)


def read_cached(file: Path, *, fresh: bool) -> Figures:
    """Read the file from the page cache, into touched or into fresh memory."""
    import numpy as np

    probes.warm(file)
    size = file.stat().st_size
    touched = None if fresh else _touched_buffer(size)
    return _time(lambda: _read(file, (np.empty(size, np.uint8) if touched is None else touched).data))


def read_cold(file: Path) -> Figures:
    """Read the file from the disk through the page cache, in 16 MiB reads into touched memory."""
    probes.drop(file)
    block = memoryview(_blocks())[:BLOCK_BYTES]

    def work() -> None:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(block):
                pass

    return _time(work)


def read_direct(file: Path) -> Figures:
    """Read the file from the disk with O_DIRECT, two reads in flight into touched memory."""
    probes.drop(file)
    blocks = _blocks()
    size = file.stat().st_size

    def work() -> None:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
        jobs = pool.map(
            lambda offset: os.preadv(descriptor, [_block(blocks, offset, _round_up_to_page(size))], offset),
            range(0, size, BLOCK_BYTES),
        )
        if sum(jobs) != size:
            raise OSError("a read was cut short")
        os.close(descriptor)

    with _pool(2) as pool:
        return _time(work)


def device(name: str, nbytes: int, matrix: Any) -> Figures:
    """TFLOP/s of the square of a matrix; GB/s of copies on the device (read and written) and over the bus."""
    import torch

    clock = partial(seconds, device=name, warm_up=2, runs=5)
    block, twin = (torch.zeros(nbytes, dtype=torch.uint8, device=name) for _ in range(2))
    host = {"pageable": torch.zeros(nbytes, dtype=torch.uint8)}
    if name.startswith("cuda"):
        host["page_locked"] = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
    figures = {
        "tflops": 2 * len(matrix) ** 3 / clock(lambda: matrix @ matrix) / 1e12,
        "device_copy_gbs": 2 * nbytes / clock(lambda: twin.copy_(block)) / 1e9,
    }
    for kind, memory in host.items():
        figures[f"to_{kind}_gbs"] = nbytes / clock(partial(memory.copy_, block, non_blocking=True)) / 1e9
        figures[f"from_{kind}_gbs"] = nbytes / clock(partial(block.copy_, memory, non_blocking=True)) / 1e9
    return figures


def digest(spec: Spec, *, all_cores: bool) -> Figures:
    """BLAKE3 of a buffer that was just written."""
    from blake3 import blake3

    source = _touched_buffer(spec.nbytes).data
    threads = blake3.AUTO if all_cores else 1
    blake3(source[: 1 << 20], max_threads=threads).digest()  # starts the threads
    return _time(lambda: blake3(source, max_threads=threads).digest())


def _time(work: Callable[[], object]) -> Figures:
    began = time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - began}


def _touched_buffer(size: int) -> Any:
    import numpy as np

    return np.resize(np.random.default_rng(0).integers(0, 256, BLOCK_BYTES, np.uint8), size)


def _blocks() -> mmap.mmap:
    blocks = mmap.mmap(-1, BLOCKS * BLOCK_BYTES)  # page-aligned, as O_DIRECT requires
    blocks.write(os.urandom(BLOCK_BYTES) * BLOCKS)
    return blocks


def _block(blocks: mmap.mmap, offset: int, size: int) -> memoryview:
    start = offset // BLOCK_BYTES % BLOCKS * BLOCK_BYTES
    return memoryview(blocks)[start : start + min(BLOCK_BYTES, size - offset)]


def _round_up_to_page(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _read(file: Path, view: memoryview) -> None:
    with file.open("rb", buffering=0) as opened:
        offset = 0
        while offset < len(view):
            offset += os.preadv(opened.fileno(), [view[offset : offset + BLOCK_BYTES]], offset)


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(time.sleep, [0.01] * threads))  # all threads have started
        yield pool
