"""A text stream that a notebook shows as one output of the cell, which changes in place."""

from __future__ import annotations

import io
import re
import time
from typing import Any

#: Lines that stay visible: a long run prints thousands.
MAX_LINES = 40
#: Seconds between two states of a line that changes: each is a message to the browser.
INTERVAL_SECONDS = 0.2
#: A line that the next one replaces: of a step, or of a save.
_REPLACED = re.compile(r"step \d+(/|: saved )")


class CellOutput(io.TextIOBase):
    """The stream; each ``write`` is of one line. Creating it shows the output."""

    def __init__(self) -> None:
        from IPython.display import display

        self._lines: list[str] = []
        self._shown = 0.0  # when
        self._handle = display(self, display_id=True)

    def write(self, text: str) -> int:
        """Add a line."""
        remaining = [line for line in self._lines if not _REPLACED.match(line)]
        self._lines = [*remaining, text.rstrip("\n")][-MAX_LINES:]
        if not _REPLACED.match(text) or time.monotonic() - self._shown >= INTERVAL_SECONDS:
            self._shown = time.monotonic()
            self._handle.update(self)
        return len(text)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/plain": "\n".join(self._lines)}  # what IPython asks for
