"""Random programs over managers, their clones, copies and forks, each operation compared with the model.

A background save that has not been waited for may be visible or not, and so may its removals; all else is
exactly as the model says. This module is also the process that runs the programs.
"""

from __future__ import annotations

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

from campaigns import child
from campaigns.campaign import Campaign, Case, require
from campaigns.concurrency import model
from campaigns.concurrency.burst import FORK_SECONDS, Burst, run_concurrently
from campaigns.oracle import Rules, Saved
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import PendingSave, direct_io, lock
from distrust.errors import CheckpointDirectoryLocked, CheckpointNotFound, UnsupportedState

#: In one process, one after the other.
PROGRAMS = 10
OPERATIONS = 40  # in a program
SIZES = (16, 16, 500, 500, 5_000, 200_000)  # items; the last one takes long enough to overlap
#: How long to wait for a lock that another one holds; the races test the real time.
LOCK_SECONDS = 0.02
_LOG_ENTRIES = 25  # of a finding: the last operations


class Handle(NamedTuple):
    """A manager, and the session that it shares with its clones."""

    manager: CheckpointManager
    session: int


class Program:
    def __init__(self, directory: Path, rng: random.Random, counts: Counter[str]) -> None:
        self.rng = rng
        self.counts = counts
        self.log: list[str] = []
        self.directory = directory
        keep = rng.choice([1, 2, 3, None]), rng.choice([0, 1, 2]), rng.choice([None, None, 5])
        self.rules = Rules(*keep, model.METRIC)
        self.model = model.Model(self.rules)
        self._version = 0
        self._sessions = 0
        self.handles = [self._new_handle()]
        self.pending: PendingSave | None = None
        #: The files before the save that has not been waited for; None if there is none.
        self.earlier: dict[Saved, int] | None = None

    def run(self) -> None:
        for _ in range(OPERATIONS):
            name = self.rng.choice(_OPERATIONS)
            if not self.handles:
                name = "new"
            self.log.append(name)
            getattr(self, f"do_{name}")()
            self.counts[f"operations: {name}"] += 1
            if self.rng.random() < 0.3:
                self.check()
        self.wait()
        self.check()
        self.handles.clear()

    # Operations

    def do_new(self) -> None:
        self.handles.append(self._new_handle())

    def do_copy(self) -> None:
        handle = self._any_handle()
        self.handles.append(Handle(copy.copy(handle.manager), handle.session))

    def do_deepcopy(self) -> None:
        self.handles.append(Handle(copy.deepcopy(self._any_handle().manager), self._new_session()))

    def do_pickle(self) -> None:
        copied = pickle.loads(pickle.dumps(self._any_handle().manager))
        self.handles.append(Handle(copied, self._new_session()))

    def do_save(self) -> None:
        handle, saved = self._any_handle(), self._any_step()
        if self._is_refused(handle, lambda: handle.manager.save(self._checkpoint(saved), final=saved.final)):
            return
        self.earlier = None
        self.model.commit(handle.session, saved, self._version)

    def do_save_async(self) -> None:
        handle, saved = self._any_handle(), self._any_step()
        options = {"final": saved.final, "overlap": self.rng.random() < 0.5}
        pending: list[PendingSave] = []
        save = handle.manager.save_async
        if self._is_refused(handle, lambda: pending.append(save(self._checkpoint(saved), **options))):
            return
        self.earlier = dict(self.model.files)  # the save before this one has ended
        self.pending = pending[0]
        self.model.commit(handle.session, saved, self._version)
        if self.rng.random() < 0.5:
            self.wait()

    def do_unsupported(self) -> None:
        handle = self._any_handle()

        def save() -> None:
            try:
                handle.manager.save(Checkpoint(step=3, model={"w": object()}))
            except UnsupportedState:
                return
            require(False, "an object was saved")

        if not self._is_refused(handle, save):
            self.earlier = None
            self.model.holder = handle.session

    def do_acquire(self) -> None:
        handle = self._any_handle()
        if not self._is_refused(handle, handle.manager.acquire):
            self.model.holder = handle.session

    def do_cleanup(self) -> None:
        handle = self._any_handle()
        keep_last = self.rng.choice([None, 1, 4])
        removed: list[int] = []
        if self._is_refused(handle, lambda: removed.extend(handle.manager.cleanup(keep_last=keep_last))):
            return
        self.earlier = None
        expected = self.model.clean_up(handle.session, keep_last=keep_last)
        require(removed == expected, f"the clean-up reports {removed} as removed, not {expected}")

    def do_reserve(self) -> None:
        handle = self._any_handle()
        handle.manager.reserve(self.rng.choice([0, 1000, 4 << 20]))
        if handle.session == self.model.holder:
            self.earlier = None

    def do_close(self) -> None:
        handle = self._any_handle()
        handle.manager.close()
        if handle.session == self.model.holder:
            self.earlier = None
        self.model.release(handle.session)

    def do_drop(self) -> None:
        handle = self.handles.pop(self.rng.randrange(len(self.handles)))
        manager, session = handle
        del handle, manager
        if any(session == each.session for each in self.handles):
            return
        if session == self.model.holder and self.earlier is not None:
            # The thread of the save refers to the session until it has ended.
            self.wait()
            for thread in threading.enumerate():
                if thread.name.startswith("save "):
                    thread.join()
        gc.collect()
        self.model.release(session)
        self.model.resumed.pop(session, None)

    def do_load(self) -> None:
        handle = self._any_handle()
        if not self.model.files:
            return
        saved = self.rng.choice(sorted(self.model.by_step().values()))
        mmap = self.rng.random() < 0.5
        lazy = mmap and self.rng.random() < 0.5
        if self.earlier is not None and saved not in self.earlier:
            self.wait()
        loaded = handle.manager.load(saved.step, mmap=mmap, verify="lazy" if lazy else "full")
        self._require_version(loaded, saved, session=None if lazy else handle.session)

    def do_load_latest(self) -> None:
        mmap = self.rng.random() < 0.5
        self._load_one(lambda manager: manager.load_latest(mmap=mmap), self.model.newest)

    def do_load_best(self) -> None:
        self._load_one(CheckpointManager.load_best, self.model.best)

    def do_validate(self) -> None:
        self.wait()
        for step in self.model.by_step():
            self._any_handle().manager.validate(step)

    def do_fork(self) -> None:
        """A child reads, and may write only if no session holds the directory."""
        if self.rng.random() < 0.5:
            self.wait()
        handle, saved = self._any_handle(), self._any_step()
        checkpoint, is_exact = self._checkpoint(saved), self.earlier is None
        version, free = self._version, self.model.holder is None
        expected = sorted(self.model.by_step())

        def body() -> None:
            if is_exact:
                steps = handle.manager.list_checkpoints()
                require(steps == expected, f"a child lists {steps}, not {expected}")
            run_concurrently([handle.manager.list_checkpoints] * 3)
            run_concurrently([lambda: self._try(handle.manager.acquire, allowed=free)] * 2)
            self._try(lambda: handle.manager.save(checkpoint, final=saved.final), allowed=free)

        child.call(body, seconds=FORK_SECONDS)
        if free:
            session = self._new_session()
            self.model.commit(session, saved, version)
            self.model.release(session)

    def do_burst(self) -> None:
        self.wait()
        handle = self._any_handle()
        if not self.model.may_write(handle.session):
            return
        first = self._newest_step() + 1
        burst = Burst(
            handle.manager, self.rng, lambda each: (self._checkpoint(each), self._version), first=first
        )
        burst.run()
        self.counts["operations of threads"] += burst.operations
        self.model.files.update(burst.saved)
        self.model.resumed.pop(handle.session, None)
        # Load the newest, so that the file that is protected as resumed is known again.
        model.version_of(handle.manager.load_latest())
        self.model.resume(handle.session, self.model.newest())
        handle.manager.cleanup()
        self.model.clean_up(handle.session)
        self.check()

    # Checks

    def wait(self) -> None:
        """Wait for the pending save: from then on the model is exact."""
        if self.pending is not None:
            self.pending.wait()
            self.pending = self.earlier = None

    def check(self) -> None:
        scan = CheckpointManager(self.directory).scan()
        require(not scan.damaged, f"damaged: {[file.reason for file in scan.damaged]}")
        existing = {
            model.saved_step(file.step, file.kind == "final"): file.metadata["of"][1] for file in scan.files
        }
        expected = self.model.files
        if self.earlier is None:
            require(existing == expected, f"there are {_names(existing)}, not {_names(expected)}")
            temporary = [path.name for path in self.directory.glob(".checkpoint*")]
            require(not temporary, f"temporary files are left: {temporary}")
            return
        old, new = set(self.earlier.items()), set(expected.items())
        text = f"there are {_names(existing)}, between {_names(self.earlier)} and {_names(expected)}"
        require(old & new <= set(existing.items()) <= old | new, text)

    def _load_one(
        self, load: Callable[[CheckpointManager], Checkpoint], expected: Callable[[], Saved]
    ) -> None:
        self.wait()
        handle = self._any_handle()
        try:
            loaded = load(handle.manager)
        except CheckpointNotFound:
            require(not self.model.files, f"not found; there are {_names(self.model.files)}")
            return
        self._require_version(loaded, expected(), session=handle.session)

    def _require_version(self, loaded: Checkpoint, saved: Saved, *, session: int | None) -> None:
        version = model.version_of(loaded, step=saved.step)
        possible = {self.model.files[saved]}
        if self.earlier is not None:
            possible |= {old for each, old in self.earlier.items() if each.step == saved.step}
        require(version in possible, f"{saved.name} is version {version}, not {possible}")
        if session is None:
            return
        if self.earlier is not None:
            # It may have been the old file or the new one: wait, and load it once more.
            self.wait()
            if saved in self.model.files:
                handle = next(handle for handle in self.handles if handle.session == session)
                model.version_of(handle.manager.load(saved.step), step=saved.step)
        if saved in self.model.files:
            self.model.resume(session, saved)

    def _is_refused(self, handle: Handle, act: Callable[[], object]) -> bool:
        return self._try(act, allowed=self.model.may_write(handle.session))

    def _try(self, act: Callable[[], object], *, allowed: bool) -> bool:
        """Do something that is refused unless it is allowed; returns whether it was refused."""
        try:
            act()
        except CheckpointDirectoryLocked as error:
            require(not allowed, f"refused, and no other session holds the directory: {error}")
            return True
        require(allowed, "not refused, and another session holds the directory")
        return False

    # Random objects

    def _new_handle(self) -> Handle:
        return Handle(CheckpointManager(self.directory, **self.rules._asdict()), self._new_session())

    def _new_session(self) -> int:
        self._sessions += 1
        return self._sessions

    def _any_handle(self) -> Handle:
        return self.rng.choice(self.handles)

    def _newest_step(self) -> int:
        return max((saved.step for saved in self.model.files), default=0)

    def _any_step(self) -> Saved:
        """A step to save: most often a new one, or one that exists, or did."""
        newest = self._newest_step()
        step = newest + self.rng.randint(1, 3)
        if newest and self.rng.random() < 0.3:
            step = self.rng.randint(1, newest)
        return model.saved_step(step, self.rng.random() < 0.15)

    def _checkpoint(self, saved: Saved) -> Checkpoint:
        return self._next_checkpoint(saved)[0]

    def _next_checkpoint(self, saved: Saved) -> tuple[Checkpoint, int]:
        self._version += 1
        return model.make_checkpoint(saved.step, self._version, self.rng.choice(SIZES)), self._version


_OPERATIONS = (
    *["save", "save_async"] * 4,
    *["load", "load_latest", "load_best", "copy", "close", "cleanup", "fork"] * 2,
    *["new", "deepcopy", "pickle", "drop", "acquire", "validate", "burst", "unsupported", "reserve"],
)


def _names(files: dict[Saved, int]) -> dict[str, int]:
    return {saved.name: files[saved] for saved in sorted(files)}


def run(campaign: Campaign, case: Case, folder: Path) -> None:
    seed = case.rng.random()
    with child.start_child(campaign, "campaigns.concurrency.programs", folder, seed, PROGRAMS) as process:
        for _ in range(PROGRAMS):
            answer = process.receive_json()
            campaign.count_all(answer["counts"])
            require(answer["finding"] is None, answer["finding"])
        process.finish()


def main() -> None:
    options = child.parse_arguments(folder=Path, seed=str, programs=int)
    warnings.simplefilter("error")
    # Later versions of Python warn of every fork beside threads.
    warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
    lock.WAIT_SECONDS = LOCK_SECONDS
    default_flag = direct_io.FLAG
    for number in range(options.programs):
        rng = random.Random(f"{options.seed}/{number}")
        direct_io.FLAG = rng.choice([default_flag, 0])
        sys.setswitchinterval(rng.choice([5e-3, 1e-4, 1e-6]))
        counts = Counter({"programs": 1})
        program = Program(options.folder / str(number) / "checkpoints", rng, counts)
        program.directory.parent.mkdir()
        finding = None
        try:
            program.run()
        except Exception:
            log = " ".join(program.log[-_LOG_ENTRIES:])
            finding = f"program {number}, rules {program.rules}, after: {log}\n{traceback.format_exc()}"
        print(json.dumps({"counts": counts, "finding": finding}), flush=True)


if __name__ == "__main__":
    main()
