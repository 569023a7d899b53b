"""Checked access to untrusted JSON: each value has its type, or an error names the field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar, cast, get_type_hints

from distrust.checkpoint.checkpoint import MAX_STEP
from distrust.errors import DataError, quote_untrusted

T = TypeVar("T")

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


def text(record: Mapping[str, Any], name: str) -> str:
    """A string."""
    return cast(str, _require(record.get(name), str, name, "not a string"))


def scalar(record: Mapping[str, Any], name: str) -> str | int | float | None:
    """A number, a string or null."""
    value = _require(record.get(name), (str, int, float, type(None)), name, "neither a number nor a string")
    return cast("str | int | float | None", value)


def items(record: Mapping[str, Any], name: str) -> list[Any]:
    """A list."""
    return cast("list[Any]", _require(record.get(name), list, name, "not a list"))


def mapping(value: Any, name: str) -> dict[str, Any]:
    """An object."""
    return cast("dict[str, Any]", _require(value, dict, name, "not an object"))


def _require(value: Any, types: type | tuple[type, ...], name: str, problem: str) -> Any:
    return value if isinstance(value, types) else reject(name, problem)


def build(cls: type[T], value: Any, name: str) -> T:
    """A dataclass whose fields are all strings, counts or finite numbers, from an object."""
    record = mapping(value, name)
    values: dict[str, Any] = {}
    for field, kind in get_type_hints(cls).items():
        if kind is float:
            values[field] = finite(record.get(field), f"{name}.{field}")
        else:
            values[field] = integer(record, field) if kind is int else text(record, field)
    return cls(**values)
