"""How wrong records are told: all of them at once, each with file, line, field and remedy."""

from __future__ import annotations

from collections.abc import Sequence

from distrust.errors import DataError

SHOWN = 20
"""How many problems a message lists; the error's ``problems`` holds all."""


class RecordError(Exception):
    """What is wrong with one record. It never leaves this package: it ends in the list of all of them.

    Args:
        what: what is wrong with it; what to do.
        field: the record's field, such as ``messages[2].content``; None for the record as a whole.
    """

    def __init__(self, what: str, *, field: str | None = None) -> None:
        super().__init__(what if field is None else f"{field}: {what}")


def collected(headline: str, problems: Sequence[str]) -> DataError:
    """One error for all the problems: the headline, the first ``SHOWN`` of them, and how many more."""
    lines = [headline, *problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"and {len(problems) - SHOWN} more")
    return DataError("\n".join(lines), problems)
