"""Reads the data of a checkpoint and verifies it, on all cores.

Each tensor has a digest of its own, so each core takes the next tensor, reads a piece of it directly into its
final position, and hashes the piece while it is in the CPU cache.

All functions raise CorruptCheckpoint naming the first damaged tensor. A read error raises OSError; in mapped
memory the system sends SIGBUS.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import mmap
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import NamedTuple, Self

from distrust.checkpoint import direct_io, parallel
from distrust.checkpoint.files import CUT_WHILE_READ, read_into
from distrust.checkpoint.format import TensorInfo, tensor_hasher
from distrust.checkpoint.header import Header
from distrust.checkpoint.memory import PAGE_BYTES, address_of, allocate, round_up
from distrust.errors import CorruptCheckpoint, quote_untrusted

PIECE_BYTES = 1 << 20  # stays in the CPU cache between its read and its hash
LARGE_PIECE_BYTES = 16 << 20  # of a large tensor: all cores hash one piece together
LARGE_TENSOR_BYTES = 64 << 20
CACHE_LINE_BYTES = 64
FETCH_BYTES = 8 << 20  # one direct read; a multiple of the page size
FETCHES_IN_FLIGHT = 3
_PROBES = 16


class TensorBytes(NamedTuple):
    """The bytes of all tensors, in one piece of memory."""

    data: memoryview
    offsets: Mapping[str, int]  # where each tensor begins in it, by name

    def view(self, tensor: TensorInfo, begin: int, end: int) -> memoryview:
        """Return bytes ``begin`` to ``end`` of a tensor."""
        offset = self.offsets[tensor.name]
        return self.data[offset + begin : offset + end]


def load(descriptor: int, header: Header) -> TensorBytes:
    """Read and verify all tensors, into new memory.

    A file in the page cache is read from there; any other is read with direct I/O, by threads that stay ahead
    of the hashing, so that the disk is always busy.
    """
    # Each tensor on a cache line, like memory that frameworks allocate: the alignment of an array decides how
    # some libraries sum it, and so the last bits of what is computed from it.
    sizes = (round_up(tensor.nbytes, CACHE_LINE_BYTES) for tensor in header.tensors)
    starts = list(itertools.accumulate(sizes, initial=0))
    memory = allocate(starts[-1])
    offsets = {tensor.name: start for tensor, start in zip(header.tensors, starts, strict=False)}
    content = TensorBytes(memoryview(memory), offsets)
    if is_cold(descriptor, header):
        with _Prefetcher(descriptor, header, content, address_of(memory)) as prefetcher:
            verify(header.tensors, prefetcher.wait_for)
        return content

    def read_piece(tensor: TensorInfo, begin: int, end: int) -> memoryview:
        view = content.view(tensor, begin, end)
        read_into(descriptor, view, tensor.offset + begin)
        return view

    verify(header.tensors, read_piece)
    return content


def map_file(descriptor: int, header: Header) -> TensorBytes:
    """Map the file and return all tensors, not verified."""
    try:  # private and writable: pages that a caller changes are copied, and stay in memory
        file = mmap.mmap(descriptor, header.file_size, access=mmap.ACCESS_COPY)
    except ValueError:  # truncated since its header was read
        raise CorruptCheckpoint(CUT_WHILE_READ) from None
    return TensorBytes(memoryview(file), {tensor.name: tensor.offset for tensor in header.tensors})


def verify_file(descriptor: int, header: Header) -> None:
    """Read and verify all tensors in scratch memory, keeping none."""
    scratch = threading.local()
    size = max(map(piece_bytes, header.tensors), default=0)

    def read_piece(tensor: TensorInfo, begin: int, end: int) -> memoryview:
        if not hasattr(scratch, "view"):
            scratch.view = memoryview(bytearray(size))
        view: memoryview = scratch.view[: end - begin]
        read_into(descriptor, view, tensor.offset + begin)
        return view

    verify(header.tensors, read_piece)


def verify(tensors: Sequence[TensorInfo], read_piece: Callable[[TensorInfo, int, int], memoryview]) -> None:
    """Compare each tensor's digest with the header's; read the pieces of a tensor in order."""

    def verify_one(tensor: TensorInfo) -> None:
        step = piece_bytes(tensor)
        hasher = tensor_hasher(all_cores=step == LARGE_PIECE_BYTES)
        for begin in range(0, tensor.nbytes, step):
            hasher.update(read_piece(tensor, begin, min(begin + step, tensor.nbytes)))
        check_digest(tensor, hasher.hexdigest())

    total = sum(tensor.nbytes for tensor in tensors)
    parallel.run(verify_one, tensors, threads=parallel.cores() if total > PIECE_BYTES else 1)


def piece_bytes(tensor: TensorInfo) -> int:
    """Return the size of the pieces that :func:`verify` reads, in bytes."""
    if tensor.nbytes >= LARGE_TENSOR_BYTES:
        return LARGE_PIECE_BYTES
    return min(PIECE_BYTES, max(1, tensor.nbytes))  # at least 1: it is the step of a range


def check_digest(tensor: TensorInfo, digest: str) -> None:
    """Compare a tensor's digest with the header's."""
    if digest != tensor.digest:
        location = f"bytes {tensor.offset} to {_end_of(tensor)}"
        problem = f"tensor {quote_untrusted(tensor.name)} is damaged ({location})"
        raise CorruptCheckpoint(problem, tensor=tensor.name)


def is_cold(descriptor: int, header: Header) -> bool:
    """Return whether most of the data is outside the page cache, judged by a few probes."""
    start = header.tensors[0].offset if header.tensors else header.file_size
    size = header.file_size - start
    if size < FETCH_BYTES or start % PAGE_BYTES or sys.platform != "linux":
        return False  # small, or not aligned for direct I/O, or mincore is not available
    # mincore on a mapping, not preadv2(RWF_NOWAIT): that starts read-ahead, which falsifies the next probe.
    try:
        file = mmap.mmap(descriptor, header.file_size, access=mmap.ACCESS_COPY)
    except (OSError, ValueError):
        return False  # the read itself will report the reason
    libc = ctypes.CDLL(None)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    resident, missing = ctypes.create_string_buffer(1), 0
    for index in range(_PROBES):
        page = (start + size * index // _PROBES) // mmap.PAGESIZE * mmap.PAGESIZE
        if libc.mincore(address_of(file) + page, 1, resident):
            return False  # not supported here
        missing += not resident.raw[0] & 1
    return missing > _PROBES // 2


class _Prefetcher:
    """Context manager whose threads read the data ahead of the hashing, with direct I/O if possible.

    O_DIRECT reads whole pages into page-aligned memory, but tensors begin anywhere: each thread reads a block
    of the file into a bounce buffer and copies the tensors in it to their final positions.
    """

    def __init__(self, descriptor: int, header: Header, content: TensorBytes, address: int) -> None:
        self._descriptor = descriptor
        self._header = header
        self._content = content
        self._address = address
        self._begin = header.tensors[0].offset
        self._error: BaseException | None = None
        self._arrived = [threading.Event() for _ in range(self._begin, header.file_size, FETCH_BYTES)]
        self._remaining = iter(range(len(self._arrived)))
        self._lock = threading.Lock()

    def wait_for(self, tensor: TensorInfo, begin: int, end: int) -> memoryview:
        """Return bytes ``begin`` to ``end`` of a tensor, once they have been read."""
        first, last = ((tensor.offset + edge - self._begin) // FETCH_BYTES for edge in (begin, end - 1))
        for arrived in self._arrived[first : last + 1]:
            arrived.wait()
        if self._error is not None:
            raise self._error
        return self._content.view(tensor, begin, end)

    def __enter__(self) -> Self:
        direct_io.enable(self._descriptor)
        self._threads = parallel.Threads(self._fetch, FETCHES_IN_FLIGHT)
        if not len(self._threads):
            self._fetch()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._remaining = iter(())
        self._threads.join()
        # Release threads that still wait. The new error replaces one whose traceback keeps the data alive.
        self._error = InterruptedError("the read has ended")
        for event in self._arrived:
            event.set()

    def _fetch(self) -> None:
        bounce: mmap.mmap | None = None
        while True:
            with self._lock:
                block = next(self._remaining, None)
            if block is None:
                return
            try:
                if self._error is None:
                    # Allocated inside the try block: whoever waits for the block gets the MemoryError.
                    bounce = bounce or allocate(FETCH_BYTES)
                    begin = self._begin + block * FETCH_BYTES
                    end = min(begin + FETCH_BYTES, self._header.file_size)
                    read_pages(self._descriptor, memoryview(bounce), begin, end)
                    self._copy(address_of(bounce), begin, end)
            except BaseException as error:
                self._error = error
            self._arrived[block].set()

    def _copy(self, bounce: int, begin: int, end: int) -> None:
        """Copy the tensors in a block from the address ``bounce`` to their final positions."""
        tensors = self._header.tensors
        start = bisect.bisect_right(tensors, begin, key=_end_of)
        for tensor in tensors[start : bisect.bisect_left(tensors, end, key=attrgetter("offset"))]:
            first, last = max(begin, tensor.offset), min(end, _end_of(tensor))
            target = self._address + self._content.offsets[tensor.name] + first - tensor.offset
            # memmove through ctypes releases the GIL; a slice assignment holds it.
            ctypes.memmove(target, bounce + first - begin, last - first)


def read_pages(descriptor: int, memory: memoryview, begin: int, end: int) -> None:
    """Read from ``begin``, a multiple of a page, at least to ``end``, with direct I/O if it is enabled."""
    offset = begin
    while offset < end:
        read = partial(os.preadv, descriptor, [memory[offset - begin :]], offset)
        count = direct_io.transfer(descriptor, read)
        if count == 0:
            raise CorruptCheckpoint(CUT_WHILE_READ)
        offset += count


def _end_of(tensor: TensorInfo) -> int:
    return tensor.offset + tensor.nbytes
