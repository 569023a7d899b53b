"""Sources -> records: reads a JSON Lines file and checks every line of it.

A record is one JSON object a line. Its content is ``text``, or ``prompt`` and ``completion``, or
``messages``; its source is ``authority_weight`` and ``provenance_entropy`` (``auth_weight`` and
``prov_entropy`` are the same fields by another name). A null is a field that is not there, as tables
exported to JSON have it; fields of other names are nobody's business here. Nothing is repaired or
skipped: what is wrong is an error, and all wrong lines are told at once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any, TypeVar

from distrust.data.fields import (
    Fields,
    check_authority_weight,
    check_provenance_entropy,
    json_kind,
    read_authority_weight,
    read_content,
    read_provenance_entropy,
    shown,
)
from distrust.data.problems import RecordError, collected
from distrust.data.records import Location, Record
from distrust.errors import ConfigError, DataError

T = TypeVar("T")


def read_records(
    path: str | PathLike[str],
    *,
    default_authority_weight: float | None = None,
    default_provenance_entropy: float | None = None,
) -> list[Record]:
    """Reads a JSON Lines file of records, UTF-8 with or without a byte order mark; blank lines are skipped.

    Args:
        path: the file.
        default_authority_weight: w of records that have none; without it that is an error.
        default_provenance_entropy: H in bits of records that have none; without it that is an error.

    Returns:
        The records in file order, at least one.

    Raises:
        DataError: the file cannot be read or is empty (one line), or records are wrong (a headline, then
            one line for each of the first 20 problems; ``problems`` holds all).
        ConfigError: a default is outside its range.
    """
    name = fspath(path)
    source = _Source(
        _checked_default("default_authority_weight", default_authority_weight, check_authority_weight),
        _checked_default("default_provenance_entropy", default_provenance_entropy, check_provenance_entropy),
    )
    records: list[Record] = []
    problems: list[str] = []
    count = wrong = 0
    for location, raw in _lines(name):
        record, found = _read_line(raw, location, source)
        count += 1
        if record is not None:
            records.append(record)
        else:
            wrong += 1
            problems += [f"{location}: {problem}" for problem in found]
    if problems:
        are = "record is" if count == 1 else "records are"
        raise collected(f"{name}: {wrong} of {count} {are} wrong", problems)
    if not count:
        raise DataError(f"{name}: holds no records; it must be JSON Lines, one JSON object a line")
    return records


@dataclass(frozen=True, slots=True)
class _Source:
    """What a record's source is worth where the record does not say; None where it must."""

    authority_weight: float | None
    provenance_entropy: float | None


def _lines(name: str) -> Iterator[tuple[Location, bytes]]:
    """The lines that are not blank. Only a line feed ends a line: JSON text may hold U+2028 and the like."""
    try:
        with open(name, "rb") as file:
            for number, raw in enumerate(file, 1):
                line = (raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw).rstrip()
                if line:
                    yield Location(name, number), line
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{name}: is a directory; name a JSON Lines file in it") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error


def _read_line(raw: bytes, location: Location, source: _Source) -> tuple[Record | None, list[RecordError]]:
    """The record of a line, or what is wrong with it: content and source are judged independently."""
    problems: list[RecordError] = []

    def attempt(read: Callable[[], T]) -> T | None:
        try:
            return read()
        except RecordError as problem:
            problems.append(problem)
            return None

    fields = attempt(lambda: _decode(raw))
    if fields is None:
        return None, problems
    content = attempt(lambda: read_content(fields))
    weight = attempt(lambda: read_authority_weight(fields, source.authority_weight))
    entropy = attempt(lambda: read_provenance_entropy(fields, source.provenance_entropy))
    if content is None or weight is None or entropy is None:
        return None, problems
    return Record(location, weight, entropy, content), problems


def _decode(raw: bytes) -> Fields:
    """The fields of a line, without those that are null."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise RecordError(f"invalid UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        reason = error.msg[:1].lower() + error.msg[1:]
        raise RecordError(
            f"invalid JSON at column {error.colno}: {reason}; a record is one JSON object on one line"
        ) from None
    except (ValueError, RecursionError):  # a number of thousands of digits; brackets without end
        raise RecordError("JSON with a number too long or nested too deep to read; simplify it") from None
    if not isinstance(value, dict):
        raise RecordError(f"{json_kind(value)}, not a JSON object; a record is one JSON object on one line")
    return {key: field for key, field in value.items() if field is not None}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise RecordError("stands twice in one object; keep one", field=shown(twice))
    return fields


def _checked_default(option: str, value: float | None, check: Callable[[Any, str], float]) -> float | None:
    if value is None:
        return None
    try:
        return check(value, option)
    except RecordError as problem:
        raise ConfigError(str(problem)) from None
