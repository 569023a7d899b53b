"""Records -> segments: which part of a text is learned, which is only read.

Each segment is tokenized by itself, so a prompt has the tokens here that it has when the model is used.

In a conversation the assistant's turns are found by rendering: up to where the turn begins (with the
template's generation prompt) and to where it ends. What lies between is the turn: its content through the
template's end-of-turn mark. That is only right where each rendering continues the one before, letter for
letter. A template that rewrites earlier turns when later ones come (some drop their reasoning) trains
on something the model never sees in use, and is refused.
"""

from __future__ import annotations

from typing import NamedTuple

from distrust.data.record_errors import RecordError
from distrust.data.records import Completion, Conversation, Text
from distrust.data.tokenizer import Tokenizer


class Segment(NamedTuple):
    """A stretch of an example's text.

    Attributes:
        text: the stretch.
        learn: whether its tokens carry loss.
    """

    text: str
    trained: bool


def segments(content: Text | Completion | Conversation, tokenizer: Tokenizer) -> list[Segment]:
    """The stretches of a record's text, in order.

    Raises:
        RecordError: the tokenizer's chat template cannot render the conversation turn by turn.
    """
    match content:
        case Text(text):
            return [Segment(text, trained=True)]
        case Completion(prompt, completion):
            return [Segment(prompt, trained=False), Segment(completion, trained=True)]
        case Conversation():
            return _conversation(content, tokenizer)


def _conversation(conversation: Conversation, tokenizer: Tokenizer) -> list[Segment]:
    turns = [{"role": message.role, "content": message.content} for message in conversation.messages]
    whole = _render(turns, tokenizer, answer_next=False)
    found: list[Segment] = []
    done = 0
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant" or index < conversation.trained_turns:
            continue
        before = _render(turns[:index], tokenizer, answer_next=True)
        through = _render(turns[: index + 1], tokenizer, answer_next=False)
        begin = len(before)
        if not (done <= begin < len(through) and through.startswith(before) and whole.startswith(through)):
            raise RecordError(
                "the tokenizer's chat template does not print this turn the same wherever it stands; "
                "use a template that does",
                field=f"messages[{index}]",
            )
        end = begin + len(_through_end_mark(through[begin:], turn["content"]))
        found += [Segment(whole[done:begin], trained=False), Segment(whole[begin:end], trained=True)]
        done = end
    return [*found, Segment(whole[done:], trained=False)]


def _through_end_mark(printed: str, content: str) -> str:
    """A turn as printed, without the white space after its end mark: nothing is generated after that."""
    stripped = printed.rstrip()
    # Without any other mark the white space is what ends the turn.
    return printed if stripped.endswith(content.rstrip()) else stripped


def _render(turns: list[dict[str, str]], tokenizer: Tokenizer, *, answer_next: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_next))
    except Exception as error:  # a template is a program: it may raise anything, its own refusals too
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RecordError(
            f"the tokenizer's chat template refuses it ({reason}); change the record or the template",
            field="messages",
        ) from error
