"""Renders a model card: facts -> the README.md that people and hubs read. Pure.

Names of models, files and metrics may hold anything. In the front matter, which is YAML, each is a string in
double quotes with every invisible character escaped. In the text, each is in a code span, in which Markdown
has no effect, on one line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distrust.errors import shorten


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The contents of a card."""

    title: str  # such as the name of the folder
    library: str  # loads the folder: peft, mlx or transformers
    base: str  # public name of the base model
    hub_name: str | None  # of the base model on a hub
    tags: Sequence[str]  # for hubs
    summary: str  # one sentence about the folder
    load: str  # Python code that loads the folder
    notes: Sequence[str]  # sentences for users of the folder
    sections: Mapping[str, Mapping[str, object]]  # heading -> name -> value


def model_card(facts: Facts) -> str:
    """Render the text of the README.md."""
    lines = [
        *_front_matter(facts),
        "",
        f"# {_code_span(facts.title)}",
        "",
        f"{facts.summary} Base model: {_code_span(facts.base)}.",
        "",
        *_code_block(facts.load),
    ]
    lines += [line for note in facts.notes for line in ("", note)]
    for heading, values in facts.sections.items():
        lines += ["", f"## {heading}", ""]
        lines += [f"- {_code_span(name)}: {_code_span(_text(value))}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def yaml_text(text: str) -> str:
    """A YAML string in double quotes: any reader gets the text back, lone surrogates as U+FFFD."""
    escapes = {'"': '\\"', "\\": "\\\\"}
    return '"' + "".join(escapes.get(char) or _escape(char) for char in text) + '"'


def _front_matter(facts: Facts) -> list[str]:
    relation = "finetune" if facts.library == "transformers" else "adapter"
    lines = ["---", f"library_name: {facts.library}", "pipeline_tag: text-generation"]
    if facts.hub_name is not None:  # a hub rejects the name of a local folder
        lines += [f"base_model: {yaml_text(facts.hub_name)}", f"base_model_relation: {relation}"]
    return [*lines, "tags:", *(f"- {yaml_text(tag)}" for tag in facts.tags), "---"]


def _code_span(text: str) -> str:
    line = "".join(map(_escape, shorten(text)))
    fence = "`" * (_longest_fence(line) + 1)
    # Markdown strips one space at each end: the text may begin or end with a backtick, or be empty.
    pad = " " if not line.strip() or line[0] in "` " or line[-1] in "` " else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _code_block(code: str) -> list[str]:
    fence = "`" * max(3, _longest_fence(code) + 1)
    return [f"{fence}python", *code.rstrip("\n").split("\n"), fence]


def _longest_fence(text: str) -> int:
    """The length of the longest run of backticks: a fence must be longer."""
    return max(map(len, re.findall("`+", text)), default=0)


def _escape(char: str) -> str:
    """A character, or if it is invisible an escape that YAML reads and people can read too."""
    if 0xD800 <= ord(char) < 0xE000:
        return "\ufffd"  # a lone surrogate: UTF-8 cannot encode it
    return char if char.isprintable() else char.encode("unicode_escape").decode()


def _text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value)
