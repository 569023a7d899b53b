"""Sampling order: a pure function of (seed, epoch), addressed by global position.

The generator is written out here, so no library version changes the order and a run can be resumed after an
upgrade. Each row gets a 64-bit key, and the order is that of the keys (equal ones keep the order of the file:
about one pair among 6 billion rows). The keys are SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014), seeded with a mix of seed and epoch:

    state  = mix(mix(seed + γ) xor epoch)
    key(i) = mix(state + γ·(i + 1))         modulo 2⁶⁴, γ = 0x9E3779B97F4A7C15

What is sampled are rows of a batch: one example each, or several with packing.

A mixture of sources has an epoch as long as all its rows, and each source has as many positions in it as its
share says. Each epoch samples which positions; they are filled from the source's own endless order, so no
row of a source repeats before all of its rows have been used.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from distrust.errors import ConfigError

MAX_SEED = 2**63  # the largest seed, inclusive

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ / golden ratio, odd


def permutation(n: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of one epoch, counted from 0: int64[n], each of 0 to n − 1 once.

    Raises:
        ConfigError: the seed is not from 0 to 2⁶³.
        ValueError: n or epoch is negative.
    """
    _check_seed(seed)
    if n < 0 or epoch < 0:
        raise ValueError(f"n and epoch must not be negative: {n}, {epoch}")
    # Arrays, not scalars: numpy warns when scalar arithmetic wraps around.
    state = _mix(_mix(np.array([seed], np.uint64) + _GAMMA) ^ np.array([epoch], np.uint64))  # uint64[1]
    keys = _mix(state + _GAMMA * np.arange(1, n + 1, dtype=np.uint64))  # uint64[n]
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64, a bijection of 64-bit words."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # wraps modulo 2⁶⁴
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _check_seed(seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed must be from 0 to 2^63, not {seed}")


class EpochSampler:
    """Samples all rows once per epoch, each epoch in its own order: an endless sequence with random access.

    Args:
        rows: the number of rows in an epoch, at least 1.
        seed: the run's seed, 0 to 2⁶³.
    """

    def __init__(self, rows: int, *, seed: int) -> None:
        if rows < 1:
            raise ValueError(f"a sampler needs at least one row, not {rows}")
        self.rows_per_epoch = rows
        self.seed = seed
        self._cached: tuple[int, NDArray[np.int64]] | None = None  # (epoch, int64[rows_per_epoch])
        self._epoch(0)  # checks the seed now rather than at the first step

    def at(self, start: int, count: int) -> NDArray[np.int64]:
        """The rows at global positions ``start`` to ``start + count``; epoch = position // rows_per_epoch.

        Earlier calls have no influence, and position 10¹² costs what position 0 costs.

        Returns:
            int64[count], row numbers.
        """
        if start < 0 or count < 0:
            raise ValueError(f"start and count must not be negative: {start}, {count}")
        parts = [np.empty(0, np.int64)]  # concatenate needs one array, also for count 0
        while count:
            epoch, offset = divmod(start, self.rows_per_epoch)
            part = self._epoch(epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)  # a copy: callers may write to it

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        cached = self._cached  # read once: the prefetch thread may replace it
        if cached is None or cached[0] != epoch:
            cached = self._cached = (epoch, self._permutation(epoch))
        return cached[1]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """The order of an epoch: int64[rows_per_epoch]."""
        return permutation(self.rows_per_epoch, seed=self.seed, epoch=epoch)


class MixtureSampler(EpochSampler):
    """Samples several sources by their shares. The rows are numbered source after source.

    Args:
        sizes: the rows of each source, at least 1.
        shares: of each source, 0 or more, not all 0; they are normalized.
        seed: the run's seed, 0 to 2⁶³.
    """

    def __init__(self, sizes: Sequence[int], *, shares: Sequence[float], seed: int) -> None:
        if not sizes or min(sizes) < 1 or len(sizes) != len(shares):
            raise ValueError(f"every source needs rows and a share: {list(sizes)}, {list(shares)}")
        self.counts = apportion(sum(sizes), shares)  # rows of each source in an epoch
        self._starts = [0, *accumulate(sizes)][:-1]  # first row number of each source
        # Independent seeds: equal sources must not repeat in step with each other.
        self._samplers = [EpochSampler(size, seed=derived_seed(seed, k)) for k, size in enumerate(sizes)]
        super().__init__(sum(sizes), seed=seed)  # last, because it samples the first epoch

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        source_of = np.repeat(np.arange(len(self.counts)), self.counts)  # int64[rows_per_epoch]
        source_of = source_of[super()._permutation(epoch)]
        rows = np.empty(self.rows_per_epoch, np.int64)
        sources = zip(self._samplers, self._starts, self.counts, strict=True)
        for k, (sampler, start, count) in enumerate(sources):
            # Continues where the previous epoch stopped, so no row repeats early.
            rows[source_of == k] = start + sampler.at(epoch * count, count)
        return rows


def apportion(seats: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Apportion seats, at least one per share, by largest remainder; at least one to each share above 0."""
    exact = [Fraction(share) for share in shares]  # floats would round differently on long lists
    ideal = [share * seats / sum(exact) for share in exact]
    counts = [max(int(count), int(count > 0)) for count in ideal]
    while (remaining := seats - sum(counts)) != 0:
        # Correct the count that is furthest from its ideal; of equal ones the first.
        gaps = [(count - ideal[k]) * (1 if remaining > 0 else -1) for k, count in enumerate(counts)]
        eligible = [k for k in range(len(counts)) if ideal[k] > 0 and (remaining > 0 or counts[k] > 1)]
        counts[min(eligible, key=lambda k: gaps[k])] += 1 if remaining > 0 else -1
    return tuple(counts)


def derived_seed(seed: int, stream: int) -> int:
    """An independent seed for each stream of random numbers of a run."""
    _check_seed(seed)
    state = _mix(np.array([seed], np.uint64) + _GAMMA) ^ _mix(np.array([stream], np.uint64) - _GAMMA)
    return int(_mix(state)[0] >> np.uint64(1))  # 63 bits: within MAX_SEED
