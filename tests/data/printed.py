"""What a chat template prints for the assistant, found without the product: an oracle for its tests.

Contents are words that no template prints by itself, so what is missing shows.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from distrust.data.records import Conversation, Message

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}


@dataclass(frozen=True)
class Printed:
    """One sequence as a template prints it."""

    text: str
    trained: tuple[str, ...]  # in order; only what the template prints, so perhaps without an end


@dataclass(frozen=True)
class Template:
    """A chat template, and the special tokens of its tokenizer."""

    source: str
    special: tuple[tuple[str, str], ...] = tuple(SPECIAL.items())


def render(template: Template, messages: list[dict[str, Any]], tools=None, *, prompt=False, marks=False):
    """The text, and the stretches inside generation marks."""
    (text,), spans = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=template.source,
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=marks,
        **dict(template.special),
    )
    return text, spans[0] if marks else []


def as_turns(conversation: Conversation) -> list[dict[str, Any]]:
    return [{"role": turn.role, "content": turn.content, **turn.fields} for turn in conversation.messages]


def with_parts(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some templates read the content as a list of parts only."""
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def words(*values: Any) -> set[str]:
    """The words that stand for something in a conversation: they have a digit behind."""
    return set(re.findall(r"[A-Z][a-z]+\d", json.dumps(values)))


def print_turns(template: Template, conversation: Conversation) -> list[Printed] | None:
    """The sequences to train on; None if the template refuses it, or leaves out a part."""
    turns, tools = as_turns(conversation), list(conversation.tools) or None
    for form in (turns, with_parts(turns)):
        try:
            sequences = _by_marks(template, form, tools) if MARKED.search(template.source) else None
            sequences = sequences or _by_turns(template, form, tools)
        except Exception:
            continue
        texts = " ".join(sequence.text for sequence in sequences)
        if words(turns, tools) <= words(texts):
            return sequences
    return None


def _by_marks(template, turns, tools) -> list[Printed] | None:
    text, marks = render(template, turns, tools, marks=True)
    stretches: list[list[int]] = []
    for begin, end in marks:
        if not text[begin:end].strip():
            continue
        if stretches and stretches[-1][1] == begin:
            stretches[-1][1] = end
        else:
            stretches.append([begin, end])
    trained = tuple(text[begin:end] for begin, end in stretches)
    return [Printed(text, trained)] if words(turns, tools) <= words(text) else None


def _by_turns(template, turns, tools) -> list[Printed]:
    pieces = [
        _turn(template, turns[:index], turn, tools)
        for index, turn in enumerate(turns)
        if turn["role"] == "assistant"
    ]
    full_text, _ = pieces[-1]
    trained = tuple(turn for _, turn in pieces)
    if all(full_text.startswith(text.rstrip()) for text, _ in pieces):
        return [Printed(full_text, trained)]
    return [Printed(text, (turn,)) for text, turn in pieces]


def _turn(template, before, turn, tools) -> tuple[str, str]:
    """The text up to the end of a turn as it is in use, and what the model generates of it."""
    prompt, _ = render(template, before, tools, prompt=True)
    text, _ = render(template, [*before, turn], tools)
    begin = len(commonprefix([prompt, text]))  # noqa: RUF071 - characters
    if words(before) & words(text[begin:]):  # the turns before are printed in another way now
        header = prompt.removeprefix(render(template, before, tools)[0])
        read = max(text.rfind(word) + len(word) for word in words(before))
        text = prompt + text[text.index(header, read) + len(header) :]
        begin = len(prompt)
    return text, text[begin:].rstrip()


def ends_turn(end: str, turn: str, template: Template, conversation: Conversation) -> bool:
    """Whether a text behind what the template prints of a turn ends it: EOS, or how the next turn begins."""
    if end == dict(template.special)["eos_token"]:
        return True
    turns, tools = as_turns(conversation), list(conversation.tools) or None
    last_word = max(turn.rfind(word) for word in words(turn))
    for form in (turns, with_parts(turns)):
        for following in ([], [{**form[0], "role": "user"}]):
            try:
                if turn[last_word:] + end in render(template, form + following, tools)[0]:
                    return True
            except Exception:
                continue
    return False


def user(content: str) -> Message:
    return Message("user", content)


def assistant(content: str, **fields: Any) -> Message:
    return Message("assistant", content, fields=fields)


PARAMETERS = {"type": "object", "properties": {"Argument1": {"type": "string", "description": "Meaning1"}}}
TOOL = {"name": "Tool1", "description": "Purpose1", "parameters": PARAMETERS}
TOOLS = ({"type": "function", "function": TOOL},)
CALL = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "Tool1", "arguments": {"Argument1": "Given1"}},
}
RESULT = Message("tool", "Result1", fields={"name": "Tool1", "tool_call_id": "call00001"})

CONVERSATIONS = {
    "one turn": Conversation((user("Ask1"), assistant("Answer1"))),
    "two turns": Conversation((user("Ask1"), assistant("Answer1"), user("Ask2"), assistant("Answer2"))),
    "system": Conversation((Message("system", "Rule1"), user("Ask1"), assistant("Answer1"))),
    "tools": Conversation(
        (user("Ask1"), assistant("", tool_calls=[CALL]), RESULT, assistant("Answer1")), tools=TOOLS
    ),
    "reasoning": Conversation((user("Ask1"), assistant("Answer1", reasoning_content="Reason1"))),
    "empty system": Conversation((Message("system", ""), user("Ask1"), assistant("Answer1"))),
    # More than one of these at once.
    "reasoning in two turns": Conversation(
        (
            user("Ask1"),
            assistant("Answer1", reasoning_content="Reason1"),
            user("Ask2"),
            assistant("Answer2", reasoning_content="Reason2"),
        )
    ),
    "reasoning before a call": Conversation(
        (
            user("Ask1"),
            assistant("", tool_calls=[CALL], reasoning_content="Reason1"),
            RESULT,
            assistant("Answer1"),
        ),
        tools=TOOLS,
    ),
    "reasoning before and after a call": Conversation(
        (
            user("Ask1"),
            assistant("", tool_calls=[CALL], reasoning_content="Reason1"),
            RESULT,
            assistant("Answer1", reasoning_content="Reason2"),
        ),
        tools=TOOLS,
    ),
}
