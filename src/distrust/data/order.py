"""The order of training: a pure function of (seed, epoch), at a place that is a pure function of the step.

The generator is written out here and is nobody else's: no version of any library changes the order, so a
run can be resumed after an upgrade. Each sequence draws a 64-bit key, and the order is that of the keys
(equal keys, about one pair among 6 billion sequences, keep the order of the file). The keys are SplitMix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), started from a
state that is mixed of seed and epoch:

    state  = mix(mix(seed + γ) xor epoch)
    key(i) = mix(state + γ·(i + 1))         modulo 2⁶⁴, γ = 0x9E3779B97F4A7C15

What is ordered are sequences: lists of examples that share one row of a batch. Here each holds one example.
"""

from __future__ import annotations

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


class Order:
    """An endless row of epochs, each in an order of its own, that can be entered anywhere at one price.

    Attributes:
        sequences: how many there are in an epoch.
        seed: the run's seed.
    """

    def __init__(self, sequences: int, *, seed: int) -> None:
        if sequences < 1:
            raise ValueError(f"there must be a sequence to order, not {sequences}")
        self.sequences = sequences
        self.seed = seed
        self._cached = (0, permutation(sequences, seed=seed, epoch=0))

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
            epoch, place = divmod(start, self.sequences)
            part = self._epoch(epoch)[place : place + count]
            taken.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(taken)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        cached = self._cached  # read once: another thread may replace it
        if cached[0] != epoch:
            cached = self._cached = (epoch, permutation(self.sequences, seed=self.seed, epoch=epoch))
        return cached[1]
