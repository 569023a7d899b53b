"""SIGKILL at random instants of a real training run, hundreds of times.

    python -m campaigns.kills --seed 1 --cases 30
    python -m campaigns.kills --seed 1 --cases 5 --engine mlx

The run is killed about ten times and restarted by the same command. After each kill everything in
``invariants`` holds; the finished run has the undisturbed run's state digest and numbers in
``metrics.jsonl``. Every third case is the real command, the others are forks. A finding may need a few
repetitions.

Every other case keeps its steps in shared memory, and hardly saves: whatever step had ended when the run was
killed, it then resumes at most one step before.
"""

from __future__ import annotations

import os
import random
import re
import sys
import tempfile
from collections.abc import Sequence
from signal import SIGKILL
from typing import NamedTuple
from unittest.mock import patch

from campaigns import training_run
from campaigns.campaign import Campaign, Case, require, run
from campaigns.invariants import DurabilityRecord, require_writable, save_phase
from campaigns.session import Session
from campaigns.training_run import LOOP, RULES, STEPS, TrainingRun
from campaigns.triggers import Trigger, after, once_printed, random_disk_event
from distrust.checkpoint import catalog

MEMORY = "/dev/shm"
KILLS = 10  # of each run


class Reference(NamedTuple):
    """The undisturbed run: its final digest, the lines of its ``metrics.jsonl``, how long its loop took."""

    digest: str
    metrics: list[dict[str, float]]
    loop_seconds: float


class KilledRun:
    def __init__(self, campaign: Campaign, training: TrainingRun, *, keeps_steps: bool) -> None:
        self._campaign = campaign
        self._training = training
        self._record = DurabilityRecord(training.checkpoints, RULES)
        self._keeps_steps, self._last_step = keeps_steps, 0

    def kill(self, trigger: Trigger, delay: float) -> bool:
        """Start it, and kill it; False if it had ended by then."""
        record = self._record
        previous = record.newest
        session, code = self._training.disturb(SIGKILL, record.watch(trigger), delay)
        record.record_output(session)
        if self._keeps_steps:
            self.require_rescued(session)
        if code == 0:
            return False
        require(code == -SIGKILL, f"{self._training.out}: exit code {code}: {session.errors()}")
        durable = record.durable
        scan = record.require()
        self._campaign.count(f"kills of {self._training.launcher.name}")
        self._campaign.count(f"  {save_phase(self._training.checkpoints, scan, durable, RULES)}")
        if record.newest == previous:
            self._campaign.count("kills before anything new was durable")
        return True

    def require_rescued(self, session: Session) -> None:
        """Compare the step that a session resumed from with the last one that ended before."""
        for line in session.output():
            if match := re.match(r"Resuming from step (\d+) |(step) \d+/", line):
                resumed = int(match[1] or 0)  # a run that did not resume begins at 0
                lost = self._last_step - resumed
                require(
                    lost <= 1,
                    f"{self._training.out}: step {self._last_step} had ended; resumed from {resumed}",
                )
                self._campaign.count(f"  kills that lost {'no step' if lost <= 0 else 'the last step'}")
                self._last_step = resumed
                break
        ended = [int(match[1]) for line in session.output() if (match := re.match(r"step (\d+)/", line))]
        self._last_step = max([self._last_step, *ended])

    def finish(self) -> str:
        digest = self._training.finish()
        self._record.require()
        require_writable(self._training.checkpoints)
        return digest


def random_instant(rng: random.Random, reference: Reference, *, saves: bool) -> tuple[Trigger, float]:
    choice, count = rng.uniform(0 if saves else 0.08, 1 if saves else 0.4), rng.randint(1, 6)
    if choice < 0.1:
        return after(rng.uniform(0, 8)), 0.0  # while it starts, unless it is a fork
    if choice < 0.3:
        return once_printed(LOOP), rng.uniform(0, 2.5 * reference.loop_seconds / KILLS)
    if choice < 0.4:
        return once_printed("step ", 2 * count), rng.uniform(0, 0.05)
    return random_disk_event(rng, count), rng.choice([0.0, 0.0, rng.uniform(0, 0.003)])


def train_reference(training: TrainingRun) -> Reference:
    training = training.with_options("--save-every", "1")
    digest = training.finish()
    times = [file.path.stat().st_mtime for file in catalog.scan(training.checkpoints).files]
    # Only the last checkpoints still exist; the earlier ones took about as long.
    seconds = STEPS * (max(times) - min(times)) / max(1, len(times) - 1)
    return Reference(digest, training.metrics(), seconds)


def one_case(campaign: Campaign, case: Case, training: TrainingRun, reference: Reference) -> None:
    keeps_steps = case.number % 2 == 0
    options = ["--save-every", str(case.rng.choice([1, 1, 2]))]
    if keeps_steps:
        options = ["--save-every", str(case.rng.choice([0, 0, 9])), "--save-budget", "50"]
    training = training.with_options(*options, f"--{'' if keeps_steps else 'no-'}step-snapshots")
    killed = KilledRun(campaign, training, keeps_steps=keeps_steps)
    for _ in range(KILLS):
        if not killed.kill(*random_instant(case.rng, reference, saves=not keeps_steps)):
            campaign.count("runs that finished before their last kill")
            break
    same = killed.finish() == reference.digest
    require(same, f"{training.out}: ended in another state than the undisturbed run")
    same = training.metrics() == reference.metrics
    require(same, f"{training.out}: metrics.jsonl differs from that of the undisturbed run")
    campaign.count(f"runs of {training.launcher.name} that ended in the undisturbed state")


def body(campaign: Campaign) -> None:
    directory = MEMORY if os.path.isdir(MEMORY) else None
    with tempfile.TemporaryDirectory(dir=directory) as memory, patch.dict(os.environ, DISTRUST_SHM=memory):
        training_run.disturb_runs(campaign, real_every=3, reference=train_reference, one_case=one_case)


def main(arguments: Sequence[str] | None = None) -> int:
    return run("kills", training_run.parser(__doc__), body, cases=6, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
