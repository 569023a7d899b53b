"""Many threads at once on clones of one manager: they save, read, clean up, copy and fork."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Callable, Sequence
from functools import partial

from campaigns import child
from campaigns.concurrency import model
from campaigns.oracle import Saved
from distrust import Checkpoint, CheckpointManager
from distrust.errors import CheckpointNotFound

THREADS, OPERATIONS = (2, 6), (2, 6)  # from, to
FORK_SECONDS = 60.0  # for one forked child
_JOIN_SECONDS = 60.0  # for one thread


class Burst:
    """Threads that each save steps of their own, so that the final content is known."""

    def __init__(
        self,
        manager: CheckpointManager,
        rng: random.Random,
        make: Callable[[Saved], tuple[Checkpoint, int]],
        *,
        first: int,
    ) -> None:
        self.saved: dict[Saved, int] = {}  # what was saved, and its version
        self.operations = 0  # how many there were
        self._manager = manager  # that they all clone
        self._rng = rng  # of all choices, which are made before the threads start
        self._make = make  # returns the checkpoint to save, and its version
        self._step = first  # that may be saved

    def run(self) -> None:
        self._manager.acquire()  # else a copy might take the directory first
        plans = [
            [self._operation() for _ in range(self._rng.randint(*OPERATIONS))]
            for _ in range(self._rng.randint(*THREADS))
        ]
        self.operations = sum(map(len, plans))
        run_concurrently([partial(_follow, plan) for plan in plans])

    def _operation(self) -> Callable[[], object]:
        rng = self._rng
        clone = copy.copy(self._manager)
        if rng.random() < 0.5:
            saved = model.saved_step(self._step, rng.random() < 0.1)
            self._step += 1
            checkpoint, self.saved[saved] = self._make(saved)
            if rng.random() < 0.5:
                return lambda: clone.save(checkpoint, final=saved.final)
            overlap, waits = rng.random() < 0.5, rng.random() < 0.5

            def save() -> None:
                pending = clone.save_async(checkpoint, final=saved.final, overlap=overlap)
                if waits:
                    pending.wait()

            return save
        operations: list[Callable[[], object]] = [
            clone.cleanup,
            clone.list_checkpoints,
            lambda: _load(clone.load_latest),
            lambda: _load(clone.load_best),
            lambda: _load_listed(clone),
            lambda: _require_refused(copy.deepcopy(clone)),
            lambda: _require_refused(pickle.loads(pickle.dumps(clone))),
            lambda: child.call(lambda: _use_in_child(clone), seconds=FORK_SECONDS),
        ]
        return rng.choice(operations)


def _follow(plan: list[Callable[[], object]]) -> None:
    for operation in plan:
        operation()


def run_concurrently(acts: Sequence[Callable[[], object]]) -> None:
    """Do each on a thread of its own, all at once; raises what one of them raised, or if one hangs."""
    barrier, errors = threading.Barrier(len(acts)), []

    def run_one(act: Callable[[], object]) -> None:
        try:
            barrier.wait()
            act()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run_one, args=(act,), daemon=True) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_JOIN_SECONDS)
        if thread.is_alive():
            raise ValueError("a thread hangs")
    if errors:
        raise errors[0]


def _load(load: Callable[[], Checkpoint]) -> None:
    try:
        model.version_of(load())
    except CheckpointNotFound as error:
        if "no such checkpoint" in str(error):
            raise ValueError(f"a checkpoint that a rule retains is gone: {error}") from error


def _load_listed(manager: CheckpointManager) -> None:
    for step in manager.list_checkpoints():
        try:
            model.version_of(manager.load(step), step=step)
        except CheckpointNotFound:
            continue


def _require_refused(manager: CheckpointManager) -> None:
    if not model.is_locked(manager):
        raise ValueError("a copy may write beside the manager that it was copied from")


def _use_in_child(manager: CheckpointManager) -> None:
    _load(manager.load_latest)
    _require_refused(manager)
