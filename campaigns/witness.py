"""What is known to have been durable of a training run: what it has said, and what had its name.

A checkpoint that stands under its name is durable against everything but a power cut, whether the run has
come to say so or not: nothing that happens to the process may take it away.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from campaigns import invariants
from campaigns.processes import Session
from campaigns.triggers import Trigger
from distrust.checkpoint import Scan
from distrust.checkpoint.retention import Candidate, Retention


class DurabilityRecord:
    """Remembers the checkpoints of one run over all its sessions.

    Args:
        directory: of its checkpoints.
        rules: of the run.
    """

    def __init__(self, directory: Path, rules: Retention) -> None:
        self._directory = directory
        self._rules = rules
        self._durable: set[tuple[int, bool]] = set()

    @property
    def newest(self) -> int:
        """The newest step that is known to have been durable; 0 if there is none."""
        return max((step for step, _ in self._durable), default=0)

    @property
    def reported(self) -> list[Candidate]:
        """All that is known."""
        return [Candidate(step, final, {}) for step, final in sorted(self._durable)]

    def watching(self, instant: Trigger) -> Trigger:
        """The same instant, with a look at the directory each time that it is asked for."""

        def watched(session: Session) -> Callable[[], bool]:
            come = instant(session)

            def look() -> bool:
                self._durable |= _standing(self._directory)
                return come()

            return look

        return watched

    def hear(self, session: Session) -> None:
        """Take down what a session has said."""
        self._durable |= {_saved(line) for line in session.said() if _says_saved(line)}

    def require_kept(self) -> Scan:
        """Check what is promised of all that is known, and take down what stands; returns what is there.

        Raises:
            CounterExample: see :func:`campaigns.invariants.require_kept`.
        """
        scan = invariants.require_kept(self._directory, self.reported, self._rules)
        self._durable |= {(file.step, file.kind == "final") for file in scan.files}
        return scan


def _standing(directory: Path) -> set[tuple[int, bool]]:
    return {
        (int(path.stem.split("-")[1]), path.stem.endswith("-final"))
        for path in directory.glob("checkpoint-*.safetensors")
    }


def _says_saved(line: str) -> bool:
    return line.startswith("step ") and ": saved " in line


def _saved(line: str) -> tuple[int, bool]:
    """The checkpoint that a line says is durable."""
    step, path = line.removeprefix("step ").split(" (")[0].split(": saved ")
    return int(step), path.endswith("-final.safetensors")
