"""Results on disk: one line for each run, durable before the next one counts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.weighting.design import Run

Result = dict[str, Any]


def run_of(result: Result) -> Run:
    """The run that a result belongs to."""
    return Run(**{name: result[name] for name in Run.__slots__})


class Results:
    """A file of results of one design.

    Raises:
        SystemExit: if it holds results of another design.
    """

    def __init__(self, path: Path, *, design: str) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        lines = content[: content.rfind(b"\n") + 1]  # a killed writer left an incomplete last line
        if lines != content:
            os.truncate(path, len(lines))
        self.all: list[Result] = [json.loads(line) for line in lines.splitlines()]
        if any(result["design"] != design for result in self.all):
            raise SystemExit(f"{path}: holds results of another design than this one; give another --out")

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """The runs without a result."""
        completed = set(map(run_of, self.all))
        return [run for run in runs if run not in completed]

    def add(self, result: Result) -> None:
        """Durable when this returns."""
        with self._path.open("ab") as file:
            file.write(json.dumps(result).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.all.append(result)
