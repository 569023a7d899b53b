"""A trial: an accident, and what the saver makes of it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from campaigns.peers.accidents import ALL, KILL, Accident, Strike
from campaigns.peers.all_subjects import SUBJECTS
from campaigns.peers.outcomes import STOPPED, Outcome, Reply, classify
from campaigns.peers.processes import WarmProcess, kill_during_save
from campaigns.peers.subjects import Store, Subject

#: Of the bare savers' states: small where every byte may be hit, large where a save has to take a while.
DAMAGED_MIB = 1
KILLED_MIB = 32  # a save takes tens of ms
#: Of an accident that is the same each time.
CERTAIN_TRIALS = 3


@dataclass(frozen=True, slots=True)
class Cell:
    subject: Subject
    accident: Accident

    @property
    def trials(self) -> int:
        if self.accident.certain:
            return CERTAIN_TRIALS
        return self.subject.kills if self.accident.name == KILL else self.subject.damages


@dataclass(frozen=True, slots=True)
class Trial:
    description: str
    outcome: Outcome
    message: str


#: In a fixed order, so that a case is found by its number.
CELLS = tuple(
    Cell(subject, accident) for accident in ALL for subject in SUBJECTS if accident in subject.accidents
)


class Bench:
    """Where one saver is tried: its warm process, its undamaged checkpoints, and the expected values."""

    def __init__(self, subject: Subject, parent: Path, *, fault: str | None) -> None:
        self._subject = subject  # the saver
        self._fault = fault  # a check of ours to leave out, which must be found
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(TemporaryDirectory(dir=parent)))
        self._warm = self._stack.enter_context(WarmProcess(subject, fault=fault))
        self._expected: dict[int, dict[int, str]] = {}
        self._newest = 2 * subject.interval
        self._undamaged = self._folder / "undamaged"
        self._killed_mib = KILLED_MIB if isinstance(subject, Store) else DAMAGED_MIB

    def __enter__(self) -> Self:
        """Write two checkpoints; raises RuntimeError unless the saver resumes from the newer one."""
        try:
            self._warm.write(self._undamaged, DAMAGED_MIB, self._newest)
            reply = self._resume_copy()
            self._warm.usual_words |= set(reply.words)
            outcome = classify(reply, self._proofs(DAMAGED_MIB), self._newest)
            if outcome is not Outcome.NOTHING_LOST or reply.step != self._newest:
                raise RuntimeError(f"{self._subject.name}: undamaged, it is {outcome.value}: {reply.message}")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run_trial(self, accident: Accident, rng: random.Random) -> Trial:
        with TemporaryDirectory(dir=self._folder) as folder:
            if accident.strike is None:
                return self._kill(Path(folder), rng)
            return self._damage(Path(folder), accident.strike, rng)

    def _damage(self, folder: Path, strike: Strike, rng: random.Random) -> Trial:
        directory = self._copy(folder)
        description = strike(self._subject.files(directory, self._newest), rng)
        reply = self._warm.resume(directory, DAMAGED_MIB)
        return Trial(description, classify(reply, self._proofs(DAMAGED_MIB), self._newest), reply.message)

    def _kill(self, folder: Path, rng: random.Random) -> Trial:
        subject, mib = self._subject, self._killed_mib
        directory, step, description = kill_during_save(subject, folder, mib, rng, fault=self._fault)
        outcome, reply = resume_after_kill(self._warm, subject, directory, mib, step, self._proofs(mib))
        return Trial(description, outcome, reply.message)

    def _resume_copy(self) -> Reply:
        with TemporaryDirectory(dir=self._folder) as folder:
            return self._warm.resume(self._copy(Path(folder)), DAMAGED_MIB)

    def _copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(self._undamaged, folder / "copy"))

    def _proofs(self, mib: int) -> dict[int, str]:
        if mib not in self._expected:
            self._expected[mib] = self._warm.expected_proofs(self._folder / f"expected-{mib}", mib)
        return self._expected[mib]


def resume_after_kill(
    warm: WarmProcess, subject: Subject, directory: Path, mib: int, step: int, expected: Mapping[int, str]
) -> tuple[Outcome, Reply]:
    """Resume where the writer was killed while it saved ``step``; the checkpoint before had been reported.

    If resuming stops, try again without the checkpoint that was being written: is anything left?
    """
    reported = step - subject.interval
    reply = warm.resume(directory, mib)
    outcome = classify(reply, expected, reported)
    if outcome not in STOPPED:
        return outcome, reply
    path = subject.path(directory, step)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    second = classify(warm.resume(directory, mib), expected, reported)
    return (outcome if second is Outcome.NOTHING_LOST else Outcome.ALL_LOST), reply


def cell_of(number: int) -> tuple[Cell, int]:
    """The cell of a case, and how many trials of that cell come before it."""
    earlier, index = divmod(number, len(CELLS))
    return CELLS[index], earlier
