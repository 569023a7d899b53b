"""Saves into a directory, and what must hold after each save, whether it succeeded or not.

Names and contents are read past the manager (``invariants.checkpoint_digests``).
"""

from __future__ import annotations

import errno
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

from campaigns.campaign import require
from campaigns.disks.volumes import wait_until
from campaigns.invariants import checkpoint_digests, temporary_files
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import direct_io
from distrust.errors import CheckpointNotFound, SaveFailed

METHODS = ("blocking", "background", "overlapped")  # save, save_async, and save_async with overlap
Step = int
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # where the message must give the bytes


class Outcome(NamedTuple):
    checkpoint: Checkpoint  # that was to be saved
    existing: dict[str, str]  # the checkpoints before it: name -> digest of all bytes
    error: SaveFailed | None  # why it was not saved, or None
    resources: tuple[int, int]  # how many files may be open, and threads run, after it


class SaveChecker:
    """Saves into a directory, and checks each save."""

    def __init__(self, directory: Path, rng: random.Random, counts: Counter[str], label: str) -> None:
        self.directory = directory  # of checkpoints
        self.rng = rng  # of how each save is made
        self.reported: dict[Step, Checkpoint] = {}  # what was reported durable, and no rule has removed since
        self._counts = counts  # what was done, and how often
        self._label = label  # prefix of the counts
        self._keep_last = rng.choice([None, 2, 3])
        self._locked = False
        self._finals: set[Step] = set()
        self.manager = self._open()  # that saves
        if rng.random() < 0.5:
            direct_io.FLAG = 0  # the case has a process of its own
        warnings.simplefilter("ignore")  # a clean-up that fails warns, and is no failed save

    def reopen(self) -> None:
        """Release the directory, and take a new manager, as a new process would."""
        self.manager.close()
        self.manager = self._open()
        self._locked = False

    def attempt(
        self,
        step: Step,
        nbytes: int,
        *,
        context: AbstractContextManager[object] | None = None,
        during: Callable[[], None] | None = None,
    ) -> Outcome:
        """Save by one of the methods, in a context, or with a call during it; :meth:`check` judges it."""
        checkpoint = _checkpoint(step, nbytes, salt=self.rng.getrandbits(32))
        method = self.rng.choice(METHODS) if during is None else "background"
        # Where a step has both files, the final one is read.
        final = self.rng.random() < 0.1 or step in self._finals
        existing = checkpoint_digests(self.directory)
        files, threads = _resources()
        resources = files + (not self._locked), threads  # the lock stays open
        error = None
        try:
            with context or nullcontext():
                if method == "blocking":
                    self.manager.save(checkpoint, final=final)
                else:
                    overlap = method == "overlapped"
                    pending = self.manager.save_async(checkpoint, final=final, overlap=overlap)
                    if during is not None:
                        during()
                    pending.wait()
        except SaveFailed as failure:
            error = failure
        self._locked = self._locked or error is None
        if final and error is None:
            self._finals.add(step)
        self._counts[f"{self._label}: {f'refused: {_where_and_why(error)}' if error else 'saved'}"] += 1
        return Outcome(checkpoint, existing, error, resources)

    def check(self, outcome: Outcome, *, removable: bool = True, reachable: bool = True) -> None:
        """Check everything that must hold after a save.

        ``removable``: whether the file system still lets files be removed; ``reachable``: whether the earlier
        checkpoints can still exist.
        """
        released = wait_until(lambda: _at_most(outcome.resources), seconds=3)
        require(released, "open files or threads are left")
        error = outcome.error
        if error is None:
            self.reported[outcome.checkpoint.step] = outcome.checkpoint
            self.forget_removed()
            self.require_all()
        else:
            self.check_message(outcome)
            if reachable:
                self._require_untouched(outcome, may_exist="written completely" in str(error))
        if removable:
            temporary = temporary_files(self.directory)
            require(not temporary, f"temporary files are left: {temporary}")
        if reachable:
            self.require_newest()

    def check_message(self, outcome: Outcome) -> None:
        """One line: what failed, where, how many bytes were needed and free."""
        error = outcome.error
        if error is None:
            return
        text, cause, nbytes = str(error), error.__cause__, outcome.checkpoint.nbytes
        require("\n" not in text, f"more than one line: {text!r}")
        require(str(self.directory) in text and error.path is not None, f"the message names no path: {text}")
        if isinstance(cause, OSError) and cause.strerror:
            require(cause.strerror in text, f"the message gives no reason: {text}")
        if isinstance(cause, OSError) and cause.errno in _NO_SPACE and "not saved" in text:
            require(error.needed is not None and error.needed >= nbytes, f"needed: {error.needed}: {text}")
            require(f"{error.needed:,} bytes needed" in text and " free" in text, f"how many bytes? {text}")

    def save(self, step: Step, nbytes: int) -> None:
        outcome = self.attempt(step, nbytes)
        require(outcome.error is None, f"with space and permissions, still not saved: {outcome.error}")
        self.check(outcome)

    def require_newest(self) -> None:
        """The newest checkpoint that was reported durable can be loaded, and is what was saved."""
        reader = CheckpointManager(self.directory)
        try:
            loaded = reader.load_latest()
        except CheckpointNotFound:
            require(not self.reported, f"reported durable, and gone: steps {sorted(self.reported)}")
            return
        newest = max(self.reported, default=-1)
        require(loaded.step >= newest, f"step {newest} was reported durable, step {loaded.step} is loaded")
        if loaded.step == newest:
            require(_same(loaded, self.reported[newest]), f"step {newest} is not what was saved")

    def require_all(self) -> None:
        """Every checkpoint that was reported durable, and that no rule removed, is what was saved."""
        reader = CheckpointManager(self.directory)
        for step, checkpoint in self.reported.items():
            require(_same(reader.load(step), checkpoint), f"step {step} is not what was saved")

    def forget_removed(self) -> None:
        """Stop expecting checkpoints that the rules allow to be removed, and that are gone."""
        if self._keep_last is not None:
            existing = set(CheckpointManager(self.directory).list_checkpoints())
            # One whose directory could not be synced was not reported, but counts if it exists.
            for step in sorted(existing | set(self.reported))[: -self._keep_last]:
                if step not in existing:
                    self.reported.pop(step, None)

    def _open(self) -> CheckpointManager:
        return CheckpointManager(self.directory, keep_last=self._keep_last)

    def _require_untouched(self, outcome: Outcome, *, may_exist: bool) -> None:
        digests = checkpoint_digests(self.directory)
        for name, digest in outcome.existing.items():
            require(name in digests, f"a save that failed removed {name}")
            replaced = may_exist and name.startswith(f"checkpoint-{outcome.checkpoint.step}")
            require(digests[name] == digest or replaced, f"a save that failed changed {name}")
        new = set(digests) - set(outcome.existing)
        require(not new or may_exist, f"a save that failed left {sorted(new)}")
        if may_exist:  # complete, but perhaps not durable: either one may be read from now on
            self.reported[outcome.checkpoint.step] = outcome.checkpoint


def _where_and_why(error: SaveFailed) -> str:
    """The innermost function of the product that failed, and the system's reason."""
    function, cause = "unknown", error.__cause__
    trace = cause.__traceback__ if cause else error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if f"{os.sep}distrust{os.sep}checkpoint" in code.co_filename:
            function = code.co_name
        trace = trace.tb_next
    if isinstance(cause, OSError):
        return f"{function}: {cause.strerror}"
    return f"{function}: {type(cause).__name__}" if cause else function


def _checkpoint(step: Step, nbytes: int, *, salt: int) -> Checkpoint:
    data = np.random.default_rng([salt, step]).integers(0, 256, nbytes, np.uint8)
    model, optimizer = {"w": data[: nbytes // 3]}, {"moments": data[nbytes // 3 :]}
    return Checkpoint(step=step, model=model, optimizer=optimizer, metadata={"salt": salt})


def _same(loaded: Checkpoint, saved: Checkpoint) -> bool:
    same_weights = np.array_equal(loaded.model["w"], saved.model["w"])
    same_moments = np.array_equal(loaded.optimizer["moments"], saved.optimizer["moments"])
    return loaded.metadata == saved.metadata and same_weights and same_moments


def _resources() -> tuple[int, int]:
    descriptors = Path("/proc/self/fd")
    return (len(os.listdir(descriptors)) if descriptors.exists() else 0), threading.active_count()


def _at_most(limits: tuple[int, int]) -> bool:
    return all(count <= limit for count, limit in zip(_resources(), limits, strict=True))
