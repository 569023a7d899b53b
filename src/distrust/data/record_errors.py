"""Collects the errors of all records, so that one run reports every wrong line.

Each error names file, line, field and remedy. Records that share an error share one line of the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from distrust.data.records import Location
from distrust.errors import DataError

MAX_LINES = 20
"""The largest number of different errors that a message lists."""

MAX_LOCATIONS = 3
"""The largest number of locations listed for one error."""

MAX_PROBLEMS = 1000
"""The length limit of ``DataError.problems``: a file of a billion wrong lines must not fill the memory."""


class RecordError(Exception):
    """One error of one record. It never leaves this package: ``RecordErrors`` turns it into a DataError.

    ``field`` is a path such as ``messages[2].content``; None stands for the record as a whole.
    """

    def __init__(self, problem: str, *, field: str | None = None) -> None:
        super().__init__(problem if field is None else f"{field}: {problem}")


@dataclass(slots=True)
class _Cause:
    count: int = 0
    locations: list[str] = field(default_factory=list)  # the first MAX_LOCATIONS


class RecordErrors:
    """The errors of the records read so far, grouped by message.

    Memory is bounded: only the first ``MAX_LINES`` different messages are counted one by one.
    """

    def __init__(self) -> None:
        self.records = 0  # with at least one error
        self._total = 0  # errors, several per record possible
        self._problems: list[str] = []
        self._causes: dict[str, _Cause] = {}  # message without location -> where; insertion order

    def add(self, location: Location, errors: Iterable[RecordError]) -> None:
        """Add the errors of one record."""
        self.records += 1
        for error in errors:
            self._total += 1
            message = str(error)
            if len(self._problems) < MAX_PROBLEMS:
                self._problems.append(f"{location}: {message}")
            if message in self._causes or len(self._causes) < MAX_LINES:
                cause = self._causes.setdefault(message, _Cause())
                cause.count += 1
                if cause.count <= MAX_LOCATIONS:
                    cause.locations.append(str(location))

    def to_data_error(self, headline: str) -> DataError:
        """One error for all records: the headline, then one line for each different message."""
        return DataError("\n".join([headline, *self._summary_lines()]), self._problems)

    def _summary_lines(self) -> Iterator[str]:
        for message, cause in self._causes.items():
            first, *further = cause.locations
            ellipsis = ", …" if cause.count > MAX_LOCATIONS else ""
            also = f" ({cause.count:,} records: also {', '.join(further)}{ellipsis})" if further else ""
            yield f"{first}: {message}{also}"
        if remaining := self._total - sum(cause.count for cause in self._causes.values()):
            yield f"and {remaining:,} more"
