"""What one record of a source says: something to learn, and what its source is worth.

These are values that have been checked (``reading`` checks them); everything after can rely on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]

Unit = Literal["line", "row", "index"]
"""What a record of a source is counted by: lines and rows from 1, an iterable's examples from 0."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a record stands: what a message about it begins with.

    Attributes:
        file: the path or the name as the user gave it.
        line: its line, row or index.
        unit: which of them it is.
    """

    file: str
    line: int
    unit: Unit = "line"

    def __str__(self) -> str:
        match self.unit:
            case "line":
                return f"{self.file}:{self.line}"
            case "row":
                return f"{self.file}: row {self.line}"
            case "index":
                return f"{self.file}[{self.line}]"


@dataclass(frozen=True, slots=True)
class Text:
    """A plain text; every token of it is learned."""

    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its completion; only the completion is learned. The prompt may be empty."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of which one at least, and never the first, is the assistant's; only those are learned.

    Attributes:
        messages: the turns.
        learned_from: the assistant's turns before this one are only read: they are the prompt's.
    """

    messages: tuple[Message, ...]
    trained_turns: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """One example as its source gives it.

    Attributes:
        location: where it stands.
        authority_weight: w of its source, in [0, 0.99].
        provenance_entropy: H of its source, in bits, finite and not negative.
        content: what there is to learn.
        source: the class that its source is of, as its data names it; empty where that says nothing.
    """

    location: Location
    authority_weight: float
    provenance_entropy: float
    content: Text | Completion | Conversation
    source: str = ""
