"""A record's fields -> what is learned of it and what its source is worth, each checked.

A null is a field that is not there, as tables exported to JSON have it (``sources`` leaves it out). Nothing
is repaired: what is wrong is a ``RecordError`` that names the field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, get_args

from distrust.data.problems import RecordError
from distrust.data.records import Completion, Conversation, Message, Role, Text
from distrust.weighting import MAX_AUTHORITY_WEIGHT

Fields = Mapping[str, Any]
"""The fields of one record, none of them null."""

_KINDS = {"text": ("text",), "prompt + completion": ("prompt", "completion"), "messages": ("messages",)}
_ROLES: tuple[str, ...] = get_args(Role)

# Chat templates print these too: a turn without them would be learned as something that was never said.
_UNSUPPORTED_IN_TURN = ("function_call", "reasoning_content", "thinking", "tool_calls")


def read_content(fields: Fields) -> Text | Completion | Conversation:
    """What the record teaches: exactly one of the three kinds of content."""
    kinds = [kind for kind, names in _KINDS.items() if any(name in fields for name in names)]
    if not kinds:
        there = ", ".join(shown(key) for key in list(fields)[:8]) or "nothing"
        raise RecordError(
            f"no text, no prompt + completion, and no messages; give one of them (there is {there})"
        )
    if len(kinds) > 1:
        raise RecordError(f"{' and '.join(kinds)} in one record; keep one of them")
    if kinds == ["text"]:
        return Text(_string(fields["text"], "text", empty=False))
    if kinds == ["messages"]:
        return _conversation(fields["messages"])
    for name, other in (("prompt", "completion"), ("completion", "prompt")):
        if name not in fields:
            raise RecordError(f"missing beside {other}; give both, or only text", field=name)
    return Completion(
        _string(fields["prompt"], "prompt"), _string(fields["completion"], "completion", empty=False)
    )


def _conversation(value: Any) -> Conversation:
    if not isinstance(value, list) or not value:
        what = "empty" if value == [] else f"{json_kind(value)}, not a list"
        raise RecordError(f'{what}; give a list of {{"role", "content"}}', field="messages")
    messages = tuple(_message(item, f"messages[{index}]") for index, item in enumerate(value))
    if all(message.role != "assistant" for message in messages):
        raise RecordError("no assistant turn; there is nothing to learn from it", field="messages")
    if messages[0].role == "assistant":
        raise RecordError(
            "begins with the assistant; a chat template needs a user's or system turn before it",
            field="messages[0]",
        )
    return Conversation(messages)


def _message(item: Any, field: str) -> Message:
    if not isinstance(item, dict):
        raise RecordError(f'{json_kind(item)}, not an object; give {{"role", "content"}}', field=field)
    for name in _UNSUPPORTED_IN_TURN:
        if item.get(name):
            raise RecordError(
                "is not supported; write it into content, or leave it out", field=f"{field}.{name}"
            )
    role = item.get("role")
    if role not in _ROLES:
        what = "missing" if role is None else f"unknown: {shown(role)}"
        raise RecordError(f"{what}; give one of {', '.join(_ROLES)}", field=f"{field}.role")
    content = item.get("content")
    if content is None:
        raise RecordError("missing; give the text of the turn", field=f"{field}.content")
    return Message(role, _string(content, f"{field}.content", empty=role != "assistant"))


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


def read_authority_weight(fields: Fields, default: float | None) -> float:
    """The record's w, or the default where it has none."""
    names = ("authority_weight", "auth_weight")
    return check_authority_weight(*_named(fields, names, default, "--default-authority-weight"))


def read_provenance_entropy(fields: Fields, default: float | None) -> float:
    """The record's H in bits, or the default where it has none."""
    names = ("provenance_entropy", "prov_entropy")
    return check_provenance_entropy(*_named(fields, names, default, "--default-provenance-entropy"))


def _named(fields: Fields, names: tuple[str, str], default: float | None, flag: str) -> tuple[Any, str]:
    """The value of a field that goes by either of two names, and the name it goes by here."""
    given = [name for name in names if name in fields]
    if not given:
        if default is None:
            raise RecordError(f"missing; add it, or give {flag} for records without it", field=names[0])
        return default, names[0]
    if len(given) == 2 and fields[names[0]] != fields[names[1]]:
        values = " and ".join(shown(fields[name]) for name in names)
        raise RecordError(f"differs from its other name, {names[1]} ({values}); keep one", field=names[0])
    return fields[given[0]], given[0]


def check_authority_weight(value: Any, field: str) -> float:
    """The value as a w, if it is one."""
    number = _number(value, field)
    if MAX_AUTHORITY_WEIGHT < number <= 1:
        raise RecordError(
            f"{shown(value)} is above {MAX_AUTHORITY_WEIGHT}, the highest authority there is; "
            f"write {MAX_AUTHORITY_WEIGHT}",
            field=field,
        )
    if not 0 <= number <= MAX_AUTHORITY_WEIGHT:
        raise RecordError(
            f"{shown(value)} is outside [0, {MAX_AUTHORITY_WEIGHT}]; "
            f"0 is no authority, {MAX_AUTHORITY_WEIGHT} the highest",
            field=field,
        )
    return number


def check_provenance_entropy(value: Any, field: str) -> float:
    """The value as an H in bits, if it is one."""
    number = _number(value, field)
    if not (math.isfinite(number) and number >= 0):
        raise RecordError(
            f"{shown(value)} is not a finite number of bits, 0 or more; correct it", field=field
        )
    return number


def _number(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError(f"{json_kind(value)} ({shown(value)}), not a number; write it as one", field=field)
    try:
        return float(value)
    except OverflowError:  # an integer beyond the largest float
        return math.inf if value > 0 else -math.inf


def json_kind(value: Any) -> str:
    """What JSON calls it."""
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "a string", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), "a number")


def shown(value: Any) -> str:
    """A value for a message: no control characters, no surrogates, not too long."""
    shown = json.dumps(value) if not isinstance(value, int) or value.bit_length() < 200 else "a huge integer"
    return shown if len(shown) <= 40 else shown[:39] + "…"
