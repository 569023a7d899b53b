"""The user's table -> what the ingredients of w and H are called and count for.

The defaults stand in ``bundled/provenance.toml`` and nowhere else; a table of the user replaces what it
names. No source, person or institution is named there: who ranks how is the user's to say.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrust.bundled import PROVENANCE_TABLE
from distrust.config import in_range, suggest_name
from distrust.errors import ConfigError, read_failure_reason, shorten
from distrust.provenance import Coefficients

_IS_AN_ERROR = "error"


@dataclass(frozen=True, slots=True)
class Ingredients:
    """The columns that w and H are computed from.

    Attributes:
        rank: of the institution: a number in [0, 1], or a name.
        citation_count: how often the source is cited.
        consensus_count: how many others say the same.
        evidence: the chain of evidence.
    """

    rank: str
    citation_count: str
    consensus_count: str
    evidence: str


@dataclass(frozen=True, slots=True)
class Table:
    """How w and H are computed.

    Attributes:
        name: for messages.
        coefficients: of w.
        columns: the names of the ingredients' columns.
        missing: what the rank and the counts are in a record without them; None where that is an error.
        ranks: name -> rank in [0, 1].
        editable: kinds of evidence that count for nothing.
    """

    name: str
    coefficients: Coefficients
    columns: Ingredients
    missing: Mapping[str, float | None]
    ranks: Mapping[str, float]
    editable: tuple[str, ...]


def load_table(path: Path | None = None) -> Table:
    """The table that comes with the package, and above it one of the user's.

    Raises:
        ConfigError: the file cannot be read, or naming everything in it that is unknown or wrong.
    """
    sections = _read(PROVENANCE_TABLE)
    if path is not None:
        given = _read(path)
        problems = [f"{path}: {problem}" for problem in _problems(given, sections)]
        if problems:
            raise ConfigError("\n".join(problems))
        sections = {name: {**keys, **given.get(name, {})} for name, keys in sections.items()}
    return Table(
        name="the table" if path is None else str(path),
        coefficients=Coefficients(**{key: float(value) for key, value in sections["coefficients"].items()}),
        columns=Ingredients(**sections["columns"]),
        missing={
            key: None if value == _IS_AN_ERROR else float(value) for key, value in sections["missing"].items()
        },
        ranks={name: float(rank) for name, rank in sections["ranks"].items()},
        editable=tuple(sections["evidence"]["editable"]),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"--table {path}: {read_failure_reason(error)}") from None
    except (ValueError, RecursionError) as error:  # TOML, UTF-8, a number of thousands of digits
        raise ConfigError(f"--table {path}: not valid TOML: {error}") from None


def _problems(given: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is unknown or wrong in a table, a line each."""
    problems = []
    for section, keys in given.items():
        if section not in known:
            problems.append(f"unknown table [{shorten(section)}]{_suggest(section, known)}")
        elif not isinstance(keys, dict):
            problems.append(f"{section} is no table; write [{section}], and key = value beneath it")
        else:
            for key, value in keys.items():
                # Ranks are of names that only the user knows.
                if section != "ranks" and key not in known[section]:
                    there = known[section]
                    problems.append(f"unknown key {shorten(key)!r} in [{section}]{_suggest(key, there)}")
                elif wanted := _expected_type(section, key, value):
                    problems.append(f"{shorten(key)} in [{section}] is {shorten(repr(value))}: give {wanted}")
    return problems


def _expected_type(section: str, key: str, value: Any) -> str | None:
    """What a key's value should be, if it is not."""
    match section:
        case "coefficients":
            return None if _is_number(value) else "a number, 0 or more"
        case "columns":
            return None if isinstance(value, str) and value else "the name of a column"
        case "missing" if key == "rank":
            return None if value == _IS_AN_ERROR or _is_number(value, 1) else 'a number in [0, 1], or "error"'
        case "missing":
            return None if value == _IS_AN_ERROR or _is_number(value) else 'a number, 0 or more, or "error"'
        case "ranks":
            return None if _is_number(value, 1) else "a number in [0, 1]"
        case _:
            is_list = isinstance(value, list) and all(isinstance(kind, str) for kind in value)
            return None if is_list else "a list of kinds"


def _is_number(value: Any, high: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and in_range(value, 0, high)


def _suggest(name: str, known: Iterable[str]) -> str:
    return suggest_name(name, known) or f"; give one of {', '.join(known)}"
