"""Collects the errors of all records, so that one run reports every wrong line.

Each error names file, line, field and remedy. Records that share an error share one line of the report.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from distrust.data.records import Location
from distrust.errors import DataError

MAX_LINES = 20  # the largest number of different errors that a message lists
MAX_LOCATIONS = 3  # the largest number of locations listed for one error
# The length limit of ``DataError.problems``: a file of a billion wrong lines must not fill the memory.
MAX_PROBLEMS = 1000


class RecordError(Exception):
    """One error of one record. It never leaves this package: ``RecordErrors`` turns it into a DataError.

    ``field`` is a path such as ``messages[2].content``; None stands for the record as a whole. ``detail``
    is printed with the message, but errors that differ only in it are equal.
    """

    def __init__(self, problem: str, *, field: str | None = None, detail: str = "") -> None:
        super().__init__(problem if field is None else f"{field}: {problem}")
        self.detail = detail


def too_large(limit: int) -> RecordError:
    """The error of a record that takes more than ``limit`` bytes."""
    return RecordError(f"takes more than {limit:,} bytes; split it, or raise --max-record-bytes")


class RecordErrors:
    """The errors of the records read so far, grouped by message.

    Memory is bounded: only the first ``MAX_LINES`` different messages are counted one by one.
    """

    def __init__(self) -> None:
        self.records = 0  # with at least one error
        self._total = 0  # errors, several per record possible
        self._problems: list[str] = []
        self._counts: Counter[str] = Counter()  # of each message without location; insertion order
        # Of each message: its first error, and where the next ones are, MAX_LOCATIONS together.
        self._examples: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, location: Location, errors: Sequence[RecordError]) -> None:
        """Add the errors of one record."""
        self.records += 1
        self._total += len(errors)
        for error in errors:
            message, problem = str(error), f"{location}: {error}{error.detail}"
            if len(self._problems) < MAX_PROBLEMS:
                self._problems.append(problem)
            if message in self._counts or len(self._counts) < MAX_LINES:
                self._counts[message] += 1
                if self._counts[message] <= MAX_LOCATIONS:
                    examples = self._examples[message]
                    examples.append(str(location) if examples else problem)

    def raise_if_any(self, headline: str, *, of: int = 0, hint: str = "") -> None:
        """Raise one DataError for all records: the headline, a line for each different message, the hint.

        One line if each of the ``of`` records has the same error: probably an option is wrong, or the file.
        """
        if self.records and self.records == self._total == of and len(self._counts) == 1:
            line = self._problems[0] + (f" (all {of:,} records)" if of > 1 else "")
            raise DataError(f"{line}; {hint}" if hint else line, self._problems)
        if self.records:
            raise DataError([headline, *self._summary_lines(), *([hint] if hint else [])], self._problems)

    def _summary_lines(self) -> Iterator[str]:
        for message, count in self._counts.items():
            first, *further = self._examples[message]
            ellipsis = ", …" if count > MAX_LOCATIONS else ""
            also = f" ({count:,} records: also {', '.join(further)}{ellipsis})" if further else ""
            yield f"{first}{also}"
        if remaining := self._total - self._counts.total():
            yield f"and {remaining:,} more"
