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


class RecordErrors:
    """What is wrong with the records of a run: the first ones in words, the rest as a number.

    Attributes:
        records: how many records are wrong.
    """

    def __init__(self) -> None:
        self.records = 0
        self._lines: list[str] = []
        self._count = 0
        self._first: dict[str, list[str]] = {}  # of the first causes, the first lines
        self._counts: Counter[str] = Counter()  # how often each of these causes was found

    def add(self, location: Location, found: Iterable[RecordError]) -> None:
        """What is wrong with one record."""
        self.records += 1
        for problem in found:
            self._count += 1
            cause = str(problem)
            line = f"{location}: {cause}"
            if len(self._lines) < KEPT:
                self._lines.append(line)
            if cause in self._first or len(self._first) < SHOWN:
                self._counts[cause] += 1
                first = self._first.setdefault(cause, [])
                if len(first) < SAME:
                    first.append(line)

    def to_data_error(self, headline: str) -> DataError:
        """One error for all of them: the headline, the first ones, and how many more of which cause."""
        return DataError("\n".join([headline, *self._summary_lines()]), self._lines)

    def _summary_lines(self) -> Iterator[str]:
        """All of them if they are few; else, cause by cause, a few and how many more."""
        if self._count <= SHOWN:
            yield from self._lines
            return
        room, left = SHOWN, self._count
        for cause, first in self._first.items():
            shown = first[:room]
            if not shown:
                break
            yield from shown
            if more := self._counts[cause] - len(shown):
                yield f"and {more:,} more: {cause}"
            room -= len(shown)
            left -= self._counts[cause]
        if left:
            yield f"and {left:,} more"
