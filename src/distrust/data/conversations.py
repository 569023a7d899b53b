"""Reads conversations: who speaks, text, reasoning, calls of tools, and which turns are trained.

The usual ways to write them give one form, that of OpenAI: ``role``, ``content``, ``tool_calls`` with
arguments as objects, ``reasoning_content``. Other keys of a turn are kept: the chat template may print them.
What has a meaning that training cannot honour is a ``RecordError``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from distrust.data.columns import NOTHING, SYSTEM, TEMPLATE_OPTIONS, Fields
from distrust.data.record_errors import RecordError
from distrust.data.records import Conversation, Message, Role
from distrust.data.values import (
    json_kind,
    of_kind,
    parse_text,
    quote_value,
    read_factor,
    read_text,
    require_json,
)

_ROLES: tuple[Role, ...] = get_args(Role)
_SPEAKERS: Mapping[str, Role] = {
    **{role: role for role in _ROLES},
    "human": "user", "gpt": "assistant", "function_call": "assistant", "tool_call": "assistant",
    "observation": "tool", "function": "tool", "tool_response": "tool",
}  # fmt: skip
#: Speakers whose text is a call of a tool, or a list of calls, as JSON.
_CALLERS = ("function_call", "tool_call")
_TRAINED = ("weight", "train", "training", "loss")  # whether, or with which weight, a turn is trained
_REASONING = ("reasoning_content", "reasoning", "thinking")
_UNSUPPORTED = (
    "train_detail", "training_detail", "mask", "masked", "loss_weight", "loss_mask", "trainable",
    "train_on_turn", "output_with_loss", "prefix", "images", "image", "videos", "audios", "audio",
)  # fmt: skip
_TEXT_PARTS, _THOUGHT_PARTS = ("text", "input_text", "output_text"), ("thinking", "reasoning")
#: Parameters of ``apply_chat_template``, and what a template has from its tokenizer, besides ``*_token``.
_SET_BY_TRAINER = {
    "conversation", "conversations", "messages", "tools", "documents", "chat_template",
    "add_generation_prompt", "continue_final_message", "tokenize", "sanitize_control_tokens", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "additional_special_tokens", "strftime_now", "raise_exception",
}  # fmt: skip


def read_conversation(fields: Fields, prompt: str | None, answer: str) -> Conversation:
    """The conversation in one or two fields: only the assistant turns of ``answer`` may be trained.

    ``system``, ``tools`` and the options for the chat template are read from fields of these names.
    """
    context = () if prompt is None else _turns(fields[prompt], prompt)
    trained = _turns(fields[answer], answer)
    answers = [message for message in trained if message.role == "assistant"]
    if not answers:
        raise RecordError("no assistant turn; there is nothing to train on", field=answer)
    if not any(message.weight for message in answers):
        raise RecordError("no assistant turn is to be trained; remove the record", field=answer)
    context = (*_system(fields, context + trained), *context)
    return Conversation(
        context + trained,
        trained_turns=len(context) if prompt is not None else 0,
        tools=_tools(fields["tools"]) if "tools" in fields else (),
        template_options=_options(fields[TEMPLATE_OPTIONS]) if TEMPLATE_OPTIONS in fields else {},
    )


def _system(fields: Fields, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The system turn to put first, if a record has one besides its turns."""
    first: tuple[Message, ...] = ()
    for name in (name for name in SYSTEM if name in fields):
        text = read_text(fields[name], name)
        stated = [message.content for message in first + messages if message.role == "system"]
        if text.strip() and not stated:
            first = (Message("system", text),)
        elif text.strip() and stated != [text]:
            raise RecordError("differs from the system turn of the conversation; keep one", field=name)
    return first


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    tools = of_kind(parse_text(value, "tools") or [], list, "tools", "give a list of objects")
    for index, tool in enumerate(tools):
        field = f"tools[{index}]"
        require_json(of_kind(tool, dict, field, "describe a function"), field)
    return tuple(_in_envelope(tool) if "name" in tool else tool for tool in tools)


def _options(value: Any) -> Mapping[str, Any]:
    options = of_kind(parse_text(value, TEMPLATE_OPTIONS), dict, TEMPLATE_OPTIONS, "name the options")
    for name in options:
        if name in _SET_BY_TRAINER or name.endswith("_token"):
            raise RecordError("is set by the trainer; remove it", field=f"{TEMPLATE_OPTIONS}.{name}")
    require_json(options, TEMPLATE_OPTIONS)
    return options


def _turns(value: Any, name: str) -> tuple[Message, ...]:
    remedy = 'give a list of {"role", "content"}'
    if value == []:
        raise RecordError(f"empty; {remedy}", field=name)
    items = of_kind(value, list, name, remedy)
    return tuple([_message(item, f"{name}[{index}]") for index, item in enumerate(items)])


def _message(item: Any, field: str) -> Message:
    item = of_kind(item, dict, field, 'give {"role", "content"}')
    if len(item) == 2 and item.get("role") in _ROLES and isinstance(item.get("content"), str):  # most turns
        role = item["role"]
        return Message(role, read_text(item["content"], f"{field}.content", empty=role != "assistant"))
    keys = {name: value for name, value in item.items() if value is not None}
    role_key, text_key = ("from", "value") if "from" in keys and "role" not in keys else ("role", "content")
    speaker, value = keys.pop(role_key, None), keys.pop(text_key, None)
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        problem = "missing" if speaker is None else f"unknown: {quote_value(speaker)}"
        raise RecordError(f"{problem}; give one of {', '.join(_ROLES)}", field=f"{field}.{role_key}")
    text_field = f"{field}.{text_key}"
    if speaker in _CALLERS:
        text, keys["function_call"], thoughts = "", _calls(value, text_field), None
    else:
        text, thoughts = _parts("" if value is None else value, text_field)
    weight = _read_others(keys, role, thoughts, field)
    if not (text.strip() or keys.get("tool_calls") or keys.get("reasoning_content")):
        if value is None:
            raise RecordError("missing; give the text of the turn", field=text_field)
        if role == "assistant":
            raise RecordError("is empty; add text, or remove the record", field=text_field)
    return Message(role, text, weight, keys)


def _read_others(keys: dict[str, Any], role: Role, thoughts: str | None, field: str) -> float:
    """Bring all keys of a turn besides its text into the form of ``Message.fields``; returns its weight."""
    for name in _UNSUPPORTED:
        if keys.get(name) not in NOTHING:
            remedy = "remove it (weight or train says what is trained), or remove the record"
            raise RecordError(f"is not supported; {remedy}", field=f"{field}.{name}")
    weight = _weight(keys, role, field)
    assistant_fields = {
        "reasoning_content": _reasoning(keys, thoughts, field),
        "tool_calls": _tool_calls(keys, field),
    }
    for name, value in assistant_fields.items():
        if value and role != "assistant":
            raise RecordError("is for assistant turns; remove it", field=f"{field}.{name}")
    for name, value in keys.items():
        require_json(value, f"{field}.{name}")
    keys |= {name: value for name, value in assistant_fields.items() if value}
    return weight


def _weight(rest: dict[str, Any], role: Role, field: str) -> float:
    """The weight of a turn's tokens. A boolean says only whether the turn is trained."""
    stated = {name: rest.pop(name) for name in _TRAINED if name in rest}
    for name, value in stated.items():
        if name == "weight" or not isinstance(value, bool):
            stated[name] = read_factor(value, f"{field}.{name}")
    names, numbers = list(stated), {value for value in stated.values() if not isinstance(value, bool)}
    if len(numbers) > 1 or len({value > 0 for value in stated.values()}) > 1:
        raise RecordError(f"differs from {names[1]}; keep one", field=f"{field}.{names[0]}")
    weight = float(next(iter(numbers or stated.values()), 1))
    if names and weight and role != "assistant":
        problem = f"only assistant turns are trained, and this one is of {role}; remove it, or give 0"
        raise RecordError(problem, field=f"{field}.{names[0]}")
    return weight


def _parts(value: Any, field: str) -> tuple[str, str | None]:
    """The text of a turn in parts, and the reasoning that they hold, if any."""
    value = value if isinstance(value, list) else [read_text(value, field)]
    texts, thoughts = [], []
    for index, part in enumerate(value):
        where = f"{field}[{index}]"
        if isinstance(part, str):
            texts.append(read_text(part, where))
            continue
        if not isinstance(part, dict):
            raise RecordError(f"{json_kind(part)}, not a part of text; give its text", field=where)
        kind = str(part.get("type", "text"))
        if kind in _TEXT_PARTS:
            texts.append(read_text(part.get("text"), f"{where}.text"))
        elif kind in _THOUGHT_PARTS:
            thoughts.append(_parts(part.get(kind), f"{where}.{kind}")[0])
        else:
            raise RecordError(
                f"a part of type {quote_value(kind)} is not supported; only text is trained on", field=where
            )
    return "".join(texts), "".join(thoughts) if thoughts else None


def _reasoning(rest: dict[str, Any], thoughts: str | None, field: str) -> str | None:
    """The reasoning of a turn, whatever its key; None if there is none."""
    stated = {n: read_text(rest.pop(n), f"{field}.{n}") for n in _REASONING if n in rest}
    if thoughts is not None:
        stated["content"] = thoughts
    if len(set(stated.values())) > 1:
        first, second, *_ = stated
        raise RecordError(f"differs from {second}; keep one", field=f"{field}.{first}")
    return next(iter(stated.values()), None)


def _tool_calls(rest: dict[str, Any], field: str) -> list[dict[str, Any]]:
    stated = {name: rest.pop(name, None) for name in ("tool_calls", "function_call")}
    present = [name for name, value in stated.items() if value]
    if len(present) > 1:
        raise RecordError("present together with function_call; keep one", field=f"{field}.tool_calls")
    return [call for name in present for call in _calls(stated[name], f"{field}.{name}")]


def _calls(value: Any, field: str) -> list[dict[str, Any]]:
    """Calls of tools: a list, or a single one, or the JSON text of either."""
    calls = parse_text(value, field)
    if isinstance(calls, list):
        return [_call(call, f"{field}[{index}]") for index, call in enumerate(calls)]
    return [_call(calls, field)]


def _call(call: Any, field: str) -> dict[str, Any]:
    """A call in the form of OpenAI, its arguments as an object."""
    result = _in_envelope(of_kind(call, dict, field, 'give {"name", "arguments"}'))
    function = result["function"]
    if function is call.get("function"):
        field = f"{field}.function"
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise RecordError("missing; name the function", field=f"{field}.name")
    arguments, remedy = (
        parse_text(function.get("arguments"), f"{field}.arguments"),
        "give an object, {} for none",
    )
    if arguments is None:
        raise RecordError(f"missing; {remedy}", field=f"{field}.arguments")
    arguments = of_kind(arguments, dict, f"{field}.arguments", remedy)
    result["function"] = {**function, "arguments": arguments}
    require_json(result, field)
    return {name: value for name, value in result.items() if value is not None}


def _in_envelope(function: dict[str, Any]) -> dict[str, Any]:
    """A function, or a call of one, in the form of OpenAI: ``{"type", "function"}``."""
    if isinstance(function.get("function"), dict):
        return {"type": "function", **function}
    outer = {name: value for name, value in function.items() if name in ("type", "id")}
    inner = {name: value for name, value in function.items() if name not in outer}
    return {"type": "function", **outer, "function": inner}
