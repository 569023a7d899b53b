"""Which columns of a source hold which field: the usual names, or those that options give.

If an option names a column of content, only the named columns are read: a table may hold a text next to a
prompt and its completion, and the option chooses.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from distrust.config import TrainConfig
from distrust.option_values import as_names

Fields = Mapping[str, Any]  # the fields of one record, none of them null

TEMPLATE_OPTIONS = "chat_template_kwargs"  # options for the chat template, such as enable_thinking
SYSTEM = ("system", "system_prompt")  # alternative names
#: What a record states beside the turns of its conversation.
CONTEXT = (*SYSTEM, "tools", TEMPLATE_OPTIONS)
#: Fields of other trainers that change what is trained on, and that this one cannot honour.
UNSUPPORTED = (
    "history", "mask_history", "functions", "images", "image", "videos", "audios",
    "chosen", "rejected", "kto_tag", "label",
)  # fmt: skip
#: Values of such a field that say nothing; false and 0 say something.
NOTHING: tuple[Any, ...] = (None, "", "[]", "{}", [], {})
_INSTRUCTION = ("instruction", "input", "output")


@dataclass(frozen=True)
class Columns:
    """The column names of a record's fields."""

    text: str | None = "text"  # None: plain texts are not read
    prompt: tuple[str, ...] = ("prompt",)  # joined in this order; empty: prompts are not read
    completion: str | None = "completion"  # None: completions are not read
    messages: tuple[str, ...] = ("messages", "conversations")  # alternative names, as in the next three
    authority_weight: tuple[str, ...] = ("authority_weight", "auth_weight")
    provenance_entropy: tuple[str, ...] = ("provenance_entropy", "prov_entropy")
    source: tuple[str, ...] = ("source",)
    weight: tuple[str, ...] = ("weight",)
    explicit: bool = False  # whether options name the columns of content

    @cached_property
    def kinds(self) -> dict[str, tuple[str, ...]]:
        """The kinds of content that are read, as a message names them, and their columns."""
        kinds: dict[str, tuple[str, ...]] = {}
        if self.text is not None:
            kinds[self.text] = (self.text,)
        if self.completion is not None:
            kinds[" + ".join((*self.prompt, self.completion))] = (*self.prompt, self.completion)
        if self.messages:
            kinds[self.messages[0]] = self.messages
        return kinds

    def kinds_in(self, names: Collection[str]) -> dict[str, tuple[str, ...]]:
        """The kinds of content among the fields of a record: incomplete ones only if there is no other."""
        present = {
            kind: columns for kind, columns in self.kinds.items() if any(name in names for name in columns)
        }
        if self.explicit:
            return present
        if _INSTRUCTION[0] in names and (not present or _INSTRUCTION[-1] in names):
            present[" + ".join(_INSTRUCTION[::2])] = _INSTRUCTION
        complete = {
            k: columns for k, columns in present.items() if columns == self.messages or columns[-1] in names
        }
        return complete or present

    def choice(self, own: tuple[str, ...], names: Collection[str]) -> str:
        """The options that choose one kind of content among the fields of a record."""
        *prompt, last = (name for name in own if name in names)
        if own == self.messages:
            return f"--messages-column {last}"
        if own == (self.text,):
            return f"--text-column {last}"
        return f"--prompt-column {' '.join(prompt)} " * bool(prompt) + f"--completion-column {last}"

    @property
    def options(self) -> list[str]:
        """The options that name the columns of content which are read."""
        read = {"text": self.text, "prompt": self.prompt, "completion": self.completion}
        return [
            f"--{name}-column" for name, columns in {**read, "messages": self.messages}.items() if columns
        ]

    @property
    def content(self) -> tuple[str, ...]:
        """All columns of content."""
        named = tuple(name for names in self.kinds.values() for name in names)
        return named if self.explicit else named + _INSTRUCTION

    @property
    def numbers(self) -> tuple[str, ...]:
        """All columns of numbers."""
        return self.authority_weight + self.provenance_entropy + self.weight

    def needed_from(self, available: Sequence[str]) -> list[str]:
        """The columns of a table to read."""
        if not self.kinds_in(available):
            return list(available)  # all of them, for the error message
        context = CONTEXT if self.explicit else CONTEXT + UNSUPPORTED
        return [name for name in available if name in self.content + self.numbers + self.source + context]

    def select(
        self,
        row: Mapping[str, Any],
        text: str | None = None,  # noqa: ARG002
        *,
        is_cells: bool = False,
    ) -> Fields:
        """The fields of a row without nulls.

        ``text`` is a JSON object as written, on one line. ``is_cells``: the row is from a table with types,
        which fills structs with nulls, so nulls inside values are left out, too.
        """
        return {n: _without_nulls(v) if is_cells else v for n, v in row.items() if v is not None}


class WholeRow(dict[str, Any]):
    """All fields of a row, including nulls."""

    __slots__ = ("text",)

    def __init__(self, row: Mapping[str, Any], text: str | None) -> None:
        super().__init__(row)
        self.text = text  # the object as written in its file, if that is JSON


class WholeRows(Columns):
    """Columns for a reader that needs complete rows, to write them again."""

    def needed_from(self, available: Sequence[str]) -> list[str]:
        """All of them."""
        return list(available)

    def select(self, row: Mapping[str, Any], text: str | None = None, *, is_cells: bool = False) -> WholeRow:  # noqa: ARG002
        """The complete row."""
        return WholeRow(row, text)


def _without_nulls(value: Any) -> Any:
    """A value without the members of objects that are null."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return value


def columns_of(config: TrainConfig) -> Columns:
    """The columns that a config names, with the usual names for the rest."""
    usual = Columns()
    columns = Columns(
        authority_weight=as_names(config.authority_weight_column) or usual.authority_weight,
        provenance_entropy=as_names(config.provenance_entropy_column) or usual.provenance_entropy,
        source=as_names(config.source_column) or usual.source,
        weight=as_names(config.weight_column) or usual.weight,
    )
    prompt, completion = as_names(config.prompt_column), config.completion_column
    if not (config.text_column or prompt or completion or config.messages_column):
        return columns
    pair = bool(prompt or completion)  # naming one of the two keeps the usual name of the other
    return replace(
        columns,
        text=config.text_column,
        prompt=(prompt or usual.prompt) if pair else (),
        completion=(completion or usual.completion) if pair else None,
        messages=as_names(config.messages_column),
        explicit=True,
    )
