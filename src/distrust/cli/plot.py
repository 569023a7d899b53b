"""The command ``distrust plot``."""

from __future__ import annotations

import argparse
from pathlib import Path

from distrust.cli.arguments import parser
from distrust.errors import ConfigError
from distrust.reporting.display import printable


def main(arguments: list[str]) -> int:
    """Draw one run, or several in one picture."""
    # numpy takes a moment to load, and the names of the panels are theirs to say.
    from distrust.reporting import figures, panels, series
    from distrust.reporting.run_reader import read_run

    arg = parser(
        "plot",
        description=(
            "The runs are only read: they may be training. Each gets a colour; what none has data for is "
            "left out. A run without metrics.jsonl is drawn from the history in its newest checkpoint."
        ),
        examples=[
            "distrust plot runs/train",
            "distrust plot runs/off runs/monotone --panels loss,eval,sources --out compared.svg",
            "distrust plot runs/seed-* --x tokens --smooth 50 --out loss.png --out loss.svg --panels loss",
        ],
    )
    arg.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, its --out")
    arg.add_argument(
        "--out",
        type=Path,
        action="append",
        help="file to write, .png or .svg; may be given several times. Default: plot.png, in the folder of "
        "the run if there is one, else here",
    )
    arg.add_argument(
        "--x", choices=series.X_AXES, default="step", help="what steps are drawn over; default: step"
    )
    arg.add_argument(
        "--smooth", type=_whole, metavar="N", help="steps to smooth over; default: a twenty-fifth of the run"
    )
    arg.add_argument(
        "--panels",
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        default=[],
        metavar="NAMES",
        help=f"what to draw, in this order, of {','.join(panels.PANELS)}; default: all",
    )
    arg.add_argument("--title", help="above the picture; default: of one run, its name")
    options = arg.parse_args(arguments)

    panels.require_panels(options.panels)
    folder = options.runs[0] if len(options.runs) == 1 else Path()
    targets = options.out or [figures.default_target(folder, "plot.png")]
    suffixes = [figures.require_suffix(target) for target in targets]
    there = [path.resolve() for path in options.runs]
    twice = [path for path, place in zip(options.runs, there, strict=True) if there.count(place) > 1]
    if twice:
        raise ConfigError(f"{twice[-1]} is given twice; name each run once")
    scene = figures.prepare_runs(
        [read_run(path) for path in options.runs], axis=options.x, smooth=options.smooth
    )
    figure = figures.draw(scene, options.panels, title=options.title)
    for target, suffix in zip(targets, suffixes, strict=True):
        figures.write(target, figures.render(figure, suffix))
        print(printable(str(target)))
    return 0


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:19]) < 10**18):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, 1 or more")
    return int(text)
