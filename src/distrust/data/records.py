"""Record types: the content to train on, and the provenance of its source.

``reading`` validates every field before it builds one of these. Later stages do not check again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "developer", "user", "assistant", "tool"]

# How the records of a source are numbered: lines and rows from 1, the examples of an iterable from 0.
Unit = Literal["line", "row", "index"]


@dataclass(frozen=True, slots=True)
class Location:
    """Where a record comes from: the prefix of every message about it."""

    file: str  # path or name, as the user gave it
    line: int  # line, row or index, counted as ``unit`` says
    unit: Unit = "line"

    def __str__(self) -> str:
        forms = {"line": "{}:{}", "row": "{}: row {}", "index": "{}[{}]"}
        return forms[self.unit].format(self.file, self.line)


@dataclass(frozen=True, slots=True)
class Text:
    """A plain text. Every token is trained."""

    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its completion. Only the completion is trained."""

    prompt: str  # may be empty
    completion: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str  # "" for a turn that only calls tools
    weight: float = 1.0  # factor of the loss of its tokens, >= 0; 0: read, but not trained
    # All else that a chat template may print: tool_calls (their arguments as objects), reasoning_content,
    # tool_call_id, name.
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of a chat, at least one. Only assistant turns are trained."""

    messages: tuple[Message, ...]
    trained_turns: int = 0  # index of the first turn that may be trained; earlier turns are prompt
    tools: tuple[Mapping[str, Any], ...] = ()  # descriptions of functions, as the chat template takes them
    template_options: Mapping[str, Any] = field(default_factory=dict)  # such as enable_thinking


@dataclass(frozen=True, slots=True)
class Record:
    """One validated example of a source."""

    location: Location
    authority_weight: float  # w in [0, 0.99]; high means less training weight
    provenance_entropy: float  # H in bits, finite, >= 0
    content: Text | Completion | Conversation
    source: str = ""  # source class as the data names it; "" if it names none
    weight: float = 1.0  # factor of the loss of its tokens, >= 0
