"""What comes out of a file, made fit for a terminal.

Names and metadata are anybody's. A terminal obeys what stands between letters: it can be told to hide lines,
to rename its window, to write backwards, or to type for the user.
"""

from __future__ import annotations

import re

_NOT_PLAIN = re.compile("[^ -~]")


def printable(text: str, *, lines: bool = False) -> str:
    r"""Text with everything that is not to be seen as an escape of JSON, such as ``\u001b``.

    Args:
        text: from anywhere.
        lines: whether it may have more than one.
    """
    if text.isprintable():
        return text
    kept = "\n" if lines else ""
    return _NOT_PLAIN.sub(lambda found: found[0] if found[0] in kept else _seen(found[0]), text)


def _seen(letter: str) -> str:
    import json
    import unicodedata

    if letter.isprintable() or unicodedata.category(letter) == "Zs":  # the other kinds of spaces
        return letter
    return json.dumps(letter)[1:-1]


def pluralize(number: float, thing: str) -> str:
    """So many of a thing, to the nearest whole one: its name gets an s, but for one."""
    return f"{number:,.0f} {thing}{'' if round(number) == 1 else 's'}"
