"""Validates a record's fields: content, authority weight, provenance entropy and source class.

A null counts as a missing field, as in tables exported to JSON (``Columns.select`` removes it). Nothing is
repaired: each error is a ``RecordError`` that names the field.
"""

from __future__ import annotations

import sys
from typing import Any

from distrust.data.columns import CONTEXT, NOTHING, UNSUPPORTED, Columns, Fields
from distrust.data.conversations import read_conversation
from distrust.data.record_errors import RecordError
from distrust.data.records import Completion, Conversation, Text
from distrust.data.values import list_names, quote_value, read_factor, read_text, to_number
from distrust.weighting import MAX_AUTHORITY_WEIGHT

MAX_SOURCE_LENGTH = 100  # longer source class names are truncated: they appear in logs and figures
# Display name of the class of records that name none; a class of this name counts as none.
NO_CLASS = "(none)"

_GIVE_CONTENT = (
    "give one of them, or name the columns with --text-column, with --prompt-column and --completion-column, "
    "or with --messages-column"
)


def read_content(fields: Fields, columns: Columns) -> Text | Completion | Conversation:
    """The content to train on: exactly one of the three kinds."""
    kinds = columns.kinds_in(fields)
    if not kinds:
        raise RecordError(_no_content(columns), detail=f" (there is {list_names(fields)})")
    if len(kinds) > 1:
        choices = " or ".join(columns.choice(names_of_kind, fields) for names_of_kind in kinds.values())
        raise RecordError(f"{' and '.join(kinds)} in one record; keep one, or choose one with {choices}")
    ((kind, names),) = kinds.items()
    if names == columns.messages:
        first, *alternatives = (name for name in names if name in fields)
        if alternatives:
            problem = f"present together with {alternatives[0]}; choose one with --messages-column"
            raise RecordError(problem, field=first)
        content: Text | Completion | Conversation = read_conversation(fields, None, first)
    elif names == (columns.text,):
        content = Text(read_text(fields[names[0]], names[0], empty=False))
    else:
        content = _completion(fields, names[:-1], names[-1])
    if not columns.explicit:  # options choose what is read
        unread = UNSUPPORTED if isinstance(content, Conversation) else CONTEXT + UNSUPPORTED
        for name in (name for name in unread if name in fields and fields[name] not in NOTHING):
            # A label is a class, unless it says of an answer whether it is good.
            is_verdict = isinstance(fields[name], bool) and not isinstance(content, Text)
            if name != "label" or is_verdict:
                rewrite = "write it into the turns of messages, " * (name in CONTEXT)
                raise RecordError(
                    f"cannot be honoured with {kind}; {rewrite}remove it, or name the columns to train on "
                    f"({columns.choice(names, fields)})",
                    field=name,
                )
    return content


def _no_content(columns: Columns) -> str:
    *kinds, last = columns.kinds
    remedy = f"correct {' or '.join(columns.options)}" if columns.explicit else _GIVE_CONTENT
    return f"{', '.join(f'no {kind}' for kind in kinds)}{', and ' * bool(kinds)}no {last}; {remedy}"


def _completion(fields: Fields, prompts: tuple[str, ...], name: str) -> Completion | Conversation:
    present = [prompt for prompt in prompts if prompt in fields]
    if not present or name not in fields:
        missing, partner = (name, present[0]) if present else (prompts[0], name)
        problem = f"missing, but {partner} is present; give both, or only text"
        raise RecordError(problem, field=missing, detail=f" (there is {list_names(fields)})")
    if len(prompts) == 1 and isinstance(fields[present[0]], list) and isinstance(fields[name], list):
        return read_conversation(fields, present[0], name)  # both are lists of turns
    texts = [read_text(fields[prompt], prompt) for prompt in present]
    # A single prompt is used as it is; several are joined by empty lines, blank ones left out.
    prompt = texts[0] if len(prompts) == 1 else "".join(f"{text}\n\n" for text in texts if text.strip())
    return Completion(prompt, read_text(fields[name], name, empty=False))


def read_authority_weight(fields: Fields, columns: Columns, default: float | None) -> float:
    """The record's w in [0, 0.99], or the default."""
    value, field = _field_value(fields, columns.authority_weight, default, "--default-authority-weight")
    number = to_number(value, field)
    if 0 <= number <= MAX_AUTHORITY_WEIGHT:
        return number
    if 0 <= number <= 1:  # 1 is a natural mistake, with an obvious fix
        problem = f"above {MAX_AUTHORITY_WEIGHT}, the largest authority weight; write {MAX_AUTHORITY_WEIGHT}"
    else:
        problem = (
            f"outside [0, {MAX_AUTHORITY_WEIGHT}]; 0 is a primary record (most training weight), "
            f"{MAX_AUTHORITY_WEIGHT} coordinated consensus (least)"
        )
    raise RecordError(f"{quote_value(value)} is {problem}", field=field)


def read_provenance_entropy(fields: Fields, columns: Columns, default: float | None) -> float:
    """The record's H in bits, finite and not negative, or the default."""
    value, field = _field_value(fields, columns.provenance_entropy, default, "--default-provenance-entropy")
    return read_factor(value, field, "in [0, ∞) bits", low=0, high=sys.float_info.max)


def read_weight(fields: Fields, columns: Columns, default: float | None) -> float:
    """The record's own weight, else the default, else 1."""
    present = [name for name in columns.weight if name in fields]
    return read_factor(fields[present[0]], present[0]) if present else 1.0 if default is None else default


def read_source(fields: Fields, columns: Columns) -> str:
    """The record's source class: a string, or a number or boolean as JSON writes it; "" for none."""
    value = next((fields[name] for name in columns.source if name in fields), "")
    if isinstance(value, str):
        # For display only, so nothing is refused: lone surrogates are replaced.
        name = " ".join(value.encode("utf-8", "replace").decode().split())[:MAX_SOURCE_LENGTH]
        return "" if name == NO_CLASS else name
    return quote_value(value) if isinstance(value, bool | int | float) else ""


def _field_value(fields: Fields, names: tuple[str, ...], default: float | None, flag: str) -> tuple[Any, str]:
    """The value of a field with alternative names, and the name that it has in this record."""
    present = [name for name in names if name in fields]
    if not present:
        if default is None:
            raise RecordError(
                f"missing; add it, or give {flag} for records without it, or --weighting off", field=names[0]
            )
        return default, names[0]
    if len(present) == 2 and fields[names[0]] != fields[names[1]]:
        values = " and ".join(quote_value(fields[name]) for name in names)
        raise RecordError(f"differs from its other name, {names[1]} ({values}); keep one", field=names[0])
    return fields[present[0]], present[0]
