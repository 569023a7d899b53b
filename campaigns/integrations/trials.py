"""A trial: kills at random instants of one run, and how it ends."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from enum import Enum
from pathlib import Path
from signal import SIGKILL
from typing import NamedTuple

from campaigns.campaign import require
from campaigns.integrations.subjects import CHECKPOINT, End, ExampleSubject, TrainerSubject
from campaigns.session import Launcher, Session
from campaigns.triggers import Trigger, after, once_on_disk, once_printed, send_at

KILLS = 4  # of each run, at most
Subject = TrainerSubject | ExampleSubject
EXAMPLE_SAVES = 4  # at least, of a script
LOGS = {"log_history", "train_loss", "best"}  # of an end: what does not change the weights


class Outcome(Enum):
    EQUAL = "equal"
    NOT_RESUMED = "equal, never resumed"  # the kills, if any, came before the first checkpoint
    OTHER_LOGS = "other logs"
    OTHER_STATE = "other weights, moments or generators"
    STOPPED = "stopped with an error"


class Trial(NamedTuple):
    outcome: Outcome
    differences: tuple[str, ...]  # the names of what differs, or the last line of the error
    kills: int
    resumes: int  # from a checkpoint; the others came before the first one


class Instant(NamedTuple):
    """``delay`` seconds after so many events, which are printed steps or new checkpoints; 0 is the start."""

    events: int
    delay: float

    def trigger(self, *, printed: bool) -> Trigger:
        if not self.events:
            return after(0.0)
        return once_printed("step ", self.events) if printed else once_on_disk("renamed", self.events)


def random_instants(rng: random.Random, seconds: float, events: int) -> list[Instant]:
    """Instants in a run of so many seconds and events; half of them are soon after an event."""
    return [
        Instant(rng.randint(1, max(1, events // 2)), rng.uniform(0, 0.03))
        if rng.random() < 0.5
        else Instant(0, rng.uniform(0.2, 1) * seconds)  # it takes a while until it trains
        for _ in range(KILLS)
    ]


class Bench:
    """Where the runs of one subject are disturbed, and what an undisturbed one was like."""

    def __init__(self, subject: Subject, launcher: Launcher, folder: Path, *, broken: bool) -> None:
        self._subject, self._launcher, self._folder = subject, launcher, folder
        self._broken = broken  # ours forgets the generators
        folder.mkdir()
        code, session = self._start(folder / "undisturbed", subject.undisturbed)
        require(code == 0, f"{subject.name}, undisturbed: {session.errors()}")
        self.expected: End = subject.end(folder / "undisturbed")
        self.seconds = session.seconds
        steps = sum(line.startswith("step ") for line in session.output())
        self.prints_steps = bool(steps)
        self.events = steps or EXAMPLE_SAVES

    def run(self, number: int, keeper: str, instants: list[Instant]) -> Trial:
        """Kill a run at each instant that it reaches, and let it end; its folder stays if the end differs."""
        folder = self._folder / f"{number}-{keeper}"
        counts: Counter[str] = Counter()
        for instant in (*instants, None):
            had_checkpoint = any(folder.rglob(CHECKPOINT))
            code, session = self._start(folder, keeper, instant)
            counts["resumes"] += self._subject.has_resumed(session.output(), had_checkpoint=had_checkpoint)
            counts["kills"] += code == -SIGKILL
            if code not in (0, -SIGKILL):
                error = (session.errors().splitlines() or ["no message"])[-1]
                return Trial(Outcome.STOPPED, (error,), counts["kills"], counts["resumes"])
            if code == 0:
                break  # it ended first
        end = self._subject.end(folder)
        differences = tuple(name for name in self.expected if end[name] != self.expected[name])
        if differences:
            outcome = Outcome.OTHER_LOGS if set(differences) <= LOGS else Outcome.OTHER_STATE
        else:
            outcome = Outcome.EQUAL if counts["resumes"] else Outcome.NOT_RESUMED
            shutil.rmtree(folder)
        return Trial(outcome, differences, counts["kills"], counts["resumes"])

    def _start(self, folder: Path, keeper: str, instant: Instant | None = None) -> tuple[int, Session]:
        folder.mkdir(exist_ok=True)
        keeper = "broken" if self._broken and keeper == "distrust" else keeper
        arguments = self._subject.arguments(keeper, folder)
        session = Session(self._launcher, arguments, folder=folder, directory=self._subject.directory(folder))
        if instant is not None:
            send_at(session, SIGKILL, instant.trigger(printed=self.prints_steps), instant.delay)
        return session.wait(), session
