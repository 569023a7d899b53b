"""The outcomes of an accident, in a few terms that fit every saver, and how a trial is classified."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Outcome(Enum):
    """The outcome of an accident, the best first. The value is the term in tables."""

    NOTHING_LOST = "nothing lost"  # the newest checkpoint, or the one that was being saved
    FELL_BACK_SAYING = "older one, said so"  # with a message about the damage
    FELL_BACK = "older one, silently"  # without a message
    FOUND = "stopped, naming it"  # an error that names the damage
    DIED = "died otherwise"  # another error
    CRASHED = "crashed or hung"  # of the process
    BEGAN_ANEW = "found none"  # as if there were no checkpoint
    OTHER_VALUES_SAYING = "other values, with a warning"  # values that were never saved
    OTHER_VALUES = "other values, unnoticed"  # the worst that a saver can do
    ALL_LOST = "all lost"  # the older checkpoint, too


#: Nothing was resumed: after a kill, a second attempt shows whether anything is left.
STOPPED = {Outcome.FOUND, Outcome.DIED, Outcome.CRASHED, Outcome.BEGAN_ANEW}

#: An error with one of these words names the damage (a generous list). So does one that names the directory.
NAMED = re.compile(
    r"corrupt|\bdamag|checksum|\bcrc|\bdigest|mismatch|truncat|incomplete|\binvalid|malformed|unexpected end"
    r"|end of file|file read failed|\bmissing\b|no such file|not found|does not exist|can't find"
    r"|could not find|deserializ|central directory|data_loss|not covered|unreadable|not a valid"
    r"|out of range|out of bounds|none of them is intact",
    re.IGNORECASE,
)
#: So does a printed line that an undamaged checkpoint does not cause.
SAID = re.compile(rf"{NAMED.pattern}|\bskip|\bolder\b|\binstead\b|\binitiali", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Reply:
    step: int | None = None  # that it resumed from; None if it found none
    proof: str | None = None  # digest of the values that it then had
    error: str | None = None  # what it raised, with the causes; None if it resumed
    directory: str | None = None  # that it was to resume from
    words: tuple[str, ...] = ()  # what it printed, without what it prints for an undamaged checkpoint
    crashed: str | None = None  # how its process ended, if it did

    @property
    def names_it(self) -> bool:
        """Whether its error names the damage; the frames of a traceback in it do not count."""
        lines = [line for line in (self.error or "").splitlines() if not line.startswith(" ")]
        directory = self.directory
        return any(NAMED.search(line) or (directory is not None and directory in line) for line in lines)

    @property
    def says_it(self) -> bool:
        return any(map(SAID.search, self.words))

    @property
    def message(self) -> str:
        return self.crashed or self.error or " / ".join(self.words)


def classify(reply: Reply, expected: Mapping[int, str], newest: int) -> Outcome:
    """Classify a trial by the proof of each step's true values, and the last step reported as saved."""
    if reply.crashed is not None:
        return Outcome.CRASHED
    if reply.error is not None:
        return Outcome.FOUND if reply.names_it else Outcome.DIED
    if reply.step is None:
        return Outcome.BEGAN_ANEW
    if reply.proof is None or reply.proof != expected.get(reply.step):
        return Outcome.OTHER_VALUES_SAYING if reply.says_it else Outcome.OTHER_VALUES
    if reply.step >= newest:
        return Outcome.NOTHING_LOST
    return Outcome.FELL_BACK_SAYING if reply.says_it else Outcome.FELL_BACK
