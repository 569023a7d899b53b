"""Validates a record's fields: content, authority weight, provenance entropy and source class.

A null counts as a missing field, as in tables exported to JSON (``Columns.select`` removes it). Nothing is
repaired: each error is a ``RecordError`` that names the field.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, cast, get_args

from distrust.data.columns import Columns, Fields
from distrust.data.record_errors import RecordError
from distrust.data.records import Completion, Conversation, Message, Role, Text
from distrust.weighting import MAX_AUTHORITY_WEIGHT

MAX_SOURCE_LENGTH = 100  # longer source class names are truncated: they appear in logs and figures
# Display name of the class of records that name none; a class of this name counts as none.
NO_CLASS = "(none)"

_ROLES: tuple[str, ...] = get_args(Role)

#: Roles of turns that are written as {"from", "value"}.
_SPEAKERS = {"human": "user", "gpt": "assistant", **{role: role for role in _ROLES}}

# Chat templates print these too: without them the turn would be trained on as something nobody said.
_UNSUPPORTED_IN_TURN = ("function_call", "reasoning_content", "thinking", "tool_calls")


def read_content(fields: Fields, columns: Columns) -> Text | Completion | Conversation:
    """The content to train on: exactly one of the three kinds."""
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
    missing = f"no {', no '.join(kinds)}, and no {last}" if kinds else f"no {last}"
    present = ", ".join(quote_value(key) for key in list(fields)[:8]) or "nothing"  # 8 fit one line
    remedy = (
        "correct the option that names it"
        if columns.explicit
        else (
            "give one of them, or name the columns with --text-column, with --prompt-column and "
            "--completion-column, or with --messages-column"
        )
    )
    return f"{missing}; {remedy} (there is {present})"


def _completion(fields: Fields, prompts: tuple[str, ...], name: str) -> Completion | Conversation:
    present = [prompt for prompt in prompts if prompt in fields]
    if not present:
        raise RecordError(f"missing, but {name} is present; give both, or only text", field=prompts[0])
    if name not in fields:
        raise RecordError(f"missing, but {present[0]} is present; give both, or only text", field=name)
    if len(prompts) == 1 and isinstance(fields[present[0]], list) and isinstance(fields[name], list):
        prompt_turns = _messages(fields[present[0]], present[0])  # both are lists of turns
        return _conversation(prompt_turns, _messages(fields[name], name), name)
    texts = [_string(fields[prompt], prompt) for prompt in present]
    # A single prompt is used as it is; several are joined by empty lines, blank ones left out.
    prompt = texts[0] if len(prompts) == 1 else "".join(f"{text}\n\n" for text in texts if text.strip())
    return Completion(prompt, _string(fields[name], name, empty=False))


def _chat(fields: Fields, names: list[str]) -> Conversation:
    if len(names) > 1:
        raise RecordError(
            f"present together with {names[1]}; choose one with --messages-column", field=names[0]
        )
    (name,) = names
    value = fields[name]
    if not isinstance(value, list) or not value:
        problem = "empty" if value == [] else f"{json_kind(value)}, not a list"
        raise RecordError(f'{problem}; give a list of {{"role", "content"}}', field=name)
    return _conversation((), _messages(value, name), name)


def _messages(turns: list[Any], name: str) -> tuple[Message, ...]:
    return tuple(_message(item, f"{name}[{index}]") for index, item in enumerate(turns))


def _conversation(prompt: tuple[Message, ...], answer: tuple[Message, ...], name: str) -> Conversation:
    """A conversation whose assistant turns are trained only in ``answer``."""
    if all(message.role != "assistant" for message in answer):
        raise RecordError("no assistant turn; there is nothing to train on", field=name)
    if (prompt + answer)[0].role == "assistant":
        raise RecordError(
            "begins with the assistant; a chat template needs a user or system turn first", field=f"{name}[0]"
        )
    return Conversation(prompt + answer, trained_turns=len(prompt))


def _message(item: Any, field: str) -> Message:
    if not isinstance(item, dict):
        raise RecordError(f'{json_kind(item)}, not an object; give {{"role", "content"}}', field=field)
    for name in _UNSUPPORTED_IN_TURN:
        if item.get(name):
            raise RecordError(
                "is not supported; write it into content, or leave it out", field=f"{field}.{name}"
            )
    role_key, text_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    speaker = item.get(role_key)
    role = _SPEAKERS.get(speaker, speaker) if role_key == "from" and isinstance(speaker, str) else speaker
    if role not in _ROLES:
        problem = "missing" if speaker is None else f"unknown: {quote_value(speaker)}"
        raise RecordError(f"{problem}; give one of {', '.join(_ROLES)}", field=f"{field}.{role_key}")
    content = item.get(text_key)
    if content is None:
        raise RecordError("missing; give the text of the turn", field=f"{field}.{text_key}")
    return Message(cast(Role, role), _string(content, f"{field}.{text_key}", empty=role != "assistant"))


def _string(value: Any, field: str, *, empty: bool = True) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{json_kind(value)}, not a string; give its text", field=field)
    if not empty and not value.strip():
        raise RecordError("is empty; add text, or remove the record", field=field)
    try:
        value.encode()  # a lone surrogate, which JSON can hold, would stop the tokenizer
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise RecordError(
            f"half of a surrogate pair ({half}) at character {error.start + 1}; remove it", field=field
        ) from None
    return value


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
    number = to_number(value, field)
    if not 0 <= number < math.inf:
        problem = f"{quote_value(value)} is not in [0, ∞) bits; correct it"
        raise RecordError(problem, field=field)
    return number


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


def to_number(value: Any, field: str) -> float:
    """A JSON number as a float, ±inf beyond its range; raises RecordError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError(
            f"must be a number, not {json_kind(value)} ({quote_value(value)}); correct it",
            field=field,
        )
    try:
        return float(value)
    except OverflowError:  # an integer beyond the largest float
        return math.inf if value > 0 else -math.inf


def parse_number(text: str) -> float | str:
    """The number that a text holds, as in CSV files, or else the text."""
    try:
        return float(text)
    except ValueError:
        return text


def unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An ``object_pairs_hook`` for JSON that refuses duplicate keys, with a RecordError."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        duplicate = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise RecordError("appears twice in one object; keep one", field=quote_value(duplicate))
    return fields


def json_kind(value: Any) -> str:
    """The JSON type of a value, with its article."""
    # A bool is an int, so it comes first.
    kinds = {bool: "a boolean", int | float: "a number", str: "a string", list: "a list", dict: "an object"}
    for types, name in kinds.items():
        if isinstance(value, types):
            return name
    return "null" if value is None else f"a value of type {type(value).__name__}"


def quote_value(value: Any) -> str:
    """A value for a message: escaped, and at most 40 characters."""
    # Python refuses to print an integer of thousands of digits.
    is_huge = isinstance(value, int) and value.bit_length() >= 200
    quoted = "a huge integer" if is_huge else json.dumps(value, default=repr)
    return quoted if len(quoted) <= 40 else quoted[:39] + "…"
