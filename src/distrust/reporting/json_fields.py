"""Checked access to untrusted JSON: each value has its type, or an error names the field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from distrust.checkpoint.checkpoint import MAX_STEP
from distrust.errors import DataError, quote_untrusted

#: What the functions below raise.
FIELD_ERRORS = (ValueError, RecursionError)

_DECODE = json.JSONDecoder().decode  # json.loads detects the encoding first: slow for a million lines
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
        value = _DECODE(text.decode())
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
    if type(value) not in (int, float):
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


def text(record: Mapping[str, Any], name: str) -> str:
    """A string."""
    value = record.get(name)
    if not isinstance(value, str):
        reject(name, "not a string")
    return value


def scalar(record: Mapping[str, Any], name: str) -> str | int | float | None:
    """A number, a string or null."""
    value = record.get(name)
    if not isinstance(value, (str, int, float, type(None))):
        reject(name, "neither a number nor a string")
    return value


def items(record: Mapping[str, Any], name: str) -> list[Any]:
    """A list."""
    value = record.get(name)
    if not isinstance(value, list):
        reject(name, "not a list")
    return value


def mapping(value: Any, name: str) -> dict[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        reject(name, "not an object")
    return value
