"""What ran: one line of JSON for each step, written at once: a cut-off loses only the steps in progress."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["ok", "failed", "too slow", "not installed", "cut off"]
#: After the others, a step is run again.
LASTING = ("ok", "failed", "too slow")


@dataclass(frozen=True)
class Record:
    """A step that ran: its figures by name, or the reason why it has none; and the machine."""

    step: str
    outcome: Outcome
    seconds: float  # of the whole process
    device: str
    tiny: bool
    figures: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    machine: dict[str, str] = field(default_factory=dict)


class Records:
    """The records of a folder, in a file to which lines are only added."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "records.jsonl"
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        self.all = [record for record in map(_parse, lines) if record is not None]

    def add(self, record: Record) -> None:
        """Write a record; returns when it is durable."""
        self.all.append(record)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def newest(self, *, device: str, tiny: bool) -> dict[str, Record]:
        """Step -> its last record on this device and in these sizes."""
        return {r.step: r for r in self.all if (r.device, r.tiny) == (device, tiny)}


def _parse(line: bytes) -> Record | None:
    try:
        return Record(**json.loads(line))
    except (ValueError, TypeError):  # the line in progress when the machine was taken away
        return None
