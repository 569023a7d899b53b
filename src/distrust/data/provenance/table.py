"""The table that defines how authority weight and provenance entropy are computed.

The defaults are in ``bundled/provenance.toml``; a user's table replaces the keys that it names. The package
ranks no source, person or institution: ranks come from the user.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrust.bundled import PROVENANCE_TABLE
from distrust.errors import ConfigError, shorten
from distrust.options import in_range, read_toml, suggest_name
from distrust.provenance import Coefficients

_IS_AN_ERROR = "error"  # under [missing]: no value replaces a missing one


@dataclass(frozen=True, slots=True)
class Ingredients:
    """The columns that w and H are computed from."""

    rank: str  # rank of the institution: a number in [0, 1], or a name in [ranks]
    citation_count: str  # how often the source is cited
    consensus_count: str  # how many other sources say the same
    evidence: str  # chain of evidence: a list of {"kind", "share", "id"}


@dataclass(frozen=True, slots=True)
class Table:
    """How w and H are computed."""

    name: str  # for messages
    coefficients: Coefficients  # of w
    columns: Ingredients
    missing: Mapping[str, float | None]  # values for records without a rank or count; None: an error
    ranks: Mapping[str, float]  # name -> rank in [0, 1]
    editable: tuple[str, ...]  # kinds of evidence that are not counted


def load_table(path: Path | None = None) -> Table:
    """Load the package's table, with the keys of a user's table in place of its own.

    Raises:
        ConfigError: the file cannot be read, or has unknown keys or wrong values: a line for each.
    """
    sections = read_toml(PROVENANCE_TABLE, "--table")
    if path is not None:
        user_sections = read_toml(path, "--table")
        problems = [f"{path}: {problem}" for problem in _problems(user_sections, sections)]
        if problems:
            raise ConfigError(problems)
        sections = {name: {**keys, **user_sections.get(name, {})} for name, keys in sections.items()}
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


def _problems(sections: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each unknown or wrong entry of a table."""
    problems = []
    for section, keys in sections.items():
        if section not in known:
            problems.append(f"unknown table [{shorten(section)}]{_suggest(section, known)}")
        elif not isinstance(keys, dict):
            problems.append(f"{section} is not a table; write [{section}], and key = value beneath it")
        else:
            for key, value in keys.items():
                # The keys of [ranks] are names that only the user knows.
                if section != "ranks" and key not in known[section]:
                    suggestion = _suggest(key, known[section])
                    problems.append(f"unknown key {shorten(key)!r} in [{section}]{suggestion}")
                elif expected := _expected_type(section, key, value):
                    problems.append(
                        f"{shorten(key)} in [{section}] is {shorten(repr(value))}: give {expected}"
                    )
    return problems


def _expected_type(section: str, key: str, value: Any) -> str | None:
    """What a key's value must be; None if it is."""
    if section == "columns":
        return None if isinstance(value, str) and value else "the name of a column"
    if section == "evidence":
        is_list = isinstance(value, list) and all(isinstance(kind, str) for kind in value)
        return None if is_list else "a list of kinds"
    is_rank = section == "ranks" or (section, key) == ("missing", "rank")  # in [coefficients] it is not
    expected = "a number in [0, 1]" if is_rank else "a number, 0 or more"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    valid = is_number and in_range(value, 0, 1 if is_rank else math.inf)
    if section == "missing":
        return None if valid or value == _IS_AN_ERROR else f'{expected}, or "error"'
    return None if valid else expected


def _suggest(name: str, known: Iterable[str]) -> str:
    return suggest_name(name, known) or f"; give one of {', '.join(known)}"
