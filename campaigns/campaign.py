"""The frame of every campaign: numbered cases, counts, and the first counterexample.

A case is a number and a generator of random choices that depends on it and on the seed alone, so
``--seed S --case N`` repeats any finding.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

PROGRESS_SECONDS = 5.0  # from one line of progress to the next
#: Prefix of the counts of what this machine cannot run.
SKIPPED = "skipped"


class CounterExample(Exception):
    """An invariant that does not hold: what a campaign looks for."""


def require(holds: bool, violation: str) -> None:
    """Raise CounterExample with ``violation`` unless the invariant holds."""
    if not holds:
        raise CounterExample(violation)


@contextmanager
def never(errors: type[Exception] | tuple[type[Exception], ...], prefix: str = "") -> Iterator[None]:
    """An error of these kinds is a violation; its message is that of the error, after a prefix."""
    try:
        yield
    except errors as error:
        raise CounterExample(f"{prefix}{error}") from error


class Case(NamedTuple):
    """One case: its number, from 0, and the generator of all its random choices."""

    number: int
    rng: random.Random


class Campaign:
    def __init__(self, name: str, options: argparse.Namespace, *, cases: int) -> None:
        self.name = name  # of its command
        self.options = options  # as :func:`parser` parsed them
        self.counts: Counter[str] = Counter()  # what was done so far, and how often
        self.own_options = ""  # the options that only this campaign has, as given; needed to repeat a finding
        self._cases = cases  # how many to run if the options give neither a number nor a time
        self._current: int | None = None
        self._began = time.monotonic()
        self._last_progress = self._began

    def cases(self) -> Iterator[Case]:
        """One case, a number of them, or as many as the time allows."""
        if self.options.case is not None:
            yield self._begin(self.options.case)
            return
        limit = self.options.cases
        if limit is None and self.options.seconds is None:
            limit = self._cases
        number = 0
        # At least one: the set-up before the first may take all of the time.
        while (limit is None or number < limit) and (number == 0 or not self.out_of_time):
            yield self._begin(number)
            self._show_progress()
            number += 1

    @property
    def out_of_time(self) -> bool:
        return self.options.seconds is not None and self.seconds >= self.options.seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def count(self, description: str, by: int = 1) -> None:
        self.counts[description] += by
        self._show_progress()

    def count_all(self, counts: Mapping[str, int]) -> None:
        for description, number in counts.items():
            self.count(description, number)

    def count_largest(self, description: str, value: int) -> None:
        """Keep the largest value of a measurement among the counts."""
        self.counts[description] = max(self.counts[description], value)

    @property
    def idle(self) -> bool:
        """Whether nothing ran, except what was skipped."""
        return all(description.startswith(SKIPPED) for description in self.counts)

    def report(self, counter_example: str | None) -> None:
        for description, number in self.counts.items():
            print(f"{number:>12,}  {description}")
        if counter_example is not None:
            print(f"{self.name}: COUNTEREXAMPLE: {counter_example}")
            if self._current is not None:
                again = f"--seed {self.options.seed} --case {self._current}{self.own_options}"
                print(f"again: python -m campaigns.{self.name} {again}")
        elif self.idle:
            print(f"{self.name}: nothing was run, so nothing is shown")
        else:
            print(f"{self.name}: every invariant held, {self.seconds:.0f} s, seed {self.options.seed}")
        if self.options.json is not None:
            figures = {"campaign": self.name, "seed": self.options.seed, "seconds": round(self.seconds, 1)}
            figures |= {"counts": dict(self.counts), "counterexample": counter_example}
            self.options.json.write_text(json.dumps(figures, indent=2) + "\n")

    def _begin(self, number: int) -> Case:
        self._current = number
        return Case(number, random.Random(f"{self.options.seed}/{number}"))

    def _show_progress(self) -> None:
        now = time.monotonic()
        if now - self._last_progress >= PROGRESS_SECONDS:
            self._last_progress = now
            counts = ", ".join(f"{number:,} {description}" for description, number in self.counts.items())
            print(f"{self.seconds:5.0f} s: {counts}", file=sys.stderr, flush=True)


def parser(
    description: str | None, *, writes: bool = False, faults: Iterable[str] = ()
) -> argparse.ArgumentParser:
    """A parser with the options that every campaign has.

    Args:
        description: the docstring of its module.
        writes: whether it writes to a disk, and so has ``--directory``.
        faults: the choices of ``--fault``.
    """
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--seed", type=int, default=1, help="of every random choice (default: 1)")
    options.add_argument("--seconds", type=float, help="how long to run; the current case is finished")
    options.add_argument("--cases", type=int, help="how many cases to run at most")
    options.add_argument("--case", type=int, help="run only this one: repeat a counterexample")
    options.add_argument("--json", type=Path, help="write the counts to this file, too")
    if writes:
        where = "where to work (default: the system's temporary folder)"
        options.add_argument("--directory", type=Path, help=where)
    if faults:
        options.add_argument("--fault", choices=faults, help="break the product: it must be found")
    return options


def _own_options(options: argparse.ArgumentParser, parsed: argparse.Namespace) -> str:
    shared = {action.dest for action in parser(None)._actions}
    text = ""
    for action in options._actions:
        value = getattr(parsed, action.dest, None)
        if action.dest not in shared and value != action.default:
            text += f" {action.option_strings[0]}" + ("" if value is True else f" {shlex.quote(str(value))}")
    return text


def run(
    name: str,
    options: argparse.ArgumentParser,
    body: Callable[[Campaign], Any],
    *,
    cases: int,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a campaign of so many cases by default; returns the exit code: 1 if it found or ran nothing.

    A CounterExample that ``body`` raises is the finding.
    """
    options.prog = f"python -m campaigns.{name}"
    campaign = Campaign(name, options.parse_args(arguments), cases=cases)
    campaign.own_options = _own_options(options, campaign.options)
    counter_example = None
    try:
        # Killed runs would leave their steps in shared memory, and resume from them. The kills want that.
        with patch.dict(os.environ, DISTRUST_SHM=""):
            body(campaign)
    except CounterExample as error:
        counter_example = str(error)
    campaign.report(counter_example)
    return 0 if counter_example is None and not campaign.idle else 1
