"""The command ``python -m campaigns.concurrency``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from campaigns import concurrency
from campaigns.campaign import Campaign, parser, run
from campaigns.concurrency import orphans, programs, races, readers, trainers
from campaigns.faults import FAULTS

PARTS = {part.__name__.rpartition(".")[2]: part.run for part in (races, trainers, orphans, readers, programs)}
#: Cheap ones come more often.
CYCLE = ("readers", "trainers", *["races"] * 3, *["orphans"] * 5, *["programs"] * 10)
CASES = 5 * len(CYCLE)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(concurrency.__doc__, writes=True, faults=FAULTS)
    options.add_argument("--only", choices=PARTS, help="only these cases (default: all)")
    options.add_argument("--readers", type=int, default=8, help="how many read (default: 8)")
    options.add_argument("--saves", type=int, default=200, help="saves beside them (default: 200)")
    options.add_argument(
        "--path", choices=("direct", "buffered", "either"), default="either", help="how files are written"
    )
    return run("concurrency", options, _body, cases=CASES, arguments=arguments)


def _body(campaign: Campaign) -> None:
    options = campaign.options
    for case in campaign.cases():
        part = CYCLE[case.number % len(CYCLE)]
        if options.only in (None, part):
            with tempfile.TemporaryDirectory(prefix=f"{part}-", dir=options.directory) as folder:
                PARTS[part](campaign, case, Path(folder))
            campaign.count(f"{part}: cases")


if __name__ == "__main__":
    sys.exit(main())
