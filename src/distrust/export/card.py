"""The model card: facts -> the README.md that people and hubs read. Pure.

Names are anybody's: of a model, of a file, of a metric. In the front matter, which is YAML, each is a string
in double quotes with everything escaped that is not plain; in the text each stands in a code span, in which
Markdown obeys nothing, on one line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distrust.errors import shorten


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card says.

    Attributes:
        title: of the card, such as the name of the folder.
        library: that loads the folder: ``peft``, ``mlx`` or ``transformers``.
        base: name of the base model, as people know it.
        hub_name: of the base model on a hub, or None.
        tags: for hubs.
        summary: one sentence: what is in the folder.
        load: Python code that loads the folder.
        notes: sentences that a user of the folder should know.
        sections: heading -> name -> value.
    """

    title: str
    library: str
    base: str
    hub_name: str | None
    tags: Sequence[str]
    summary: str
    load: str
    notes: Sequence[str]
    sections: Mapping[str, Mapping[str, object]]


def model_card(facts: Facts) -> str:
    """The text of the README.md."""
    lines = [
        *_front_matter(facts),
        "",
        f"# {_code(facts.title)}",
        "",
        f"{facts.summary} Base model: {_code(facts.base)}.",
        "",
        *_fenced(facts.load),
    ]
    lines += [line for note in facts.notes for line in ("", note)]
    for heading, values in facts.sections.items():
        lines += ["", f"## {heading}", ""]
        lines += [f"- {_code(name)}: {_code(_shown(value))}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def yaml_text(text: str) -> str:
    """A string of YAML in double quotes: any reader gets the text back, half surrogates as U+FFFD."""
    escaped = {'"': '\\"', "\\": "\\\\"}
    return '"' + "".join(escaped.get(letter) or _plain(letter) for letter in text) + '"'


def _front_matter(facts: Facts) -> list[str]:
    relation = "finetune" if facts.library == "transformers" else "adapter"
    lines = ["---", f"library_name: {facts.library}", "pipeline_tag: text-generation"]
    if facts.hub_name is not None:  # a hub refuses what is no name of its own
        lines += [f"base_model: {yaml_text(facts.hub_name)}", f"base_model_relation: {relation}"]
    return [*lines, "tags:", *(f"- {yaml_text(tag)}" for tag in facts.tags), "---"]


def _code(text: str) -> str:
    """A code span: fenced by more backticks than any that stand in it."""
    line = "".join(_plain(letter) for letter in shorten(text))
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    # A space at either end is taken off again: the text may begin or end with a backtick, or be empty.
    pad = " " if not line.strip() or line[0] in "` " or line[-1] in "` " else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _fenced(code: str) -> list[str]:
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}python", *code.rstrip("\n").split("\n"), fence]


def _plain(letter: str) -> str:
    """A letter as it is if it can be seen; else as an escape of YAML, which people can read too."""
    number = ord(letter)
    if 0xD800 <= number < 0xE000:
        return "\ufffd"
    if letter.isprintable():
        return letter
    return (
        f"\\x{number:02x}"
        if number < 0x100
        else f"\\u{number:04x}"
        if number < 0x10000
        else f"\\U{number:08x}"
    )


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value)
