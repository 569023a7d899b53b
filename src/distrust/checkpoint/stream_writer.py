"""An image of a checkpoint poured into a file: copied, written and digested at the same time.

Two ways, to the same bytes:

- :func:`write_filled`: all data lies in memory as it will lie in the file, because a snapshot was taken.
  Blocks of it are written as they stand.
- :func:`write_filling`: the data is still in the caller's arrays, and must not be copied whole. It goes
  through a ring of blocks: one is filled while those before it are written. What is digested is the block,
  not what the caller may have made of the array since.

One thread fills and digests, at about the speed of a disk of 3 GB/s. Handing digests to others was slower
where they had to share two cores with those who write.
"""

from __future__ import annotations

import bisect
import itertools
import mmap
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

from distrust.checkpoint import arrays
from distrust.checkpoint.format import Layout, tensor_hasher
from distrust.checkpoint.memory import PAGE_BYTES, ReusableMemory, allocate, round_up
from distrust.checkpoint.serialization import PreparedCheckpoint
from distrust.checkpoint.storage import AtomicFile

#: What is written at once.
BLOCK_BYTES = 4 << 20
#: Of the ring: what a blocking save takes beyond the state.
BLOCKS = 4
_OF_NOTHING = tensor_hasher(all_cores=False).hexdigest()


def write_snapshot(file: AtomicFile, layout: Layout, data: mmap.mmap) -> str:
    """Write a file, to be committed by the caller; returns its header's digest.

    Args:
        file: new, of the size that the layout wants.
        layout: where every byte goes.
        data: the tensors as they will lie in the file, in whole pages.

    Raises:
        SaveFailed: with what stood before untouched.
        UnsupportedState: if no reader would take the header.
    """
    digests = _Digests(layout)
    for begin, end in _blocks(layout):
        block = memoryview(data)[begin : round_up(end, PAGE_BYTES)]
        file.write(block, layout.data_offset + begin)
        digests.update(block, begin, end)
    return _write_header(file, layout, digests.digests())


def write_streaming(file: AtomicFile, image: PreparedCheckpoint, block_buffer: ReusableMemory) -> str:
    """Write a file, to be committed by the caller; returns its header's digest.

    Args:
        file: new, of the size that the layout wants.
        image: what to write.
        block_buffer: memory for the blocks.

    Raises:
        SaveFailed: with what stood before untouched.
        UnsupportedState: if no reader would take the header.
    """
    layout = image.layout
    digests = _Digests(layout)
    slots = min(BLOCKS, len(_blocks(layout)))
    memory = block_buffer.acquire(slots * BLOCK_BYTES)
    under_way: deque[threading.Event] = deque()
    for number, (begin, end) in enumerate(_blocks(layout)):
        if number >= slots:
            under_way.popleft().wait()
        place = number % slots * BLOCK_BYTES
        arrays.fill(memory, place, _arrays_in_range(image, begin, end))
        block = memoryview(memory)[place : place + round_up(end - begin, PAGE_BYTES)]
        under_way.append(file.write(block, layout.data_offset + begin))
        digests.update(block, begin, end)
    return _write_header(file, layout, digests.digests())


class _Digests:
    """The digests of all tensors, of data that comes in blocks, in order."""

    def __init__(self, layout: Layout) -> None:
        self._edges = layout.edges
        self._begun: dict[int, Any] = {}  # a few: each takes as much memory as a small tensor
        self._digests = [_OF_NOTHING] * len(layout.names)

    def update(self, block: memoryview, begin: int, end: int) -> None:
        """Go on with the data from ``begin`` to ``end``, with which ``block`` begins."""
        for index in _tensors_in_range(self._edges, begin, end):
            first, last = max(begin, self._edges[index]), min(end, self._edges[index + 1])
            hasher = self._begun.pop(index, None) or tensor_hasher(all_cores=False)
            hasher.update(block[first - begin : last - begin])
            if last == self._edges[index + 1]:
                self._digests[index] = hasher.hexdigest()
            else:
                self._begun[index] = hasher

    def digests(self) -> list[str]:
        """Each tensor's, in the order of the data."""
        return self._digests


def _blocks(layout: Layout) -> list[tuple[int, int]]:
    """The blocks of the data: where each begins and ends."""
    begins = range(0, layout.data_bytes, BLOCK_BYTES)
    return list(itertools.pairwise([*begins, layout.data_bytes])) if begins else []


def _tensors_in_range(edges: Sequence[int], begin: int, end: int) -> range:
    """The tensors that have data from ``begin`` to ``end``."""
    return range(bisect.bisect_right(edges, begin) - 1, bisect.bisect_left(edges, end))


def _arrays_in_range(image: PreparedCheckpoint, begin: int, end: int) -> list[Any]:
    """The arrays with data from ``begin`` to ``end``, and of the first and last one what is of that."""
    edges = image.layout.edges
    touched = _tensors_in_range(edges, begin, end)
    cut = list(image.flat_arrays[touched.start : touched.stop])
    # The last one first: where there is only one, its end is cut off before its beginning is.
    cut[-1] = arrays.byte_range(cut[-1], 0, min(end, edges[touched.stop]) - edges[touched.stop - 1])
    cut[0] = arrays.byte_range(cut[0], max(begin, edges[touched.start]) - edges[touched.start], cut[0].nbytes)
    return cut


def _write_header(file: AtomicFile, layout: Layout, digests: Sequence[str]) -> str:
    """Write the header; returns its digest."""
    header, digest = layout.header(digests)
    block = allocate(len(header))
    block[: len(header)] = header
    # Last: a file without its header is no checkpoint, whatever the disk made of the rest.
    file.write(memoryview(block)[: len(header)], 0)
    return digest
