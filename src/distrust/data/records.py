"""What one line of a source says: something to learn, and what its source is worth.

These are values that have been checked (``sources`` checks them); everything after can rely on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Location:
    """Where a record stands: what a message about it begins with.

    Attributes:
        file: the path as the user gave it.
        line: counted from 1.
    """

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


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
    """Turns of which one at least, and never the first, is the assistant's; only those are learned."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One example as its source gives it.

    Attributes:
        location: where it stands.
        authority_weight: w of its source, in [0, 0.99].
        provenance_entropy: H of its source, in bits, finite and not negative.
        content: what there is to learn.
    """

    location: Location
    authority_weight: float
    provenance_entropy: float
    content: Text | Completion | Conversation
