"""Streams a checkpoint to disk: copy, write and hash overlap.

Both functions write the same bytes into a new file of the layout's size, which the caller commits, and return
the digest of its header. They raise SaveFailed, with existing files unchanged, and UnsupportedState if no
reader would accept the header.

One thread copies and hashes, at about the speed of a 3 GB/s disk. Hashing on more threads was slower on two
cores, which the writing threads need as well.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from distrust.checkpoint import arrays
from distrust.checkpoint.checkpoint_file import CheckpointFile
from distrust.checkpoint.files import open_regular, read_into
from distrust.checkpoint.format import Layout, tensor_hasher
from distrust.checkpoint.memory import PAGE_BYTES, ReusableMemory, allocate, round_up
from distrust.checkpoint.serialization import PreparedCheckpoint

#: Size of one write. A multiple of the page size, so that O_DIRECT accepts every block's memory and offset.
BLOCK_BYTES = 4 << 20
#: Of the ring buffer: the memory that a blocking save needs in addition to the state.
BLOCKS = 4
_EMPTY_DIGEST = tensor_hasher(all_cores=False).hexdigest()


class BlockFile(Protocol):
    """What is written: a new file, or a slot in shared memory."""

    def write(self, block: memoryview, offset: int) -> threading.Event:
        """Write a block; as ``AtomicCheckpointFile.write`` does."""


def write_snapshot(file: BlockFile, layout: Layout, data: memoryview) -> str:
    """Write a snapshot in place: ``data`` has the layout of the file, padded to whole pages."""
    digests = TensorDigests(layout.edges)
    for begin, end in _blocks(layout):
        block = data[begin : round_up(end, PAGE_BYTES)]  # O_DIRECT writes whole pages
        file.write(block, layout.data_offset + begin)
        digests.update(block, begin, end)
    return write_header(file, layout, digests.hex)


def write_streaming(file: BlockFile, prepared: PreparedCheckpoint, block_buffer: ReusableMemory) -> str:
    """Write arrays that must not be copied as a whole, through a ring buffer in ``block_buffer``.

    One block is filled while earlier ones are written. The block is hashed, not the array, which the caller
    may have changed since.
    """
    layout = prepared.layout
    digests = TensorDigests(layout.edges)
    slots = min(BLOCKS, len(_blocks(layout)))
    stream = arrays.copy_stream(prepared.flat_arrays)
    memory = block_buffer.acquire(slots * BLOCK_BYTES, stream.page_lock if stream else None)
    writes: deque[threading.Event] = deque()
    for number, (begin, end) in enumerate(_blocks(layout)):
        if number >= slots:
            writes.popleft().wait()  # the slot's previous block must be written before it is overwritten
        slot = number % slots * BLOCK_BYTES
        arrays.fill(memory, slot, _arrays_in_range(prepared, begin, end))
        block = memoryview(memory)[slot : slot + round_up(end - begin, PAGE_BYTES)]
        writes.append(file.write(block, layout.data_offset + begin))
        digests.update(block, begin, end)  # while the block is being written
    return write_header(file, layout, digests.hex)


def copy_file(file: BlockFile, source: CheckpointFile, block_buffer: ReusableMemory) -> str:
    """Write the bytes of a verified file."""
    block = memoryview(block_buffer.acquire(BLOCK_BYTES))[:BLOCK_BYTES]
    with open_regular(source.path) as (descriptor, _):
        for begin in range(0, source.bytes, BLOCK_BYTES):
            length = min(BLOCK_BYTES, source.bytes - begin)
            read_into(descriptor, block[:length], begin)
            file.write(block[: round_up(length, PAGE_BYTES)], begin).wait()
    return source.digest


class TensorDigests:
    """Computes the digest of each tensor from blocks of the data that arrive in order."""

    # One digest per tensor, so that a reader can verify each without the others, in parallel or on demand.
    def __init__(self, edges: Sequence[int]) -> None:
        self._edges = edges  # where each tensor begins in the data, and where the last one ends
        self._hasher = tensor_hasher(all_cores=False)  # of the tensor that may continue in the next block
        self.hex = [_EMPTY_DIGEST] * (len(edges) - 1)  # in the order of the data

    def update(self, block: memoryview, begin: int, end: int) -> None:
        """Add the data from ``begin`` to ``end``, the first bytes of ``block``."""
        for index in tensors_in_range(self._edges, begin, end):
            first, last = max(begin, self._edges[index]), min(end, self._edges[index + 1])
            self._hasher.update(block[first - begin : last - begin])
            if last == self._edges[index + 1]:
                self.hex[index] = self._hasher.hexdigest()
                self._hasher = tensor_hasher(all_cores=False)


def _blocks(layout: Layout) -> list[tuple[int, int]]:
    """Return the begin and end of each block of the data."""
    begins = range(0, layout.data_bytes, BLOCK_BYTES)
    return list(itertools.pairwise([*begins, layout.data_bytes])) if begins else []


def tensors_in_range(edges: Sequence[int], begin: int, end: int) -> range:
    """Return the indices of the tensors with data between ``begin`` and ``end``."""
    return range(bisect.bisect_right(edges, begin) - 1, bisect.bisect_left(edges, end))


def _arrays_in_range(prepared: PreparedCheckpoint, begin: int, end: int) -> list[Any]:
    """Return the arrays with data between ``begin`` and ``end``, the first and last cut to that range."""
    edges = prepared.layout.edges
    indices = tensors_in_range(edges, begin, end)
    flats = list(prepared.flat_arrays[indices.start : indices.stop])
    # The last first: if there is only one array, both cuts apply to it, and the first shifts its offsets.
    flats[-1] = arrays.byte_range(flats[-1], 0, min(end, edges[indices.stop]) - edges[indices.stop - 1])
    skipped = max(begin, edges[indices.start]) - edges[indices.start]
    flats[0] = arrays.byte_range(flats[0], skipped, flats[0].nbytes)
    return flats


def write_header(file: BlockFile, layout: Layout, digests: Sequence[str]) -> str:
    """Write the header of a file whose data is complete; returns the digest in it."""
    header, digest = layout.header(digests)
    block = allocate(len(header))  # page-aligned, for O_DIRECT; the header's length is a multiple of a page
    block[: len(header)] = header
    # Last, before the caller's fsync: after a crash, a file without its header is not a checkpoint.
    file.write(memoryview(block)[: len(header)], 0)
    return digest
