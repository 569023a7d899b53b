"""Pictures of runs, drawn without a display: figures of several panels, and what is written of them."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrust.atomic import atomic_file
from distrust.errors import ConfigError, DistrustWarning, RunNotFound, WriteFailed
from distrust.reporting.names import NAME_CHARACTERS, one_line
from distrust.reporting.panels import PANELS, Panel, require_known
from distrust.reporting.run_reader import RunData
from distrust.reporting.style import (
    GRID,
    INK,
    QUIET,
    SERIES,
    PlottedRun,
    XAxis,
    compact,
    positions,
)

SUFFIXES = (".png", ".svg")
#: Inches.
_WIDTH, _HEIGHT = 5.0, 3.3
_STYLE = {
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
    "svg.fonttype": "none",
    "svg.hashsalt": "distrust",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True, slots=True)
class PlottedRuns:
    """What is drawn.

    Attributes:
        runs: each with a name and a colour that tell it from the others.
        x_label: what they are drawn over.
    """

    runs: Sequence[PlottedRun]
    x_label: str


def prepare_runs(runs: Sequence[RunData], *, axis: XAxis = "step", smooth: int | None = None) -> PlottedRuns:
    """Runs, made ready to be drawn.

    Args:
        runs: one or more.
        axis: what their steps are drawn over.
        smooth: steps to smooth over; None for a twenty-fifth of each run.

    Raises:
        ConfigError: if a run does not have what the axis needs.
    """
    xs = [positions(run, axis) for run in runs]
    unit, label = _unit(axis, max((float(x[-1]) for x in xs if len(x)), default=0.0))
    names, colours = names_of([run.path for run in runs]), _colours(len(runs))
    return PlottedRuns(
        [PlottedRun(*of, smooth) for of in zip(runs, names, colours, (x / unit for x in xs), strict=True)],
        label,
    )


def _unit(axis: XAxis, longest: float) -> tuple[float, str]:
    """What a unit of an axis is worth, and what it is called."""
    if axis != "time":
        return 1.0, axis
    for seconds, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if longest >= 2 * seconds:
            return seconds, name
    return 1.0, "seconds"


def names_of(paths: Sequence[Path]) -> list[str]:
    """What tells folders apart: of their paths, the parts that are not the same in all."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    shortest = min(map(len, parts))
    first = _equal(parts, shortest - 1)
    last = _equal([part[::-1] for part in parts], shortest - 1 - first)
    return [one_line(os.path.join(*part[first : len(part) - last])) for part in parts]


def _equal(rows: Sequence[Sequence[str]], most: int) -> int:
    """How many of the first entries, at most so many, are the same in all rows."""
    for count in range(most):
        if len({row[count] for row in rows}) > 1:
            return count
    return most


def _colours(count: int) -> Sequence[Any]:
    if count <= len(SERIES):
        return SERIES[:count]
    import matplotlib as mpl

    return [mpl.colors.to_hex(mpl.colormaps["viridis"](0.92 * i / (count - 1))) for i in range(count)]


def draw(
    scene: PlottedRuns, panels: Sequence[str] = (), *, title: str | None = None, panel_titles: bool = True
) -> Any:
    """A figure of runs.

    Args:
        scene: what is drawn.
        panels: names of what to show; empty for all. What no run has anything for is left out, with a warning
            if it was named.
        title: above it; default: of one run, its name.
        panel_titles: whether panels have theirs; a page has them as text.

    Returns:
        The figure of matplotlib.

    Raises:
        ConfigError: for a name that is no panel.
        RunNotFound: if there is nothing to draw.
    """
    require_known(panels)
    there = {name: PANELS[name] for name in panels or PANELS if has_data(name, scene)}
    for name in panels:
        if name not in there:
            warnings.warn(f"--panels {name}: the runs have no data for it", DistrustWarning, stacklevel=2)
    if not there:
        path = scene.runs[0].run.path
        raise RunNotFound(f"{path}: nothing to draw: no step is known", path=path)
    if title is None:
        title = scene.runs[0].name if panel_titles and len(scene.runs) == 1 else ""
    return _figure(list(there.values()), scene, title=title, panel_titles=panel_titles)


def has_data(name: str, scene: PlottedRuns) -> bool:
    """Whether a panel has something to show."""
    return any(PANELS[name].has(shown.run) for shown in scene.runs)


def _figure(panels: Sequence[Panel], scene: PlottedRuns, *, title: str, panel_titles: bool) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = 1 if len(panels) == 1 else 2 if len(panels) in (2, 4) else 3
    rows = -(-len(panels) // columns)
    with style_context():
        # Room for each, and for what is beside it: nothing is drawn over anything.
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, rect=(0.006, 0.008, 0.988, 0.98))
        figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows), layout=layout)
        cells = list(figure.subplots(rows, columns, squeeze=False).flat)
        for panel, axes in zip(panels, cells, strict=False):
            _draw_into(axes, panel, scene)
            if panel_titles:
                axes.set_title(panel.title, loc="left")
        for axes in cells[len(panels) :]:
            axes.remove()
        if title:
            figure.suptitle(one_line(title, 120), fontsize=13, fontweight="bold")
        if len(scene.runs) > 1:
            _add_legend(figure, scene.runs, columns)
    return figure


def _draw_into(axes: Any, panel: Panel, scene: PlottedRuns) -> None:
    from matplotlib.ticker import FuncFormatter

    if panel.over_steps:
        axes.set_xlabel(scene.x_label)
        axes.xaxis.set_major_formatter(FuncFormatter(compact))
        axes.yaxis.set_major_formatter(FuncFormatter(compact))
    remark = panel.draw(axes, [shown for shown in scene.runs if panel.has(shown.run)])
    axes.set_title(remark, loc="right", fontsize=8.5, fontweight="normal", color=QUIET)


def _add_legend(figure: Any, runs: Sequence[PlottedRun], columns: int) -> None:
    """Which colour is which run: below the panels, where it covers no line."""
    from matplotlib.lines import Line2D

    figure.legend(
        [Line2D([], [], color=shown.colour, linewidth=2.5) for shown in runs],
        [one_line(shown.name, 2 * NAME_CHARACTERS) for shown in runs],
        loc="outside lower center",
        ncols=min(len(runs), 2 * columns),
        frameon=False,
        fontsize=10,
    )


@contextlib.contextmanager
def style_context() -> Iterator[None]:
    """How all of it looks. Names may have letters that no font here has: a box is drawn, and nothing said."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def render(figure: Any, suffix: str, *, transparent: bool = False) -> bytes:
    """A figure as the bytes of a file: the same figure gives the same ones.

    Args:
        figure: of matplotlib.
        suffix: ``.png`` or ``.svg``.
        transparent: without a background.
    """
    target = io.BytesIO()
    metadata = {"Date": None} if suffix == ".svg" else {}
    with style_context():
        figure.savefig(target, format=suffix[1:], dpi=150, transparent=transparent, metadata=metadata)
    return target.getvalue()


def require_suffix(path: Path, suffixes: Sequence[str] = SUFFIXES) -> str:
    """The suffix of a file to be written, in lower case.

    Raises:
        ConfigError: for one that stands for no format.
    """
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f"--out {path}: give a name that ends with {' or '.join(suffixes)}")
    return path.suffix.lower()


def default_target(run: Path, name: str) -> Path:
    """Where a picture of a run, or a page on it, is put by itself: into its folder.

    Raises:
        ConfigError: if a link stands there: who handed the folder over must not choose what is replaced.
    """
    target = run / name
    if target.is_symlink():
        raise ConfigError(f"{target}: is a link, and is not written through unasked; give --out")
    return target


def write(path: Path, content: bytes) -> None:
    """Put a file under its name, wholly or not at all, in place of one that stands there.

    Raises:
        WriteFailed: if that cannot be done; what stood there is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteFailed(f"{path}: not written: {error.strerror or error}", path=path) from error
    with atomic_file(path, force=True) as file:
        file.write(content)
