"""The command ``python -m campaigns.peers``: which cells are tried how often, and the reports."""

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
from campaigns.campaign import Campaign, Case, parser, require, run
from campaigns.peers.accidents import KILL
from campaigns.peers.all_subjects import SUBJECTS, missing_modules, versions
from campaigns.peers.outcomes import Outcome
from campaigns.peers.report import Results, draw, markdown
from campaigns.peers.trials import CELLS, Bench, Cell, Trial, cell_of

#: Characters of a message in the log.
MESSAGE = 1500
ROUNDS = max(cell.trials for cell in CELLS)  # of the cell with the most trials
#: What ours may do. A kill loses nothing; damage is found; a missing file cannot be noticed, since there is
#: no list of the files.
ALLOWED = {
    KILL: {Outcome.NOTHING_LOST},
    "missing file": {Outcome.FELL_BACK, Outcome.FELL_BACK_SAYING, Outcome.FOUND},
}
ALLOWED_OF_DAMAGE = {Outcome.NOTHING_LOST, Outcome.FELL_BACK_SAYING, Outcome.FOUND}


def main(arguments: Sequence[str] | None = None) -> int:
    cli = parser(peers.__doc__, writes=True, faults=["digests"])
    cli.add_argument("--peers", type=re.compile, default="", help="only the savers whose name this matches")
    cli.add_argument("--accidents", type=re.compile, default="", help="only the accidents that this matches")
    cli.add_argument("--rounds", type=int, help="trials of each cell, at most (default: all)")
    cli.add_argument("--markdown", type=Path, help="write the table into this file")
    cli.add_argument("--picture", type=Path, help="draw the counts into this PNG")
    cli.add_argument("--log", type=Path, help="write every trial into this file, a line of JSON each")
    return run("peers", cli, _body, cases=ROUNDS * len(CELLS), arguments=arguments)


def _body(campaign: Campaign) -> None:
    options, results = campaign.options, Results()
    cells = list(_select_cells(campaign))
    subjects = [one for one in SUBJECTS if any(cell.subject is one for cell in cells)]
    package_versions = versions(subjects)
    print(", ".join(f"{package} {version}" for package, version in package_versions.items()))
    with ExitStack() as stack:
        parent = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.directory)))
        log = stack.enter_context(options.log.open("w")) if options.log else None
        benches: dict[str, Bench] = {}
        try:
            for case, cell in _select_cases(campaign, cells):
                name = cell.subject.name
                if name not in benches:
                    benches[name] = stack.enter_context(Bench(cell.subject, parent, fault=options.fault))
                trial = benches[name].run_trial(cell.accident, case.rng)
                results.add(cell, trial.outcome)
                campaign.count(f"{cell.accident.name}, {name}: {trial.outcome.value}")
                if log is not None:
                    _write_log(log, case, cell, trial)
                _require(cell, trial)
        finally:
            _write_reports(campaign, results, package_versions)


def _select_cells(campaign: Campaign) -> Iterator[Cell]:
    """The cells that the options select and that can be tried."""
    options = campaign.options
    for subject in SUBJECTS:
        selected = [
            cell
            for cell in CELLS
            if cell.subject is subject
            and re.search(options.peers, subject.name)
            and re.search(options.accidents, cell.accident.name)
        ]
        missing = missing_modules(subject)
        if selected and missing:
            print(f"{subject.name}: skipped, {', '.join(missing)} not installed")
        else:
            yield from selected


def _select_cases(campaign: Campaign, cells: Sequence[Cell]) -> Iterator[tuple[Case, Cell]]:
    """The cases whose cell is selected and has trials left."""
    options = campaign.options
    for case in campaign.cases():
        cell, earlier = cell_of(case.number)
        rounds = cell.trials if options.rounds is None else min(cell.trials, options.rounds)
        if cell in cells and (options.case is not None or earlier % ROUNDS < rounds):
            yield case, cell


def _write_log(log: TextIO, case: Case, cell: Cell, trial: Trial) -> None:
    line = {"case": case.number, "saver": cell.subject.name, "accident": cell.accident.name}
    line |= {"what": trial.description, "outcome": trial.outcome.value}
    line["message"] = trial.message[-MESSAGE:]  # the end of an error is the most specific
    print(json.dumps(line), file=log, flush=True)


def _require(cell: Cell, trial: Trial) -> None:
    allowed = ALLOWED.get(cell.accident.name, ALLOWED_OF_DAMAGE)
    trial_name = f"{cell.subject.name}, {cell.accident.name} ({trial.description})"
    message = f"{trial_name}: {trial.outcome.value}: {trial.message[-MESSAGE:]}"
    require(not cell.subject.ours or trial.outcome in allowed, message)


def _write_reports(campaign: Campaign, results: Results, package_versions: dict[str, str]) -> None:
    options = campaign.options
    system = f"{platform.system()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    about = f"{system}, seed {options.seed}"
    if options.markdown:
        options.markdown.write_text(markdown(results, package_versions, about))
    if options.picture:
        shown = " · ".join(f"{package} {version}" for package, version in package_versions.items())
        draw(results, options.picture, about=f"{shown} · {about}")


if __name__ == "__main__":
    sys.exit(main())
