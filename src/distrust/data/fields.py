"""A record's fields -> what is learned of it and what its source is worth, each checked.

A null is a field that is not there, as tables exported to JSON have it (``formats`` leaves it out). Nothing
is repaired: what is wrong is a ``RecordError`` that names the field.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast, get_args

from distrust.data.columns import Columns
from distrust.data.record_errors import RecordError
from distrust.data.records import Completion, Conversation, Message, Role, Text
from distrust.weighting import MAX_AUTHORITY_WEIGHT

Fields = Mapping[str, Any]
"""The fields of one record, none of them null."""

_ROLES: tuple[str, ...] = get_args(Role)

#: Who speaks, where turns are written as {"from", "value"}.
_SPEAKERS = {"human": "user", "gpt": "assistant", **{role: role for role in _ROLES}}

#: Longer names of source classes are cut: they stand in logs and in pictures.
MAX_SOURCE_LENGTH = 100
#: What the class of records that name none is shown as; one of that name is the same.
NO_CLASS = "(none)"

# Chat templates print these too: a turn without them would be learned as something that was never said.
_UNSUPPORTED_IN_TURN = ("function_call", "reasoning_content", "thinking", "tool_calls")


def read_content(fields: Fields, columns: Columns) -> Text | Completion | Conversation:
    """What the record teaches: exactly one of the three kinds of content."""
    kinds = [kind for kind, names in columns.kinds.items() if any(name in fields for name in names)]
    if not kinds:
        raise RecordError(_no_content(fields, columns))
    if len(kinds) > 1:
        raise RecordError(
            f"{' and '.join(kinds)} in one record; keep one of them, or choose one with --text-column, "
            "--completion-column or --messages-column"
        )
    names = columns.kinds[kinds[0]]
    if names == (columns.text,):
        return Text(_string(fields[names[0]], names[0], empty=False))
    if names == columns.messages:
        return _chat(fields, [name for name in names if name in fields])
    return _completion(fields, columns.prompt, str(columns.completion))


def _no_content(fields: Fields, columns: Columns) -> str:
    *kinds, last = columns.kinds
    none = f"no {', no '.join(kinds)}, and no {last}" if kinds else f"no {last}"
    there = ", ".join(quote_value(key) for key in list(fields)[:8]) or "nothing"
    remedy = (
        "correct the option that names it"
        if columns.explicit
        else (
            "give one of them, or name the columns with --text-column, with --prompt-column and "
            "--completion-column, or with --messages-column"
        )
    )
    return f"{none}; {remedy} (there is {there})"


def _completion(fields: Fields, prompts: tuple[str, ...], name: str) -> Completion | Conversation:
    given = [prompt for prompt in prompts if prompt in fields]
    if not given:
        raise RecordError(f"missing beside {name}; give both, or only text", field=prompts[0])
    if name not in fields:
        raise RecordError(f"missing beside {given[0]}; give both, or only text", field=name)
    if len(prompts) == 1 and isinstance(fields[given[0]], list) and isinstance(fields[name], list):
        asked = _messages(fields[given[0]], given[0])
        return _conversation(asked, _messages(fields[name], name), name)
    texts = [_string(fields[prompt], prompt) for prompt in given]
    prompt = texts[0] if len(prompts) == 1 else "".join(f"{text}\n\n" for text in texts if text.strip())
    return Completion(prompt, _string(fields[name], name, empty=False))


def _chat(fields: Fields, names: list[str]) -> Conversation:
    if len(names) > 1:
        raise RecordError(f"stands beside {names[1]}; choose one with --messages-column", field=names[0])
    (name,) = names
    value = fields[name]
    if not isinstance(value, list) or not value:
        what = "empty" if value == [] else f"{json_kind(value)}, not a list"
        raise RecordError(f'{what}; give a list of {{"role", "content"}}', field=name)
    return _conversation((), _messages(value, name), name)


def _messages(turns: list[Any], name: str) -> tuple[Message, ...]:
    return tuple(_message(item, f"{name}[{index}]") for index, item in enumerate(turns))


def _conversation(asked: tuple[Message, ...], told: tuple[Message, ...], name: str) -> Conversation:
    """Of turns that are only read, and turns of which the assistant's are learned."""
    if all(message.role != "assistant" for message in told):
        raise RecordError("no assistant turn; there is nothing to learn from it", field=name)
    if (asked + told)[0].role == "assistant":
        raise RecordError(
            "begins with the assistant; a chat template needs a user's or system turn before it",
            field=f"{name}[0]",
        )
    return Conversation(asked + told, trained_turns=len(asked))


def _message(item: Any, field: str) -> Message:
    if not isinstance(item, dict):
        raise RecordError(f'{json_kind(item)}, not an object; give {{"role", "content"}}', field=field)
    for name in _UNSUPPORTED_IN_TURN:
        if item.get(name):
            raise RecordError(
                "is not supported; write it into content, or leave it out", field=f"{field}.{name}"
            )
    who, what = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    named = item.get(who)
    role = _SPEAKERS.get(named, named) if who == "from" and isinstance(named, str) else named
    if role not in _ROLES:
        problem = "missing" if named is None else f"unknown: {quote_value(named)}"
        raise RecordError(f"{problem}; give one of {', '.join(_ROLES)}", field=f"{field}.{who}")
    content = item.get(what)
    if content is None:
        raise RecordError("missing; give the text of the turn", field=f"{field}.{what}")
    return Message(cast(Role, role), _string(content, f"{field}.{what}", empty=role != "assistant"))


def _string(value: Any, field: str, *, empty: bool = True) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{json_kind(value)}, not a string; give its text", field=field)
    if not empty and not value.strip():
        raise RecordError("empty; give it some text, or remove the record", field=field)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise RecordError(
            f"half of a surrogate pair ({half}) at character {error.start + 1}; remove it", field=field
        ) from None
    return value


def read_authority_weight(fields: Fields, columns: Columns, default: float | None) -> float:
    """The record's w, or the default where it has none."""
    names = columns.authority_weight
    return check_authority_weight(*_field_value(fields, names, default, "--default-authority-weight"))


def read_provenance_entropy(fields: Fields, columns: Columns, default: float | None) -> float:
    """The record's H in bits, or the default where it has none."""
    names = columns.provenance_entropy
    return check_provenance_entropy(*_field_value(fields, names, default, "--default-provenance-entropy"))


def read_source(fields: Fields, columns: Columns) -> str:
    """The class of the record's source: a name, or a number or a truth value as JSON writes it."""
    value = next((fields[name] for name in columns.source if name in fields), "")
    if isinstance(value, str):
        # Shown only, so nothing is refused: what no file can hold is replaced.
        name = " ".join(value.encode("utf-8", "replace").decode().split())[:MAX_SOURCE_LENGTH]
        return "" if name == NO_CLASS else name
    return quote_value(value) if isinstance(value, bool | int | float) else ""


def _field_value(fields: Fields, names: tuple[str, ...], default: float | None, flag: str) -> tuple[Any, str]:
    """The value of a field that goes by any of some names, and the name it goes by here."""
    given = [name for name in names if name in fields]
    if not given:
        if default is None:
            raise RecordError(
                f"missing; add it, or give {flag} for records without it, or --weighting off", field=names[0]
            )
        return default, names[0]
    if len(given) == 2 and fields[names[0]] != fields[names[1]]:
        values = " and ".join(quote_value(fields[name]) for name in names)
        raise RecordError(f"differs from its other name, {names[1]} ({values}); keep one", field=names[0])
    return fields[given[0]], given[0]


def check_authority_weight(value: Any, field: str) -> float:
    """The value as a w, if it is one."""
    number = _number(value, field)
    if MAX_AUTHORITY_WEIGHT < number <= 1:
        raise RecordError(
            f"{quote_value(value)} is above {MAX_AUTHORITY_WEIGHT}, the highest authority there is; "
            f"write {MAX_AUTHORITY_WEIGHT}",
            field=field,
        )
    if not 0 <= number <= MAX_AUTHORITY_WEIGHT:
        raise RecordError(
            f"{quote_value(value)} is outside [0, {MAX_AUTHORITY_WEIGHT}]; "
            f"0 is no authority, {MAX_AUTHORITY_WEIGHT} the highest",
            field=field,
        )
    return number


def check_provenance_entropy(value: Any, field: str) -> float:
    """The value as an H in bits, if it is one."""
    number = _number(value, field)
    if not (math.isfinite(number) and number >= 0):
        raise RecordError(
            f"{quote_value(value)} is not a finite number of bits, 0 or more; correct it", field=field
        )
    return number


def _number(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError(
            f"{json_kind(value)} ({quote_value(value)}), not a number; write it as one", field=field
        )
    try:
        return float(value)
    except OverflowError:  # an integer beyond the largest float
        return math.inf if value > 0 else -math.inf


def unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The members of an object of JSON, for ``object_pairs_hook``.

    Raises:
        RecordError: for a name that stands twice: which of the values counts is not said.
    """
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise RecordError("stands twice in one object; keep one", field=quote_value(twice))
    return fields


def json_kind(value: Any) -> str:
    """What JSON calls it."""
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "a string", list: "a list", dict: "an object", type(None): "null"}
    if isinstance(value, int | float):
        return "a number"
    return names.get(type(value), f"a value of type {type(value).__name__}")


def quote_value(value: Any) -> str:
    """A value for a message: no control characters, no surrogates, not too long."""
    shown = (
        json.dumps(value, default=repr)
        if not isinstance(value, int) or value.bit_length() < 200
        else "a huge integer"
    )
    return shown if len(shown) <= 40 else shown[:39] + "…"
