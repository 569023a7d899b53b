"""Computes the w and H of a record from its fields and a table.

Errors are ``RecordError`` and name the field. A missing ingredient is a ``MissingIngredientError``: it is no
error for a record that states its own w or H.
"""

from __future__ import annotations

import json
import math
from typing import Any

from distrust import provenance
from distrust.data.columns import Fields
from distrust.data.provenance.table import Table
from distrust.data.record_errors import RecordError
from distrust.data.values import json_kind, parse_number, quote_value, to_number, unique_members
from distrust.provenance import Evidence

_COUNTS = ("citation_count", "consensus_count")

# Decimal places of computed values: more would suggest a precision that ranks and shares do not have.
DIGITS = 6


class MissingIngredientError(RecordError):
    """A value that w or H is computed from is missing."""

    def __init__(self, problem: str, *, field: str, reason: str) -> None:
        super().__init__(problem, field=field)
        self.reason = reason  # equal for all records that lack the same value


def authority_weight(fields: Fields, table: Table) -> float:
    """The w of a record from its rank and counts, to ``DIGITS`` decimal places."""
    names = {key: getattr(table.columns, key) for key in ("rank", *_COUNTS)}
    present = {key for key, name in names.items() if fields.get(name, "") != ""}  # "": an empty CSV cell
    absent = [name for key, name in names.items() if key not in present and table.missing[key] is None]
    if absent:
        raise MissingIngredientError(
            "missing, so authority_weight cannot be computed; add it, give its replacement under [missing] "
            "of a --table, or give --default-authority-weight",
            field=" and ".join(absent),
            reason=f"no {' and no '.join(absent)}",
        )
    counts = {
        key: _non_negative(fields[names[key]], names[key], "a count, 0 or more; correct it")
        if key in present
        else float(table.missing[key] or 0)
        for key in _COUNTS
    }
    rank = _rank(fields[names["rank"]], table) if "rank" in present else float(table.missing["rank"] or 0)
    return round(provenance.authority_weight(rank=rank, coefficients=table.coefficients, **counts), DIGITS)


def _rank(value: Any, table: Table) -> float:
    field = table.columns.rank
    if isinstance(value, str):
        if value in table.ranks:
            return table.ranks[value]
        value = parse_number(value)  # a CSV file's number
        if isinstance(value, str):
            raise MissingIngredientError(
                f"{quote_value(value)} has no rank; give it one under [ranks] of a --table",
                field=field,
                reason=f"{field} not in [ranks] of {table.name}",
            )
    number = to_number(value, field)
    if not 0 <= number <= 1:
        raise RecordError(f"{quote_value(value)} is outside [0, 1]; 1 is the highest rank", field=field)
    return number


def _non_negative(value: Any, field: str, expected: str) -> float:
    """A finite number, 0 or more; also as text, as all values of CSV files are."""
    number = to_number(parse_number(value) if isinstance(value, str) else value, field)
    if not 0 <= number < math.inf:
        raise RecordError(f"{quote_value(value)} is not {expected}", field=field)
    return number


def provenance_entropy(fields: Fields, table: Table) -> float:
    """The H of a record in bits from its chain of evidence, to ``DIGITS`` decimal places."""
    field = table.columns.evidence
    chain = fields.get(field, "")
    if chain == "":
        raise MissingIngredientError(
            "missing, so provenance_entropy cannot be computed; add it ([] for no evidence), or give "
            "--default-provenance-entropy",
            field=field,
            reason=f"no {field}",
        )
    if isinstance(chain, str):  # a CSV file's cell holds the list as JSON
        try:
            chain = json.loads(chain, object_pairs_hook=unique_members)
        except (ValueError, RecursionError):
            raise RecordError(f"{quote_value(chain)} is not a list, nor JSON of one", field=field) from None
    if not isinstance(chain, list):
        raise RecordError(f'{json_kind(chain)}, not a list; give a list of {{"kind", "share"}}', field=field)
    items = [_item(item, f"{field}[{index}]") for index, item in enumerate(chain)]
    if items and not any(item.share for item in items):
        raise RecordError("all shares are 0; give at least one share above 0", field=field)
    return round(provenance.provenance_entropy(items, editable=table.editable), DIGITS)


def _item(item: Any, field: str) -> Evidence:
    if not isinstance(item, dict):
        raise RecordError(f'{json_kind(item)}, not an object; give {{"kind", "share"}}', field=field)
    kind, share, name = item.get("kind"), item.get("share"), item.get("id")
    if not isinstance(kind, str) or not kind.strip():
        problem = "missing" if kind is None else f"{quote_value(kind)} is not a kind"
        raise RecordError(f'{problem}; give a name such as "notebook"', field=f"{field}.kind")
    if share is None:
        raise RecordError("missing; give its share of the chain", field=f"{field}.share")
    number = _non_negative(share, f"{field}.share", "a finite share, 0 or more")
    if isinstance(name, float) and name.is_integer():  # tables store a column of integers with gaps as floats
        name = int(name)
    if isinstance(name, bool) or not isinstance(name, str | int | None):
        problem = f"{json_kind(name)} ({quote_value(name)}), not a name or a whole number; give one of these"
        raise RecordError(problem, field=f"{field}.id")
    return Evidence(kind, number, None if name is None else str(name))
