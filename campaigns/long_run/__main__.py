"""The command ``python -m campaigns.long_run``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from campaigns import long_run
from campaigns.campaign import Campaign, parser, run
from campaigns.faults import FAULTS
from campaigns.long_run import saves, standing, training
from campaigns.long_run.picture import draw

CASES = 20_000
RUNS = {"saves": saves.run, "standing": standing.run, "training": training.run}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit code."""
    options = parser(long_run.__doc__)
    options.add_argument("--only", choices=RUNS, help="only this run (default: all three, in turn)")
    options.add_argument("--standing", type=int, default=1000, help="checkpoints to keep (default: 1000)")
    options.add_argument("--steps", type=int, default=5000, help="steps to train (default: 5000)")
    options.add_argument("--directory", type=Path, help="where to save (default: the system's temporary one)")
    options.add_argument("--picture", type=Path, help="draw memory and latency over the saves into this PNG")
    options.add_argument("--fault", choices=FAULTS, help="break the product, to see that it is found")
    return run("long_run", options, _body, cases=CASES, arguments=arguments)


def _body(campaign: Campaign) -> None:
    options = campaign.options
    if options.case is not None:  # all saves up to that one
        options.case, options.cases = None, options.case + 1
    shown = {}
    try:
        for name in [options.only] if options.only else RUNS:
            with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=options.directory) as folder:
                shown[name] = RUNS[name](campaign, Path(folder))
    finally:
        if options.picture is not None and shown:
            draw(shown, options.picture)


if __name__ == "__main__":
    sys.exit(main())
