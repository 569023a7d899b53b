"""The data of a checkpoint, read and verified on all cores.

Each tensor proves itself without the others, so each core takes the next tensor, reads a piece of it straight
to where it belongs, and digests the piece while it is still in the core's cache. Three ways to its bytes:

- :func:`load`: into memory of their own. A file in the page cache is read from there. One that is not is read
  past it, with direct I/O, by threads that keep ahead of the digests, so that the disk never waits.
- :func:`mapped`: the file itself, as memory; copied page by page only where somebody writes to it.
- :func:`verify_file`: nowhere; for who wants to know only whether the file is whole.

A read error is an error in the first and the last; in memory that is mapped the system sends a signal.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import itertools
import mmap
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Self

from distrust.checkpoint import direct_io, parallel
from distrust.checkpoint.files import CUT_WHILE_READ, read_into
from distrust.checkpoint.format import TensorInfo, tensor_hasher
from distrust.checkpoint.header import Header
from distrust.checkpoint.memory import PAGE_BYTES, address_of, allocate, round_up
from distrust.errors import CorruptCheckpoint, quote_untrusted

#: A piece stays in a core's cache between its read and its digest.
PIECE_BYTES = 1 << 20
#: Of a large tensor, a piece is digested by all cores together.
LARGE_PIECE_BYTES = 16 << 20
LARGE_TENSOR_BYTES = 64 << 20
CACHE_LINE_BYTES = 64
FETCH_BYTES = 8 << 20
FETCHES_IN_FLIGHT = 3
_PROBES = 16


class TensorBytes(NamedTuple):
    """The bytes of tensors.

    Attributes:
        data: the memory they are in.
        offsets: where in it each begins, by name.
    """

    data: memoryview
    offsets: Mapping[str, int]

    def of(self, tensor: TensorInfo, begin: int, end: int) -> memoryview:
        """Some bytes of a tensor."""
        offset = self.offsets[tensor.name]
        return self.data[offset + begin : offset + end]


def load(descriptor: int, header: Header) -> TensorBytes:
    """All tensors, verified, in memory of their own.

    Each begins on a cache line, as in memory that frameworks allocate: where an array begins decides how some
    libraries add up, and with it the last bits of what is computed from it.

    Raises:
        CorruptCheckpoint: naming the first tensor that is damaged.
        OSError: if the disk cannot be read.
        MemoryError: if there is not enough memory.
    """
    sizes = (round_up(tensor.nbytes, CACHE_LINE_BYTES) for tensor in header.tensors)
    places = list(itertools.accumulate(sizes, initial=0))
    memory = allocate(places[-1])
    offsets = {tensor.name: place for tensor, place in zip(header.tensors, places, strict=False)}
    content = TensorBytes(memoryview(memory), offsets)
    if _is_cold(descriptor, header):
        with _Prefetcher(descriptor, header, content, address_of(memory)) as fetched:
            _verify_all(header.tensors, fetched.piece)
        return content

    def piece(tensor: TensorInfo, begin: int, end: int) -> memoryview:
        view = content.of(tensor, begin, end)
        read_into(descriptor, view, tensor.offset + begin)
        return view

    _verify_all(header.tensors, piece)
    return content


def map_file(descriptor: int, header: Header) -> TensorBytes:
    """All tensors as the file itself, not verified.

    Raises:
        CorruptCheckpoint: if the file is shorter than its header was told.
    """
    # Private and writable: what a caller changes stays with it.
    try:
        file = mmap.mmap(descriptor, header.file_size, access=mmap.ACCESS_COPY)
    except ValueError:
        raise CorruptCheckpoint(CUT_WHILE_READ) from None
    return TensorBytes(memoryview(file), {tensor.name: tensor.offset for tensor in header.tensors})


def verify_content(content: TensorBytes, tensors: Sequence[TensorInfo]) -> None:
    """Verify tensors that are in memory.

    Raises:
        CorruptCheckpoint: naming the first tensor that is damaged.
    """
    _verify_all(tensors, content.of)


def verify_file(descriptor: int, header: Header) -> None:
    """Read everything and check it.

    Raises:
        CorruptCheckpoint: naming the first tensor that is damaged.
        OSError: if the disk cannot be read.
    """
    blocks = threading.local()
    size = max((_piece_bytes(tensor) for tensor in header.tensors), default=0)

    def piece(tensor: TensorInfo, begin: int, end: int) -> memoryview:
        if not hasattr(blocks, "view"):
            blocks.view = memoryview(bytearray(size))
        view: memoryview = blocks.view[: end - begin]
        read_into(descriptor, view, tensor.offset + begin)
        return view

    _verify_all(header.tensors, piece)


def _verify_all(tensors: Sequence[TensorInfo], piece: Callable[[TensorInfo, int, int], memoryview]) -> None:
    """Compare each tensor's digest with the header's; the pieces of a tensor are asked for in order."""

    def verify_one(tensor: TensorInfo) -> None:
        step = _piece_bytes(tensor)
        hasher = tensor_hasher(all_cores=step == LARGE_PIECE_BYTES)
        for begin in range(0, tensor.nbytes, step):
            hasher.update(piece(tensor, begin, min(begin + step, tensor.nbytes)))
        check_digest(tensor, hasher.hexdigest())

    total = sum(tensor.nbytes for tensor in tensors)
    parallel.run(verify_one, tensors, threads=parallel.cores() if total > PIECE_BYTES else 1)


def _piece_bytes(tensor: TensorInfo) -> int:
    return (
        LARGE_PIECE_BYTES if tensor.nbytes >= LARGE_TENSOR_BYTES else min(PIECE_BYTES, max(1, tensor.nbytes))
    )


def check_digest(tensor: TensorInfo, digest: str) -> None:
    """Compare a tensor's digest with the header's.

    Raises:
        CorruptCheckpoint: naming the tensor and where it lies.
    """
    if digest != tensor.digest:
        place = f"bytes {tensor.offset} to {tensor.offset + tensor.nbytes}"
        raise CorruptCheckpoint(
            f"tensor {quote_untrusted(tensor.name)} is damaged ({place})", tensor=tensor.name
        )


def _is_cold(descriptor: int, header: Header) -> bool:
    """Whether most of the data is not in the page cache, as far as some probes tell.

    Small files are read as they are, and so is a file where direct I/O has no aligned place to begin. The
    pages of a mapping are asked about: to try a read that does not wait makes the system read ahead there,
    and the next time the answer is wrong.
    """
    start = header.tensors[0].offset if header.tensors else header.file_size
    size = header.file_size - start
    if size < FETCH_BYTES or start % PAGE_BYTES or sys.platform != "linux":
        return False
    try:
        file = mmap.mmap(descriptor, header.file_size, access=mmap.ACCESS_COPY)
    except (OSError, ValueError):
        return False  # who reads it will be told why
    libc = ctypes.CDLL(None)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    here, missing = ctypes.create_string_buffer(1), 0
    for index in range(_PROBES):
        page = (start + size * index // _PROBES) // mmap.PAGESIZE * mmap.PAGESIZE
        if libc.mincore(address_of(file) + page, 1, here):
            return False  # a system that does not tell
        missing += not here.raw[0] & 1
    return missing > _PROBES // 2


class _Prefetcher:
    """Tensors that threads read ahead of their digests, past the page cache if the file system allows that.

    Direct I/O reads whole pages: blocks of the file are read beside, and copied to where the tensors begin.
    """

    def __init__(self, descriptor: int, header: Header, content: TensorBytes, address: int) -> None:
        self._descriptor = descriptor
        self._header = header
        self._content = content
        self._address = address
        self._begin = header.tensors[0].offset
        self._error: BaseException | None = None
        self._arrived = [threading.Event() for _ in range(self._begin, header.file_size, FETCH_BYTES)]
        self._left = iter(range(len(self._arrived)))
        self._lock = threading.Lock()

    def piece(self, tensor: TensorInfo, begin: int, end: int) -> memoryview:
        """Some bytes of a tensor, once they are there."""
        first, last = (tensor.offset + edge - self._begin for edge in (begin, end - 1))
        for block in range(first // FETCH_BYTES, last // FETCH_BYTES + 1):
            self._arrived[block].wait()
        if self._error is not None:
            raise self._error
        return self._content.of(tensor, begin, end)

    def __enter__(self) -> Self:
        direct_io.enable(self._descriptor)
        self._threads = parallel.Threads(self._fetch, FETCHES_IN_FLIGHT)
        if not len(self._threads):
            self._fetch()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._left = iter(())
        self._threads.join()
        # Whoever should still wait must not for ever. The error that was raised holds what was read: it goes.
        self._error = InterruptedError("nobody reads any more")
        for arrived in self._arrived:
            arrived.set()

    def _fetch(self) -> None:
        beside: mmap.mmap | None = None
        while True:
            with self._lock:
                block = next(self._left, None)
            if block is None:
                return
            try:
                if self._error is None:
                    # Here, where whoever waits for the block is told if there is no memory.
                    beside = beside or allocate(FETCH_BYTES)
                    begin = self._begin + block * FETCH_BYTES
                    end = min(begin + FETCH_BYTES, self._header.file_size)
                    self._read(memoryview(beside), begin, end)
                    self._copy(address_of(beside), begin, end)
            except BaseException as error:
                self._error = error
            self._arrived[block].set()

    def _read(self, beside: memoryview, begin: int, end: int) -> None:
        offset, refused = begin, False
        while offset < end:
            try:
                count = os.preadv(self._descriptor, [beside[offset - begin :]], offset)
            except OSError as error:
                if error.errno != errno.EINVAL or refused:
                    raise
                direct_io.disable(self._descriptor)
                refused = True
                continue
            if count == 0:
                raise CorruptCheckpoint(CUT_WHILE_READ)
            offset += count

    def _copy(self, beside: int, begin: int, end: int) -> None:
        tensors = self._header.tensors
        index = bisect.bisect_right(tensors, begin, key=_end_of)
        while index < len(tensors) and tensors[index].offset < end:
            tensor = tensors[index]
            first, last = max(begin, tensor.offset), min(end, _end_of(tensor))
            place = self._address + self._content.offsets[tensor.name] + first - tensor.offset
            # Not an assignment of slices: that would hold the interpreter.
            ctypes.memmove(place, beside + first - begin, last - first)
            index += 1


def _end_of(tensor: TensorInfo) -> int:
    return tensor.offset + tensor.nbytes
