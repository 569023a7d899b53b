"""Long runs: twenty thousand saves in one process, and nothing grows.

Three runs, each in a process of its own that is asked now and then for its resident memory, the blocks that
Python has given out, its open descriptors and its threads (``gauges.py``), and for how long a save took:

saves      saves of a small state, blocking and in the background, with retention by number and by metric
standing   a directory that keeps a thousand checkpoints: does a save get slower with how many stand?
training   the trainer on an engine of numpy, with a save every second step

Descriptors and threads have to be exactly what they were; memory may differ by ``MEMORY_BOUND`` between the
second quarter and the last one, and what Python has given out by ``BLOCKS_BOUND``; a save may take
``LATENCY_BOUND`` times as long at the end as at the start, in medians of windows.

A case is a save of the first run, and ``--case N`` makes all of them up to that one: growth is no single
save's fault.

examples:
  python -m campaigns.long_run
  python -m campaigns.long_run --only saves --cases 2000 --picture long_run.png
  python -m campaigns.long_run --only training --steps 10000
  python -m campaigns.long_run --only saves --cases 1000 --fault descriptors    # it has to be found
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from campaigns.campaign import Campaign, parser, run
from campaigns.faults import FAULTS
from campaigns.long_run import saves, standing, training
from campaigns.long_run.picture import draw

CASES = 20_000
RUNS = {"saves": saves.run, "standing": standing.run, "training": training.run}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit code."""
    options = parser(__doc__)
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
