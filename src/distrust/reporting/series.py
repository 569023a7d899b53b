"""Values over steps, prepared for figures: positions on an axis, smoothed and thinned out. Pure functions."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from distrust.errors import ConfigError
from distrust.reporting.metrics import METRICS
from distrust.reporting.run_reader import RunData, Values

XAxis = Literal["step", "tokens", "time"]
X_AXES = get_args(XAxis)

#: More points look the same in a figure.
POINTS = 2000
#: Larger values are treated like NaN: matplotlib cannot divide such an axis.
LARGEST = 1e100
GIB = 2**30


def positions(run: RunData, axis: XAxis) -> Values:
    """The position of each step on an axis, float64[n]: its number, or cumulative tokens or seconds.

    A step whose tokens or seconds are unknown counts as the mean of the others.

    Raises:
        ConfigError: no step has tokens, or seconds.
    """
    if axis == "step":
        return run.steps.step.astype(np.float64)
    name = {"tokens": "tokens", "time": "seconds"}[axis]
    values = run.steps.columns.get(name)
    if values is None or not np.isfinite(values).any():
        raise ConfigError(f"--x {axis}: {run.path / METRICS} has no {name}; draw over steps, with --x step")
    finite = np.abs(values) <= LARGEST  # False for NaN
    mean = values[finite].mean() if finite.any() else 0.0
    lengths = np.where(finite, values, mean)  # restored lines have no times
    if axis == "time" and "stall_seconds" in run.steps.columns:
        lengths += zero_unknown(run.steps.columns["stall_seconds"])
    return np.cumsum(lengths)


def zero_unknown(values: Values) -> Values:
    """The values, with 0 in place of NaN and of numbers too large to add up."""
    return np.where(np.abs(values) <= LARGEST, values, 0.0)


def stall_share(run: RunData) -> Values:
    """The share of the time until each step that checkpoints took; unknown seconds count as 0: float64[n]."""
    stall = np.cumsum(zero_unknown(run.steps.columns["stall_seconds"]))
    steps = np.cumsum(zero_unknown(run.steps.columns["seconds"]))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(stall + steps > 0, stall / (stall + steps), 0.0)


def peak_memory(run: RunData, *names: str) -> str:
    """The largest value of those columns that the run has, which are in bytes."""
    columns = [zero_unknown(run.steps.columns[name]) for name in names if name in run.steps.columns]
    return f"{np.max(columns, initial=0.0) / GIB:.3g} GiB"


def smooth(values: Values, window: int) -> Values:
    """The mean of the finite values in a centred window: float64[n], NaN where it has none.

    Args:
        values: float64[n].
        window: number of values, 1 or more; fewer at both ends.
    """
    finite = np.isfinite(values)
    if not finite.any():
        return np.full(len(values), np.nan)
    low, high = values[finite].min(), values[finite].max()
    scale = max(abs(low), abs(high)) or 1.0  # else sums of the largest floats would overflow
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite, values, 0.0) / scale)))
    counts = np.concatenate(([0], np.cumsum(finite)))
    index = np.arange(len(values))
    first = np.maximum(index - (window - 1) // 2, 0)
    last = np.minimum(index + window // 2 + 1, len(values))
    count = counts[last] - counts[first]
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (sums[last] - sums[first]) / count * scale
    # The difference of two sums is rounded; a mean lies between the smallest and the largest value.
    return np.where(count > 0, np.clip(means, low, high), np.nan)


def default_window(count: int) -> int:
    """The number of values to smooth over: 4% of them."""
    return max(1, round(count / 25))


def thin(x: NDArray[Any], y: Values, points: int = POINTS) -> tuple[NDArray[Any], Values]:
    """Reduce a line to a number of points that look the same: the lowest and the highest of each block.

    The first and the last stay, too. A block without a finite value leaves one NaN.

    Args:
        x: numbers [n].
        y: float64[n]; may hold values that are not finite.
        points: 4 or more.
    """
    n = len(y)
    if n <= points:  # nothing to gain
        return x, y
    size = -(-n // ((points - 2) // 2))  # rounded up
    padded = np.full(-(-n // size) * size, np.nan)
    padded[:n] = np.where(np.isfinite(y), y, np.nan)  # the last block may be short
    blocks = padded.reshape(-1, size)
    starts = np.arange(len(blocks)) * size
    lowest = starts + np.where(np.isnan(blocks), np.inf, blocks).argmin(axis=1)
    highest = starts + np.where(np.isnan(blocks), -np.inf, blocks).argmax(axis=1)
    chosen = np.unique(np.concatenate(([0], lowest, highest, [n - 1])))
    return x[chosen], y[chosen]
