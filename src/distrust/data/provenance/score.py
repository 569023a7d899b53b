"""Sources -> the w and H of each record: its own where it brings them, else computed, else a default.

Where a record brings its own and what it could be computed from too, both are compared. All that is wrong
is told at once, as ``reading`` does; nothing of a record is kept but its two numbers, the class of its
source and its place.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappush, heappushpop
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distrust.data.columns import Columns
from distrust.data.corpus import Classes, Locations
from distrust.data.fields import Fields, read_authority_weight, read_provenance_entropy, read_source
from distrust.data.provenance import evidence
from distrust.data.provenance.evidence import MissingIngredientError
from distrust.data.provenance.table import Table
from distrust.data.record_errors import RecordError, RecordErrors
from distrust.data.records import Location
from distrust.data.sources import Part, Source
from distrust.errors import DataError

Quantity = Literal["authority_weight", "provenance_entropy"]

LARGEST = 5
"""How many of the differences are told, the largest ones."""

REPORT_EVERY = 5000
"""Records between two calls of ``on_progress``."""

_CAPTION_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Difference:
    """What a record says, and what follows from its ingredients.

    Attributes:
        where: the record stands.
        given: its own value.
        computed: the other one.
    """

    where: str
    recorded: float
    computed: float


@dataclass(slots=True)
class Check:
    """Where the values of one quantity come from, and what comparing them showed.

    Attributes:
        tolerance: up to which two values are the same.
        computed: records that had no value of their own.
        defaulted: records that had none, nor what it could be computed from.
        checked: records whose own value was compared.
        differing: those of them that differ by more than the tolerance.
        unchecked: what was missing -> records whose own value could not be compared.
    """

    tolerance: float
    computed: int = 0
    defaulted: int = 0
    checked: int = 0
    differing: int = 0
    unchecked: Counter[str] = field(default_factory=Counter)
    _largest: list[tuple[float, int, Difference]] = field(default_factory=list)

    @property
    def largest(self) -> list[Difference]:
        """The largest differences, and of equal ones the first; ``LARGEST`` at most."""
        return [difference for *_, difference in sorted(self._largest, key=lambda entry: entry[:2])[::-1]]

    def compare(self, location: Location, given: float, computed: float) -> None:
        """Take note of a record's own value and of the computed one."""
        self.checked += 1
        size = abs(given - computed)
        if size > self.tolerance:
            self.differing += 1
            entry = (size, -self.differing, Difference(str(location), given, computed))
            if len(self._largest) < LARGEST:
                heappush(self._largest, entry)
            elif size > self._largest[0][0]:
                heappushpop(self._largest, entry)


@dataclass(frozen=True, slots=True)
class ScoredRecords:
    """What was found of n records.

    Attributes:
        authority_weight: w, float64[n].
        provenance_entropy: H in bits, float64[n].
        classes: the names of the source classes, by first appearance; one without a name for none.
        class_of: int32[n], the class of each record.
        locations: where each record stands.
        checks: where the values come from.
    """

    authority_weight: NDArray[np.float64]
    provenance_entropy: NDArray[np.float64]
    classes: Sequence[str]
    class_of: NDArray[np.int32]
    locations: Sequence[Location]
    checks: Mapping[Quantity, Check]

    def __len__(self) -> int:
        return len(self.class_of)


@dataclass(frozen=True, slots=True)
class Scoring:
    """How records are weighed.

    Attributes:
        columns: which fields hold w, H and the source class.
        table: how they are computed.
        tolerances: up to which a record's own value and the computed one are the same.
        authority_weight: w of records that have none, nor the ingredients; None where that is an error.
        provenance_entropy: H in bits of such records, likewise.
        recompute: whether the computed value replaces the record's own.
    """

    columns: Columns
    table: Table
    tolerances: Mapping[Quantity, float]
    authority_weight: float | None = None
    provenance_entropy: float | None = None
    recompute: bool = False

    def score(self, quantity: Quantity, fields: Fields, location: Location, check: Check) -> float:
        """The value that holds for a record.

        Raises:
            RecordError: there is none, or something of it is wrong.
        """
        columns, table = self.columns, self.table
        if quantity == "authority_weight":
            names, read, compute = columns.authority_weight, read_authority_weight, evidence.authority_weight
            default = self.authority_weight
        else:
            names, read = columns.provenance_entropy, read_provenance_entropy
            compute, default = evidence.provenance_entropy, self.provenance_entropy
        given = read(fields, columns, None) if any(name in fields for name in names) else None
        try:
            computed = compute(fields, table)
        except MissingIngredientError as missing:
            if given is not None:
                check.unchecked[missing.reason] += 1
                return given
            if default is None:
                raise
            check.defaulted += 1
            return default
        if given is None:
            check.computed += 1
            return computed
        check.compare(location, given, computed)
        return computed if self.recompute else given


def score_records(
    sources: Sequence[Source], scoring: Scoring, *, on_progress: Callable[[int], None] | None = None
) -> ScoredRecords:
    """Reads every record once, and keeps its numbers.

    Args:
        sources: at least one.
        scoring: how they are weighed.
        on_progress: called now and then with the number of records read.

    Raises:
        DataError: a source cannot be read or holds nothing (one line), or records are wrong (a headline,
            then a line for each of the first problems).
    """
    parts = [part for source in sources for part in source.parts]
    checks: dict[Quantity, Check] = {name: Check(limit) for name, limit in scoring.tolerances.items()}
    values: dict[Quantity, array[float]] = {name: array("d") for name in checks}
    classes = Classes()
    class_of, part_of, lines = array("i"), array("i"), array("q")
    problems = RecordErrors()
    for index, location, row in _rows(parts):
        found: list[RecordError] = []
        if isinstance(row, RecordError):
            found.append(row)
        else:
            fields = {name: value for name, value in row.items() if value is not None}
            for name, check in checks.items():
                try:
                    values[name].append(scoring.score(name, fields, location, check))
                except RecordError as problem:
                    found.append(problem)
            class_of.extend(classes.number([read_source(fields, scoring.columns)]).tolist())
        if found:
            problems.add(location, found)
        part_of.append(index)
        lines.append(location.line)
        if on_progress is not None and len(lines) % REPORT_EVERY == 0:
            on_progress(len(lines))
    names = ", ".join(source.name for source in sources)
    if problems.records:
        are = "record is" if len(lines) == 1 else "records are"
        raise problems.to_data_error(f"{names}: {problems.records} of {len(lines)} {are} wrong")
    counted = np.bincount(np.asarray(part_of, np.int32), minlength=len(parts)).tolist()
    first = 0
    for source in sources:
        if not any(counted[first : first + len(source.parts)]):
            raise DataError(f"{source.name}: holds no records; there must be one at least")
        first += len(source.parts)
    return ScoredRecords(
        np.asarray(values["authority_weight"], np.float64),
        np.asarray(values["provenance_entropy"], np.float64),
        classes.names,
        np.asarray(class_of, np.int32),
        Locations(
            [(part.name, part.unit) for part in parts],
            np.asarray(part_of, np.int32),
            np.asarray(lines, np.int64),
        ),
        checks,
    )


def _rows(parts: Sequence[Part]) -> Iterator[tuple[int, Location, Fields | RecordError]]:
    for index, part in enumerate(parts):
        for number, row in part.rows():
            yield index, Location(part.name, number, part.unit), row


def captions(sources: Sequence[Source], columns: Columns, wanted: Collection[str]) -> dict[str, str]:
    """What a person knows records by: the title, or how the text begins; read until all are found.

    Args:
        sources: as they were weighed.
        columns: which fields hold content.
        wanted: locations, as text.
    """
    found: dict[str, str] = {}
    for _, location, row in _rows([part for source in sources for part in source.parts]):
        where = str(location)
        if where in wanted and not isinstance(row, RecordError):
            found[where] = _caption(row, columns)
            if len(found) == len(wanted):
                break
    return found


def _caption(fields: Fields, columns: Columns) -> str:
    for value in (fields.get(name) for name in ("title", *columns.content)):
        text = _text_of(value)
        if text:
            words = " ".join(text[: 4 * _CAPTION_CHARACTERS].split())
            return words if len(words) <= _CAPTION_CHARACTERS else words[: _CAPTION_CHARACTERS - 1] + "…"
    return ""


def _text_of(value: Any) -> str:
    """A text, or the first turn of a conversation."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = value[0].get("content", value[0].get("value"))
    return value.strip() if isinstance(value, str) else ""
