"""Figures of runs, drawn without a display, and the files they are written to."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from distrust.atomic import atomic_file
from distrust.checkpoint.remote.location import Target
from distrust.errors import ConfigError, RunNotFound, WriteFailed, warn
from distrust.paths import refuse_links
from distrust.reporting.display import NAME_CHARACTERS, one_line
from distrust.reporting.panels import PANELS, Panel, require_panels
from distrust.reporting.run_reader import RunData
from distrust.reporting.series import XAxis, positions
from distrust.reporting.style import SERIES, PlottedRun, compact, load_matplotlib, set_titles, style_context

SUFFIXES = (".png", ".svg")
#: Of a panel, in inches.
_WIDTH, _HEIGHT = 5.0, 3.3


class PlottedRuns(NamedTuple):
    """The runs of a figure."""

    runs: Sequence[PlottedRun]  # each with a name and a colour of its own
    x_label: str  # of the axis of the steps


def prepare_runs(runs: Sequence[RunData], *, axis: XAxis = "step", smooth: int | None = None) -> PlottedRuns:
    """Give runs their names, colours and positions.

    Args:
        runs: one or more.
        axis: the x axis of their steps.
        smooth: steps to smooth over; None for 4% of each run.

    Raises:
        ConfigError: a run lacks the values that the axis needs.
    """
    columns = [positions(run, axis) for run in runs]
    unit, label = _unit(axis, max((float(x[-1]) for x in columns if len(x)), default=0.0))
    names, colours = distinct_names([run.path for run in runs]), _colours(len(runs))  # one each per run
    rows = zip(runs, names, colours, columns, strict=True)
    plotted = [PlottedRun(run, name, colour, x / unit, smooth) for run, name, colour, x in rows]
    return PlottedRuns(plotted, label)


def _unit(axis: XAxis, longest: float) -> tuple[float, str]:
    """The value of one unit of an axis, and its label."""
    if axis != "time":
        return 1.0, axis
    for seconds, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if longest >= 2 * seconds:
            return seconds, name
    return 1.0, "seconds"


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Short names of folders: their paths without the parts that all have in common at either end."""
    parts = [Path(os.path.abspath(str(path))).parts for path in paths]  # resolves "..", not links
    removable = min(map(len, parts)) - 1  # keep at least one part of each
    first = min(_count_common(parts), removable)
    last = min(_count_common([part[::-1] for part in parts]), removable - first)
    return [one_line(os.path.join(*part[first : len(part) - last])) for part in parts]


def _count_common(rows: Sequence[Sequence[str]]) -> int:
    columns = zip(*rows, strict=False)  # up to the end of the shortest row
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _colours(count: int) -> Sequence[Any]:
    if count <= len(SERIES):
        return SERIES[:count]  # distinguishable colours
    mpl = load_matplotlib()
    return [mpl.colors.to_hex(mpl.colormaps["viridis"](0.92 * i / (count - 1))) for i in range(count)]


def draw(
    scene: PlottedRuns, panels: Sequence[str] = (), *, title: str | None = None, panel_titles: bool = True
) -> Any:
    """Draw a figure of runs.

    Args:
        scene: the runs.
        panels: names; empty for all. Panels without data are left out, with a warning if they were named.
        title: of the figure; default: the name of the run, if it is the only one.
        panel_titles: whether to draw the panels' titles; a page has them as text.

    Returns:
        The figure of matplotlib.

    Raises:
        ConfigError: a name is unknown.
        RunNotFound: there is nothing to draw.
    """
    drawable = [PANELS[name] for name in select_panels(scene, panels)]
    if title is None:
        title = scene.runs[0].name if panel_titles and len(scene.runs) == 1 else ""
    columns = 1 if len(drawable) == 1 else 2 if len(drawable) in (2, 4) else 3
    rows = -(-len(drawable) // columns)
    with style_context():
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        # Constrained layout keeps legends and labels off the lines of other panels.
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, rect=(0.006, 0.008, 0.988, 0.98))
        figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows), layout=layout)
        cells = list(figure.subplots(rows, columns, squeeze=False).flat)
        for panel, axes in zip(drawable, cells, strict=False):
            remark = _draw_panel(axes, panel, scene)
            set_titles(axes, panel.title if panel_titles else "", remark)
        for axes in cells[len(drawable) :]:  # empty cells of the last row
            axes.remove()
        if title:
            figure.suptitle(one_line(title, 120), fontsize=13, fontweight="bold")
        if len(scene.runs) > 1:
            _add_legend(figure, scene.runs, columns)
    return figure


def select_panels(scene: PlottedRuns, panels: Sequence[str] = ()) -> list[str]:
    """The names of those panels that have data; raises and warns as :func:`draw`."""
    require_panels(panels)
    drawable = [name for name in panels or PANELS if has_data(name, scene)]
    for name in panels:
        if name not in drawable:
            warn(f"--panels {name}: the runs have no data for it")
    if not drawable:
        path = scene.runs[0].run.path
        reason = "the panels have no data" if panels else "no step is known"
        raise RunNotFound(f"{path}: nothing to draw: {reason}", path=path)
    return drawable


def _draw_panel(axes: Any, panel: Panel, scene: PlottedRuns) -> str:
    from matplotlib.ticker import FuncFormatter

    if panel.over_steps:
        axes.set_xlabel(scene.x_label)
        axes.xaxis.set_major_formatter(FuncFormatter(compact))
        axes.yaxis.set_major_formatter(FuncFormatter(compact))
    return panel.draw(axes, [shown for shown in scene.runs if panel.has(shown.run)])


def has_data(name: str, scene: PlottedRuns) -> bool:
    """Whether any run has data for a panel."""
    return any(PANELS[name].has(shown.run) for shown in scene.runs)


def _add_legend(figure: Any, runs: Sequence[PlottedRun], columns: int) -> None:
    """Add the names of the runs below the panels, where they cover no line."""
    from matplotlib.lines import Line2D

    figure.legend(
        [Line2D([], [], color=shown.colour, linewidth=2.5) for shown in runs],
        [one_line(shown.name, 2 * NAME_CHARACTERS) for shown in runs],
        loc="outside lower center",
        ncols=min(len(runs), 2 * columns),
        frameon=False,
        fontsize=10,
    )


def render(figure: Any, suffix: str, *, transparent: bool = False) -> bytes:
    """Render a figure of matplotlib as ``.png`` or ``.svg``. Equal figures give equal bytes."""
    target = io.BytesIO()
    metadata = {"Date": None} if suffix == ".svg" else {}  # no time stamp: equal bytes
    with style_context():
        figure.savefig(target, format=suffix[1:], dpi=150, transparent=transparent, metadata=metadata)
    return target.getvalue()


def require_suffix(path: Path, suffixes: Sequence[str] = SUFFIXES) -> str:
    """The suffix of an output file, in lower case; raises ConfigError if it is none of the suffixes."""
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f"--out {path}: give a name that ends with {' or '.join(suffixes)}")
    return path.suffix.lower()


def default_target(run: Target, name: str) -> Path:
    """The default output file: in a run's folder, for a URL here. Raises WriteFailed if it is a link."""
    target = run / name if isinstance(run, Path) else Path(name)
    refuse_links(target)  # before anything slow; writing refuses it, too
    return target


def write(path: Path, content: bytes, *, follow_link: bool = False) -> None:
    """Write or replace a file atomically, and make its folder; on failure an existing file is unchanged.

    ``follow_link``: whether a link's target is written, because the user named the link.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteFailed(f"{path}: not written: {error.strerror or error}", path=path) from error
    with atomic_file(path, force=True, follow_link=follow_link) as file:  # replaces a file, never a folder
        file.write(content)
