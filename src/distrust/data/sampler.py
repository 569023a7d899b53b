"""The order of training: a pure function of (seed, epoch), at a place that is a pure function of the step.

The generator is written out here and is nobody else's: no version of any library changes the order, so a
run can be resumed after an upgrade. Each sequence draws a 64-bit key, and the order is that of the keys
(equal keys, about one pair among 6 billion sequences, keep the order of the file). The keys are SplitMix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), started from a
state that is mixed of seed and epoch:

    state  = mix(mix(seed + γ) xor epoch)
    key(i) = mix(state + γ·(i + 1))         modulo 2⁶⁴, γ = 0x9E3779B97F4A7C15

What is ordered are sequences: lists of examples that share one row of a batch.

Where sources are mixed, an epoch is as long as all their sequences, and each source has as many places in
it as its share says. Which places is drawn for each epoch; what stands there comes from the source's own
endless order, so nothing of a source comes again before all of it has come.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from distrust.errors import ConfigError

MAX_SEED = 2**63
"""The largest seed, included."""

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def permutation(n: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of one epoch.

    Args:
        n: the number of sequences.
        seed: 0 to 2⁶³.
        epoch: counted from 0.

    Returns:
        int64[n], each of 0 to n − 1 once.

    Raises:
        ConfigError: the seed is out of range.
        ValueError: n or epoch is negative.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed must be from 0 to 2^63, not {seed}")
    if n < 0 or epoch < 0:
        raise ValueError(f"neither n nor epoch may be negative: {n}, {epoch}")
    # Arrays, not scalars: numpy warns where arithmetic of scalars wraps around.
    state = _mix(_mix(np.array([seed], np.uint64) + _GAMMA) ^ np.array([epoch], np.uint64))
    keys = _mix(state + _GAMMA * np.arange(1, n + 1, dtype=np.uint64))
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64, a bijection of 64-bit words."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class _Sampler:
    """An endless row of epochs that can be entered anywhere at one price: what an order of either kind is."""

    def __init__(self, sequences: int, *, seed: int) -> None:
        self.rows_per_epoch = sequences
        self.seed = seed
        self._cached: tuple[int, NDArray[np.int64]] | None = None

    def at(self, start: int, count: int) -> NDArray[np.int64]:
        """The sequences at global positions ``start`` to ``start + count``; epoch = position // sequences.

        What was asked before has no influence. At position 10¹² it costs what it costs at 0.

        Args:
            start: counted from 0 over all epochs.
            count: may reach over the end of an epoch, or of several.

        Returns:
            int64[count], numbers of sequences.

        Raises:
            ValueError: start or count is negative.
        """
        if start < 0 or count < 0:
            raise ValueError(f"neither start nor count may be negative: {start}, {count}")
        taken = [np.empty(0, np.int64)]
        while count:
            epoch, place = divmod(start, self.rows_per_epoch)
            part = self._epoch(epoch)[place : place + count]
            taken.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(taken)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        cached = self._cached  # read once: another thread may replace it
        if cached is None or cached[0] != epoch:
            cached = self._cached = (epoch, self._permutation(epoch))
        return cached[1]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """The order of an epoch: int64[sequences]."""
        raise NotImplementedError


class EpochSampler(_Sampler):
    """An endless row of epochs, each in an order of its own, that can be entered anywhere at one price.

    Attributes:
        sequences: how many there are in an epoch.
        seed: the run's seed.
    """

    def __init__(self, sequences: int, *, seed: int) -> None:
        if sequences < 1:
            raise ValueError(f"there must be a sequence to order, not {sequences}")
        super().__init__(sequences, seed=seed)
        self._epoch(0)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return permutation(self.rows_per_epoch, seed=self.seed, epoch=epoch)


class MixtureSampler(_Sampler):
    """An endless row of epochs in which each source has its share; the interface of ``Order``.

    The sequences are numbered source after source.

    Args:
        sizes: the sequences of each source, one at least.
        shares: of each source, 0 or more, not all 0; they are normalized.
        seed: the run's seed.

    Attributes:
        sequences: how many there are in an epoch: as many as in all sources.
        counts: how many of them are of each source.
        seed: the run's seed.
    """

    def __init__(self, sizes: Sequence[int], *, shares: Sequence[float], seed: int) -> None:
        if not sizes or min(sizes) < 1 or len(sizes) != len(shares):
            raise ValueError(f"every source needs sequences and a share: {list(sizes)}, {list(shares)}")
        super().__init__(sum(sizes), seed=seed)
        self.counts = apportion(self.rows_per_epoch, shares)
        self._begins = [0, *accumulate(sizes)][:-1]
        self._orders = [EpochSampler(size, seed=derived_seed(seed, k)) for k, size in enumerate(sizes)]
        self._epoch(0)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        source = np.repeat(np.arange(len(self.counts)), self.counts)
        source = source[permutation(self.rows_per_epoch, seed=self.seed, epoch=epoch)]
        drawn = np.empty(self.rows_per_epoch, np.int64)
        for k, (order, begin, count) in enumerate(zip(self._orders, self._begins, self.counts, strict=True)):
            drawn[source == k] = begin + order.at(epoch * count, count)
        return drawn


def apportion(places: int, shares: Sequence[float]) -> tuple[int, ...]:
    """So many places by shares: by largest remainder, and one at least where a share is not 0.

    Args:
        places: to be given away; as many as there are shares, at least.
        shares: 0 or more, not all 0; they are normalized.

    Returns:
        As many as there are shares, which add up to ``places``.
    """
    exact = [Fraction(share) for share in shares]
    ideal = [share * places / sum(exact) for share in exact]
    counts = [max(int(count), int(count > 0)) for count in ideal]
    while (left := places - sum(counts)) != 0:
        # The one that is furthest from its share; of equal ones the first.
        gaps = [(count - ideal[k]) * (1 if left > 0 else -1) for k, count in enumerate(counts)]
        able = [k for k in range(len(counts)) if ideal[k] > 0 and (left > 0 or counts[k] > 1)]
        counts[min(able, key=lambda k: gaps[k])] += 1 if left > 0 else -1
    return tuple(counts)


def derived_seed(seed: int, stream: int) -> int:
    """A seed for something of its own that a run draws: another one for each stream."""
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed must be from 0 to 2^63, not {seed}")
    state = _mix(np.array([seed], np.uint64) + _GAMMA) ^ _mix(np.array([stream], np.uint64) - _GAMMA)
    return int(_mix(state)[0] >> np.uint64(1))
