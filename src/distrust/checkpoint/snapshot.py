"""The state as it was when a background save began: host memory that nobody else will change.

One buffer, used again by every save and touched before the first one: a copy into it runs at the speed of the
memory. Frameworks whose arrays cannot change, or can be held as they are, need no copy and no room.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distrust.checkpoint import arrays, memory
from distrust.checkpoint.arrays import HostArray
from distrust.checkpoint.memory import ReusableMemory, Room

#: The part of the memory still free that a snapshot may take.
BUDGET = 0.25


class Capture:
    """A state on its way into a snapshot.

    Attributes:
        sources: label -> where its bytes are, or will be once it is copied.
    """

    def __init__(self) -> None:
        self.sources: dict[str, HostArray] = {}
        self._copies: list[Callable[[], None]] = []

    def add(self, state: Mapping[str, Any], room: Room) -> None:
        """Find a place for arrays, or hold them; :meth:`copy` copies them."""
        for adapter, group in arrays.grouped(state).items():
            captured = adapter.capture(list(group.values()), room)
            self.sources.update(zip(group, captured.sources, strict=True))
            self._copies.append(captured.copy)

    def copy(self) -> None:
        """Copy what was added since the last call. Until this returns, nobody may change it."""
        copies, self._copies = self._copies, []
        for copy in copies:
            copy()


class Snapshot:
    """The buffer. One save at a time may use it."""

    def __init__(self) -> None:
        self._memory = ReusableMemory()

    def reserve(self, nbytes: int) -> bool:
        """Have room for ``nbytes``, all of it touched; returns whether the budget allows that."""
        missing = nbytes - self._memory.touched
        if missing > 0 and missing > BUDGET * memory.available_bytes():
            return False
        self._memory.take(nbytes)
        return True

    def begin(self, state: Mapping[str, Any], *, later: tuple[str, ...] = ()) -> Capture | None:
        """Take arrays in; None if the budget does not allow their copies.

        Args:
            state: arrays by label.
            later: how the labels begin that :meth:`Capture.copy` copies, and that may not change until then;
                the others are copied when this returns.
        """
        groups = arrays.grouped(state)
        nbytes = sum(adapter.room(list(group.values())) for adapter, group in groups.items())
        if not self.reserve(nbytes):
            return None
        capture, room = Capture(), Room(self._memory, nbytes)
        waiting = {label: array for label, array in state.items() if label.startswith(later)}
        capture.add({label: array for label, array in state.items() if label not in waiting}, room)
        capture.copy()
        capture.add(waiting, room)
        return capture

    def release(self) -> None:
        """Give the buffer back."""
        self._memory.release()
