"""The chat template of a tokenizer: renders turns on a fixed day, and tells what it prints.

No template is known by its name or family: what it prints is found out by rendering probes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import date, datetime
from functools import cache, cached_property
from itertools import product
from typing import Any, NamedTuple, cast

from distrust.activity import current
from distrust.data.corpus import common_length
from distrust.data.record_errors import RecordError
from distrust.data.records import Conversation, Message
from distrust.data.tokenizer import Tokenizer
from distrust.errors import warn

#: A word that no template prints by itself, trims or escapes; and two others for the same probe.
PROBE = "Zqx"
_FIRST, _NEXT = "Zqy", "Zqz"
_DATE_CALL = re.compile(r"""\bstrftime_now\s*\(\s*(['"])([^'"\\]*)\1\s*\)""")
_ANY_DATE = re.compile(r"\bstrftime_now\b(?!\s+is\b)")
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TurnEnds(NamedTuple):
    """How an assistant's turns end, found by rendering short conversations.

    A mark is a special or added token other than white space and BOS: generation can stop only at a token. An
    answer ends at the first of these that exists:

    1. A mark behind the answer in [user, assistant], which the template prints. Of several, the last that
       also follows the answer in [user, assistant, user], or else the first.
    2. No mark, if the template prints other visible text there: plain text such as ``### User:`` stops
       nothing.
    3. The first mark between the answer and the next turn in [user, assistant, user]: the next role's mark.
    4. The tokenizer's EOS.

    A call of tools ends by rules 1 and 3, with the tool's result as the next turn, or else as an answer does.
    What closes each call, such as ``</tool_call>``, is no end: it is also behind the first of two calls.
    """

    ids: tuple[int, ...] = ()  # of the tokens that end a turn; empty: generation would not stop there
    #: Text to append to a rendering that ends with an answer, or with a call of tools: "" where the template
    #: prints the end itself, where plain text ends a turn, or where no end is known.
    mark: str = ""
    call_mark: str = ""


def turn_ends(tokenizer: Tokenizer) -> TurnEnds:
    """The ends of an assistant's turns; none without a chat template, or if it refuses the conversations."""
    if tokenizer.chat_template is None:
        return TurnEnds()
    return ChatTemplate(tokenizer, today=date.today()).ends


def name_part(index: int, name: str) -> str:
    """A field of a turn, as an error names it: reasoning may have another name in the record."""
    return f"messages[{index}].{name}" + " (the reasoning)" * (name == "reasoning_content")


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: has a chat template.
        today: what the template prints as the date of today.
    """

    def __init__(self, tokenizer: Tokenizer, *, today: date) -> None:
        self._tokenizer = cast(Any, tokenizer)
        self._today, self._has_warned = today, False
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._added = {number: str(token) for number, token in added.items() if str(token).strip()}
        previous, current.location = current.location, "the chat template"  # it may run for long
        # Whether it reads contents as lists of parts, and the arguments of calls as JSON text: the simplest
        # form of those that print most.
        self._form = max(product((False, True), repeat=2), key=self._suits)
        self.ends = self._find_ends()
        current.location = previous
        bos, eos = (str(getattr(tokenizer, name, None) or "") for name in ("bos_token", "eos_token"))
        ends = [str(self._tokenizer.decode([number])) for number in self.ends.ids]
        #: The texts of the tokens that end a turn, or all.
        self.end_texts = tuple(dict.fromkeys(filter(None, (*ends, eos))))
        #: The texts of all tokens that may end a turn: some templates end earlier turns in another way.
        self.mark_texts = (*self.end_texts, *self._added.values())
        self._special = sorted(filter(None, (*self.end_texts, bos)))

    def render(
        self, conversation: Conversation, messages: Sequence[Message], *, generation_prompt: bool = False
    ) -> str:
        """Render some turns of a conversation, optionally up to where the assistant's answer begins.

        Raises:
            RecordError: the template refuses them.
        """
        turns, options = self._turns(messages), self._options(conversation)
        with _refusals():
            return str(
                self._tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=generation_prompt, **options
                )
            )

    def render_with_marks(
        self, conversation: Conversation, messages: Sequence[Message]
    ) -> tuple[str, list[tuple[int, int]]]:
        """Some turns, and the characters that the template itself marks as generated, if it has marks."""
        options = self._options(conversation)
        if not _has_marks(options["chat_template"]):
            return "", []
        from transformers.utils.chat_template_utils import render_jinja_template

        with _refusals():
            (text,), (marks,) = render_jinja_template(
                conversations=[self._turns(messages)],
                return_assistant_tokens_mask=True,
                **{**self._tokenizer.special_tokens_map, **options},
            )
        return text, [(begin, end) for begin, end in marks if text[begin:end].strip()]

    def require_printed(self, conversation: Conversation) -> None:
        """Raise RecordError for a part that the template leaves out, or for an end within a trained turn.

        An end within another turn is a warning: a user may quote it.
        """
        if conversation.tools:
            self._require("tools", "tools")
        for index, message in enumerate(conversation.messages):
            field = f"messages[{index}]"
            if message.content.strip():
                self._require(message.role, field)
            for name in ("tool_calls", "reasoning_content"):
                if message.fields.get(name):
                    self._require(name, name_part(index, name))
            text = f"{message.content}{message.fields.get('reasoning_content', '')}"
            for token in (token for token in self._special if token in text):
                problem = f"contains {token}, which the model reads as the beginning or end of a text or turn"
                if message.role == "assistant" and message.weight:
                    advice = "the chat template prints it where it belongs, so leave it out"
                    raise RecordError(f"{problem}; {advice}", field=f"{field}.content")
                if not self._has_warned:  # other records may contain it, too: one warning is enough
                    self._has_warned = True
                    warn(f"{current.location}: {field} {problem}")

    def _require(self, part: str, field: str) -> None:
        if part in self._unprinted:
            raise RecordError(
                "is not printed by the tokenizer's chat template, so the model would not see it; leave it "
                "out, or give another template with --chat-template",
                field=field,
            )

    @cached_property
    def _unprinted(self) -> set[str]:
        """The roles, fields of turns and "tools" that the template leaves out.

        One that it refuses is not among them: the rendering of the record will tell.
        """
        user, answer, call = Message("user", "a"), Message("assistant", "b"), _calls("c")
        thoughts = {"reasoning_content": PROBE}
        texts = {
            "system": self._probe(Message("system", PROBE), user, answer),
            "developer": self._probe(Message("developer", PROBE), user, answer),
            "tool": self._probe(user, call, _result(PROBE)),
            "tools": self._probe(user, tools=(_function(PROBE),)),
            "tool_calls": self._probe(user, _calls(PROBE)),
            "reasoning_content": self._probe(user, replace(answer, fields=thoughts))
            + self._probe(user, replace(call, fields={**call.fields, **thoughts})),  # some print it only here
        }
        return {part for part, text in texts.items() if text and PROBE not in text}

    def _suits(self, form: tuple[bool, ...]) -> tuple[bool, bool]:
        """Whether the template prints contents in a form, and accepts calls of tools."""
        self._form = form
        user = Message("user", PROBE)
        return PROBE in self._probe(user), bool(self._probe(user, _calls(PROBE)))

    def _find_ends(self) -> TurnEnds:
        eos = [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        answer, mark = self._end(Message("assistant", PROBE), Message("user", _NEXT), otherwise=eos)
        call, call_mark = self._end(_calls(PROBE), _result(_NEXT), otherwise=answer)
        return TurnEnds(tuple(dict.fromkeys((*answer, *call))), mark, call_mark)

    def _end(self, turn: Message, following: Message, *, otherwise: list[int]) -> tuple[list[int], str]:
        """The id of the mark that ends a turn, if there is one, and the text to append."""
        tail = self._text_behind(PROBE, turn)
        if tail is None:
            return [], ""
        marks, inner = self._marks(tail), self._marks(self._text_behind(PROBE, turn, following, until=_NEXT))
        if turn.fields:
            calls = _calls(_FIRST, PROBE)
            first, last = self._text_behind(_FIRST, calls, until=PROBE), self._text_behind(PROBE, calls)
            closing = common_length(self._marks(first), self._marks(last))
            marks, inner = marks[closing:], inner[closing:]
        if marks:
            return [marks[max(common_length(marks, inner), 1) - 1]], ""
        if tail.strip() and not turn.fields:
            return [], ""
        end = (inner or otherwise)[:1]
        return end, str(self._tokenizer.decode(end)) if end else ""

    def _text_behind(self, word: str, *turns: Message, until: str = r"\Z") -> str | None:
        """What is printed behind the last ``word``; None if the words are not printed."""
        tools = (_function("f"),) if turns[0].fields else ()
        match = re.match(f"(?s).*{word}(.*?){until}", self._probe(Message("user", "a"), *turns, tools=tools))
        return match and match[1]

    def _marks(self, text: str | None) -> list[int]:
        """The ids of the marks in a text."""
        marks = self._added.keys() - {self._tokenizer.bos_token_id} | {self._tokenizer.eos_token_id}
        return [
            number
            for number in self._tokenizer.encode(text or "", add_special_tokens=False)
            if number in marks
        ]

    def _probe(self, *messages: Message, tools: tuple[Mapping[str, Any], ...] = ()) -> str:
        """The rendered turns, with a system turn before them if the template needs one; "" if it refuses."""
        for turns in (messages, (Message("system", "a"), *messages)):
            with suppress(RecordError):
                return self.render(Conversation(turns, tools=tools), turns)
        return ""

    def _options(self, conversation: Conversation) -> dict[str, Any]:
        tools, template = list(conversation.tools) or None, self._tokenizer.chat_template
        if not isinstance(template, str):  # several by name, as for the use of tools
            template = self._tokenizer.get_chat_template(tools=tools)
        frozen = _freeze(template, self._today)
        return {**conversation.template_options, "tools": tools, "chat_template": frozen}

    def _turns(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Turns in the form that the template reads."""
        has_parts, has_json = self._form
        turns = []
        for message in messages:
            content = [{"type": "text", "text": message.content}] if has_parts else message.content
            turns.append({"role": message.role, "content": content, **message.fields})
            if has_json and "tool_calls" in message.fields:
                turns[-1]["tool_calls"] = list(map(_with_json, message.fields["tool_calls"]))
        return turns


@cache
def _has_marks(template: str) -> bool:
    return _GENERATION_MARK.search(template) is not None  # cached: a template is long, and each record asks


@cache
def _freeze(template: str, today: date) -> str:
    """The template with the date in place of the function that returns it; RecordError if it cannot be."""
    midnight = datetime.combine(today, datetime.min.time())
    text = _DATE_CALL.sub(lambda call: json.dumps(midnight.strftime(call[2]), ensure_ascii=False), template)
    if _ANY_DATE.search(text):
        problem = "prints the date in a form that is not written out, so that the text would change every day"
        raise RecordError(f"the tokenizer's chat template {problem}; give another with --chat-template")
    return text


def _function(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"word": {"type": "string", "description": "A word."}}}
    function = {"name": name, "description": "Looks up a word.", "parameters": parameters}
    return {"type": "function", "function": function}


def _calls(*words: str) -> Message:
    functions = [{"name": "f", "arguments": {"word": word}} for word in words]
    # Some templates require ids of nine letters and digits.
    calls = [{"type": "function", "id": f"call{i:05}", "function": each} for i, each in enumerate(functions)]
    return Message("assistant", "", fields={"tool_calls": calls})


def _result(text: str) -> Message:
    return Message("tool", text, fields={"name": "f", "tool_call_id": "call00000"})


def _with_json(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call of a tool with its arguments as JSON text."""
    arguments = json.dumps(call["function"].get("arguments", {}), ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}


@contextmanager
def _refusals() -> Iterator[None]:
    """A template is a program: it may raise anything, also to refuse a record."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RecordError(
            f"the tokenizer's chat template refuses it ({reason}); change the record, or give another "
            "template with --chat-template",
            field="messages",
        ) from error
