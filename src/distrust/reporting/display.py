"""Text and numbers for terminals, pages and figures.

Names and metadata come from files that anybody may have written. A terminal obeys control characters: they
can hide lines, rename its window, reverse text or type for the user. So everything that is printed goes
through :func:`distrust.errors.printable`, and every name in a page or a figure through :func:`one_line`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

#: Characters of a source class's name in a figure, and in a table of a page.
NAME_CHARACTERS, TABLE_NAME_CHARACTERS = 28, 120
_EXACT_INTEGERS = 10**18  # larger ones are shortened to four digits


def one_line(text: str, characters: int = 10**6) -> str:
    """Text on one line, invisible characters replaced by U+FFFD, cut to a number of characters."""
    # One more than the limit tells whether anything was cut; hostile text may have a million.
    clean = "".join(char if char.isprintable() else "\ufffd" for char in text[: characters + 1])
    return clean if len(clean) <= characters else clean[: characters - 1] + "…"


def class_name(name: str, characters: int = NAME_CHARACTERS) -> str:
    """The displayed name of a source class; the class of examples without one has a name of its own."""
    from distrust.data import NO_CLASS  # late: numpy is slow to load, and `distrust ls` needs none

    return one_line(name, characters) or NO_CLASS


def pluralize(number: float, noun: str) -> str:
    """A count, rounded to an integer, and its noun, with an s unless the count is 1."""
    return f"{number:,.0f} {noun}{'' if round(number) == 1 else 's'}"


def size(nbytes: int) -> str:
    """A number of bytes with three digits and a unit."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def number(value: float) -> str:
    """A metric with four significant digits; integers in full, unless they are astronomical."""
    if not isinstance(value, int):
        return f"{value:#.4g}".rstrip(".")
    if abs(value) < _EXACT_INTEGERS:
        return f"{value:,}"
    from decimal import Decimal  # metadata may hold integers that overflow a float

    return f"{Decimal(value):.4g}"


def clock(seconds: float) -> str:
    """A time as ``h:mm:ss`` or ``m:ss``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def duration(seconds: float) -> str:
    """A time with its unit: milliseconds, seconds, or a clock of minutes or hours."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{clock(seconds)} {'h' if round(seconds) >= 3600 else 'min'}"


def words(value: Any) -> str:
    """The value of an option as words."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return " ".join(map(words, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {words(item)}" for name, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def to_json(value: Any) -> Any:
    """A value for JSON: NaN and infinities, which it lacks, become strings; so do keys and paths."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, PurePath) else value
