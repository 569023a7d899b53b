"""How wrong records are told: all of them at once, each with file, line, field and remedy."""

from __future__ import annotations

from collections.abc import Iterable

from distrust.data.records import Location
from distrust.errors import DataError

SHOWN = 20
"""How many problems a message lists."""

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
        self._lines: list[str] = []
        self._count = 0

    def add(self, location: Location, found: Iterable[RecordError]) -> None:
        """What is wrong with one record."""
        self.records += 1
        for problem in found:
            self._count += 1
            if len(self._lines) < KEPT:
                self._lines.append(f"{location}: {problem}")

    def error(self, headline: str) -> DataError:
        """One error for all of them: the headline, the first ``SHOWN``, and how many more."""
        lines = [headline, *self._lines[:SHOWN]]
        if self._count > SHOWN:
            lines.append(f"and {self._count - SHOWN} more")
        return DataError("\n".join(lines), self._lines)
