"""The command ``python -m campaigns.long_run``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from campaigns import long_run
from campaigns.campaign import Campaign, parser, run
from campaigns.faults import FAULTS
from campaigns.long_run import saves, training
from campaigns.long_run.plot import draw

CASES = 20_000  # saves
RUNS = {"saves": saves.run, "many": saves.run_many, "training": training.run}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(long_run.__doc__, writes=True, faults=FAULTS)
    options.add_argument("--only", choices=RUNS, help="only this run (default: all three, in turn)")
    options.add_argument("--many", type=int, default=1000, help="checkpoints to keep (default: 1000)")
    options.add_argument("--steps", type=int, default=5000, help="steps to train (default: 5000)")
    options.add_argument("--picture", type=Path, help="draw memory and latency over the saves into this PNG")
    return run("long_run", options, _body, cases=CASES, arguments=arguments)


def _body(campaign: Campaign) -> None:
    options = campaign.options
    if options.case is not None:  # all saves up to that one
        options.case, options.cases = None, options.case + 1
    samples = {}
    try:
        for name in [options.only] if options.only else RUNS:
            with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=options.directory) as folder:
                samples[name] = RUNS[name](campaign, Path(folder))
    finally:
        if options.picture is not None and samples:
            draw(samples, options.picture)


if __name__ == "__main__":
    sys.exit(main())
