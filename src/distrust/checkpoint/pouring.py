"""An image of a checkpoint poured into a file: copied, written and digested at the same time.

Two ways, to the same bytes:

- :func:`write_filled`: all data lies in memory as it will lie in the file, because a snapshot was taken. Blocks of
  it are written as they stand while all cores digest the tensors.
- :func:`write_filling`: the data is still in the caller's arrays, and must not be copied whole. It goes through a
  ring of blocks: one is filled while those before it are written, and digested, what was copied and not what the
  caller may have made of it since, before it is filled again.
"""

from __future__ import annotations

import bisect
import mmap
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distrust.checkpoint import arrays, parallel
from distrust.checkpoint.arrays import Segment
from distrust.checkpoint.format import Layout, tensor_hasher
from distrust.checkpoint.image import Image
from distrust.checkpoint.memory import PAGE_BYTES, ReusableMemory, allocate, rounded
from distrust.checkpoint.storage import AtomicFile

#: Of the ring: together what a save takes beyond the state.
BLOCKS = 8
BLOCK_BYTES = 4 << 20
#: A larger tensor is digested by all cores together.
LARGE_TENSOR_BYTES = 8 << 20
_NOTHING = tensor_hasher(all_cores=False).hexdigest()


def write_filled(path: Path, layout: Layout, data: mmap.mmap) -> str:
    """Write and commit a file; returns its header's digest.

    Args:
        path: the final name.
        layout: where every byte goes.
        data: the tensors as they will lie in the file, in whole pages.

    Raises:
        SaveFailed: with what stood before untouched.
        UnsupportedState: if no reader would take the header.
    """
    view = memoryview(data)
    with AtomicFile(path, layout.file_size) as file:
        for begin in range(0, layout.data_bytes, BLOCK_BYTES):
            end = min(begin + BLOCK_BYTES, rounded(layout.data_bytes, PAGE_BYTES))
            file.write(view[begin:end], layout.data_offset + begin)
        return _complete(file, layout, _digests(layout, view))


def write_filling(path: Path, image: Image, ring: ReusableMemory) -> str:
    """Write and commit a file; returns its header's digest.

    Args:
        path: the final name.
        image: what to write.
        ring: memory for the blocks.

    Raises:
        SaveFailed: with what stood before untouched.
        UnsupportedState: if no reader would take the header.
    """
    layout = image.layout
    with AtomicFile(path, layout.file_size) as file:
        return _complete(file, layout, _Filling(image, ring).pour(file))


class _Filling:
    """The ring at work."""

    def __init__(self, image: Image, ring: ReusableMemory) -> None:
        self._edges = image.layout.edges
        self._flats = [image.flats[name] for name in image.layout.names]
        self._data_offset = image.layout.data_offset
        self._data_bytes = image.layout.data_bytes
        self._slots = min(BLOCKS, -(-self._data_bytes // BLOCK_BYTES))
        self._memory = ring.take(self._slots * BLOCK_BYTES)
        self._view = memoryview(self._memory)
        self._hashers: dict[int, Any] = {}
        self._digests = [_NOTHING] * len(self._flats)

    def pour(self, file: AtomicFile) -> list[str]:
        """Write all data; returns the digest of each tensor, in the order of the data."""
        begun: deque[tuple[int, threading.Event]] = deque()
        for begin in range(0, self._data_bytes, BLOCK_BYTES):
            if len(begun) == self._slots:
                oldest, written = begun.popleft()
                self._digest(oldest)
                written.wait()
            begun.append((begin, self._write(file, begin)))
        for begin, _ in begun:
            self._digest(begin)
        return self._digests

    def _write(self, file: AtomicFile, begin: int) -> threading.Event:
        place = self._place(begin)
        arrays.fill(
            self._memory,
            [
                Segment(place + first - begin, self._flats[index], first - edge, last - edge)
                for index, first, last in self._pieces(begin)
                for edge in [self._edges[index]]
            ],
        )
        length = min(BLOCK_BYTES, rounded(self._data_bytes - begin, PAGE_BYTES))
        return file.write(self._view[place : place + length], self._data_offset + begin)

    def _digest(self, begin: int) -> None:
        place = self._place(begin)
        for index, first, last in self._pieces(begin):
            hasher = self._hashers.pop(index, None) or _hasher(self._edges[index + 1] - self._edges[index])
            hasher.update(self._view[place + first - begin : place + last - begin])
            if last == self._edges[index + 1]:
                self._digests[index] = hasher.hexdigest()
            else:
                self._hashers[index] = hasher

    def _place(self, begin: int) -> int:
        return begin // BLOCK_BYTES % self._slots * BLOCK_BYTES

    def _pieces(self, begin: int) -> Iterator[tuple[int, int, int]]:
        """The tensors in the block that begins there, each with its first byte in it, and one behind the last."""
        end = min(begin + BLOCK_BYTES, self._data_bytes)
        index = bisect.bisect_right(self._edges, begin) - 1
        while index < len(self._flats) and self._edges[index] < end:
            yield index, max(begin, self._edges[index]), min(end, self._edges[index + 1])
            index += 1


def _digests(layout: Layout, view: memoryview) -> list[str]:
    digests = [_NOTHING] * len(layout.names)

    def digest(index: int) -> None:
        begin, end = layout.edges[index : index + 2]
        digests[index] = _hasher(end - begin).update(view[begin:end]).hexdigest()

    threads = parallel.worthwhile_threads(layout.data_bytes)
    parallel.run(digest, range(len(digests)), threads=threads)
    return digests


def _hasher(nbytes: int) -> Any:
    return tensor_hasher(all_cores=nbytes >= LARGE_TENSOR_BYTES)


def _complete(file: AtomicFile, layout: Layout, digests: Sequence[str]) -> str:
    """Write the header and commit; returns the header's digest."""
    header, digest = layout.header(digests)
    block = allocate(len(header))
    block[: len(header)] = header
    # Last: a file without its header is no checkpoint, whatever the disk made of the rest.
    file.write(memoryview(block)[: len(header)], 0)
    file.commit()
    return digest
