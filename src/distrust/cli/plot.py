"""The command ``distrust plot``: figures of runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from distrust.cli import targets
from distrust.cli.arguments import parser
from distrust.errors import ConfigError, printable


def main(arguments: list[str]) -> int:
    """Draw one run, or several in one figure."""
    options = _options(arguments)
    from distrust.reporting import figures, panels
    from distrust.reporting.run_reader import read_run

    panels.require_panels(options.panels)
    folder = options.runs[0] if len(options.runs) == 1 else Path()  # several runs: the working directory
    targets = options.out or [figures.default_target(folder, "plot.png")]
    suffixes = [figures.require_suffix(target) for target in targets]  # fail before the runs are read
    resolved = [os.path.realpath(str(path)) for path in options.runs]  # one run under two paths
    repeated = [run for run, path in zip(options.runs, resolved, strict=True) if resolved.count(path) > 1]
    if repeated:
        raise ConfigError(f"{repeated[-1]} is given twice; name each run once")
    runs = [read_run(path) for path in options.runs]
    scene = figures.prepare_runs(runs, axis=options.x, smooth=options.smooth)
    names = figures.select_panels(scene, options.panels)
    for target, suffix in zip(targets, suffixes, strict=True):
        # Anew for each file: rendering adjusts the layout, and a second time by a pixel that nothing fixes.
        figure = figures.draw(scene, names, title=options.title)
        figures.write(target, figures.render(figure, suffix), follow_link=bool(options.out))
        print(printable(str(target)))
    return 0


def _options(arguments: list[str]) -> argparse.Namespace:
    # The help lists axes and panels, whose modules load numpy: not for the other commands.
    from distrust.reporting import panels, series

    arg = parser(
        "plot",
        description="Runs are only read: they may be training. Each gets its own colour; panels without data "
        "are left out. Without metrics.jsonl, a run is drawn from the history in its newest checkpoint.",
        examples=[
            "distrust plot runs/train",
            "distrust plot runs/off runs/monotone --panels loss,eval,sources --out compared.svg",
            "distrust plot runs/seed-* --x tokens --smooth 50 --out loss.png --out loss.svg --panels loss",
        ],
    )
    arg.add_argument("runs", type=targets.target, nargs="+", metavar="RUN", help="folder or URL of a run")
    arg.add_argument(
        "--out",
        type=Path,
        action="append",
        help="file to write, .png or .svg; repeat it for several. Default: plot.png in the folder of the "
        "run, or for several runs, or a URL, in the working directory",
    )
    arg.add_argument("--x", choices=series.X_AXES, default="step", help="x axis; default: step")
    arg.add_argument(
        "--smooth", type=_positive, metavar="N", help="steps to smooth over; default: 4%% of the run"
    )
    arg.add_argument(
        "--panels",
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        default=[],
        metavar="NAMES",
        help=f"panels to draw, in this order, out of {','.join(panels.PANELS)}; default: all",
    )
    arg.add_argument("--title", help="title of the figure; default: for one run, its name")
    return arg.parse_args(arguments)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:19]) < 10**18):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, 1 or more")
    return int(text)
