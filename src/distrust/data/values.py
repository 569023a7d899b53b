"""Reads single JSON values, and quotes them in messages. Every error is a ``RecordError``."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Any, TypeVar

from distrust.data.record_errors import RecordError

T = TypeVar("T")


def of_kind(value: Any, kind: type[T], field: str, remedy: str) -> T:
    """The value, if it is of a type of JSON. RecordError with the remedy otherwise."""
    if not isinstance(value, kind):
        raise RecordError(f"{json_kind(value)}, not {json_kind(kind())}; {remedy}", field=field)
    return value


def read_text(value: Any, field: str, *, empty: bool = True) -> str:
    """A string that a tokenizer can encode; ``empty`` says whether it may be blank. RecordError otherwise."""
    text = of_kind(value, str, field, "give its text")
    if not empty and not text.strip():
        raise RecordError("is empty; add text, or remove the record", field=field)
    try:
        text.encode()  # a lone surrogate, which JSON can hold, would stop the tokenizer
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise RecordError(
            f"half of a surrogate pair ({half}) at character {error.start + 1}; remove it", field=field
        ) from None
    return text


def parse_text(value: Any, field: str) -> Any:
    """A value, or what it holds as JSON if it is a text: None for a blank one."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=unique_members) if value.strip() else None
    except RecordError as error:
        raise RecordError(str(error), field=field) from None
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "a number too long, or nested too deep")
        raise RecordError(f"not valid JSON ({reason}); correct it", field=field) from None


def require_json(value: Any, field: str) -> None:
    """Raise RecordError unless a chat template can print the value, and a tokenizer encode that."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RecordError("holds half of a surrogate pair; remove it", field=field) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise RecordError(f"cannot be written as JSON ({error}); correct it", field=field) from None


def to_number(value: Any, field: str) -> float:
    """A JSON number as a float, ±inf beyond its range; raises RecordError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError(
            f"must be a number, not {json_kind(value)} ({quote_value(value)}); correct it",
            field=field,
        )
    try:
        return float(value)
    except OverflowError:  # an integer beyond the largest float
        return math.inf if value > 0 else -math.inf


# So that the product of the weights of a record and of a message fits into float32.
_WEIGHT = "0, or a number from 1e-15 to 1e15"


def read_factor(
    value: Any, field: str, what: str = _WEIGHT, *, low: float = 1e-15, high: float = 1e15
) -> float:
    """A weight or an entropy: 0, or from ``low`` to ``high``; ``what`` says so in the error."""
    number = to_number(value, field)
    if not (number == 0 or low <= number <= high):
        raise RecordError(f"{quote_value(value)} is not {what}; correct it", field=field)
    return number


def parse_number(text: str) -> float | str:
    """The number that a text holds, as in CSV files, or else the text."""
    try:
        return float(text)
    except ValueError:
        return text


def unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An ``object_pairs_hook`` for JSON that refuses duplicate keys, with a RecordError."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        duplicate = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise RecordError("appears twice in one object; keep one", field=quote_value(duplicate))
    return fields


def json_kind(value: Any) -> str:
    """The JSON type of a value, with its article."""
    # A bool is an int, so it comes first.
    kinds = {bool: "a boolean", int | float: "a number", str: "a string", list: "a list", dict: "an object"}
    for types, name in kinds.items():
        if isinstance(value, types):
            return name
    return "null" if value is None else f"a value of type {type(value).__name__}"


def quote_value(value: Any) -> str:
    """A value for a message: escaped, and at most 40 characters."""
    # Python refuses to print an integer of thousands of digits.
    is_huge = isinstance(value, int) and value.bit_length() >= 200
    quoted = "a huge integer" if is_huge else json.dumps(value, default=repr)
    return quoted if len(quoted) <= 40 else quoted[:39] + "…"


def list_names(names: Iterable[str]) -> str:
    """Column names for a message: the first eight."""
    listed = [quote_value(name) for name in islice(names, 9)]
    return ", ".join(listed[:8]) + (", …" if len(listed) > 8 else "") or "nothing"
