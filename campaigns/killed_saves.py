"""SIGKILL at random instants of a process that saves, thousands of times.

    python -m campaigns.killed_saves --seed 1 --case 3
    python -m campaigns.killed_saves --fault in-place --seconds 20     # it must be found

A case is a ``walk``, a fork, that is killed about twenty times and restarted. After each kill everything in
``invariants`` holds, and no checkpoint is older than the one reported durable. The finished walk must have
the state digest of the undisturbed one. When a signal arrives depends on the machine: repeat a finding.
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

from campaigns.campaign import Campaign, Case, parser, require, run
from campaigns.faults import FAULTS
from campaigns.invariants import require_durable, require_writable, save_phase
from campaigns.oracle import Saved
from campaigns.session import Forks, Session
from campaigns.triggers import Trigger, after, once_printed, random_disk_event, send_at
from campaigns.walk import Plan, Report
from distrust import CheckpointManager
from distrust.checkpoint import Scan

KILLS = 20  # of each walk
STEPS = 60  # of each walk, about three from kill to kill
#: What a walk would import when it first needs it.
IMPORTS = ["numpy.random", "distrust.checkpoint.arrays.of_numpy"]


class KilledWalk:
    def __init__(self, campaign: Campaign, forks: Forks, folder: Path, plan: Plan) -> None:
        self._campaign = campaign
        self._forks = forks
        self._folder = folder
        self._plan = plan
        self._starts = 0
        self._reports: list[Report] = []
        self._directory = Path(plan.directory)

    def kill(self, trigger: Trigger, delay: float) -> bool:
        """Start it, and kill it; False if it had finished by then."""
        session = self._start()
        previous = self._newest()
        send_at(session, SIGKILL, trigger, delay)
        code = session.wait()
        self._read_reports(session)
        if code == 0:
            return False
        self._require(code == -SIGKILL, f"exit code {code}: {session.errors()}")
        scan = self._require_durable()
        self._campaign.count("kills")
        self._campaign.count(f"  {save_phase(self._directory, scan, self._durable(), self._plan.rules)}")
        if self._newest() == previous:
            self._campaign.count("kills before anything new was durable")
        return True

    def finish(self) -> str:
        session = self._start()
        code = session.wait()
        self._require(code == 0, f"exit code {code}: {session.errors()}")
        self._read_reports(session)
        newest = self._require_durable().files[-1]
        self._require((newest.step, newest.kind) == (self._plan.steps, "final"), "no final checkpoint")
        require_writable(self._directory)
        return CheckpointManager(self._directory).inspect(self._plan.steps).state_digest

    def _start(self) -> Session:
        self._starts += 1
        plan = replace(self._plan, first_save=self._starts * 1_000_000)
        return Session(self._forks, [plan.argument()], folder=self._folder, directory=self._directory)

    def _read_reports(self, session: Session) -> None:
        self._reports += [Report.parse(line) for line in session.output()]

    def _newest(self) -> int:
        return max((report.step for report in self._reports), default=0)

    def _durable(self) -> list[Saved]:
        return [Saved(report.step, report.final, report.height) for report in self._reports]

    def _require_durable(self) -> Scan:
        scan = require_durable(self._directory, self._durable(), self._plan.rules)
        files = {(file.step, file.kind == "final"): file for file in scan.files}
        for report in self._reports:
            if (file := files.get((report.step, report.final))) is not None:
                is_newer = file.header.run_info["extra"]["number"] >= report.number
                self._require(is_newer, f"{file.path} is an older version than was durable before")
        return scan

    def _require(self, holds: bool, violation: str) -> None:
        require(holds, f"{self._folder}: {violation}")


def random_plan(rng: random.Random, *, fault: str | None) -> Plan:
    return Plan(
        directory="",
        seed=rng.randrange(1 << 32),
        steps=STEPS,
        sizes=tuple(int(10 ** rng.uniform(0, 4.8)) for _ in range(rng.randint(1, 8))),
        block_bytes=1 << rng.randint(12, 20),
        direct=rng.random() < 0.5,
        keep_last=rng.randint(1, 3),
        keep_every=rng.choice([None, 7]),
        fault=fault,
    )


def random_instant(rng: random.Random, reference_seconds: float) -> tuple[Trigger, float]:
    choice = rng.random()
    if choice < 0.3:
        return after(rng.uniform(0, 3 * reference_seconds / KILLS)), 0.0
    count = rng.randint(1, 4)
    if choice < 0.5:
        return once_printed("", count), rng.uniform(0, 0.003)
    return random_disk_event(rng, count), rng.choice([0.0, rng.uniform(0, 0.002)])


def one_case(campaign: Campaign, forks: Forks, case: Case, folder: Path) -> None:
    plan = random_plan(case.rng, fault=campaign.options.fault)
    digest, seconds = run_reference(forks, plan, folder / "reference")
    killed = folder / "killed"
    killed.mkdir()
    walk = KilledWalk(campaign, forks, killed, replace(plan, directory=str(killed / "walk")))
    for _ in range(KILLS):
        if not walk.kill(*random_instant(case.rng, seconds)):
            campaign.count("walks that finished before their last kill")
            break
    require(walk.finish() == digest, f"{killed}: ended in another state than the undisturbed walk")
    campaign.count(f"walks, {'direct I/O' if plan.direct else 'page cache'}")


def run_reference(forks: Forks, plan: Plan, folder: Path) -> tuple[str, float]:
    """The digest that the undisturbed walk ends in, and how long it takes."""
    folder.mkdir()
    plan = replace(plan, directory=str(folder / "walk"), fault=None)
    session = Session(forks, [plan.argument()], folder=folder, directory=Path(plan.directory))
    require(session.wait() == 0, f"{folder}: failed, undisturbed: {session.errors()}")
    return CheckpointManager(plan.directory).inspect(plan.steps).state_digest, session.seconds


def body(campaign: Campaign) -> None:
    with Forks("campaigns.walk:main", IMPORTS, name="a fork") as forks:
        for case in campaign.cases():
            folder = Path(tempfile.mkdtemp(prefix="killed-saves-", dir=campaign.options.directory))
            one_case(campaign, forks, case, folder)
            shutil.rmtree(folder)  # not after a counterexample: its folder is evidence


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__, writes=True, faults=FAULTS)
    return run("killed_saves", options, body, cases=50, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
