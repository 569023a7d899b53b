"""Renders what is trained of some records for a terminal, for a notebook, and as a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from html import escape
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from distrust.errors import printable
from distrust.reporting.display import one_line, pluralize

if TYPE_CHECKING:
    from distrust.data import ShownSequence

#: What is put before and after each part of a rendered sequence.
_Style = Mapping[str, tuple[str, str]]
_TERMINAL: _Style = {
    "head": ("\033[1m", "\033[22m"),
    "trained": ("\033[32m", "\033[39m"),
    "special": ("\033[2m", "\033[22m"),
    "note": ("\033[2m[", "]\033[22m"),
    "error": ("\033[31m", "\033[39m"),
}
_PLAIN: _Style = {"trained": ("⟦", "⟧"), "note": ("[", "]")}
_HTML: _Style = {
    "head": ("<h2>", "</h2>"),
    "text": ("<pre>", "</pre>"),
    "trained": ("<mark>", "</mark>"),
    "special": ("<i>", "</i>"),
    "note": ("<p>", "</p>"),
    "error": ('<p class="error">', "</p>"),
}
_CSS = """<style>
.preview { font: 14px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; overflow-wrap: anywhere; }
.preview h2 { font-size: 1em; margin: 1.6em 0 .4em; }
.preview pre { border: 1px solid rgb(128 128 128 / .4); border-radius: 10px; padding: .7em 1em; margin: 0;
  font: 13px/1.55 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; }
.preview mark { background: rgb(0 158 115 / .25); color: inherit; border-bottom: 2px solid rgb(0 158 115); }
.preview i { font-style: normal; opacity: .55; }
.preview .error { color: #d55e00; }
</style>"""
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
{body}
</html>
"""


@dataclass(frozen=True)
class Preview:
    """What is trained of some records. A notebook shows it in colour, ``str`` in brackets."""

    title: str  # names of model and data
    entries: tuple[ShownSequence | str, ...]  # by record; an error of a record is a line
    notes: tuple[str, ...]  # which columns are read, what may be wrong with them, what the weights are

    @property
    def sequences(self) -> tuple[ShownSequence, ...]:
        """The sequences of the records without errors."""
        return tuple(entry for entry in self.entries if not isinstance(entry, str))

    @property
    def errors(self) -> tuple[str, ...]:
        """The errors of the others, a line each."""
        return tuple(entry for entry in self.entries if isinstance(entry, str))

    def as_json(self) -> list[dict[str, Any]]:
        """The sequences; ``trained`` holds the begin and end of characters of ``text``."""
        return [{k: v for k, v in asdict(part).items() if k != "special"} for part in self.sequences]

    def to_text(self, *, colour: bool) -> str:
        """For a terminal: what is trained is green, or in brackets without colour."""
        parts = _render(self.entries, _TERMINAL if colour else _PLAIN, printable)
        legend = [f"{'green' if colour else '⟦ ⟧'}: trained"] * self._shows_trained
        notes = "\n".join([*legend, *map(printable, filter(None, self.notes))])
        return "\n\n".join([printable(self.title), *parts, notes])

    @property
    def _shows_trained(self) -> bool:
        return any(part.trained for part in self.sequences)

    def to_page(self) -> str:
        """A self-contained page, which loads and runs nothing."""
        return _PAGE.format(title=escape(one_line(self.title)), body=self._repr_html_())

    def __str__(self) -> str:
        return self.to_text(colour=False)

    def _repr_html_(self) -> str:
        # Characters that are invisible, or reverse the text around them, are shown as in a terminal.
        def clean(text: str, **options: bool) -> str:
            return escape(printable(text, **options))

        parts = _render(self.entries, _HTML, clean)
        legend = ["<mark>marked</mark>: trained"] * self._shows_trained
        caption = "<br>".join([clean(self.title), *legend, *map(clean, filter(None, self.notes))])
        return "\n".join([_CSS, '<div class="preview">', f"<p>{caption}</p>", *parts, "</div>"])


def _render(
    entries: tuple[ShownSequence | str, ...], style: _Style, clean: Callable[..., str]
) -> Iterator[str]:
    def put(part: str, text: str) -> str:
        opening, closing = style.get(part, ("", ""))
        return f"{opening}{text}{closing}" if text else ""

    for entry in entries:
        if isinstance(entry, str):
            yield put("error", clean(entry))
            continue
        text = ""
        for is_trained, pieces in groupby(_pieces(entry), key=lambda piece: piece[1]):
            cleaned = [(clean(piece, lines=True), special) for piece, _, special in pieces]
            inner = "".join(put("special", piece) if special else piece for piece, special in cleaned)
            text += put("trained", inner) if is_trained else inner
        of = f", sequence {entry.sequence} of {entry.sequences}" if entry.sequences > 1 else ""
        if entry.tokens:  # not left out
            tokens = pluralize(entry.tokens, "token")
            of += f": {tokens}, {entry.trained_tokens:,} trained, weight {entry.weight:.4g}"
        head = put("head", clean(f"record {entry.record} ({entry.location}){of}"))
        lines = [head, put("text", text.removesuffix("\n")), put("note", clean(entry.note))]
        yield "\n".join(filter(None, lines))


def _pieces(part: ShownSequence) -> Iterator[tuple[str, bool, bool]]:
    """Pieces of the text, and whether each is trained, and special."""
    edges = sorted({0, len(part.text), *(edge for span in (*part.trained, *part.special) for edge in span)})
    for begin, end in pairwise(edges):
        is_trained, is_special = (
            any(first <= begin < last for first, last in spans) for spans in (part.trained, part.special)
        )
        yield part.text[begin:end], is_trained, is_special
