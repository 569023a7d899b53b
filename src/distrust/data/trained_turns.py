"""Locates the turns that are trained in the text of a conversation.

In this order:

1. A template with ``{% generation %}`` marks says itself what the assistant generates.
2. If rendering only grows from turn to turn, a trained turn is what follows its generation prompt.
3. A template that rewrites earlier turns when later ones come (some drop their reasoning, some end the last
   turn in another way) would train on text that the model never sees in use. Each trained turn becomes a
   sequence of its own, rendered as at inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from distrust.data.chat_template import PROBE, ChatTemplate, name_part
from distrust.data.corpus import common_length
from distrust.data.record_errors import RecordError
from distrust.data.records import Conversation, Message


class Span(NamedTuple):
    """Characters of a text that are trained."""

    begin: int
    end: int
    weight: float = 1.0  # factor of the loss of its tokens, above 0


class Rendered(NamedTuple):
    """A sequence to train on, as text."""

    text: str
    spans: tuple[Span, ...]  # in order
    is_chat: bool = False  # whether the text itself has the special tokens that begin and end it


def render_conversation(
    conversation: Conversation, template: ChatTemplate, *, max_characters: int | None = None
) -> list[Rendered]:
    """The sequences of a conversation: one, or one for each trained turn.

    Args:
        conversation: at least one of its turns is trained.
        template: renders it.
        max_characters: turns behind the first that begins after so many are left out: a sequence for each
            turn of a long conversation would take time and memory of the square of its length.

    Raises:
        RecordError: the template refuses the conversation, or leaves out a part of it.
    """
    template.require_printed(conversation)
    messages = conversation.messages
    trained = [
        index
        for index, message in enumerate(messages)
        if message.role == "assistant" and message.weight and index >= conversation.trained_turns
    ]
    marked = _by_marks(conversation, template, trained)
    return marked or _by_turns(conversation, template, trained, max_characters)


def _by_marks(conversation: Conversation, template: ChatTemplate, trained: list[int]) -> list[Rendered]:
    """The conversation by the template's own marks; nothing if they leave out a part of a trained turn."""
    messages, spans = conversation.messages, []
    text, marks = template.render_with_marks(conversation, messages)
    if not marks:
        return []
    _require_instructions(messages[: trained[-1]], text)
    for index in trained:
        first, behind = (
            len(template.render_with_marks(conversation, messages[:end])[1]) if end else 0
            for end in (index, index + 1)
        )
        turn_marks = marks[first:behind]  # those that the rendering of the turn adds
        end = _end_of_turn(text, turn_marks[-1][1], template) if turn_marks else None
        if end is None or _missing(messages[index], "".join(text[slice(*mark)] for mark in turn_marks)):
            return []
        turn_marks[-1] = (turn_marks[-1][0], end)
        spans += [Span(*mark, messages[index].weight) for mark in turn_marks]
    return [Rendered(text, tuple(spans), is_chat=True)] if spans else []


def _end_of_turn(text: str, end: int, template: ChatTemplate) -> int | None:
    """The end of a mark, moved over the token that ends the turn; None if there is none."""
    if text[:end].rstrip().endswith(template.mark_texts):
        return end
    behind = len(text) - len(text[end:].lstrip())
    return next((behind + len(mark) for mark in template.end_texts if text.startswith(mark, behind)), None)


def _by_turns(
    conversation: Conversation, template: ChatTemplate, trained: list[int], max_characters: int | None
) -> list[Rendered]:
    messages, sequences = conversation.messages, []
    for last in trained:
        sequences.append(_through(conversation, last, template))
        if max_characters is not None and sequences[-1].spans[0].begin > max_characters:
            break
    is_whole = last == len(messages) - 1
    full_text = sequences[-1].text if is_whole else template.render(conversation, messages)
    if not all(full_text.startswith(sequence.text) for sequence in sequences):
        return sequences
    return [
        Rendered(full_text, tuple(span for sequence in sequences for span in sequence.spans), is_chat=True)
    ]


def _through(conversation: Conversation, index: int, template: ChatTemplate) -> Rendered:
    """The conversation up to a turn, of which only that turn is trained."""
    messages = conversation.messages
    # An empty conversation cannot be rendered.
    prompt = template.render(conversation, messages[:index], generation_prompt=True) if index else ""
    text = template.render(conversation, messages[: index + 1])
    begin = len(prompt)
    _require_instructions(messages[:index], prompt)
    if not index or not text.startswith(prompt):
        text, begin = _with_prompt(prompt, text, conversation, index, template)
    ends = template.ends
    end_mark = ends.call_mark if messages[index].fields.get("tool_calls") else ends.mark
    text += end_mark
    end = len(text) if end_mark else len(text.rstrip())  # generation stops before white space behind the mark
    if end <= begin:
        raise RecordError(
            "the tokenizer's chat template prints nothing of it; give another one with --chat-template",
            field=f"messages[{index}]",
        )
    name = _missing(messages[index], text[begin:end])
    if name:  # the generation prompt may have opened what is in the data, too, such as a block of reasoning
        begin_of_turn = common_length(template.render(conversation, messages[:index]), text) if index else 0
        name = _missing(messages[index], text[begin_of_turn:end])
    if name:
        raise _left_out(name_part(index, name))
    return Rendered(text, (Span(begin, end, messages[index].weight),), is_chat=True)


def _require_instructions(messages: Sequence[Message], text: str) -> None:
    """Raise RecordError unless all that the system says is in a text: some templates print one turn of it."""
    for index, message in enumerate(messages):
        if message.role in ("system", "developer") and not _has(text, message.content):
            raise _left_out(f"messages[{index}].content")


def _missing(message: Message, text: str) -> str:
    """The name of a field of an assistant's turn that is not in its text; "" if all are."""
    if not _has(text, message.content):
        return "content"
    if not _has(text, str(message.fields.get("reasoning_content", ""))):
        return "reasoning_content"
    calls = message.fields.get("tool_calls", ())
    return "" if all(call["function"]["name"] in text for call in calls) else "tool_calls"


def _has(text: str, part: str) -> bool:
    """Whether a part is in a text, apart from white space; compared as it is first, which takes less time."""
    return part.strip() in text or "".join(part.split()) in "".join(text.split())


def _left_out(field: str) -> RecordError:
    return RecordError(
        "the tokenizer's chat template leaves out a part of it (some leave out all before </think>); give "
        "another one with --chat-template, or remove that part",
        field=field,
    )


def _with_prompt(
    prompt: str, text: str, conversation: Conversation, index: int, template: ChatTemplate
) -> tuple[str, int]:
    """A text that does not extend its generation prompt: the text to train on, and where the turn begins.

    Some prompts open what the template does not print in a turn, such as a block of reasoning. Some templates
    print earlier turns differently now that this one is there: then they are replaced by those of the prompt.
    """
    history_turns, content = conversation.messages[:index], conversation.messages[index].content
    replacement = PROBE if content.lstrip()[:1] != PROBE[0] else PROBE[::-1]
    with_other = template.render(conversation, (*history_turns, Message("assistant", replacement)))
    content_begin = common_length(text, with_other)
    if not history_turns:
        return text, content_begin
    history = template.render(conversation, history_turns)
    if text.startswith(history):
        return text, min(common_length(text, prompt), content_begin)
    header = prompt.removeprefix(history)  # which begins the assistant's turn
    begin = text.rfind(header, 0, content_begin)
    if header == prompt or begin < 0:
        raise RecordError(
            "the tokenizer's chat template prints the turns before this one differently at inference; give "
            "another one with --chat-template",
            field=f"messages[{index}]",
        )
    return prompt + text[begin + len(header) :], len(prompt)
