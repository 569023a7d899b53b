"""The state as it was when a background save began: host memory that nobody else will change.

One buffer, used again by every save and touched before the first one: a copy into it runs at the speed of the
memory. Tensors lie in it as they will lie in the file, so it is written as it stands. Arrays that cannot
change, or can be held as they are, need no copy and no room.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from distrust.checkpoint import arrays, stream_writer
from distrust.checkpoint.memory import PAGE_BYTES, ReusableMemory, available_bytes, round_up
from distrust.checkpoint.serialization import PreparedCheckpoint
from distrust.checkpoint.storage import AtomicFile
from distrust.errors import SaveFailed

#: The part of the memory still free that a snapshot may take.
BUDGET = 0.25


class PendingCopy(NamedTuple):
    """A state on its way into a snapshot.

    Attributes:
        copy: copies what is not copied yet, for the file of that name; until it returns, nobody may change
            that, and where the framework counts changes, it finds out.
        write: writes it into a new file, to be committed by the caller; returns its header's digest.
    """

    copy: Callable[[Path], None]
    write: Callable[[AtomicFile], str]


class Snapshot:
    """The buffer. One save at a time may use it."""

    def __init__(self) -> None:
        self._memory = ReusableMemory()

    def reserve(self, nbytes: int) -> bool:
        """Have room for ``nbytes``, all of it touched; returns whether budget and system allow that."""
        missing = nbytes - self._memory.touched_bytes
        if missing > 0 and missing > BUDGET * available_bytes():
            return False
        try:
            self._memory.acquire(round_up(nbytes, PAGE_BYTES))
        except MemoryError:  # limits that no estimate knows of
            return False
        return True

    def start_copy(
        self, image: PreparedCheckpoint, *, deferred: tuple[str, ...], block_buffer: ReusableMemory
    ) -> PendingCopy | None:
        """Take a state in; None if the budget does not allow its copy.

        Args:
            image: the state.
            deferred: how the labels begin of what :meth:`Capture.copy` copies, and may not change until then;
                everything else is copied when this returns.
            block_buffer: memory for the blocks in which arrays are written that need no copy.
        """
        return self._held(image, block_buffer) if image.zero_copy else self._copied(image, deferred)

    def release(self) -> None:
        """Give it back."""
        self._memory.release()

    def _held(self, image: PreparedCheckpoint, block_buffer: ReusableMemory) -> PendingCopy | None:
        # What changes beside arrays that are held is little, most often: random numbers, history.
        edges = zip(image.layout.names, image.layout.edges, image.layout.edges[1:], strict=False)
        changing = sum(end - begin for label, begin, end in edges if label not in image.zero_copy)
        if changing > BUDGET * available_bytes():
            return None
        flats = [
            flat if label in image.zero_copy else arrays.private_copy(flat)
            for label, flat in zip(image.layout.names, image.flat_arrays, strict=True)
        ]
        held = replace(image, flat_arrays=flats)
        return PendingCopy(
            _nothing_to_copy, lambda file: stream_writer.write_streaming(file, held, block_buffer)
        )

    def _copied(self, image: PreparedCheckpoint, deferred: tuple[str, ...]) -> PendingCopy | None:
        layout = image.layout
        if not self.reserve(layout.data_bytes):
            return None
        memory = self._memory.acquire(round_up(layout.data_bytes, PAGE_BYTES))
        waiting = []
        for behind, place, flats in _runs(image, deferred):
            if behind:
                waiting.append((place, flats, arrays.versions(flats)))
            else:
                arrays.fill(memory, place, flats)

        def copy(path: Path) -> None:
            while waiting:  # emptied: the caller's arrays are held no longer than it takes
                place, flats, changes = waiting.pop()
                arrays.fill(memory, place, flats)
                if arrays.versions(flats) != changes:
                    raise SaveFailed(
                        f"{path}: not saved: model or optimizer changed while it was copied, and it would "
                        "hold a mixture; call wait_copied() before the optimizer's step",
                        path=path,
                    )

        return PendingCopy(copy, lambda file: stream_writer.write_snapshot(file, layout, memory))


def _nothing_to_copy(_: Path) -> None:
    pass


def _runs(image: PreparedCheckpoint, deferred: tuple[str, ...]) -> Iterator[tuple[bool, int, list[Any]]]:
    """Arrays that lie side by side and are copied together: whether later, where, and which."""
    begin = 0
    for behind, labels in itertools.groupby(image.layout.names, key=lambda label: label.startswith(deferred)):
        end = begin + len(list(labels))
        yield behind, image.layout.edges[begin], list(image.flat_arrays[begin:end])
        begin = end
