"""The command ``distrust report``: a run as an HTML page."""

from __future__ import annotations

import webbrowser
from pathlib import Path

from distrust.cli import targets
from distrust.cli.arguments import parser
from distrust.errors import printable


def main(arguments: list[str]) -> int:
    """Write the page of a run."""
    arg = parser(
        "report",
        description="The page is one HTML file that contains its figures: it needs no network and can be "
        "mailed. The run is only read: it may be training, and the page shows its progress.",
        examples=["distrust report runs/train --open", "distrust report runs/train --out first-try.html"],
    )
    arg.add_argument("run", type=targets.target, metavar="RUN", help="folder or URL of a run, its --out")
    arg.add_argument(
        "--out", type=Path, help="HTML file to write; default: report.html in the run's folder, or here"
    )
    arg.add_argument("--open", action="store_true", help="show the page in the browser")
    options = arg.parse_args(arguments)

    from distrust.reporting import figures
    from distrust.reporting.report import page
    from distrust.reporting.run_reader import read_run

    target = options.out or figures.default_target(options.run, "report.html")
    figures.require_suffix(target, (".html", ".htm"))  # fail before the run is read
    content = page(read_run(options.run)).encode()
    figures.write(target, content, follow_link=target is options.out)  # atomic: nobody sees half a page
    print(printable(str(target)))
    if options.open:
        webbrowser.open(target.absolute().as_uri())
    return 0
