"""Background saves of a run: one at a time. Tracks the last durable step and the stall of the loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from distrust.checkpoint import Checkpoint, CheckpointManager, PendingSave
from distrust.checkpoint.files import checkpoint_file_name
from distrust.checkpoint.step_snapshots import StepSnapshots
from distrust.errors import CheckpointError, SaveFailed, warn
from distrust.training.events import CheckpointSaved, CheckpointStarted, Observer
from distrust.training.save_interval import SaveTimes

#: This many failed saves in a row stop the run. Fewer only warn, because the next save may succeed.
MAX_FAILURES = 3


class Saver:
    """Starts background saves and collects their results; emits an event when one starts and is durable."""

    def __init__(self, manager: CheckpointManager, emit: Observer) -> None:
        self.last_durable: tuple[int, bool] | None = None  # newest durable step, and whether it is final
        self._manager = manager
        self._emit = emit
        self._pending: PendingSave | None = None
        self._snapshots: StepSnapshots | None = None
        self._pending_save: tuple[int, bool] = (0, False)
        self.start_clock()

    @property
    def stall_seconds(self) -> float:
        """How long saves and snapshots of steps have stalled training in this session."""
        return self.times.total_stall + (self._snapshots.total_stall if self._snapshots is not None else 0.0)

    def start_clock(self) -> None:
        """Begin to measure the session: from here on a crash costs work."""
        now = time.perf_counter()
        self.times = SaveTimes(began=now, save_began=now, durable_since=now)
        self._most_at_risk = 0.0  # since the last call of take_at_risk

    @property
    def last_path(self) -> Path | None:
        """Path of the newest durable checkpoint."""
        return None if self.last_durable is None else self._path(*self.last_durable)

    def reserve(self, make: Callable[[], Checkpoint], *, device: str | None) -> None:
        """Allocate the snapshot buffer of all saves, for checkpoints like this one."""
        self.times.nbytes = make().nbytes
        self._manager.reserve(self.times.nbytes, device=device)

    def start(self, make: Callable[[], Checkpoint], *, final: bool) -> None:
        """Start saving a checkpoint, after the pending save.

        Model and optimizer may still be copied when this returns: :meth:`wait_copied` before they change.
        """
        self.wait()
        self.times.save_began, self.times.stall = time.perf_counter(), 0.0
        self.times.saves += 1
        self._ended = ended = list[float]()
        with self._measure_stall():
            checkpoint = make()  # part of the stall
            self._emit(CheckpointStarted(checkpoint.step, self._path(checkpoint.step, final)))
            self._pending = self._manager.save_async(checkpoint, final=final, overlap=True)
        self._pending.add_done_callback(lambda: ended.append(time.perf_counter()))
        self._pending_save = checkpoint.step, final

    def snapshot(self, make: Callable[[], Checkpoint], *, budget: float) -> None:
        """Keep a state in shared memory, within a budget (percent); :meth:`wait_copied` as after a save."""
        self._snapshots = self._manager.snapshot(make, budget=budget, overlap=True)

    def wait_copied(self) -> None:
        """Wait until model and optimizer may change."""
        if self._pending is not None:
            with self._measure_stall():
                self._pending.wait_copied()
        if self._snapshots is not None:
            self._snapshots.wait_copied()

    def wait_snapshot(self) -> None:
        """Wait until no snapshot of a step refers to the engine's arrays."""
        if self._snapshots is not None:
            self._snapshots.wait()

    def poll(self) -> None:
        """Collect the result of the pending save if it has ended."""
        if self._pending is not None and self._pending.done:
            self.wait()

    def wait(self, *, strict: bool = False) -> None:
        """Wait for the pending save; with ``strict`` any failure raises, because no later save follows.

        Raises:
            SaveFailed: one failure too many.
        """
        pending, self._pending = self._pending, None  # cleared first: a failure is reported once
        if pending is None:
            return
        try:
            with self._measure_stall():
                path = pending.wait()
        except SaveFailed as error:
            self.times.failures += 1
            if strict or self.times.failures == MAX_FAILURES:
                raise self._final_error(error) from error
            warn(f"{error}. Training continues, and the next save tries again")
        else:
            self.last_durable = self._pending_save  # only now: the checkpoint is on disk under its name
            times = self.times
            ended = (*self._ended, time.perf_counter())[0]  # its callback may come a moment later
            at_risk = ended - times.durable_since
            self._most_at_risk = max(self._most_at_risk, at_risk)
            times.failures, times.duration = 0, ended - times.save_began
            times.durable_since = times.save_began
            with contextlib.suppress(OSError):  # another process may have removed it
                times.nbytes = path.stat().st_size  # with the parts of all ranks
            self._emit(CheckpointSaved(self._pending_save[0], path, self.times.stall, at_risk))

    def take_at_risk(self) -> float:
        """The most seconds of work that were not durable, at any moment since the last call."""
        most, self._most_at_risk = self._most_at_risk, 0.0
        return max(most, time.perf_counter() - self.times.durable_since)

    def is_durable(self, step: int, *, final: bool = False) -> bool:
        """Whether the checkpoint of a step is durable; with ``final``, as the final checkpoint."""
        return self.last_durable in ((step, True), (step, final))  # a final one is enough for both

    def describe_durable(self) -> str:
        """The last durable step, for messages; waits for the pending save."""
        self.wait()
        return f"step {self.last_durable[0]} is saved" if self.last_durable else "nothing was saved yet"

    def _describe_remaining(self) -> str:
        """What a resume can start from. Checks the directory: the failure may have removed it."""
        if self.last_durable is None:
            return "nothing was saved yet"
        step = self.last_durable[0]
        with contextlib.suppress(CheckpointError):
            if step in self._manager.list_checkpoints():
                return f"step {step} is saved: fix the cause, and the same command resumes from there"
        return f"step {step} was saved, but its checkpoint no longer exists"

    def _final_error(self, error: SaveFailed) -> SaveFailed:
        times = f" {self.times.failures} times in a row" if self.times.failures > 1 else ""
        return SaveFailed(
            f"{error}. Saving failed{times}, so training stopped at step {self._pending_save[0]}; "
            f"{self._describe_remaining()}",
            path=error.path or self._manager.directory,
            needed=error.needed,
            free=error.free,
        )

    def _path(self, step: int, final: bool) -> Path:
        return self._manager.directory / checkpoint_file_name(step, "final" if final else "periodic")

    @contextlib.contextmanager
    def _measure_stall(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            stall = time.perf_counter() - start
            self.times.stall += stall
            self.times.total_stall += stall


class FollowerSaver(Saver):
    """The saver of a rank that does not lead: the leader saves for all, and nobody waits for it."""

    def reserve(self, make: Callable[[], Checkpoint], *, device: str | None) -> None:
        """Nothing: no save follows."""

    def start(self, make: Callable[[], Checkpoint], *, final: bool) -> None:
        """Nothing."""

    def describe_durable(self) -> str:
        """Only the leader knows the step."""
        return "the same command resumes from the newest checkpoint, if there is one"
