"""What must hold in a directory of checkpoints after its writer was killed.

Every file under a checkpoint's name is intact, every durable one exists unless the rules allow its removal,
and ``load_latest`` gives the newest. The checks only read and take no lock, so that the next writer
(:func:`require_writable`) meets what the dead one left.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Collection
from pathlib import Path

from campaigns.campaign import never, require
from campaigns.oracle import Rules, Saved, must_keep, one_per_step
from campaigns.session import Session
from campaigns.triggers import Trigger
from distrust import CheckpointManager
from distrust.checkpoint import Scan, catalog
from distrust.checkpoint.lock import LOCK_NAME
from distrust.errors import DistrustError, DistrustWarning

PAGE = 4096  # the unit in which a save writes


def require_durable(directory: Path, durable: Collection[Saved], rules: Rules) -> Scan:
    """Check the directory of a writer that died; returns its content.

    ``durable`` is every checkpoint that was durable at some time.
    """
    with never(DistrustError, f"{directory}: "):
        scan = catalog.scan(directory)
        for path in [file.path for file in scan.files] + [file.path for file in scan.damaged]:
            catalog.verify(path)
    existing = {saved.step: saved for saved in _list_saved(scan, rules)}
    _require_retained(directory, durable, existing, rules)
    temporary = temporary_files(directory)
    require(len(temporary) <= 1, f"{directory}: more than one temporary file: {', '.join(temporary)}")
    if existing:
        _require_newest_loads(directory, max(existing))
    return scan


def _list_saved(scan: Scan, rules: Rules) -> list[Saved]:
    return [Saved.of(file.step, file.kind, file.metrics, rules) for file in scan.files]


def _require_retained(
    directory: Path, durable: Collection[Saved], existing: dict[int, Saved], rules: Rules
) -> None:
    # What was removable once stays removable: newer and better ones only ever come in addition.
    union = {**one_per_step(durable), **existing}
    steps = {saved.step for saved in must_keep(union.values(), rules)}
    for saved in durable:
        text, exists = f"{directory}: {saved.name} was durable", saved.step in existing
        require(exists or saved.step not in steps, f"{text}, no rule removes it, and it is gone")
        require(not saved.final or existing[saved.step].final, f"{text}, and only a periodic one exists")


def _require_newest_loads(directory: Path, newest: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DistrustWarning)
        with never((DistrustError, DistrustWarning), f"{directory}: load_latest: "):
            loaded = CheckpointManager(directory).load_latest()
    step = loaded.step
    require(step == newest, f"{directory}: load_latest gave step {step}; the newest is {newest}")


def require_writable(directory: Path) -> None:
    """Check that a dead writer's lock is free, and that the next writer removes what it left."""
    with (
        never(DistrustError, f"{directory}: the next writer is refused: "),
        CheckpointManager(directory) as manager,
    ):
        manager.acquire()
    names = {path.name for path in directory.iterdir()} - {LOCK_NAME}
    unexpected = sorted(name for name in names if not name.endswith(".safetensors"))
    require(not unexpected, f"{directory}: the next writer left {', '.join(unexpected)}")


def temporary_files(directory: Path) -> list[str]:
    """The names of temporary files; none where there is no directory."""
    return _names(directory, ".checkpoint-")


def checkpoint_digests(directory: Path) -> dict[str, str]:
    """Name -> digest of all bytes, computed past the product; empty where there is no directory."""
    return {name: _digest(directory / name) for name in _names(directory, "checkpoint-")}


def _names(directory: Path, prefix: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(directory) if name.startswith(prefix))
    except OSError:
        return []


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return f"cannot be read: {error.strerror}"


class DurabilityRecord:
    """The checkpoints that were durable in one run, over all its sessions.

    A checkpoint under its name is durable against everything but a power cut, reported or not.
    """

    def __init__(self, directory: Path, rules: Rules) -> None:
        self._directory = directory  # of the run's checkpoints
        self._rules = rules  # of the run
        self.durable: frozenset[Saved] = frozenset()

    @property
    def newest(self) -> int:
        return max((saved.step for saved in self.durable), default=0)

    def watch(self, trigger: Trigger) -> Trigger:
        """The same trigger, recording the directory at each poll."""

        def start(session: Session) -> Callable[[], bool]:
            condition = trigger(session)

            def poll() -> bool:
                self.durable |= _existing(self._directory)
                return condition()

            return poll

        return start

    def record_output(self, session: Session) -> None:
        """Record what a session has printed as saved."""
        lines = [line for line in session.output() if line.startswith("step ") and ": saved " in line]
        self.durable |= {_parse_saved(line) for line in lines}

    def require(self) -> Scan:
        """Check the directory against the record, and record what exists; returns its content."""
        scan = require_durable(self._directory, self.durable, self._rules)
        self.durable |= {Saved(file.step, file.kind == "final") for file in scan.files}
        return scan


def _existing(directory: Path) -> set[Saved]:
    return {
        Saved(int(path.stem.split("-")[1]), path.stem.endswith("-final"))
        for path in directory.glob("checkpoint-*.safetensors")
    }


def _parse_saved(line: str) -> Saved:
    step, path = line.removeprefix("step ").split(" (")[0].split(": saved ")
    return Saved(int(step), path.endswith("-final.safetensors"))


def save_phase(directory: Path, scan: Scan, durable: Collection[Saved], rules: Rules) -> str:
    """How far the save had come when its writer was killed, as the disk shows it."""
    for path in directory.glob(".checkpoint-*"):
        return _temporary_phase(path)
    newest = max((file.step for file in scan.files), default=-1)
    if newest > max((saved.step for saved in durable), default=-1):
        if len(scan.files) > len(must_keep(_list_saved(scan, rules), rules)):
            return "renamed, the old one not yet removed"
        return "renamed, not yet reported"
    return "no save visible"


def _temporary_phase(path: Path) -> str:
    content = path.read_bytes()
    if not content:
        return "temporary file made"
    pages = [any(content[begin : begin + PAGE]) for begin in range(0, len(content), PAGE)]
    if not any(pages):
        return "space reserved"
    if pages[0]:
        return "header written, not renamed"
    # The header's pages are the first in the file, and written last.
    return "data written" if all(pages[pages.index(True) :]) else "some of the data written"
