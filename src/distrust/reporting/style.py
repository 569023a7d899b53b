"""The look of all figures: colours, fonts, lines and axes."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distrust.errors import ConfigError, ErrorTranslator
from distrust.reporting.run_reader import RunData, Values
from distrust.reporting.series import LARGEST, default_window, smooth, thin

INK, QUIET, GRID, BROWN = "#1f2328", "#6e7781", "#d8dee4", "#8c6d31"
#: Also distinguishable in grey.
PRIMARY, COORDINATED = "#0072b2", "#d55e00"
#: Okabe and Ito's colour-blind safe palette, without its yellow, which is invisible on white.
SERIES = (PRIMARY, COORDINATED, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
DASHED = (0, (4, 2))
#: Held while matplotlib is imported: of two threads, one would restore what the other has replaced.
_loading = threading.Lock()
_SETTINGS = {
    "axes.axisbelow": True,
    "axes.edgecolor": QUIET,
    "axes.grid": True,
    "axes.labelcolor": QUIET,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.size": 9.5,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.labelcolor": INK,
    "lines.solid_capstyle": "round",
    "savefig.facecolor": "white",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "distrust",  # else ids are random, and the same figure gives other bytes
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True, slots=True)
class PlottedRun:
    """A run and how it is drawn."""

    run: RunData
    name: str  # distinguishes it from the other runs
    colour: Any
    x: Values  # the position of each step
    smooth: int | None = None  # steps to smooth over; None for the default

    def positions_of(self, steps: NDArray[np.int64]) -> Values:
        """The positions of step numbers; steps after the last known one are extrapolated at its mean pace."""
        if not len(self.x):
            return steps.astype(np.float64)
        last = int(self.run.steps.step[-1])
        interpolated = np.interp(steps, [0, *self.run.steps.step], [0.0, *self.x])
        pace = float(self.x[-1]) / max(1, last)  # of evaluations after the last line
        return np.where(steps > last, steps * pace, interpolated)

    def smooth_values(self, values: Values) -> Values:
        """The values of its steps, smoothed."""
        return smooth(values, self.smooth or default_window(len(values)))


def load_matplotlib() -> Any:
    """Import matplotlib, but never with the settings of the current folder, which may be a stranger's.

    The import obeys a ``matplotlibrc`` there before the user's own one. It looks for it with
    ``os.path.exists``, which says for its duration that there is none.

    Raises:
        ConfigError: the user's own settings are invalid.
    """
    with _loading:
        return _import_matplotlib()


@functools.cache  # not of an error
def _import_matplotlib() -> Any:
    exists = os.path.exists
    os.path.exists = lambda path: path != "matplotlibrc" and exists(path)
    try:
        with ErrorTranslator((ValueError, OSError, RuntimeError), _settings_error):
            import matplotlib
    finally:
        os.path.exists = exists
    return matplotlib


def _settings_error(error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())
    return ConfigError(
        f"matplotlib cannot be loaded: {reason}; check your settings of it: MPLBACKEND, MATPLOTLIBRC, and "
        "matplotlibrc in its configuration folder"
    )


@contextlib.contextmanager
def style_context() -> Iterator[None]:
    """Apply the style over matplotlib's defaults: a figure depends on no settings of a user or a folder.

    The caller's settings are restored. Names may have characters that no font here has: they become boxes,
    silently.
    """
    mpl = load_matplotlib()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        warnings.filterwarnings("ignore", category=mpl.MatplotlibDeprecationWarning)  # of default settings
        # Not the backend: setting it would load one, and none draws here.
        defaults = {name: value for name, value in mpl.rcParamsDefault.items() if name != "backend"}
        with mpl.rc_context({**defaults, **_SETTINGS}):
            yield


def compact(value: float, _: object = None) -> str:
    """A number as an axis label."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(unit, 1e4):
            return f"{value / unit:g}{letter}"
    if 0 < abs(value) < 1e-3:
        digits, _, power = f"{value:.6e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:g}"


def draw_line(axes: Any, x: NDArray[Any], y: Values, **style: Any) -> None:
    """Draw a line, with a gap at each value that is not finite."""
    x, y = thin(x, np.where(np.abs(y) <= LARGEST, y, np.nan))  # millions of steps
    axes.plot(x, y, **style)


def draw_raw_and_smoothed(axes: Any, shown: PlottedRun, values: Values) -> None:
    """Draw the smoothed values, and the raw ones faintly behind them."""
    smoothed = shown.smooth_values(values)
    if not np.array_equal(smoothed, values):  # short runs are not smoothed
        draw_line(axes, shown.x, values, color=shown.colour, linewidth=0.7, alpha=0.28)
    draw_line(axes, shown.x, smoothed, color=shown.colour, linewidth=1.7)


def scale_log(axes: Any, edges: Sequence[float]) -> None:
    """Give a figure a logarithmic x axis with readable numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    is_wide = max(edges) / min(edges) > 1000  # else labels overlap
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if is_wide else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(compact))
    axes.xaxis.set_minor_formatter(NullFormatter())


def set_titles(axes: Any, title: str, remark: str) -> None:
    """Set the title of a panel and the remark to its right."""
    axes.set_title(title, loc="left")
    axes.set_title(remark, loc="right", fontsize=8.5, fontweight="normal", color=QUIET)


def disable_math(texts: Sequence[Any]) -> None:
    """Show names literally: the setting above does not reach tick labels and legends."""
    for text in texts:
        text.set_parse_math(False)
