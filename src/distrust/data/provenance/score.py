"""Scores records: the w and H of each, stated by the record, else computed, else a default.

If a record states a value that can also be computed, the two are compared. All errors are reported at once,
as in ``reading``. Only the two numbers, the source class and the location of a record are kept in memory.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distrust.data.columns import Columns, Fields
from distrust.data.corpus import Classes, Locations
from distrust.data.fields import read_authority_weight, read_provenance_entropy, read_source
from distrust.data.provenance import evidence
from distrust.data.provenance.evidence import MissingIngredientError
from distrust.data.provenance.table import Table
from distrust.data.reading import REPORT_EVERY, raise_errors, require_records
from distrust.data.record_errors import RecordError, RecordErrors
from distrust.data.records import Location
from distrust.data.sources import Source

Quantity = Literal["authority_weight", "provenance_entropy"]

#: How the record's own value is read, and how it is computed.
_FUNCTIONS: Mapping[Quantity, tuple[Callable[..., float], Callable[..., float]]] = {
    "authority_weight": (read_authority_weight, evidence.authority_weight),
    "provenance_entropy": (read_provenance_entropy, evidence.provenance_entropy),
}

LARGEST = 5  # how many of the largest differences are reported

_CAPTION_CHARACTERS = 60  # a caption ends a line of the terminal


@dataclass(frozen=True, slots=True)
class Difference:
    """A record whose stated value differs from the computed one."""

    where: str  # location of the record
    recorded: float  # the value in the data
    computed: float


@dataclass(slots=True)
class Check:
    """Where the values of one quantity come from, and how stated and computed values compare."""

    tolerance: float  # values that differ by at most this are equal
    computed: int = 0  # records without a value of their own
    defaulted: int = 0  # records without a value or ingredients
    checked: int = 0  # records whose own value was compared
    differing: int = 0  # checked records that differ by more than the tolerance
    unchecked: Counter[str] = field(default_factory=Counter)  # missing ingredient -> uncompared records
    largest: list[Difference] = field(default_factory=list)  # at most LARGEST; of equal ones the first

    def compare(self, location: Location, recorded: float, computed: float) -> None:
        """Count a record whose own value can be compared."""
        self.checked += 1
        if abs(recorded - computed) > self.tolerance:
            self.differing += 1
            self.largest.append(Difference(str(location), recorded, computed))
            self.largest.sort(key=lambda item: -abs(item.recorded - item.computed))  # stable
            del self.largest[LARGEST:]


@dataclass(frozen=True, slots=True)
class ScoredRecords:
    """The scores of n records, in the order of the sources."""

    authority_weight: NDArray[np.float64]  # [n], w
    provenance_entropy: NDArray[np.float64]  # [n], H in bits
    classes: Sequence[str]  # source class names by first appearance; ("",) if there are none
    class_of: NDArray[np.int32]  # [n], indices into ``classes``
    locations: Sequence[Location]  # n of them
    checks: Mapping[Quantity, Check]

    def __len__(self) -> int:
        return len(self.class_of)


@dataclass(frozen=True, slots=True)
class Scoring:
    """How records are scored."""

    columns: Columns  # which fields hold w, H and the source class
    table: Table  # how they are computed
    tolerances: Mapping[Quantity, float]
    authority_weight: float | None = None  # w of records without w and ingredients; None: an error
    provenance_entropy: float | None = None  # H in bits of such records, likewise
    recompute: bool = False  # whether a computed value replaces the record's own

    def score(self, quantity: Quantity, fields: Fields, location: Location, check: Check) -> float:
        """The value of a record, counted in ``check``; RecordError if there is none or a field is wrong."""
        read, compute = _FUNCTIONS[quantity]
        names: tuple[str, ...] = getattr(self.columns, quantity)
        default: float | None = getattr(self, quantity)
        recorded = read(fields, self.columns, None) if any(name in fields for name in names) else None
        try:
            computed = compute(fields, self.table)
        except MissingIngredientError as missing:
            if recorded is not None:
                check.unchecked[missing.reason] += 1
                return recorded
            if default is None:
                raise
            check.defaulted += 1
            return default
        if recorded is None:
            check.computed += 1
            return computed
        check.compare(location, recorded, computed)
        return computed if self.recompute else recorded


def score_records(
    sources: Sequence[Source], scoring: Scoring, *, on_progress: Callable[[int], None] | None = None
) -> ScoredRecords:
    """Reads every record once and scores it.

    Raises:
        DataError: a source cannot be read or is empty (one line), or records are wrong (a headline, then a
            line for each of the first different errors).
    """
    parts = [part for source in sources for part in source.parts]
    checks: dict[Quantity, Check] = {name: Check(limit) for name, limit in scoring.tolerances.items()}
    # Typed arrays: lists of Python numbers would take four times the memory.
    values: dict[Quantity, array[float]] = {name: array("d") for name in checks}
    classes = Classes()
    class_of, part_of, lines = array("i"), array("i"), array("q")
    errors = RecordErrors()
    rows = ((index, *row) for index, part in enumerate(parts) for row in part.located_rows())
    for index, location, row in rows:
        row_errors: list[RecordError] = []
        if isinstance(row, RecordError):
            row_errors.append(row)
        else:
            fields = {name: value for name, value in row.items() if value is not None}
            for name, check in checks.items():
                try:
                    values[name].append(scoring.score(name, fields, location, check))
                except RecordError as error:
                    row_errors.append(error)
            class_of.extend(classes.number([read_source(fields, scoring.columns)]).tolist())
        if row_errors:
            errors.add(location, row_errors)  # ``values`` is incomplete from here on, but never returned
        part_of.append(index)
        lines.append(location.line)
        if on_progress is not None and len(lines) % REPORT_EVERY == 0:
            on_progress(len(lines))
    raise_errors(errors, ", ".join(source.name for source in sources), len(lines))
    part_numbers = np.asarray(part_of, np.int32)
    counts = iter(np.bincount(part_numbers, minlength=len(parts)).tolist())
    for source in sources:
        require_records(sum(next(counts) for _ in source.parts), source)
    return ScoredRecords(
        np.asarray(values["authority_weight"], np.float64),
        np.asarray(values["provenance_entropy"], np.float64),
        classes.names,
        np.asarray(class_of, np.int32),
        Locations.from_arrays(
            [(part.name, part.unit) for part in parts], part_numbers, np.asarray(lines, np.int64)
        ),
        checks,
    )


def captions(sources: Sequence[Source], columns: Columns, locations: Collection[str]) -> dict[str, str]:
    """Location -> the title of the record there, or the beginning of its text.

    The sources are read until all locations are described.
    """
    texts: dict[str, str] = {}
    parts = chain.from_iterable(source.parts for source in sources)
    for location, row in chain.from_iterable(part.located_rows() for part in parts):
        where = str(location)
        if where in locations and not isinstance(row, RecordError):
            texts[where] = _caption(row, columns)
            if len(texts) == len(locations):
                break
    return texts


def _caption(fields: Fields, columns: Columns) -> str:
    for value in (fields.get(name) for name in ("title", *columns.content)):
        text = _text_of(value)
        if text:
            words = " ".join(text[: 4 * _CAPTION_CHARACTERS].split())  # a document may be long: split a part
            return words if len(words) <= _CAPTION_CHARACTERS else words[: _CAPTION_CHARACTERS - 1] + "…"
    return ""


def _text_of(value: Any) -> str:
    """A text, or the first turn of a conversation."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = value[0].get("content", value[0].get("value"))
    return value.strip() if isinstance(value, str) else ""
