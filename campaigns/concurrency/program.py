"""Random programs over managers, their clones, copies and forks, each step compared with the model.

The process that runs them answers after each with what it counted, and what it found.
A background save that nobody has waited for may be seen or not, and what it removes, too; everything else is
exactly as the model says.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import pickle
import random
import sys
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from campaigns.concurrency import content
from campaigns.concurrency.burst import Burst
from campaigns.concurrency.forked import in_child
from campaigns.concurrency.model import File, Model, Rules, by_step
from campaigns.faults import plant
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import PendingSave, direct_io, lock
from distrust.errors import CheckpointDirectoryLocked, CheckpointNotFound, UnsupportedState

OPERATIONS = 40
SIZES = (16, 16, 500, 500, 5_000, 200_000)
#: For a lock that somebody holds. How long it should be is for the races to say.
PATIENCE_SECONDS = 0.02
_LOG_LINES = 25


class Handle(NamedTuple):
    """A manager, and the session that it shares with its clones."""

    manager: CheckpointManager
    session: int


class Program:
    """One program, and its directory."""

    def __init__(self, directory: Path, chance: random.Random, counts: Counter[str]) -> None:
        self.chance = chance
        self.counts = counts
        self.log: list[str] = []
        self.directory = directory
        self.rules = Rules(
            keep_last=chance.choice([1, 2, 3, None]),
            keep_best=chance.choice([0, 1, 2]),
            keep_every=chance.choice([None, None, 5]),
        )
        self.model = Model(self.rules)
        self.handles = [self._fresh()]
        self.pending: PendingSave | None = None
        #: What stood before the save that nobody has waited for.
        self.before: dict[File, int] | None = None
        self._version = 0

    def run(self) -> None:
        """Do this and that."""
        for _ in range(OPERATIONS):
            name = self.chance.choice(_OPERATIONS)
            if not self.handles:
                name = "new"
            self.log.append(name)
            getattr(self, f"do_{name}")()
            self.counts[f"operations: {name}"] += 1
            if self.chance.random() < 0.3:
                self.check()
        self.settle()
        self.check()
        self.handles.clear()

    # What a program does

    def do_new(self) -> None:
        self.handles.append(self._fresh())

    def do_copy(self) -> None:
        handle = self._some()
        self.handles.append(Handle(copy.copy(handle.manager), handle.session))

    def do_deepcopy(self) -> None:
        self.handles.append(Handle(copy.deepcopy(self._some().manager), self._session()))

    def do_pickle(self) -> None:
        self.handles.append(Handle(pickle.loads(pickle.dumps(self._some().manager)), self._session()))

    def do_save(self) -> None:
        handle, file, made = self._some(), self._file(), self._made
        if self._refused(handle, lambda: handle.manager.save(made(file), final=file.final)):
            return
        self.before = None
        self.model.commit(handle.session, file, self._version)

    def do_save_async(self) -> None:
        handle, file, made = self._some(), self._file(), self._made
        overlap = self.chance.random() < 0.5
        begun: list[PendingSave] = []

        def save() -> None:
            begun.append(handle.manager.save_async(made(file), final=file.final, overlap=overlap))

        if self._refused(handle, save):
            return
        self.before = dict(self.model.files)  # the save before this one has ended
        self.pending = begun[0]
        self.model.commit(handle.session, file, self._version)
        if self.chance.random() < 0.5:
            self.settle()

    def do_unsupported(self) -> None:
        handle = self._some()

        def save() -> None:
            try:
                handle.manager.save(Checkpoint(step=3, model={"w": object()}))
            except UnsupportedState:
                return
            raise ValueError("an object was saved")

        if not self._refused(handle, save):
            self.before = None
            self.model.holder = handle.session

    def do_acquire(self) -> None:
        handle = self._some()
        if not self._refused(handle, handle.manager.acquire):
            self.model.holder = handle.session

    def do_cleanup(self) -> None:
        handle = self._some()
        keep_last = self.chance.choice([None, 1, 4])
        removed: list[int] = []
        if self._refused(handle, lambda: removed.extend(handle.manager.cleanup(keep_last=keep_last))):
            return
        self.before = None
        expected = self.model.clean_up(handle.session, keep_last=keep_last)
        require(removed == expected, f"the clean-up says that it removed {removed}, not {expected}")

    def do_reserve(self) -> None:
        handle = self._some()
        handle.manager.reserve(self.chance.choice([0, 1000, 4 << 20]))
        if handle.session == self.model.holder:
            self.before = None

    def do_close(self) -> None:
        handle = self._some()
        handle.manager.close()
        if handle.session == self.model.holder:
            self.before = None
        self.model.release(handle.session)

    def do_drop(self) -> None:
        handle = self.handles.pop(self.chance.randrange(len(self.handles)))
        manager, session = handle
        del handle, manager
        if session in {other.session for other in self.handles}:
            return
        if session == self.model.holder and self.before is not None:
            # Its thread holds what it needs until it has ended.
            self.settle()
            for thread in threading.enumerate():
                if thread.name.startswith("save "):
                    thread.join()
        gc.collect()
        self.model.release(session)
        self.model.resumed.pop(session, None)

    def do_load(self) -> None:
        handle = self._some()
        if not self.model.files:
            return
        file = self.chance.choice(sorted(by_step(self.model.files).values()))
        mmap = self.chance.random() < 0.5
        lazy = mmap and self.chance.random() < 0.5
        if self.before is not None and file not in self.before:
            self.settle()
        loaded = handle.manager.load(file.step, mmap=mmap, verify="lazy" if lazy else "full")
        self._require_version(loaded, file, take_up=None if lazy else handle.session)

    def do_load_latest(self) -> None:
        self.settle()
        handle = self._some()
        try:
            loaded = handle.manager.load_latest(mmap=self.chance.random() < 0.5)
        except CheckpointNotFound:
            require(not self.model.files, f"not found; there are {sorted(self.model.files)}")
            return
        self._require_version(loaded, self.model.newest(), take_up=handle.session)

    def do_load_best(self) -> None:
        self.settle()
        handle = self._some()
        try:
            loaded = handle.manager.load_best()
        except CheckpointNotFound:
            require(not self.model.files, f"not found; there are {sorted(self.model.files)}")
            return
        self._require_version(loaded, self.model.best(), take_up=handle.session)

    def do_validate(self) -> None:
        self.settle()
        for step in by_step(self.model.files):
            self._some().manager.validate(step)

    def do_fork(self) -> None:
        """A child reads, and may write only if nobody holds the directory."""
        if self.chance.random() < 0.5:
            self.settle()
        handle, file = self._some(), self._file()
        made, settled = self._made(file), self.before is None
        version, free = self._version, self.model.holder is None
        listed = sorted(by_step(self.model.files))

        def body() -> None:
            if settled:
                there = handle.manager.list_checkpoints()
                require(there == listed, f"a child lists {there}, not {listed}")
            run_concurrently([handle.manager.list_checkpoints] * 3)
            run_concurrently([lambda: self._refused_here(handle.manager.acquire, may=free)] * 2)
            self._refused_here(lambda: handle.manager.save(made, final=file.final), may=free)

        in_child(self.directory.parent, body)
        if free:
            child = self._session()
            self.model.commit(child, file, version)
            self.model.release(child)

    def do_burst(self) -> None:
        """Many threads at once, on clones of one manager."""
        self.settle()
        handle = self._some()
        if not self.model.may_write(handle.session):
            return
        burst = Burst(handle.manager, self.chance, self._made_new, first=self._newest_step() + 1)
        burst.run(self.directory.parent)
        self.counts["operations of threads"] += burst.operations
        self.model.files.update(burst.saved)
        self.model.resumed.pop(handle.session, None)
        # What it was resumed from stays: now that is the newest, which stays anyway.
        content.version_of(handle.manager.load_latest())
        self.model.take_up(handle.session, self.model.newest())
        handle.manager.cleanup()
        self.model.clean_up(handle.session)
        self.check()

    # What is checked

    def settle(self) -> None:
        """Wait for the save under way: from then on everything is exact."""
        if self.pending is not None:
            self.pending.wait()
            self.pending = self.before = None

    def check(self) -> None:
        """Compare what is there with the model."""
        found = CheckpointManager(self.directory).scan()
        require(not found.damaged, f"damaged: {[file.reason for file in found.damaged]}")
        there = {File(file.step, file.kind == "final"): file.metadata["of"][1] for file in found.files}
        if self.before is None:
            require(there == self.model.files, f"there are {_shown(there)}, not {_shown(self.model.files)}")
            left = [path.name for path in self.directory.glob(".checkpoint*")]
            require(not left, f"left behind: {left}")
            return
        before, after = set(self.before.items()), set(self.model.files.items())
        seen = set(there.items())
        require(
            before & after <= seen <= before | after,
            f"there are {_shown(there)}, between {_shown(self.before)} and {_shown(self.model.files)}",
        )

    def _require_version(self, loaded: Checkpoint, file: File, *, take_up: int | None) -> None:
        version = content.version_of(loaded, step=file.step)
        known = {self.model.files[file]}
        if self.before is not None:
            known |= {old for other, old in self.before.items() if other.step == file.step}
        require(version in known, f"{file} is version {version}, not {known}")
        if take_up is not None:
            if self.before is not None:
                # Which file it was is for the writer to say: wait, and load it once more.
                self.settle()
                if file in self.model.files:
                    handle = next(one for one in self.handles if one.session == take_up)
                    content.version_of(handle.manager.load(file.step), step=file.step)
            if file in self.model.files:
                self.model.take_up(take_up, file)

    def _refused(self, handle: Handle, act: Callable[[], object]) -> bool:
        """Do it, and compare whether it was refused with what the model says."""
        return self._refused_here(act, may=self.model.may_write(handle.session))

    def _refused_here(self, act: Callable[[], object], *, may: bool) -> bool:
        try:
            act()
        except CheckpointDirectoryLocked as error:
            require(not may, f"refused, and nobody else holds the directory: {error}")
            return True
        require(may, "not refused, and another one holds the directory")
        return False

    # What it is made of

    def _fresh(self) -> Handle:
        rules = self.rules
        manager = CheckpointManager(
            self.directory,
            keep_last=rules.keep_last,
            keep_best=rules.keep_best,
            keep_every=rules.keep_every,
            metric=content.METRIC,
        )
        return Handle(manager, self._session())

    def _session(self) -> int:
        self._sessions = getattr(self, "_sessions", 0) + 1
        return self._sessions

    def _some(self) -> Handle:
        return self.chance.choice(self.handles)

    def _newest_step(self) -> int:
        return max((file.step for file in self.model.files), default=0)

    def _file(self) -> File:
        """A step to save: most often a new one, or one that was there, or is."""
        newest = self._newest_step()
        step = newest + self.chance.randint(1, 3)
        if newest and self.chance.random() < 0.3:
            step = self.chance.randint(1, newest)
        return File(step, self.chance.random() < 0.15)

    def _made(self, file: File) -> Checkpoint:
        self._version += 1
        return content.make(file.step, self._version, self.chance.choice(SIZES))

    def _made_new(self, file: File) -> tuple[Checkpoint, int]:
        return self._made(file), self._version


_OPERATIONS = (
    *["save", "save_async"] * 4,
    *["load", "load_latest", "load_best", "copy", "close", "cleanup", "fork"] * 2,
    *["new", "deepcopy", "pickle", "drop", "acquire", "validate", "burst", "unsupported", "reserve"],
)


def run_concurrently(acts: list[Callable[[], object]]) -> None:
    """Do it on a thread each, all at once; raises what one of them raised."""
    begin, failed = threading.Barrier(len(acts)), []

    def one(act: Callable[[], object]) -> None:
        try:
            begin.wait()
            act()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def require(kept: bool, promise: str) -> None:
    """Raise ValueError for a promise that was not kept."""
    if not kept:
        raise ValueError(promise)


def _shown(files: dict[File, int]) -> dict[str, int]:
    return {f"{step}{'-final' if final else ''}": files[File(step, final)] for step, final in sorted(files)}


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("folder", type=Path)
    options.add_argument("seed")
    options.add_argument("programs", type=int)
    options.add_argument("--fault")
    given = options.parse_args()
    plant(given.fault)
    warnings.simplefilter("error")
    # Later versions of Python warn of every fork beside threads.
    warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
    lock.WAIT_SECONDS = PATIENCE_SECONDS
    honest = direct_io.FLAG
    for number in range(given.programs):
        chance = random.Random(f"{given.seed}/{number}")
        direct_io.FLAG = chance.choice([honest, 0])
        sys.setswitchinterval(chance.choice([5e-3, 1e-4, 1e-6]))
        counts = Counter({"programs": 1})
        program = Program(given.folder / str(number) / "checkpoints", chance, counts)
        program.directory.parent.mkdir()
        finding = None
        try:
            program.run()
        except Exception:
            log = " ".join(program.log[-_LOG_LINES:])
            finding = f"program {number}, rules {program.rules}, after: {log}\n{traceback.format_exc()}"
        print(json.dumps({"counts": counts, "finding": finding}), flush=True)


if __name__ == "__main__":
    main()
