"""SIGKILL at random instants of a process that saves, thousands of times.

    python -m campaigns.killed_saves --seed 1 --seconds 60
    python -m campaigns.killed_saves --seed 1 --case 3
    python -m campaigns.killed_saves --fault in-place --seconds 20

A case is a walk (``saving.py``): a state that goes on step by step, and is saved at each of them in all the
ways there are: blocking, in the background, overlapped, as a final one, the same step again, by a manager
opened anew, followed by a clean-up; small blocks and large ones, by direct I/O and through the page cache.
It is killed some twenty times: after a random time, after a report, or once something was seen on the disk
(``instants.py``), and started again each time. After each kill:

- every checkpoint that was reported durable is there, unless a rule removes it, and is no older version;
- every file with a checkpoint's name is whole, and ``load_latest`` gives the newest;
- there is at most one temporary file, and the next writer gets the lock and sweeps it.

At its end the walk has the state digest of the same walk left alone. How far the save under way had come is
read off the disk after each kill, and counted.

Each walk is a fork of a process that has imported numpy. What is drawn is the same for a seed and a case;
when a signal arrives within a write is the machine's to say, so a case may have to be run a few times.
``--fault`` puts a fault into the product, which must be found.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from signal import SIGKILL

from campaigns import invariants
from campaigns.campaign import Campaign, Case, CounterExample, parser, run
from campaigns.faults import FAULTS
from campaigns.processes import Forks, Session
from campaigns.saving import METRIC, Plan, Report
from campaigns.triggers import Seen, Trigger, after, once_said, once_seen, strike
from distrust import CheckpointManager
from distrust.checkpoint import Scan
from distrust.checkpoint.retention import Candidate

KILLS = 20
STEPS = 60
#: What a walk would import when it first needs it.
IMPORTS = ["numpy.random", "distrust.checkpoint.arrays.of_numpy"]
EVENTS: tuple[Seen, ...] = ("made", "reserved", "renamed", "removed")


class KilledWalk:
    """One walk in a folder of its own, and what it has reported so far."""

    def __init__(self, campaign: Campaign, forks: Forks, folder: Path, plan: Plan) -> None:
        self._campaign = campaign
        self._forks = forks
        self._folder = folder
        self._plan = plan
        self._starts = 0
        self._reports: list[Report] = []
        self._directory = Path(plan.directory)

    def kill(self, instant: Trigger, delay: float) -> bool:
        """Start it, and kill it; False if it had come to its end by then."""
        session = self._start()
        before = self._newest()
        strike(session, SIGKILL, instant, delay)
        code = session.wait()
        self._take_reports(session)
        if code == 0:
            return False
        self._require(code == -SIGKILL, f"exit code {code}: {session.complaints()}")
        scan = self._require_kept()
        phase = invariants.phase(self._directory, scan, self._candidates(), self._plan.rules)
        self._campaign.count("kills")
        self._campaign.count(f"  {phase}")
        if self._newest() == before:
            self._campaign.count("kills before anything new was durable")
        return True

    def finish(self) -> str:
        """Start it, and let it come to its end; returns the digest of its last state."""
        session = self._start()
        code = session.wait()
        self._require(code == 0, f"exit code {code}: {session.complaints()}")
        self._take_reports(session)
        scan = self._require_kept()
        self._require(
            (scan.files[-1].step, scan.files[-1].kind) == (self._plan.steps, "final"), "no final one"
        )
        invariants.require_writable(self._directory)
        return CheckpointManager(self._directory).inspect(self._plan.steps).state_digest

    def _start(self) -> Session:
        self._starts += 1
        plan = replace(self._plan, first_save=self._starts * 1_000_000)
        return Session(self._forks, [plan.argument()], folder=self._folder, directory=self._directory)

    def _take_reports(self, session: Session) -> None:
        self._reports += [Report.parse(line) for line in session.said()]

    def _newest(self) -> int:
        return max((report.step for report in self._reports), default=0)

    def _candidates(self) -> list[Candidate]:
        finals = {report.step for report in self._reports if report.final}
        return [
            Candidate(report.step, report.step in finals, {METRIC: report.height}) for report in self._reports
        ]

    def _require_kept(self) -> Scan:
        scan = invariants.require_kept(self._directory, self._candidates(), self._plan.rules)
        numbers = {(file.step, file.kind == "final"): file for file in scan.files}
        for report in self._reports:
            file = numbers.get((report.step, report.final))
            if file is not None:
                number = file.header.run_info["extra"]["number"]
                self._require(
                    number >= report.number, f"{file.path} is an older version than was durable before"
                )
        return scan

    def _require(self, kept: bool, promise: str) -> None:
        self._campaign.require(kept, f"{self._folder}: {promise}")


def plan_of(chance: random.Random, *, fault: str | None) -> Plan:
    """A walk, drawn by chance; its directory is to be filled in."""
    return Plan(
        directory="",
        seed=chance.randrange(1 << 32),
        steps=STEPS,
        sizes=tuple(int(10 ** chance.uniform(0, 4.8)) for _ in range(chance.randint(1, 8))),
        block_bytes=1 << chance.randint(12, 20),
        direct=chance.random() < 0.5,
        keep_last=chance.randint(1, 3),
        keep_every=chance.choice([None, 7]),
        fault=fault,
    )


def instant_of(chance: random.Random, alone_seconds: float) -> tuple[Trigger, float]:
    """When to kill, and how long to wait then."""
    drawn = chance.random()
    if drawn < 0.3:
        return after(chance.uniform(0, 3 * alone_seconds / KILLS)), 0.0
    count = chance.randint(1, 4)
    if drawn < 0.5:
        return once_said("", count), chance.uniform(0, 0.003)
    return once_seen(chance.choice(EVENTS), count), chance.choice([0.0, chance.uniform(0, 0.002)])


def one_case(campaign: Campaign, forks: Forks, case: Case, folder: Path) -> None:
    """Left alone, and killed until it has come to its end: the same state."""
    plan = plan_of(case.chance, fault=campaign.options.fault)
    alone, seconds = left_alone(forks, plan, folder / "alone")
    killed = folder / "killed"
    killed.mkdir()
    walk = KilledWalk(campaign, forks, killed, replace(plan, directory=str(killed / "walk")))
    for _ in range(KILLS):
        if not walk.kill(*instant_of(case.chance, seconds)):
            campaign.count("walks at their end before their last kill")
            break
    campaign.require(
        walk.finish() == alone, f"{killed}: ended in another state than the walk that was left alone"
    )
    campaign.count(f"walks, {'direct I/O' if plan.direct else 'page cache'}")


def left_alone(forks: Forks, plan: Plan, folder: Path) -> tuple[str, float]:
    """The digest that a walk ends in, and how long it takes."""
    folder.mkdir()
    plan = replace(plan, directory=str(folder / "walk"), fault=None)
    session = Session(forks, [plan.argument()], folder=folder, directory=Path(plan.directory))
    if session.wait() != 0:
        raise CounterExample(f"{folder}: left alone, it failed: {session.complaints()}")
    return CheckpointManager(plan.directory).inspect(plan.steps).state_digest, session.seconds


def body(campaign: Campaign) -> None:
    with Forks("campaigns.saving:main", IMPORTS, name="a fork") as forks:
        for case in campaign.cases():
            folder = Path(tempfile.mkdtemp(prefix="killed-saves-", dir=campaign.options.directory))
            one_case(campaign, forks, case, folder)
            shutil.rmtree(folder)  # not of a counterexample: that is kept


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--directory", type=Path, help="where to save; default: where temporary files go")
    made.add_argument("--fault", choices=FAULTS, help="put a fault into the product")
    return run("killed_saves", made, body, cases=50, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
