"""Which columns the records have: those that are read, those that are ignored, and probable misspellings."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from distrust.data.columns import CONTEXT, Columns, Fields
from distrust.data.corpus import common_length
from distrust.data.records import Conversation, Record
from distrust.data.values import list_names, quote_value

MAX_COLUMNS = 200  # names that are kept; a file may give each record others
_CLOSE = 0.85  # similarity of a misspelled name, from 0 to 1

#: Names that others give to content, by the option that takes them.
_OTHER_NAMES = {
    "--text-column": ("text", "body", "content", "document", "article"),
    "--prompt-column": ("prompt", "question", "query", "input", "problem", "instruction"),
    "--completion-column": ("completion", "response", "answer", "output", "solution", "reply"),
    "--messages-column": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns"),
}
_CONTEXTS = ("context", "input")  # names of a second column of a prompt
_OPTIONAL = ("authority_weight", "provenance_entropy", "weight", "source")  # fields of ``Columns``


@dataclass(frozen=True, slots=True)
class ColumnReport:
    """The columns of a dataset, each in the order of appearance."""

    used: tuple[str, ...]
    ignored: tuple[str, ...]
    similar: Mapping[str, str]  # ignored columns that look like a field that no record has: the advice

    def __str__(self) -> str:
        ignored = f"; ignored: {list_names(self.ignored)}" if self.ignored else ""
        return f"columns: {list_names(self.used)}{ignored}"


NO_COLUMNS = ColumnReport((), (), {})


class SeenColumns:
    """The columns of the records read so far. Memory is bounded."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._optional = {field: frozenset(getattr(columns, field)) for field in _OPTIONAL}
        self._known = frozenset({*columns.content, *CONTEXT}.union(*self._optional.values()))
        self._names: dict[str, None] = {}  # in order; at most MAX_COLUMNS, besides known ones
        #: How many records have these of the known columns, and are conversations or not.
        self._layouts: Counter[tuple[bool, frozenset[str]]] = Counter()

    def add(self, fields: Fields, record: Record | object) -> None:
        """Count a record."""
        if not fields.keys() <= self._names.keys():
            self.add_names(fields)
        is_conversation = isinstance(record, Record) and isinstance(record.content, Conversation)
        self._layouts[is_conversation, self._known.intersection(fields)] += 1

    def add_names(self, names: Iterable[str]) -> None:
        """Add names of columns, also of those that are not read."""
        for name in names:
            if len(self._names) < MAX_COLUMNS or name in self._known:
                self._names[name] = None

    @property
    def stated(self) -> dict[str, int]:
        """How many records state a field that they need not, such as weight."""
        layouts = self._layouts.items()
        return {
            field: sum(count for (_, names), count in layouts if names & columns)
            for field, columns in self._optional.items()
        }

    def report(self) -> ColumnReport:
        """The columns so far."""
        read = {
            name
            for is_conversation, names in self._layouts
            for columns in (
                *self._columns.kinds_in(names).values(),
                *self._optional.values(),
                CONTEXT * is_conversation,
            )
            for name in names.intersection(columns)
        }
        used = tuple(name for name in self._names if name in read)
        ignored = tuple(name for name in self._names if name not in read)
        return ColumnReport(used, ignored, self._similar(ignored, read))

    def hint(self) -> str:
        """Options and names that the author of wrong records may have meant; empty if nothing is close."""
        report = self.report()
        names = [*report.ignored, *report.used]
        advice = list(report.similar.values())
        kinds = self._columns.kinds_in(names).values()
        if not any(columns == self._columns.messages or _is_complete(columns, names) for columns in kinds):
            column_of = {option: _find(names, aliases) for option, aliases in _OTHER_NAMES.items()}
            text, prompt, completion, messages = column_of
            pair = column_of[prompt] and column_of[completion]
            context = next((n for n in names if n.lower() in _CONTEXTS and n != column_of[prompt]), None)
            if pair and context:
                column_of[prompt] = f"{column_of[prompt]} {context}"
            chosen = (prompt, completion) if pair else (messages,) if column_of[messages] else (text,)
            options = " ".join(f"{option} {column_of[option]}" for option in chosen if column_of[option])
            advice += [f"perhaps {options}"] if options else []
        return "; ".join(advice)

    def _similar(self, ignored: Iterable[str], read: set[str]) -> dict[str, str]:
        advice_of = {name: f"rename it to {name}" for name in CONTEXT if name not in read}
        for field, columns in self._optional.items():
            if columns.isdisjoint(read):
                advice_of |= dict.fromkeys(columns, f"give --{field.replace('_', '-')}-column {{}}")
        similar = {}
        for name in (name for name in ignored if name not in advice_of):
            if closest := _closest(name, advice_of):
                quoted = quote_value(name)  # it may hold anything
                similar[name] = (
                    f"{quoted} is ignored; if it is the {closest}, {advice_of[closest].format(quoted)}"
                )
        return similar


def _is_complete(kind: tuple[str, ...], names: list[str]) -> bool:
    """Whether there are a completion and a prompt, or a text."""
    return kind[-1] in names and (len(kind) == 1 or any(name in names for name in kind[:-1]))


def _find(names: list[str], others: tuple[str, ...]) -> str | None:
    """The first of the names that is one of the others, else the first that is close to one."""
    exact = (name for name in names if name.lower() in others)
    return next(exact, None) or next((name for name in names if _closest(name, others)), None)


def _closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a name is probably meant to be."""
    name = name.lower()
    for candidate in known:
        same = common_length(name, candidate)
        swapped = candidate[same : same + 2][::-1] + candidate[same + 2 :]  # two neighbouring letters
        if name[same:] == swapped:
            return candidate
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=_CLOSE)), None)
