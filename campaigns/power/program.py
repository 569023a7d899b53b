"""A random sequence of saves on a recording disk, and what must hold at each instant of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

from campaigns.campaign import require
from campaigns.oracle import Rules, Saved, must_keep
from campaigns.power.cut import PAGE_BYTES, World
from campaigns.power.recording import Killed, Operation, RecordingDisk, Rename, Unlink
from distrust import Checkpoint, CheckpointManager
from distrust.errors import CheckpointNotFound

INNER = Path("run", "checkpoints")  # so that its parents must be synced, too


class Version(NamedTuple):
    """A checkpoint that was saved, or was to be; ``number`` fills its arrays."""

    number: int
    saved: Saved

    @property
    def name(self) -> str:
        return self.saved.name

    def checkpoint(self) -> Checkpoint:
        """The checkpoint to save, of one to four pages."""
        items = (1 + self.number % 4) * (PAGE_BYTES // 8) - self.number % 5
        loss = self.saved.metric
        return Checkpoint(
            step=self.saved.step,
            model={"w": np.full(items, self.number)},
            optimizer={"state": {0: {"m": np.full(self.number % 7, self.number, np.float32)}}},
            metadata={"version": self.number},
            metrics={} if loss is None else {"eval_loss": loss},
        )


class Began(NamedTuple):
    version: Version  # whose save was requested


class Reported(NamedTuple):
    """The last requested save was reported durable."""


class RulesChanged(NamedTuple):
    rules: Rules  # that clean-ups follow from now on


Event = Operation | Began | Reported | RulesChanged


def describe_event(event: Event) -> str:
    paths = [field.name for field in event if isinstance(field, Path)]
    return " ".join([type(event).__name__, *paths])


class Invariants:
    """What must hold at an instant, derived from the events until then."""

    def __init__(self, world: World, directory: Path, durable: Sequence[Version]) -> None:
        self.world = world  # the disk, before the first event
        #: By name: what must exist after a cut, or a version that was being saved over it.
        self.required = {version.name: version for version in durable}
        self.possible = {version.name: {version.number} for version in durable}  # the versions that may exist
        self._directory = directory  # of the checkpoints
        self._visible = dict(self.required)  # as the running system sees it
        self._current: Version | None = None
        self._rules: Rules | None = None

    def apply(self, event: Event) -> None:
        """Take an event into account; raises CounterExample if it removes what the rules retain."""
        match event:
            case Began(version):
                self._current = version
                self.possible.setdefault(version.name, set()).add(version.number)
                return
            case Reported() if self._current is not None:
                self.required[self._current.name] = self._current
                self.possible[self._current.name] = {self._current.number}
                return
            case RulesChanged(rules):
                self._rules = rules
                return
            case Unlink(path) if path.name in self._visible:
                self._remove(path.name)
            case Rename(_, target) if self._current is not None:
                self._visible[target.name] = self._current
        self.world.apply(event)  # type: ignore[arg-type]  # the other events have returned

    def _remove(self, name: str) -> None:
        # Only what certainly exists after a cut may displace it.
        certain = [
            version.saved
            for visible, version in self._visible.items()
            if visible == name or self.world.is_certain(self._directory / visible)
        ]
        retained = self._rules and {saved.name for saved in must_keep(certain, self._rules)}
        message = f"{name} was removed, but {self._rules} retain it: {certain} are certain"
        require(retained is not None and name not in retained, message)
        del self._visible[name]
        self.required.pop(name, None)


class Program:
    """A random sequence of what a manager is asked to do, on a recording disk in the folder ``root``."""

    def __init__(self, root: Path, rng: Random, number: int, leave_out: Callable[[Operation], bool]) -> None:
        self.events: list[Event] = []  # what happened, without the operations to leave out
        self.number = number  # of the last version so far
        self.disk = RecordingDisk(lambda each: None if leave_out(each) else self.events.append(each))
        self._directory = root / INNER
        self._rng = rng  # of all choices
        self._steps: list[int] = []
        self._manager: CheckpointManager

    def run(self) -> None:
        self._start()
        for _ in range(self._rng.randint(3, 7)):
            actions = [self._save, self._clean_up, self._restart, self._die]
            self._perform(self._rng.choices(actions, weights=[10, 1, 1, 2])[0])
        self._manager.close()

    def _perform(self, action: Callable[[], None]) -> None:
        action()

    def _start(self) -> None:
        self._rules = Rules(self._rng.randint(1, 3), self._rng.randint(0, 1))
        self.events.append(RulesChanged(self._rules))
        self._manager = CheckpointManager(self._directory, disk=self.disk, **self._rules._asdict())
        if self._rng.random() < 0.7:
            with contextlib.suppress(CheckpointNotFound):
                self._manager.load_latest()
        self._steps = self._manager.list_checkpoints()

    def _restart(self) -> None:
        self._manager.close()
        self._start()

    def _save(self) -> None:
        version = self._next_version()
        self.events.append(Began(version))
        final = version.saved.final
        if self._rng.random() < 0.5:
            self._manager.save(version.checkpoint(), final=final)
        else:
            overlap = self._rng.random() < 0.5
            self._manager.save_async(version.checkpoint(), final=final, overlap=overlap).wait()
        self.events.append(Reported())

    def _clean_up(self) -> None:
        self.events.append(RulesChanged(self._rules._replace(keep_last=1)))
        self._manager.cleanup(keep_last=1)
        self.events.append(RulesChanged(self._rules))

    def _die(self) -> None:
        """Be killed between two calls of a save or a clean-up, and restart."""
        self.disk.dies_after = self.disk.calls + self._rng.randint(0, 14)
        try:
            with contextlib.suppress(Killed):
                self._rng.choices([self._save, self._clean_up], weights=[4, 1])[0]()
                self._save()
        finally:
            self.disk.dies_after = None
            self._restart()

    def _next_version(self) -> Version:
        self.number += 1
        last = max(self._steps, default=0)
        step = self._rng.choices([last + 1, self._rng.randint(0, last), last], weights=[6, 1, 1])[0]
        self._steps.append(step)
        final = self._rng.random() < 0.15
        loss = self._rng.choice([None, round(self._rng.random(), 3)])
        return Version(self.number, Saved(step, final, loss))
