"""The command: which cells are tried how often, and what is written of it."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from campaigns import peers
from campaigns.campaign import Campaign, Case, parser, run
from campaigns.peers import picture
from campaigns.peers.accidents import KILL
from campaigns.peers.all_subjects import SUBJECTS, missing, versions
from campaigns.peers.outcomes import Outcome
from campaigns.peers.results import Results, markdown
from campaigns.peers.trials import CELLS, Bench, Cell, Trial, cell_of

#: Characters of a message in the log.
MESSAGE = 1500
ROUNDS = max(cell.trials for cell in CELLS)
#: What ours may do. A kill loses nothing; damage is found; a file that is gone can be missed by nobody, for
#: there is no list of what there was.
ALLOWED = {
    KILL: {Outcome.NOTHING_LOST},
    "missing file": {Outcome.FELL_BACK, Outcome.FELL_BACK_SAYING, Outcome.FOUND},
}
ALLOWED_OF_DAMAGE = {Outcome.NOTHING_LOST, Outcome.FELL_BACK_SAYING, Outcome.FOUND}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign."""
    made = parser(peers.__doc__)
    made.add_argument("--peers", type=re.compile, default="", help="only the savers whose name this matches")
    made.add_argument("--accidents", type=re.compile, default="", help="only the accidents that this matches")
    made.add_argument(
        "--rounds", type=int, help="trials of each cell, at most (default: as many as are meant)"
    )
    made.add_argument(
        "--directory", type=Path, help="where to work (default: the system's for temporary files)"
    )
    made.add_argument("--markdown", type=Path, help="write the table into this file")
    made.add_argument("--picture", type=Path, help="draw the counts into this PNG")
    made.add_argument("--log", type=Path, help="write every trial into this file, a line of JSON each")
    made.add_argument(
        "--fault", choices=["digests"], help="leave this out of ours: the campaign has to find it"
    )
    return run("peers", made, _campaign, cases=ROUNDS * len(CELLS), arguments=arguments)


def _campaign(campaign: Campaign) -> None:
    options, results = campaign.options, Results()
    wanted = list(_wanted(campaign))
    subjects = [one for one in SUBJECTS if any(cell.subject is one for cell in wanted)]
    known = versions(subjects)
    print(", ".join(f"{package} {version}" for package, version in known.items()))
    with ExitStack() as stack:
        parent = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.directory)))
        log = stack.enter_context(options.log.open("w")) if options.log else None
        benches: dict[str, Bench] = {}
        try:
            for case, cell in _turns(campaign, wanted):
                name = cell.subject.name
                if name not in benches:
                    benches[name] = stack.enter_context(Bench(cell.subject, parent, fault=options.fault))
                trial = benches[name].tried(cell.accident, case.chance)
                _take(campaign, results, cell, trial)
                _note(log, case, cell, trial)
                _require(campaign, cell, trial)
        finally:
            _write(campaign, results, known)


def _wanted(campaign: Campaign) -> Iterator[Cell]:
    """The cells that are asked for and can be tried."""
    options = campaign.options
    for subject in SUBJECTS:
        cells = [cell for cell in CELLS if cell.subject is subject]
        chosen = [
            cell
            for cell in cells
            if re.search(options.peers, subject.name) and re.search(options.accidents, cell.accident.name)
        ]
        absent = missing(subject)
        if chosen and absent:
            print(f"{subject.name}: skipped, for there is no {', '.join(absent)} here")
        else:
            yield from chosen


def _turns(campaign: Campaign, wanted: Sequence[Cell]) -> Iterator[tuple[Case, Cell]]:
    """The cases whose cell is wanted and has trials left."""
    options = campaign.options
    for case in campaign.cases():
        cell, before = cell_of(case.number)
        rounds = cell.trials if options.rounds is None else min(cell.trials, options.rounds)
        if cell in wanted and (options.case is not None or before % ROUNDS < rounds):
            yield case, cell


def _take(campaign: Campaign, results: Results, cell: Cell, trial: Trial) -> None:
    results.add(cell, trial.outcome)
    campaign.count(f"{cell.accident.name}, {cell.subject.name}: {trial.outcome.value}")


def _note(log: TextIO | None, case: Case, cell: Cell, trial: Trial) -> None:
    if log is None:
        return
    line = {
        "case": case.number,
        "saver": cell.subject.name,
        "accident": cell.accident.name,
        "what": trial.what,
        "outcome": trial.outcome.value,
        "message": trial.message[-MESSAGE:],  # of an error, the end tells most
    }
    print(json.dumps(line), file=log, flush=True)


def _require(campaign: Campaign, cell: Cell, trial: Trial) -> None:
    allowed = ALLOWED.get(cell.accident.name, ALLOWED_OF_DAMAGE)
    what = f"{cell.subject.name}, {cell.accident.name} ({trial.what})"
    message = f"{what}: {trial.outcome.value}: {trial.message[-MESSAGE:]}"
    campaign.require(not cell.subject.ours or trial.outcome in allowed, message)


def _write(campaign: Campaign, results: Results, known: dict[str, str]) -> None:
    options = campaign.options
    system = f"{platform.system()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    about = f"{system}, seed {options.seed}"
    if options.markdown:
        options.markdown.write_text(markdown(results, known, about))
    if options.picture:
        shown = " · ".join(f"{package} {version}" for package, version in known.items())
        picture.draw(results, options.picture, about=f"{shown} · {about}")


if __name__ == "__main__":
    sys.exit(main())
