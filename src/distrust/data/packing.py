"""Examples -> sequences: which examples share one row of a batch.

Without packing each example is a row. With it, rows of up to ``capacity`` tokens are filled with whole
examples: best fit, the longest first, within windows of examples drawn by the seed. Which examples share a
row is settled once for the whole run, a pure function of (lengths, capacity, seed); each epoch then has the
rows in an order of its own (``order``). So the rows of any step are known without those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distrust.data.sampler import permutation

#: Examples that are packed with each other. Rows lose a hundredth or less beside packing all at once.
WINDOW = 4096
#: The "epoch" of the permutation that windows are cut from: no epoch of training has its number.
PACKING = 2**63


@dataclass(frozen=True)
class PackedRows:
    """Rows of a batch: row i holds ``members[offsets[i]:offsets[i + 1]]``.

    Attributes:
        offsets: int64[rows + 1].
        members: int64[n], numbers of examples; each stands in one row.
    """

    offsets: NDArray[np.int64]
    members: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def examples(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The examples of some rows, row after row."""
        return np.concatenate([self.members[self.offsets[row] : self.offsets[row + 1]] for row in rows])


def one_per_row(examples: NDArray[np.int64]) -> PackedRows:
    """Each example a row of its own."""
    return PackedRows(np.arange(len(examples) + 1, dtype=np.int64), examples)


def pack(
    examples: NDArray[np.int64], lengths: NDArray[np.int64], *, capacity: int, seed: int, window: int = WINDOW
) -> PackedRows:
    """Rows of several examples each.

    Args:
        examples: int64[n], their numbers.
        lengths: int64[n], the tokens of each, 1 to ``capacity``.
        capacity: tokens of a row, at most.
        seed: of the windows.
        window: how many examples are packed with each other.

    Returns:
        The rows, each example in one of them.

    Raises:
        ValueError: an example is longer than a row.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"an example of {int(lengths.max())} tokens does not fit a row of {capacity}")
    drawn = permutation(len(examples), seed=seed, epoch=PACKING)
    sizes, members = [np.zeros(1, np.int64)], [drawn[:0]]
    for start in range(0, len(drawn), window):
        rows = _best_fit(drawn[start : start + window], lengths, capacity)
        # Arrays, window by window: lists of all rows would take ten times the memory.
        sizes.append(np.array([len(row) for row in rows], np.int64))
        members.append(np.concatenate(rows))
    return PackedRows(np.cumsum(np.concatenate(sizes)), examples[np.concatenate(members)])


def concatenate(parts: Sequence[PackedRows]) -> PackedRows:
    """The rows of each part, one part after the other."""
    starts = np.cumsum([0, *(len(part.members) for part in parts)])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts[:-1], strict=True)]
    return PackedRows(
        np.concatenate([*offsets, starts[-1:]]), np.concatenate([part.members for part in parts])
    )


def _best_fit(window: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int) -> list[list[np.int64]]:
    """Each example into the fullest row that still has room for it, the longest example first."""
    rows: list[list[np.int64]] = []
    by_room: dict[int, list[int]] = {}
    rooms = (
        0  # bit r is set where a row has room for r more tokens: the lowest one that fits is found at once
    )
    for member in window[np.argsort(-lengths[window], kind="stable")]:
        length = int(lengths[member])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            rows[row].append(member)
        else:
            row, room = len(rows), capacity
            rows.append([member])
        left = room - length
        if left:
            by_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    return rows
