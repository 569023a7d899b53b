"""Which columns of a source hold which field: the usual names, or those that options give.

If an option names a column of content, only the named columns are read: a table may hold a text next to a
prompt and its completion, and the option chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distrust.config import TrainConfig, as_names

Fields = Mapping[str, Any]  # the fields of one record, none of them null


@dataclass(frozen=True, slots=True)
class Columns:
    """The column names of a record's fields."""

    text: str | None = "text"  # None: plain texts are not read
    prompt: tuple[str, ...] = ("prompt",)  # joined in this order; empty: prompts are not read
    completion: str | None = "completion"  # None: completions are not read
    messages: tuple[str, ...] = ("messages", "conversations")  # alternative names, as in the next three
    authority_weight: tuple[str, ...] = ("authority_weight", "auth_weight")
    provenance_entropy: tuple[str, ...] = ("provenance_entropy", "prov_entropy")
    source: tuple[str, ...] = ("source",)
    explicit: bool = False  # whether options name the columns of content

    @property
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

    @property
    def content(self) -> tuple[str, ...]:
        """All columns of content."""
        return tuple(name for names in self.kinds.values() for name in names)

    @property
    def numbers(self) -> tuple[str, ...]:
        """All columns of numbers."""
        return self.authority_weight + self.provenance_entropy

    def needed_from(self, available: Sequence[str]) -> list[str]:
        """The columns of a table to read."""
        if not any(name in available for name in self.content):
            return list(available)  # all of them, for the error message
        return [name for name in available if name in self.content + self.numbers + self.source]

    def select(self, row: Mapping[str, Any], text: str | None = None) -> Fields:  # noqa: ARG002
        """The fields of a row without nulls; ``text`` is a JSON object as written, on one line."""
        return {name: value for name, value in row.items() if value is not None}


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

    def select(self, row: Mapping[str, Any], text: str | None = None) -> WholeRow:
        """The complete row."""
        return WholeRow(row, text)


def columns_of(config: TrainConfig) -> Columns:
    """The columns that a config names, with the usual names for the rest."""
    usual = Columns()
    columns = Columns(
        authority_weight=as_names(config.authority_weight_column) or usual.authority_weight,
        provenance_entropy=as_names(config.provenance_entropy_column) or usual.provenance_entropy,
        source=as_names(config.source_column) or usual.source,
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
