"""Signals that ask a real training run to stop, in every phase of it.

    python -m campaigns.signals --seed 1 --cases 20 --engine torch

The run gets SIGTERM, SIGUSR1 or Ctrl-C once or twice and is restarted by the same command. The exit code must
be 128 + the signal (:func:`_is_allowed` has the exceptions), the step reported as saved must be the last one
trained and the newest checkpoint, and the run must end in the undisturbed state. Every second case is the
real command, the others are forks, if torch trains.
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Sequence
from signal import SIGABRT, SIGINT, SIGTERM, SIGUSR1, Signals
from typing import NamedTuple

from campaigns import training_run
from campaigns.campaign import Campaign, Case, require, run
from campaigns.invariants import DurabilityRecord, require_writable
from campaigns.session import Session
from campaigns.training_run import LOADING, LOOP, RULES, STEPS, TrainingRun
from campaigns.triggers import Trigger, after, once_on_disk, once_printed, random_disk_event, send_at
from distrust.checkpoint import Scan

#: In a case; the last one comes at the end of the run.
SIGNALS = 6
NUMBERS = (SIGTERM, SIGUSR1, SIGINT)  # that ask for a stop
LOOK_SECONDS = 0.005  # from one look at the output to the next
_STEP = re.compile(rf"step (\d+)/{STEPS}: loss")
_STOPPED = re.compile(r"Stopped by (\w+): (?:step (\d+) is saved|nothing to save yet)")


class Moment(NamedTuple):
    """When a signal is sent: ``delay`` seconds after a trigger; ``phase`` describes it."""

    phase: str
    trigger: Trigger
    delay: float


class Stop(NamedTuple):
    """A signal, and when it is sent a second time, if it is."""

    number: Signals
    repeat: Moment | None = None

    @property
    def name(self) -> str:
        return self.number.name if self.repeat is None else f"{self.number.name} twice"


class SignalledRun:
    def __init__(self, campaign: Campaign, training: TrainingRun) -> None:
        self._campaign = campaign
        self._training = training
        self._record = DurabilityRecord(training.checkpoints, RULES)

    def send(self, stop: Stop, moment: Moment) -> None:
        """Start it, send the signal, and check how it ended and what it left."""
        session = self._training.start()
        sent = send_at(session, stop.number, self._record.watch(moment.trigger), moment.delay)
        if sent and stop.repeat is not None:
            send_at(session, stop.number, self._record.watch(stop.repeat.trigger), stop.repeat.delay)
        seconds = _wait_for_last_message(session)
        code = session.wait()
        self._record.record_output(session)
        scan = self._record.require()
        description = f"{stop.name} ({moment.phase}): exit code {code}"
        printed = f"{session.output()} {session.errors()}"
        self._require(_is_allowed(stop, session, code), f"{description}: {printed}")
        self._require_message(session, code, scan, description)
        require_writable(self._training.checkpoints)
        if not sent:
            self._campaign.count("runs that finished before the signal")
            return
        self._count(stop, moment, seconds, code)

    def finish(self) -> str:
        digest = self._training.finish()
        self._record.require()
        return digest

    def _require_message(self, session: Session, code: int, scan: Scan, description: str) -> None:
        """The step that it prints as saved is the last trained one, and the newest checkpoint."""
        newest = scan.files[-1] if scan.files else None
        finished = newest is not None and newest.kind == "final"
        self._require(code != 0 or finished, f"{description}, and no final checkpoint")
        message = _stop_message(session)
        if message is None:
            return
        saved = int(message[2] or 0)
        existing = newest.step if newest is not None else 0
        text = f"{description}: step {saved} is reported as saved"
        self._require(existing == saved, f"{text}, the newest is {existing}")
        steps = [int(match[1]) for match in map(_STEP.match, session.output()) if match]
        text = f"{description}: step {steps[-1:]} was trained, step {saved} is saved"
        self._require(not steps or steps[-1] == saved, text)

    def _count(self, stop: Stop, moment: Moment, seconds: float, code: int) -> None:
        self._campaign.count(f"signals to {self._training.launcher.name}")
        self._campaign.count(f"  {stop.name}")
        self._campaign.count(f"  {moment.phase}")
        if code == -SIGABRT:
            self._campaign.count("ended by SIGABRT, while torch was imported")
        description = f"ms, at most, until its last message: {stop.name}, {moment.phase}"
        self._campaign.count_largest(description, round(1000 * seconds))

    def _require(self, holds: bool, violation: str) -> None:
        require(holds, f"{self._training.out}: {violation}")


def _stop_message(session: Session) -> re.Match[str] | None:
    return next(filter(None, map(_STOPPED.match, session.output())), None)


def _has_ended(session: Session) -> bool:
    """Whether it has printed how it ended: everything that matters is durable."""
    endings = ("Finished ", "Nothing to do", "Stopped by ")
    return any(line.startswith(endings) for line in session.output())


def _wait_for_last_message(session: Session) -> float:
    """The seconds until it has printed how it ended, or has ended: Python tears torch down slowly."""
    began = time.monotonic()
    while session.running and not _has_ended(session):
        time.sleep(LOOK_SECONDS)
    return time.monotonic() - began


def _is_allowed(stop: Stop, session: Session, code: int) -> bool:
    output = session.output()
    handles_signals = any(line.startswith(LOADING) for line in output)
    in_loop = any(line.startswith(LOOP) for line in output)
    ended = _has_ended(session)
    if code == 0:
        return ended
    if handles_signals and code > 0 and "Traceback" in session.errors() and not ended:
        return False
    if code == -stop.number:
        return not handles_signals or ended
    if code == -SIGABRT:
        # A KeyboardInterrupt that passes through native code, as while importing torch, aborts the process.
        return stop.repeat is not None and not in_loop
    if code != 128 + stop.number:
        return False
    # At once and without a message: a second Ctrl-C, or one outside the time in which signals are handled.
    may_be_silent = stop.number == SIGINT and (stop.repeat is not None or not handles_signals or ended)
    # While a framework is imported or a model is loaded, the watchdog may end the command.
    was_slow = not in_loop and f"ended by {stop.number.name}, without an answer" in session.errors()
    return may_be_silent or was_slow or _stop_message(session) is not None


def random_stop(rng: random.Random) -> Stop:
    number = rng.choice(NUMBERS)
    if number != SIGINT or rng.random() < 0.4:
        return Stop(number)
    if rng.random() < 0.5:
        return Stop(number, Moment("at once", after(0), rng.uniform(0, 0.1)))
    return Stop(number, Moment("in the save", once_on_disk("made"), rng.uniform(0, 0.01)))


def random_moment(rng: random.Random, *, last: bool) -> Moment:
    if last:
        moments = [
            Moment("in the last step", once_printed(f"step {STEPS - 1}/"), rng.uniform(0, 0.1)),
            Moment("in the final save", once_printed(f"step {STEPS}/"), rng.uniform(0, 0.03)),
            Moment("at the end", once_printed("state digest"), rng.uniform(0, 0.3)),
        ]
        return rng.choice(moments)
    count = rng.randint(1, 5)
    moments = [
        Moment("while Python starts", after(0), rng.uniform(0, 2)),
        Moment("while the model is loaded", once_printed(LOADING), rng.uniform(0, 6)),
        Moment("before the first step", once_printed(LOOP), rng.uniform(0, 0.1)),
        Moment("in the loop", once_printed("step ", 2 * count), rng.uniform(0, 0.1)),
        Moment("in a save", random_disk_event(rng, count), rng.uniform(0, 0.004)),
    ]
    return rng.choice(moments)


def one_case(campaign: Campaign, case: Case, training: TrainingRun, reference: str) -> None:
    save_every = str(case.rng.choice([0, 1, 2]))
    signalled = SignalledRun(campaign, training.with_options("--save-every", save_every))
    for number in range(SIGNALS):
        signalled.send(random_stop(case.rng), random_moment(case.rng, last=number == SIGNALS - 1))
    same = signalled.finish() == reference
    require(same, f"{training.out}: ended in another state than the undisturbed run")
    campaign.count(f"runs of {training.launcher.name} that ended in the undisturbed state")


def body(campaign: Campaign) -> None:
    training_run.disturb_runs(campaign, real_every=2, reference=TrainingRun.finish, one_case=one_case)


def main(arguments: Sequence[str] | None = None) -> int:
    return run("signals", training_run.parser(__doc__), body, cases=4, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
