"""How wrong records are told: all of them at once, each with file, line, field and remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from distrust.data.records import Location
from distrust.errors import DataError

SHOWN = 20
"""How many problems a message lists."""

SAME = 3
"""How many of them may say the same, where there are more than that."""

KEPT = 1000
"""How many the error's ``problems`` holds: a file of a billion wrong lines must not fill the memory."""


class RecordError(Exception):
    """What is wrong with one record. It never leaves this package: it ends in the list of all of them.

    Args:
        what: what is wrong with it; what to do.
        field: the record's field, such as ``messages[2].content``; None for the record as a whole.
    """

    def __init__(self, what: str, *, field: str | None = None) -> None:
        super().__init__(what if field is None else f"{field}: {what}")


class Problems:
    """What is wrong with the records of a run: the first ones in words, the rest as a number.

    Attributes:
        records: how many records are wrong.
    """

    def __init__(self) -> None:
        self.records = 0
        self._kept: list[tuple[str, str]] = []  # the line, and the cause in it
        self._counts: Counter[str] = Counter()  # of the causes that are kept
        self._count = 0

    def add(self, location: Location, found: Iterable[RecordError]) -> None:
        """What is wrong with one record."""
        self.records += 1
        for problem in found:
            self._count += 1
            cause = str(problem)
            if len(self._kept) < KEPT:
                self._kept.append((f"{location}: {cause}", cause))
                self._counts[cause] += 1
            elif cause in self._counts:
                self._counts[cause] += 1

    def error(self, headline: str) -> DataError:
        """One error for all of them: the headline, the first ``SHOWN``, and how many more of which cause."""
        kept = [line for line, _ in self._kept]
        return DataError("\n".join([headline, *self._shown()]), kept)

    def _shown(self) -> Iterator[str]:
        """All problems if they are few; else of each cause a few, and how many more."""
        most = SHOWN if self._count <= SHOWN else SAME
        shown: Counter[str] = Counter()
        for line, cause in self._kept:
            if shown[cause] < most and shown.total() < SHOWN:
                shown[cause] += 1
                yield line
        left = self._count - shown.total()
        for cause, number in shown.items():
            if number == most and self._counts[cause] > number:
                left -= self._counts[cause] - number
                yield f"and {self._counts[cause] - number:,} more: {cause}"
        if left:
            yield f"and {left:,} more"
