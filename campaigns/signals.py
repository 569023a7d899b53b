"""Signals that ask a real training run to stop, in every phase of it.

    python -m campaigns.signals --seed 1 --cases 20
    python -m campaigns.signals --seed 1 --case 3
    python -m campaigns.signals --seed 1 --cases 5 --engine mlx

A case is a training run, ``distrust train``, that gets some signals, one a session, and is started again by
the same command each time: SIGTERM, SIGUSR1, Ctrl-C once, or twice, the second one a moment later or while
the save that the first one asked for is written. They arrive while Python starts, while the model is loaded,
before the first step, in the loop, in a save, in the last step and its final save, and after that. Then:

- the exit code is 128 + the signal; or the signal itself, as long as the run does not hear it yet, or does
  not any more; or 0, if it was at its end; a second Ctrl-C while torch is imported may also end in SIGABRT;
- the run has said which step is saved, and that is the last step that it made, and the newest checkpoint;
- nothing that was durable is gone or damaged (``aftermath.py``), and the next writer gets the lock.

At its end the run has the state digest of the same run left alone. Every second case is the real command,
the others are forks (``fork_server.py``), if torch trains. The time from a signal to the run's last word is
measured.
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Sequence
from signal import SIGABRT, SIGINT, SIGTERM, SIGUSR1, Signals
from typing import NamedTuple

from campaigns import invariants, training_run
from campaigns.campaign import Campaign, Case, run
from campaigns.processes import Session
from campaigns.training_run import LOADING, LOOP, RULES, STEPS, TrainingRun
from campaigns.triggers import Seen, Trigger, after, once_said, once_seen, strike
from campaigns.witness import DurabilityRecord
from distrust.checkpoint import Scan

#: Of them the last one comes at the end of the run.
SIGNALS = 6
NUMBERS = (SIGTERM, SIGUSR1, SIGINT)
LOOK_SECONDS = 0.005
EVENTS: tuple[Seen, ...] = ("made", "reserved", "renamed", "removed")
_STEP = re.compile(rf"step (\d+)/{STEPS}: loss")
_STOPPED = re.compile(r"Stopped by (\w+): (?:step (\d+) is saved|nothing to save yet)")


class Moment(NamedTuple):
    """When a signal is sent.

    Attributes:
        phase: of the run, in a few words.
        instant: what is waited for.
        delay: how long then, in seconds.
    """

    phase: str
    instant: Trigger
    delay: float


class Blow(NamedTuple):
    """What is sent.

    Attributes:
        number: of the signal.
        again: when it is sent once more, if it is.
    """

    number: Signals
    again: Moment | None = None

    @property
    def name(self) -> str:
        """In a few words."""
        return self.number.name if self.again is None else f"{self.number.name} twice"


class DisturbedRun:
    """A run that gets signals, and what is known of it."""

    def __init__(self, campaign: Campaign, training: TrainingRun) -> None:
        self._campaign = campaign
        self._training = training
        self._witness = DurabilityRecord(training.checkpoints, RULES)

    def send(self, blow: Blow, moment: Moment) -> None:
        """Start it, send what there is to send, and check what is left when it has ended."""
        session = self._training.start()
        sent = strike(session, blow.number, self._witness.watching(moment.instant), moment.delay)
        if sent and blow.again is not None:
            strike(session, blow.number, self._witness.watching(blow.again.instant), blow.again.delay)
        took = _until_its_last_word(session)
        code = session.wait()
        self._witness.hear(session)
        scan = self._witness.require_kept()
        what = f"{blow.name} ({moment.phase}): exit code {code}"
        self._require(_allowed(blow, session, code), f"{what}: {session.said()} {session.complaints()}")
        self._require_said(session, code, scan, what)
        invariants.require_writable(self._training.checkpoints)
        if not sent:
            self._campaign.count("runs at their end before the signal")
            return
        self._count(blow, moment, took, code)

    def finish(self) -> str:
        """Run it to its end; returns the digest of its final state."""
        digest = self._training.finish()
        self._witness.require_kept()
        return digest

    def _require_said(self, session: Session, code: int, scan: Scan, what: str) -> None:
        """What it says is saved is the last step that it made, and the newest that stands."""
        newest = scan.files[-1] if scan.files else None
        if code == 0:
            self._require(newest is not None and newest.kind == "final", f"{what}, and no final checkpoint")
        stopped = _stopped(session)
        if stopped is None:
            return
        saved = int(stopped[2] or 0)
        stands = newest.step if newest is not None else 0
        self._require(
            stands == saved, f"{what}: step {saved} is said to be saved, and {stands} is the newest"
        )
        made = [int(found[1]) for found in map(_STEP.match, session.said()) if found]
        self._require(not made or made[-1] == saved, f"{what}: step {made[-1:]} was made, {saved} is saved")

    def _count(self, blow: Blow, moment: Moment, took: float, code: int) -> None:
        counts = self._campaign.counts
        self._campaign.count(f"signals to {self._training.launcher.name}")
        self._campaign.count(f"  {blow.name}")
        self._campaign.count(f"  {moment.phase}")
        if code == -SIGABRT:
            self._campaign.count("ended by SIGABRT, while torch was imported")
        longest = f"ms, at most, until its last word: {blow.name}, {moment.phase}"
        counts[longest] = max(counts[longest], round(1000 * took))

    def _require(self, kept: bool, promise: str) -> None:
        self._campaign.require(kept, f"{self._training.out}: {promise}")


def _stopped(session: Session) -> re.Match[str] | None:
    return next(filter(None, map(_STOPPED.match, session.said())), None)


def _over(session: Session) -> bool:
    """Whether it has said how it ended: everything that matters is durable."""
    return any(line.startswith(("Finished ", "Nothing to do", "Stopped by ")) for line in session.said())


def _until_its_last_word(session: Session) -> float:
    """Seconds until it has said how it ended, or has. Python then takes torch apart, which is slow."""
    began = time.monotonic()
    while session.running and not _over(session):
        time.sleep(LOOK_SECONDS)
    return time.monotonic() - began


def _allowed(blow: Blow, session: Session, code: int) -> bool:
    """Whether a session may end so."""
    said = session.said()
    hears = any(line.startswith(LOADING) for line in said)
    over = _over(session)
    if code == 0:
        return over
    if hears and code > 0 and "Traceback" in session.complaints() and not over:
        return False
    if code == -blow.number:
        return not hears or over
    if code == -SIGABRT:
        # A KeyboardInterrupt that comes through native code, as in importing torch, ends the process.
        return blow.again is not None and not any(line.startswith(LOOP) for line in said)
    if code != 128 + blow.number:
        return False
    # Left at once, without a word: by a second Ctrl-C, or by one that nobody had asked to be remembered.
    silent = blow.number == SIGINT and (blow.again is not None or not hears or over)
    return silent or _stopped(session) is not None


def blow_of(chance: random.Random) -> Blow:
    """What is sent."""
    number = chance.choice(NUMBERS)
    if number != SIGINT or chance.random() < 0.4:
        return Blow(number)
    if chance.random() < 0.5:
        return Blow(number, Moment("at once", after(0), chance.uniform(0, 0.1)))
    return Blow(number, Moment("in the save", once_seen("made"), chance.uniform(0, 0.01)))


def moment_of(chance: random.Random, *, last: bool) -> Moment:
    """When it is sent."""
    if last:
        return chance.choice(
            [
                Moment("in the last step", once_said(f"step {STEPS - 1}/"), chance.uniform(0, 0.1)),
                Moment("in the final save", once_said(f"step {STEPS}/"), chance.uniform(0, 0.03)),
                Moment("at the end", once_said("state digest"), chance.uniform(0, 0.3)),
            ]
        )
    count = chance.randint(1, 5)
    return chance.choice(
        [
            Moment("while Python starts", after(0), chance.uniform(0, 2)),
            Moment("while the model is loaded", once_said(LOADING), chance.uniform(0, 6)),
            Moment("before the first step", once_said(LOOP), chance.uniform(0, 0.1)),
            Moment("in the loop", once_said("step ", 2 * count), chance.uniform(0, 0.1)),
            Moment("in a save", once_seen(chance.choice(EVENTS), count), chance.uniform(0, 0.004)),
        ]
    )


def one_case(campaign: Campaign, case: Case, training: TrainingRun, alone: str) -> None:
    """Stop a run again and again, and let it come to its end."""
    every = str(case.chance.choice([0, 1, 2]))
    disturbed = DisturbedRun(campaign, training.with_options("--save-every", every))
    for number in range(SIGNALS):
        last = number == SIGNALS - 1
        disturbed.send(blow_of(case.chance), moment_of(case.chance, last=last))
    campaign.require(
        disturbed.finish() == alone,
        f"{training.out}: ended in another state than the run that was left alone",
    )
    campaign.count(f"runs of {training.launcher.name} that ended in the state of the one left alone")


def left_alone(training: TrainingRun) -> str:
    """Train without a disturbance; gives the final digest."""
    return training.finish()


def body(campaign: Campaign) -> None:
    training_run.disturb(campaign, real_every=2, leave_alone=left_alone, one_case=one_case)


def main(arguments: Sequence[str] | None = None) -> int:
    return run("signals", training_run.parser(__doc__), body, cases=4, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
