"""SIGKILL at random instants of a real training run, hundreds of times.

    python -m campaigns.kills --seed 1 --cases 30
    python -m campaigns.kills --seed 1 --case 3
    python -m campaigns.kills --seed 1 --cases 5 --engine mlx

A case is a training run of the bundled model, ``distrust train``, that saves at every step, or at every
second one. It is killed some ten times, and started again by the same command each time: while it starts, at
a random time in its loop, after a line that it prints, or once something was seen on the disk
(``instants.py``), so that kills fall into every part of a save. After each kill:

- every checkpoint that the run has printed as saved, or that stood under its name, is there, unless a rule
  removes it;
- every file with a checkpoint's name is whole, and ``load_latest`` gives the newest;
- there is at most one temporary file.

At its end the run has the state digest of the same run left alone, and its ``metrics.jsonl`` has the same
numbers, no line twice and none missing; the next writer gets the lock and finds nothing left behind. Every
third case is the real command line, from the first instruction of the interpreter on; the others are forks of
a process that has imported torch (``fork_server.py``), which are killed five times as often in the same time.
With ``--engine mlx`` every case is the real command line, and the run that was left alone always is.

What is drawn is the same for a seed and a case; when a signal arrives within a save is the machine's to say,
so a case may have to be run a few times.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from signal import SIGKILL
from typing import NamedTuple

from campaigns import invariants, training_run
from campaigns.campaign import Campaign, Case, run
from campaigns.training_run import LOOP, RULES, STEPS, TrainingRun
from campaigns.triggers import Seen, Trigger, after, once_said, once_seen
from campaigns.witness import DurabilityRecord
from distrust.checkpoint import catalog

KILLS = 10
EVENTS: tuple[Seen, ...] = ("made", "reserved", "renamed", "removed")


class Alone(NamedTuple):
    """The run that nobody disturbed.

    Attributes:
        digest: of its final state.
        numbers: of its ``metrics.jsonl``.
        loop_seconds: how long its loop took.
    """

    digest: str
    numbers: list[dict[str, float]]
    loop_seconds: float


class KilledRun:
    """A run that is killed, and what is known of it."""

    def __init__(self, campaign: Campaign, training: TrainingRun) -> None:
        self._campaign = campaign
        self._training = training
        self._witness = DurabilityRecord(training.checkpoints, RULES)

    def kill(self, instant: Trigger, delay: float) -> bool:
        """Start it, and kill it; False if it had ended by then."""
        witness = self._witness
        before = witness.newest
        session, code = self._training.disturb(SIGKILL, witness.watching(instant), delay)
        witness.hear(session)
        if code == 0:
            return False
        where = f"{self._training.out}: exit code {code}: {session.complaints()}"
        self._campaign.require(code == -SIGKILL, where)
        reported = witness.reported
        scan = witness.require_kept()
        self._campaign.count(f"kills of {self._training.launcher.name}")
        self._campaign.count(f"  {invariants.phase(self._training.checkpoints, scan, reported, RULES)}")
        if witness.newest == before:
            self._campaign.count("kills before anything new was durable")
        return True

    def numbers(self) -> list[dict[str, float]]:
        """What its ``metrics.jsonl`` says, without what is the machine's."""
        return self._training.numbers()

    def finish(self) -> str:
        """Run it to its end; returns the digest of its final state."""
        digest = self._training.finish()
        self._witness.require_kept()
        invariants.require_writable(self._training.checkpoints)
        return digest


def instant_of(chance: random.Random, alone: Alone) -> tuple[Trigger, float]:
    """When to kill, and how long to wait then."""
    drawn, count = chance.random(), chance.randint(1, 6)
    if drawn < 0.1:
        return after(chance.uniform(0, 8)), 0.0  # while it starts, unless it is a fork
    if drawn < 0.3:
        return once_said(LOOP), chance.uniform(0, 2.5 * alone.loop_seconds / KILLS)
    if drawn < 0.4:
        return once_said("step ", 2 * count), chance.uniform(0, 0.05)
    return once_seen(chance.choice(EVENTS), count), chance.choice([0.0, 0.0, chance.uniform(0, 0.003)])


def left_alone(training: TrainingRun) -> Alone:
    """Train without a disturbance."""
    training = training.with_options("--save-every", "1")
    digest = training.finish()
    times = [file.path.stat().st_mtime for file in catalog.scan(training.checkpoints).files]
    # Only the last checkpoints are there: as long as they took took the others.
    return Alone(digest, training.numbers(), STEPS * (max(times) - min(times)) / max(1, len(times) - 1))


def one_case(campaign: Campaign, case: Case, training: TrainingRun, alone: Alone) -> None:
    """Kill a run again and again, and let it come to its end."""
    killed = KilledRun(campaign, training.with_options("--save-every", str(case.chance.choice([1, 1, 2]))))
    for _ in range(KILLS):
        if not killed.kill(*instant_of(case.chance, alone)):
            campaign.count("runs at their end before their last kill")
            break
    campaign.require(
        killed.finish() == alone.digest,
        f"{training.out}: ended in another state than the run that was left alone",
    )
    campaign.require(
        killed.numbers() == alone.numbers, f"{training.out}: metrics.jsonl is not that of the run left alone"
    )
    campaign.count(f"runs of {training.launcher.name} that ended in the state of the one left alone")


def body(campaign: Campaign) -> None:
    training_run.disturb(campaign, real_every=3, leave_alone=left_alone, one_case=one_case)


def main(arguments: Sequence[str] | None = None) -> int:
    return run("kills", training_run.parser(__doc__), body, cases=6, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
