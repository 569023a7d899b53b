"""Checked access to untrusted JSON: each value has its type, or an error names the field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar, get_type_hints

from distrust.checkpoint.checkpoint import MAX_STEP
from distrust.errors import DataError, quote_untrusted

T = TypeVar("T")

#: What the functions below raise.
FIELD_ERRORS = (ValueError, RecursionError)

_DECODE = json.JSONDecoder().decode  # json.loads detects the encoding first: slow for a million lines
_EXPECTED: dict[type, str] = {str: "not a string", list: "not a list", dict: "not an object"}
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def field_error(where: str, error: Exception) -> DataError:
    """The error for the user, with its location."""
    return DataError(f"{where}: {error}; no run writes this: restore the file, or move it away")


def reject(name: str, problem: str) -> NoReturn:
    """Raise the error of a field."""
    raise ValueError(f"{quote_untrusted(name)}: {problem}")


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object."""
    try:
        value = _DECODE(text.decode())  # strict UTF-8
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    except ValueError:  # Python bounds the digits of an integer
        raise ValueError("a number with too many digits") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def integer(record: Mapping[str, Any], name: str) -> int:
    """A count: an integer of 0 or more."""
    value = record.get(name)
    if type(value) is not int or not 0 <= value < MAX_STEP:  # bool is a subclass of int
        reject(name, "not a whole number of 0 or more" if name in record else "missing")
    return value


def number(record: Mapping[str, Any], name: str) -> float:
    """A number; those that JSON lacks are strings: nan, inf, -inf."""
    value = record[name]
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if type(value) not in (int, float):  # not bool
        reject(name, 'neither a number nor "nan", "inf" or "-inf"')
    return _float(value, name)


def finite(value: Any, name: str) -> float:
    """A finite number."""
    if type(value) not in (int, float) or not math.isfinite(number := _float(value, name)):
        reject(name, "not a finite number")
    return number


def _float(value: int | float, name: str) -> float:
    try:
        return float(value)
    except OverflowError:
        reject(name, "too large a number")


def field_of_type(record: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """A string, a list or an object."""
    value = record.get(name)
    return value if isinstance(value, kind) else reject(name, _EXPECTED[kind])


def scalar(record: Mapping[str, Any], name: str) -> str | int | float | None:
    """A number, a string or null."""
    value = record.get(name)
    if value is None or isinstance(value, (str, int, float)):
        return value
    reject(name, "neither a number nor a string")


def build(cls: type[T], record: Mapping[str, Any], name: str) -> tuple[T, ...]:
    """Dataclasses whose fields are all strings, counts or finite numbers, from a list of objects."""
    kinds = get_type_hints(cls)
    instances = []
    for item in field_of_type(record, name, list):
        values = field_of_type({name: item}, name, dict)
        instances.append(cls(**{field: _field(values, field, kinds[field], name) for field in kinds}))
    return tuple(instances)


def _field(record: Mapping[str, Any], name: str, kind: type, parent: str) -> Any:
    if kind is float:
        return finite(record.get(name), f"{parent}.{name}")
    return integer(record, name) if kind is int else field_of_type(record, name, kind)
