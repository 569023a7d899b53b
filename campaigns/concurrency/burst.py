"""Many threads at once on clones of one manager: they save, read, clean up, copy and fork."""

from __future__ import annotations

import copy
import pickle
import random
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from campaigns.concurrency import content
from campaigns.concurrency.forked import in_child
from campaigns.concurrency.model import File
from distrust import Checkpoint, CheckpointManager
from distrust.errors import CheckpointDirectoryLocked, CheckpointNotFound

THREADS, OPERATIONS = (2, 6), (2, 6)
_JOIN_SECONDS = 60.0


class Burst:
    """Each thread saves steps of its own, so that what is left at the end is known.

    Args:
        manager: that they all clone.
        chance: of all choices, which are made before the threads start.
        make: of a file, the checkpoint and its version.
        first: the first step that may be saved.

    Attributes:
        saved: what was saved, and its version.
        operations: how many there were.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        chance: random.Random,
        make: Callable[[File], tuple[Checkpoint, int]],
        *,
        first: int,
    ) -> None:
        self.saved: dict[File, int] = {}
        self.operations = 0
        self._manager = manager
        self._chance = chance
        self._make = make
        self._step = first
        self._failed: list[str] = []

    def run(self, folder: Path) -> None:
        """Start them, and wait for them.

        Raises:
            ValueError: for what went wrong in one of them.
        """
        self._manager.acquire()  # else a copy might be the first
        plans = [self._plan(folder) for _ in range(self._chance.randint(*THREADS))]
        begin = threading.Barrier(len(plans))
        threads = [threading.Thread(target=self._follow, args=(plan, begin), daemon=True) for plan in plans]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_JOIN_SECONDS)
            if thread.is_alive():
                raise ValueError("a thread hangs")
        if self._failed:
            raise ValueError(f"in one of {len(plans)} threads: {self._failed[0]}")

    def _plan(self, folder: Path) -> list[Callable[[], None]]:
        self.operations += (count := self._chance.randint(*OPERATIONS))
        return [self._operation(folder) for _ in range(count)]

    def _operation(self, folder: Path) -> Callable[[], None]:
        chance = self._chance
        clone = copy.copy(self._manager)
        if chance.random() < 0.5:
            file = File(self._step, chance.random() < 0.1)
            self._step += 1
            made, self.saved[file] = self._make(file)
            if chance.random() < 0.5:
                return lambda: _discard(clone.save(made, final=file.final))
            overlap, waits = chance.random() < 0.5, chance.random() < 0.5

            def save() -> None:
                pending = clone.save_async(made, final=file.final, overlap=overlap)
                if waits:
                    pending.wait()

            return save
        return chance.choice(
            [
                lambda: _discard(clone.cleanup()),
                lambda: _discard(clone.list_checkpoints()),
                lambda: _load(clone.load_latest),
                lambda: _load(clone.load_best),
                lambda: _load_listed(clone),
                lambda: _refused(copy.deepcopy(clone)),
                lambda: _refused(pickle.loads(pickle.dumps(clone))),
                lambda: in_child(folder, lambda: _in_child(clone)),
            ]
        )

    def _follow(self, plan: list[Callable[[], None]], begin: threading.Barrier) -> None:
        try:
            begin.wait()
            for operation in plan:
                operation()
        except Exception:
            self._failed.append(traceback.format_exc())


def _discard(_: object) -> None:
    pass


def _load(load: Callable[[], Checkpoint]) -> None:
    try:
        content.version_of(load())
    except CheckpointNotFound as error:
        if "no such checkpoint" in str(error):
            raise ValueError(f"one that a rule keeps is gone: {error}") from error


def _load_listed(manager: CheckpointManager) -> None:
    for step in manager.list_checkpoints():
        try:
            content.version_of(manager.load(step), step=step)
        except CheckpointNotFound:
            continue


def _refused(manager: CheckpointManager) -> None:
    try:
        manager.acquire()
    except CheckpointDirectoryLocked:
        return
    raise ValueError("a copy may write beside the manager that it was made of")


def _in_child(manager: CheckpointManager) -> None:
    _load(manager.load_latest)
    _refused(manager)
