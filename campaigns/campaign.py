"""The frame of every campaign: cases by number, counts, and the first counterexample.

A case is a number, and a generator of random choices that depends on it and on the seed alone: whatever a
campaign finds is found again by ``--seed S --case N``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PROGRESS_SECONDS = 5.0
#: How the count of what this machine cannot do begins.
SKIPPED = "skipped"


class CounterExample(Exception):
    """What a campaign looks for: a promise that was not kept."""


class Case(NamedTuple):
    """One case.

    Attributes:
        number: from 0.
        chance: every random choice of the case comes from it.
    """

    number: int
    chance: random.Random


class Campaign:
    """One run of a campaign.

    Args:
        name: of its module.
        options: what :func:`parser` parsed.
        cases: how many to run where the options do not say, nor for how long.

    Attributes:
        options: as given.
        counts: what was done so far, and how often.
        repeated: the options of its own that it was given, for who wants to see a finding again.
    """

    def __init__(self, name: str, options: argparse.Namespace, *, cases: int) -> None:
        self.name = name
        self.options = options
        self.counts: Counter[str] = Counter()
        self.repeated = ""
        self._cases = cases
        self._current: int | None = None
        self._began = time.monotonic()
        self._told = self._began

    def cases(self) -> Iterator[Case]:
        """The cases to run: one, so many, or as many as the time allows."""
        if self.options.case is not None:
            yield self._begin(self.options.case)
            return
        last = self.options.cases
        if last is None and self.options.seconds is None:
            last = self._cases
        number = 0
        # One at least: what comes before the first may take long.
        while (last is None or number < last) and (number == 0 or not self.out_of_time):
            yield self._begin(number)
            self._tell()
            number += 1

    @property
    def out_of_time(self) -> bool:
        """Whether the time it was given is over."""
        return self.options.seconds is not None and self.seconds >= self.options.seconds

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    def count(self, what: str, by: int = 1) -> None:
        """Count something that was done."""
        self.counts[what] += by
        self._tell()

    @property
    def idle(self) -> bool:
        """Whether nothing was done, but for what this machine cannot do."""
        return all(what.startswith(SKIPPED) for what in self.counts)

    def require(self, kept: bool, promise: str) -> None:
        """Check a promise.

        Raises:
            CounterExample: if it was not kept.
        """
        if not kept:
            raise CounterExample(promise)

    def report(self, counter_example: str | None) -> None:
        """Print what was done, and what was found."""
        for what, number in self.counts.items():
            print(f"{number:>12,}  {what}")
        if counter_example is None and self.idle:
            print(f"{self.name}: nothing was run, and nothing is shown by that")
        elif counter_example is None:
            print(f"{self.name}: every promise was kept, in {self.seconds:.0f} s, seed {self.options.seed}")
        else:
            print(f"{self.name}: COUNTEREXAMPLE: {counter_example}")
            if self._current is not None:
                again = f"--seed {self.options.seed} --case {self._current}{self.repeated}"
                print(f"again: python -m campaigns.{self.name} {again}")
        if self.options.json is not None:
            figures = {
                "campaign": self.name,
                "seed": self.options.seed,
                "seconds": round(self.seconds, 1),
                "counts": dict(self.counts),
                "counterexample": counter_example,
            }
            self.options.json.write_text(json.dumps(figures, indent=2) + "\n")

    def _begin(self, number: int) -> Case:
        self._current = number
        return Case(number, random.Random(f"{self.options.seed}/{number}"))

    def _tell(self) -> None:
        """Progress, on a terminal or not: a line now and then."""
        now = time.monotonic()
        if now - self._told >= PROGRESS_SECONDS:
            self._told = now
            done = ", ".join(f"{number:,} {what}" for what, number in self.counts.items())
            print(f"{self.seconds:5.0f} s: {done}", file=sys.stderr, flush=True)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every campaign has; ``description`` is its module's docstring."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--seed", type=int, default=1, help="of every random choice (default: 1)")
    made.add_argument("--seconds", type=float, help="how long to run; the case under way is finished")
    made.add_argument("--cases", type=int, help="how many cases to run at most")
    made.add_argument("--case", type=int, help="run this one only: a counterexample once more")
    made.add_argument("--json", type=Path, help="write the counts into this file, too")
    return made


def _own_options(made: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """The options that only this campaign has, as they were given."""
    shared = {action.dest for action in parser(None)._actions}
    given = ""
    for action in made._actions:
        value = getattr(options, action.dest, None)
        if action.dest not in shared and value != action.default:
            given += f" {action.option_strings[0]}" + ("" if value is True else f" {value}")
    return given


def run(
    name: str,
    made: argparse.ArgumentParser,
    body: Callable[[Campaign], Any],
    *,
    cases: int,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a campaign from a command line.

    Args:
        name: of its module.
        made: its options.
        body: runs the cases; what it raises as CounterExample is the finding.
        cases: how many to run where nothing is said.
        arguments: of the command line; by default those of the process.

    Returns:
        The exit code: 0, or 1 if a counterexample was found or nothing was run.
    """
    made.prog = f"python -m campaigns.{name}"
    campaign = Campaign(name, made.parse_args(arguments), cases=cases)
    campaign.repeated = _own_options(made, campaign.options)
    found = None
    try:
        body(campaign)
    except CounterExample as error:
        found = str(error)
    campaign.report(found)
    return 0 if found is None and not campaign.idle else 1
