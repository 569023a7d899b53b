"""The state as it was when a background save began, in host memory that nothing else changes.

One buffer, reused by every save and pre-touched before the first. Tensors have the layout of the file, so it
is written in place. Arrays whose contents can be kept without a copy are referenced instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from distrust.checkpoint import arrays, stream_writer
from distrust.checkpoint.memory import PAGE_BYTES, PageLock, ReusableMemory, available_bytes, round_up
from distrust.checkpoint.serialization import PreparedCheckpoint
from distrust.errors import SaveFailed

#: The share of the available memory that a snapshot may use.
BUDGET = 0.25
#: Sections that change only in the optimizer's step: their copy may overlap the next forward and backward.
OVERLAPPED = ("model.", "optimizer.")
CHANGED = (
    "model or optimizer changed while it was copied, and the file would mix two states; call wait_copied() "
    "before the optimizer's step"
)


class PendingCopy(NamedTuple):
    """A state that is partly copied."""

    #: Copies the rest. The caller must not change those arrays until it returns; where the framework counts
    #: changes, it raises SaveFailed with the given path if they were changed.
    copy: Callable[[Path], None]
    #: Writes the state into a new file, or a slot; the caller commits; returns the digest of its header.
    write: Callable[[stream_writer.BlockFile], str]
    #: Drops the arrays that a failed save has left: its error may live long.
    drop: Callable[[], None]


class Snapshot:
    """The snapshot buffer. One save at a time may use it."""

    def __init__(self, memory: ReusableMemory | None = None, *, origin: int = 0) -> None:
        self._memory = memory or ReusableMemory()
        self._origin = origin  # where copied arrays begin in the memory
        self.budget = BUDGET
        #: Writes copied arrays. Without it their memory has the layout of the file, and is written in place.
        self.stream: Callable[[PreparedCheckpoint], Callable[[Any], str]] | None = None

    def reserve(self, nbytes: int, page_lock: PageLock | None = None) -> bool:
        """Allocate and touch ``nbytes``; return whether the memory budget and the system allow that."""
        missing = nbytes - self._memory.touched_bytes
        if missing > 0 and missing > self.budget * available_bytes():
            return False
        try:
            self._memory.acquire(round_up(nbytes, PAGE_BYTES), page_lock)
        except MemoryError:  # a limit that the estimate does not know, such as ulimit -v
            return False
        return True

    def start_copy(
        self, prepared: PreparedCheckpoint, *, deferred: tuple[str, ...], block_buffer: ReusableMemory
    ) -> PendingCopy | None:
        """Copy a state; :attr:`PendingCopy.copy` will copy the labels with the prefixes ``deferred``.

        Returns None if the copy would exceed the memory budget.
        """
        if prepared.zero_copy:
            return self._copy_mutable(prepared, block_buffer)
        return self._copy_all(prepared, deferred)

    def release(self) -> None:
        """Return the buffer to the system."""
        self._memory.release()

    def _copy_mutable(self, prepared: PreparedCheckpoint, block_buffer: ReusableMemory) -> PendingCopy | None:
        """Keep references to the arrays that stay unchanged. The others are mostly small: rng, history."""
        flats = dict(zip(prepared.layout.names, prepared.flat_arrays, strict=True))
        mutable = flats.keys() - prepared.zero_copy
        if sum(flats[label].nbytes for label in mutable) > self.budget * available_bytes():
            return None
        flats |= {label: arrays.private_copy(flats[label]) for label in mutable}
        unchanging = [*flats.values()]  # |= keeps the order
        private = replace(prepared, flat_arrays=unchanging)
        write = partial(stream_writer.write_streaming, prepared=private, block_buffer=block_buffer)
        return PendingCopy(lambda _: None, write, unchanging.clear)

    def _copy_all(self, prepared: PreparedCheckpoint, deferred: tuple[str, ...]) -> PendingCopy | None:
        layout, without_arrays = prepared.layout, replace(prepared, flat_arrays=())
        edges = [*itertools.accumulate((flat.nbytes for flat in prepared.flat_arrays), initial=self._origin)]
        stream = arrays.copy_stream(prepared.flat_arrays)
        if not self.reserve(edges[-1], stream.page_lock if stream else None):
            return None
        memory = self._memory.acquire(round_up(edges[-1], PAGE_BYTES))
        pending, on_device = [], []
        rows = zip(layout.names, edges, prepared.flat_arrays, strict=False)  # the last edge is the end
        # Adjacent arrays are copied together.
        groups = itertools.groupby(
            rows, key=lambda row: (row[0].startswith(deferred), getattr(row[2], "device", None), row[2].dtype)
        )
        for (is_deferred, device, _), group in groups:
            _, offsets, flats = zip(*group, strict=True)
            if not is_deferred:
                arrays.fill(memory, offsets[0], flats)
            elif stream and device == stream.device:
                on_device.append((offsets[0], flats))
            else:
                pending.append((offsets[0], flats, arrays.versions(flats)))
        copies = (stream.gather([flats for _, flats in on_device]) if stream else None) or []
        pending += [(offset, flats, arrays.versions(flats)) for offset, flats in on_device[len(copies) :]]
        # First those that are copied on the device, and nobody else's.
        gathered = len(copies)
        pending[:0] = [(offset, copy, []) for (offset, _), copy in zip(on_device, copies, strict=False)]

        def copy(path: Path) -> None:
            if stream:
                stream.wait()  # until the copies on the device are made: then the caller may use any stream
            while len(pending) > gathered:  # popped: no reference to the caller's arrays longer than needed
                offset, flats, versions = pending.pop()
                arrays.fill(memory, offset, flats)
                if arrays.versions(flats) != versions:  # changed before or during the copy
                    raise SaveFailed(f"{path}: not saved: {CHANGED}", path=path)

        def write(file: stream_writer.BlockFile) -> str:
            while pending:  # popped, so that the device gets its memory back
                arrays.fill(memory, *pending.pop()[:2])
            if self.stream is None:
                return stream_writer.write_snapshot(file, layout, memoryview(memory)[self._origin :])
            import numpy as np

            data = np.frombuffer(memory, np.uint8)
            flats = [data[begin:end] for begin, end in itertools.pairwise(edges)]
            return self.stream(replace(without_arrays, flat_arrays=flats))(file)

        return PendingCopy(copy, write, pending.clear)
