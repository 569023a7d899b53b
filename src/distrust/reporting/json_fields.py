"""Values of JSON that anybody may have written: each is what it should be, or an error that names it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from distrust.checkpoint.checkpoint import MAX_STEP
from distrust.errors import DataError, quote_untrusted

_DECODE = json.JSONDecoder().decode  # json.loads would first guess the encoding, a million times
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


#: What the functions below raise.
WRONG = (ValueError, RecursionError)


def field_error(where: str, error: Exception) -> DataError:
    """The error for the user, with the place where it stands."""
    return DataError(f"{where}: {error}; no run writes that: restore the file, or move it away")


def refuse(name: str, what: str) -> NoReturn:
    """Say what is wrong with a field."""
    raise ValueError(f"{quote_untrusted(name)}: {what}")


def parse_object(text: bytes) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = _DECODE(text.decode())
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    except ValueError:  # of Python's own bound
        raise ValueError("a number with too many digits") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def integer(record: Mapping[str, Any], name: str) -> int:
    """A number that counts something."""
    value = record.get(name)
    if type(value) is not int or not 0 <= value < MAX_STEP:
        refuse(name, "not a whole number of 0 or more" if name in record else "missing")
    return value


def number(record: Mapping[str, Any], name: str) -> float:
    """A number; one that is not finite is written as a word."""
    value = record[name]
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if type(value) not in (int, float):
        refuse(name, 'neither a number nor "nan", "inf" or "-inf"')
    return _float(value, name)


def finite(value: Any, name: str) -> float:
    """A finite number."""
    if type(value) not in (int, float) or not math.isfinite(number := _float(value, name)):
        refuse(name, "not a finite number")
    return number


def _float(value: int | float, name: str) -> float:
    try:
        return float(value)
    except OverflowError:
        refuse(name, "too large a number")


def text(record: Mapping[str, Any], name: str) -> str:
    """A string."""
    value = record.get(name)
    if not isinstance(value, str):
        refuse(name, "not a string")
    return value


def scalar(record: Mapping[str, Any], name: str) -> str | int | float | None:
    """A number, a string, or nothing."""
    value = record.get(name)
    if not isinstance(value, (str, int, float, type(None))):
        refuse(name, "neither a number nor a string")
    return value


def items(record: Mapping[str, Any], name: str) -> list[Any]:
    """A list."""
    value = record.get(name)
    if not isinstance(value, list):
        refuse(name, "not a list")
    return value


def mapping(value: Any, name: str) -> dict[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        refuse(name, "not an object")
    return value
