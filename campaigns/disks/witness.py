"""What stands in a directory of checkpoints, and whether a save kept its promises.

The witness looks for itself, past the manager: names by ``os.listdir``, contents by a digest of its own.
After every save that it has made, well or not, it requires what is promised of it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np

from campaigns.campaign import CounterExample
from campaigns.disks.volumes import eventually
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import direct_io
from distrust.errors import CheckpointNotFound, SaveFailed

WAYS = ("blocking", "background", "overlapped")
Step = int
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Outcome(NamedTuple):
    """How a save ended.

    Attributes:
        checkpoint: that was to be saved.
        before: the checkpoints that stood when it began: name -> digest of all bytes.
        error: why it was not saved, or None.
        resources: how many files may be open, and threads run, when it has ended.
    """

    checkpoint: Checkpoint
    before: dict[str, str]
    error: SaveFailed | None
    resources: tuple[int, int]


class SaveChecker:
    """Saves into a directory, and requires what is promised.

    Args:
        directory: of checkpoints.
        chance: draws how each save is made.
        counts: what was done, and how often.
        label: of the place, for the counts.

    Attributes:
        manager: that saves.
        reported: what was reported durable, and no rule has removed since.
    """

    def __init__(self, directory: Path, chance: random.Random, counts: Counter[str], label: str) -> None:
        self.directory = directory
        self.chance = chance
        self.reported: dict[Step, Checkpoint] = {}
        self._counts = counts
        self._label = label
        self._keep = chance.choice([None, 2, 3])
        self._locked = False
        self._finals: set[Step] = set()
        self.manager = self._open()
        if chance.random() < 0.5:
            direct_io.FLAG = 0  # this process is the case's own
        warnings.simplefilter("ignore")  # a clean-up that fails warns, and is no failed save

    def reopen(self) -> None:
        """Let go of the directory, and take a new manager, as a new process would."""
        self.manager.close()
        self.manager = self._open()
        self._locked = False

    def try_to_save(
        self,
        step: Step,
        nbytes: int,
        *,
        within: AbstractContextManager[object] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Outcome:
        """Save in one way or another; :meth:`judge` then looks at how it ended.

        Args:
            step: of the checkpoint.
            nbytes: of its arrays.
            within: a context that is entered for the save alone.
            meanwhile: called while the save is under way in the background.
        """
        checkpoint = _checkpoint(step, nbytes, salt=self.chance.getrandbits(32))
        way = self.chance.choice(WAYS) if meanwhile is None else "background"
        final = self.chance.random() < 0.1 or step in self._finals  # where both stand, the final one is read
        before = contents(self.directory)
        files, threads = _resources()
        resources = files + (not self._locked), threads  # the lock stays open
        error = None
        try:
            with within or nullcontext():
                if way == "blocking":
                    self.manager.save(checkpoint, final=final)
                else:
                    pending = self.manager.save_async(checkpoint, final=final, overlap=way == "overlapped")
                    if meanwhile is not None:
                        meanwhile()
                    pending.wait()
        except SaveFailed as failed:
            error = failed
        self._locked = self._locked or error is None
        if final and error is None:
            self._finals.add(step)
        self._count(f"refused: {place_and_reason(error)}" if error else "saved")
        return Outcome(checkpoint, before, error, resources)

    def judge(self, outcome: Outcome, *, removable: bool = True, reachable: bool = True) -> bool:
        """Require what is promised, whatever came out; returns whether the checkpoint was saved.

        Args:
            outcome: of :meth:`try_to_save`.
            removable: whether the file system still lets files be removed.
            reachable: whether what stood before can still be there.

        Raises:
            CounterExample: for a promise that was not kept.
        """
        ended = eventually(lambda: _within(outcome.resources), seconds=3)
        _require(ended, "open files or threads are left over")
        error = outcome.error
        if error is None:
            self._judge_saved(outcome)
        else:
            self.judge_message(outcome)
            if reachable:
                self._judge_untouched(outcome, new_one_may_stand="written completely" in str(error))
        if removable:
            _require(not temporary(self.directory), f"left over: {temporary(self.directory)}")
        if reachable:
            self.require_newest()
        return error is None

    def judge_message(self, outcome: Outcome) -> None:
        """What, where, how many bytes were wanted and free, in one line.

        Raises:
            CounterExample: if the message of a failure does not say so.
        """
        error = outcome.error
        if error is None:
            return
        text, cause, nbytes = str(error), error.__cause__, outcome.checkpoint.nbytes
        _require("\n" not in text, f"more than one line: {text!r}")
        _require(str(self.directory) in text and error.path is not None, f"it does not say where: {text}")
        if isinstance(cause, OSError) and cause.strerror:
            _require(cause.strerror in text, f"it does not say what: {text}")
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM and "not saved" in text:
            _require(error.needed is not None and error.needed >= nbytes, f"wanted: {error.needed}: {text}")
            _require(f"{error.needed:,} bytes wanted" in text and " free" in text, f"how many bytes? {text}")

    def save(self, step: Step, nbytes: int) -> None:
        """Save where nothing is in the way.

        Raises:
            CounterExample: if it cannot be saved.
        """
        outcome = self.try_to_save(step, nbytes)
        if outcome.error is not None:
            raise CounterExample(f"with room and rights for it, still not saved: {outcome.error}")
        self.judge(outcome)

    def require_newest(self) -> None:
        """The newest checkpoint that was reported durable can be loaded, by anybody, and is what it was.

        Raises:
            CounterExample: if not.
        """
        reader = CheckpointManager(self.directory)
        try:
            loaded = reader.load_latest()
        except CheckpointNotFound:
            _require(not self.reported, f"reported durable, and gone: steps {sorted(self.reported)}")
            return
        newest = max(self.reported, default=-1)
        _require(loaded.step >= newest, f"step {newest} was reported durable, step {loaded.step} is loaded")
        if loaded.step == newest:
            _require(_same(loaded, self.reported[newest]), f"step {newest} is not what was saved")

    def require_all(self) -> None:
        """Every checkpoint that was reported durable, and that no rule removed, is what it was.

        Raises:
            CounterExample: if not.
        """
        reader = CheckpointManager(self.directory)
        for step, checkpoint in self.reported.items():
            _require(_same(reader.load(step), checkpoint), f"step {step} is not what was saved")

    def forget_removed(self) -> None:
        """Expect no more what the rules let go, if it is gone."""
        if self._keep is not None:
            there = set(CheckpointManager(self.directory).list_checkpoints())
            # One whose directory could not be synced was not reported, and counts if it is there.
            for step in sorted(there | set(self.reported))[: -self._keep]:
                if step not in there:
                    self.reported.pop(step, None)

    def _open(self) -> CheckpointManager:
        return CheckpointManager(self.directory, keep_last=self._keep)

    def _judge_saved(self, outcome: Outcome) -> None:
        self.reported[outcome.checkpoint.step] = outcome.checkpoint
        self.forget_removed()
        self.require_all()

    def _judge_untouched(self, outcome: Outcome, *, new_one_may_stand: bool) -> None:
        now = contents(self.directory)
        for name, digest in outcome.before.items():
            _require(name in now, f"a save that failed took {name} with it")
            replaced = new_one_may_stand and name.startswith(f"checkpoint-{outcome.checkpoint.step}")
            _require(now[name] == digest or replaced, f"a save that failed changed {name}")
        new = set(now) - set(outcome.before)
        _require(not new or new_one_may_stand, f"a save that failed left {sorted(new)}")
        if new_one_may_stand:  # whole, but perhaps not durable: either one may be read from now on
            self.reported[outcome.checkpoint.step] = outcome.checkpoint

    def _count(self, what: str) -> None:
        self._counts[f"{self._label}: {what}"] += 1


def contents(directory: Path) -> dict[str, str]:
    """The checkpoints in a directory: name -> digest of all bytes; none where there is no directory."""
    try:
        names = [name for name in os.listdir(directory) if name.startswith("checkpoint-")]
    except OSError:
        return {}
    return {name: _digest(directory / name) for name in names}


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def temporary(directory: Path) -> list[str]:
    """The temporary files that are left in a directory."""
    try:
        return [name for name in os.listdir(directory) if name.startswith(".checkpoint-")]
    except OSError:
        return []


def place_and_reason(error: SaveFailed) -> str:
    """Where in the product a save failed, and what the system said: by the innermost function of it."""
    place, cause = "unknown", error.__cause__
    trace = cause.__traceback__ if cause else error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if f"{os.sep}distrust{os.sep}checkpoint" in code.co_filename:
            place = code.co_name
        trace = trace.tb_next
    if isinstance(cause, OSError):
        return f"{place}: {cause.strerror}"
    return f"{place}: {type(cause).__name__}" if cause else place


def _checkpoint(step: Step, nbytes: int, *, salt: int) -> Checkpoint:
    data = np.random.default_rng([salt, step]).integers(0, 256, nbytes, np.uint8)
    cut = nbytes // 3
    return Checkpoint(
        step=step, model={"w": data[:cut]}, optimizer={"moments": data[cut:]}, metadata={"salt": salt}
    )


def _same(loaded: Checkpoint, saved: Checkpoint) -> bool:
    return (
        loaded.metadata == saved.metadata
        and bool((loaded.model["w"] == saved.model["w"]).all())
        and bool((loaded.optimizer["moments"] == saved.optimizer["moments"]).all())
    )


def _resources() -> tuple[int, int]:
    """How many files are open, and how many threads there are."""
    listed = Path("/proc/self/fd")
    return (len(os.listdir(listed)) if listed.exists() else 0), threading.active_count()


def _within(allowed: tuple[int, int]) -> bool:
    return all(now <= most for now, most in zip(_resources(), allowed, strict=True))


def _require(kept: bool, promise: str) -> None:
    if not kept:
        raise CounterExample(promise)
