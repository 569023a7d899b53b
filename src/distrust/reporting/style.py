"""What the panels of a picture share: colours, runs as they are drawn, lines, and text that is no formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from distrust.errors import ConfigError
from distrust.reporting.metrics import METRICS
from distrust.reporting.plots import COORDINATED, PRIMARY
from distrust.reporting.run_reader import RunData
from distrust.reporting.series import Values, smooth, thin, usual_window

INK, QUIET, GRID = "#1f2328", "#6e7781", "#d8dee4"
#: Okabe and Ito's, which colour-blind people tell apart; without the yellow, which is lost on white.
SERIES = (PRIMARY, COORDINATED, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
BROWN = "#8c6d31"
#: What is larger is drawn as little as what is not finite: no axis could be divided.
LARGEST = 1e100

XAxis = Literal["step", "tokens", "time"]
X_AXES = get_args(XAxis)


@dataclass(frozen=True, slots=True)
class PlottedRun:
    """A run as it is drawn.

    Attributes:
        run: the run.
        name: that tells it apart.
        colour: of its lines.
        x: where each of its steps lies, float64[n].
        smooth: steps to smooth over; None for the usual.
    """

    run: RunData
    name: str
    colour: Any
    x: Values
    smooth: int | None = None

    def at(self, steps: NDArray[np.int64]) -> Values:
        """Where these numbers of steps lie; beyond the last one that is known, at the pace until then."""
        if not len(self.x):
            return steps.astype(np.float64)
        last = int(self.run.steps.step[-1])
        inside = np.interp(steps, [0, *self.run.steps.step], [0.0, *self.x])
        pace = float(self.x[-1]) / max(1, last)
        return np.where(steps > last, steps * pace, inside)

    def line(self, values: Values) -> Values:
        """The values of its steps, smoothed."""
        return smooth(values, self.smooth or usual_window(len(values)))


def positions(run: RunData, axis: XAxis) -> Values:
    """Where each step of a run lies on an axis, float64[n]: its number, tokens until then, or seconds.

    A step whose tokens or seconds are not known counts as the mean of the others.

    Raises:
        ConfigError: if they are known of no step.
    """
    if axis == "step":
        return run.steps.step.astype(np.float64)
    name = {"tokens": "tokens", "time": "seconds"}[axis]
    values = run.steps.columns.get(name)
    if values is None or not np.isfinite(values).any():
        raise ConfigError(f"--x {axis}: {run.path / METRICS} has no {name}; draw over steps, with --x step")
    finite = np.abs(values) <= LARGEST
    mean = values[finite].mean() if finite.any() else 0.0
    lasted = np.where(finite, values, mean)
    if axis == "time" and "stall_seconds" in run.steps.columns:
        lasted += zero_unknown(run.steps.columns["stall_seconds"])
    return np.cumsum(lasted)


def zero_unknown(values: Values) -> Values:
    """The values, and 0 in place of what is not known, or cannot be added up."""
    return np.where(np.abs(values) <= LARGEST, values, 0.0)


def compact(value: float, _: object = None) -> str:
    """A number on an axis."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:g}{letter}"
    if 0 < abs(value) < 1e-3:
        digits, _, power = f"{value:.6e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:g}"


def draw_over_steps(axes: Any, shown: PlottedRun, values: Values, **style: Any) -> None:
    """A line of a value for each step."""
    draw_line(axes, shown.x, values, color=shown.colour, **style)


def draw_line(axes: Any, x: NDArray[Any], y: Values, **style: Any) -> None:
    """A line with a gap where nothing can be drawn."""
    x, y = thin(x, np.where(np.abs(y) <= LARGEST, y, np.nan))
    axes.plot(x, y, **style)


def draw_raw_and_smoothed(axes: Any, shown: PlottedRun, values: Values) -> None:
    """A line for the eye, and the values it comes from behind it."""
    line = shown.line(values)
    if not np.array_equal(line, values):
        draw_over_steps(axes, shown, values, linewidth=0.7, alpha=0.28)
    draw_over_steps(axes, shown, line, linewidth=1.7)


def as_text(texts: Sequence[Any]) -> None:
    """Names are no formulas, whatever signs of dollars they hold."""
    for text in texts:
        text.set_parse_math(False)
