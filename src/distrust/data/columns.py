"""Which columns of a source hold what: the names that people's data goes by, or those that an option gives.

Where an option names a column of content, only the columns named so are looked at: a table may hold a text
beside a prompt and its completion, and the option chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distrust.config import TrainConfig, as_names


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of a record's fields.

    Attributes:
        text: of a plain text; None where no text is looked for.
        prompt: of a prompt; several are joined. Empty where no prompt is looked for.
        completion: of a completion; None where none is looked for.
        messages: of a conversation: any one of these names.
        authority_weight: of w: any of these names.
        provenance_entropy: of H: any of these names.
        source: of the source class: any of these names.
        given: whether the content's names come from options.
    """

    text: str | None = "text"
    prompt: tuple[str, ...] = ("prompt",)
    completion: str | None = "completion"
    messages: tuple[str, ...] = ("messages", "conversations")
    authority_weight: tuple[str, ...] = ("authority_weight", "auth_weight")
    provenance_entropy: tuple[str, ...] = ("provenance_entropy", "prov_entropy")
    source: tuple[str, ...] = ("source",)
    explicit: bool = False

    @property
    def kinds(self) -> dict[str, tuple[str, ...]]:
        """What kinds of content are looked for, as a message calls them, and their columns."""
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

    def needed_from(self, there: Sequence[str]) -> list[str]:
        """Those of a table's columns that are needed: all of them if none holds content, to tell so."""
        if not any(name in there for name in self.content):
            return list(there)
        return [name for name in there if name in self.content + self.numbers + self.source]

    def select(self, row: Mapping[str, Any], text: str | None = None) -> Mapping[str, Any]:  # noqa: ARG002
        """What is read of a row: a null is a field that is not there.

        Args:
            row: its values.
            text: of JSON, the object as it is written, on one line.
        """
        return {name: value for name, value in row.items() if value is not None}


class WholeRow(dict[str, Any]):
    """All of a row, nulls too.

    Attributes:
        text: the object as its file has it, where that is JSON.
    """

    __slots__ = ("text",)

    def __init__(self, row: Mapping[str, Any], text: str | None) -> None:
        super().__init__(row)
        self.text = text


class WholeRows(Columns):
    """Names of fields for a reader that wants all there is of a row: one that writes it again."""

    def needed_from(self, there: Sequence[str]) -> list[str]:
        """All of them."""
        return list(there)

    def select(self, row: Mapping[str, Any], text: str | None = None) -> WholeRow:
        """All of it."""
        return WholeRow(row, text)


def columns_of(config: TrainConfig) -> Columns:
    """The columns that a config names, and the usual names for the others."""
    usual = Columns()
    weights = as_names(config.authority_weight_column) or usual.authority_weight
    entropies = as_names(config.provenance_entropy_column) or usual.provenance_entropy
    source = as_names(config.source_column) or usual.source
    prompt, completion = as_names(config.prompt_column), config.completion_column
    if not (config.text_column or prompt or completion or config.messages_column):
        return Columns(authority_weight=weights, provenance_entropy=entropies, source=source)
    pair = bool(prompt or completion)
    return Columns(
        text=config.text_column,
        prompt=(prompt or usual.prompt) if pair else (),
        completion=(completion or usual.completion) if pair else None,
        messages=as_names(config.messages_column),
        authority_weight=weights,
        provenance_entropy=entropies,
        source=source,
        explicit=True,
    )
