"""Values over steps, made fit for a picture: smoothed, and thinned out. Pure functions of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

#: More points than that cannot be told apart in a picture.
POINTS = 2000


def smooth(values: Values, window: int) -> Values:
    """The mean of the finite values around each: ``window`` of them, fewer at both ends.

    Args:
        values: float64[n].
        window: how many, 1 or more.

    Returns:
        float64[n]; NaN where no value of the window is finite.
    """
    finite = np.isfinite(values)
    if not finite.any():
        return np.full(len(values), np.nan)
    low, high = values[finite].min(), values[finite].max()
    scale = max(abs(low), abs(high)) or 1.0  # sums of the largest numbers would be infinite
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite, values, 0.0) / scale)))
    counts = np.concatenate(([0], np.cumsum(finite)))
    at = np.arange(len(values))
    first = np.maximum(at - (window - 1) // 2, 0)
    last = np.minimum(at + window // 2 + 1, len(values))
    count = counts[last] - counts[first]
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (sums[last] - sums[first]) / count * scale
    # A difference of sums rounds; a mean lies between the smallest and the largest value.
    return np.where(count > 0, np.clip(means, low, high), np.nan)


def usual_window(count: int) -> int:
    """How many values to smooth over, of so many: a twenty-fifth."""
    return max(1, round(count / 25))


def thin(x: NDArray[Any], y: Values, points: int = POINTS) -> tuple[NDArray[Any], Values]:
    """No more than so many points that look the same: of each stretch the lowest and the highest one.

    Args:
        x: numbers [n].
        y: float64[n]; may hold values that are not finite.
        points: 4 or more.

    Returns:
        Some of the points, in their order: all, or the first, the last, and of each stretch of the same
        number of values the smallest and the largest finite one, or one NaN where there is none.
    """
    n = len(y)
    if n <= points:
        return x, y
    size = -(-n // ((points - 2) // 2))
    padded = np.full(-(-n // size) * size, np.nan)
    padded[:n] = np.where(np.isfinite(y), y, np.nan)
    blocks = padded.reshape(-1, size)
    begins = np.arange(len(blocks)) * size
    lowest = begins + np.where(np.isnan(blocks), np.inf, blocks).argmin(axis=1)
    highest = begins + np.where(np.isnan(blocks), -np.inf, blocks).argmax(axis=1)
    chosen = np.unique(np.concatenate(([0], lowest, highest, [n - 1])))
    return x[chosen], y[chosen]
