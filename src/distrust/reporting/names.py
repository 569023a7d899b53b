"""Names that data brings, as they are shown: text on one line, whatever they hold."""

from __future__ import annotations

from distrust.data import NO_CLASS

NAME_CHARACTERS = 28


def one_line(text: str, characters: int = 10**6) -> str:
    """Text from anywhere on one line, what cannot be seen replaced, cut to so many letters."""
    seen = "".join(letter if letter.isprintable() else "\ufffd" for letter in text[: characters + 1])
    return seen if len(seen) <= characters else seen[: characters - 1] + "…"


def class_name(name: str, characters: int = NAME_CHARACTERS) -> str:
    """What a source class is called: that of the examples that name none has no name of its own."""
    return one_line(name, characters) or NO_CLASS
