"""Packing: which examples share one row of a batch.

Without packing, each example is a row. With it, rows of up to ``capacity`` tokens are filled with complete
examples: best fit decreasing, within windows of examples sampled by the seed. The rows are fixed for the
whole run, a pure function of (lengths, capacity, seed); each epoch only reorders them (``sampler``). So the
rows of any step are known without computing earlier steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distrust.data.sampler import permutation

WINDOW = 4096  # examples that are packed together. Packing all at once would save at most 1% of the rows
# The "epoch" of the permutation that windows are cut from: no epoch of training has this number.
PACKING_EPOCH = 2**63


@dataclass(frozen=True)
class PackedRows:
    """Rows of a batch: row i holds the examples ``members[offsets[i]:offsets[i + 1]]``."""

    offsets: NDArray[np.int64]  # [rows + 1]
    members: NDArray[np.int64]  # [n], example numbers, each in one row

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def examples(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The examples of some rows, row after row: int64[k]."""
        return np.concatenate([self.members[self.offsets[row] : self.offsets[row + 1]] for row in rows])


def one_per_row(examples: NDArray[np.int64]) -> PackedRows:
    """Rows of one example each."""
    return PackedRows(np.arange(len(examples) + 1, dtype=np.int64), examples)


def pack(
    examples: NDArray[np.int64], lengths: NDArray[np.int64], *, capacity: int, seed: int, window: int = WINDOW
) -> PackedRows:
    """Pack several examples into each row, each example into one row.

    Args:
        examples: int64[n], example numbers.
        lengths: int64[n], the tokens of each, 1 to ``capacity``.
        capacity: the largest number of tokens in a row.
        seed: determines the windows.
        window: how many examples are packed together.

    Raises:
        ValueError: an example is longer than a row.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"an example of {int(lengths.max())} tokens does not fit a row of {capacity}")
    shuffled = permutation(
        len(examples), seed=seed, epoch=PACKING_EPOCH
    )  # int64[n], indices into ``lengths``
    sizes, members = [np.zeros(1, np.int64)], [shuffled[:0]]
    for start in range(0, len(shuffled), window):
        rows = _best_fit(shuffled[start : start + window], lengths, capacity)
        # Arrays, window by window: lists of all rows would take ten times the memory.
        sizes.append(np.array([len(row) for row in rows], np.int64))
        members.append(np.concatenate(rows))
    return PackedRows(np.cumsum(np.concatenate(sizes)), examples[np.concatenate(members)])


def concatenate(parts: Sequence[PackedRows]) -> PackedRows:
    """The rows of each part, one part after the other."""
    starts = np.cumsum([0, *(len(part.members) for part in parts)])  # int64[parts + 1]
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts[:-1], strict=True)]
    return PackedRows(
        np.concatenate([*offsets, starts[-1:]]), np.concatenate([part.members for part in parts])
    )


def _best_fit(window: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int) -> list[list[np.int64]]:
    """Put each example, longest first, into the fullest row that has room for it."""
    rows: list[list[np.int64]] = []
    rows_by_free_tokens: dict[int, list[int]] = {}  # free tokens -> rows with exactly that many
    free_tokens = 0  # bit r is set if a row has r free tokens: finds the tightest fit in one operation
    for member in window[np.argsort(-lengths[window], kind="stable")]:  # stable: ties keep sampling order
        length = int(lengths[member])
        fitting = free_tokens >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1  # the lowest set bit
            row = rows_by_free_tokens[space].pop()
            if not rows_by_free_tokens[space]:
                free_tokens ^= 1 << space
            rows[row].append(member)
        else:
            row, space = len(rows), capacity
            rows.append([member])
        free = space - length
        if free:
            rows_by_free_tokens.setdefault(free, []).append(row)
            free_tokens |= 1 << free
    return rows
