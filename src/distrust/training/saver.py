"""Saves behind the loop: one at a time, and it knows which step is durable, and how long the loop waited."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator

from distrust.checkpoint import Checkpoint, CheckpointManager, PendingSave
from distrust.checkpoint.files import checkpoint_file_name
from distrust.errors import CheckpointError, DistrustWarning, SaveFailed
from distrust.training.events import CheckpointSaved, CheckpointStarted, Observer

#: So many failed saves in a row stop the run; fewer are warned of, since the next one may succeed.
MAX_FAILURES = 3


class Saver:
    """Starts background saves and takes their outcome.

    Args:
        manager: of the run's directory.
        emit: told when a save begins, and when it is durable.

    Attributes:
        durable: the newest step that stands, with whether it is the final one; None if there is none.
        stall_seconds: how long the loop has waited, for all saves together.
    """

    def __init__(self, manager: CheckpointManager, emit: Observer) -> None:
        self.durable: tuple[int, bool] | None = None
        self._manager = manager
        self._emit = emit
        self._pending: PendingSave | None = None
        self._pending_state: tuple[int, bool] = (0, False)
        self._pending_stall = 0.0
        self.stall_seconds = 0.0
        self._failures = 0

    def reserve(self, checkpoint: Checkpoint) -> None:
        """Have memory ready for checkpoints of this size: the first save is to be as quick as the next."""
        self._manager.reserve(checkpoint.nbytes)

    def start(self, make: Callable[[], Checkpoint], *, final: bool) -> None:
        """Have a checkpoint written, after the one before it.

        Its model and optimizer may be copied after this returns: :meth:`wait_copied` before they change.

        Raises:
            SaveFailed: if that was one failure too many.
        """
        self.wait()
        self._pending_stall = 0.0
        with self._measure_stall():
            checkpoint = make()
            path = self._manager.directory / checkpoint_file_name(
                checkpoint.step, "final" if final else "periodic"
            )
            self._emit(CheckpointStarted(checkpoint.step, path))
            self._pending = self._manager.save_async(checkpoint, final=final, overlap=True)
        self._pending_state = checkpoint.step, final

    def wait_copied(self) -> None:
        """Wait until model and optimizer may change."""
        if self._pending is not None:
            with self._measure_stall():
                self._pending.wait_copied()

    def poll(self) -> None:
        """Take the outcome of a save that has ended meanwhile."""
        if self._pending is not None and self._pending.done:
            self.wait()

    def wait(self, *, strict: bool = False) -> None:
        """Wait for the save under way.

        Args:
            strict: whether a failure is one too many: no save follows that could make up for it.

        Raises:
            SaveFailed: if that was one failure too many.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            with self._measure_stall():
                path = pending.wait()
        except SaveFailed as error:
            self._failures += 1
            if strict or self._failures == MAX_FAILURES:
                raise self._last(error) from error
            warnings.warn(
                f"{error}. Training goes on, and the next save tries again", DistrustWarning, stacklevel=2
            )
        else:
            self._failures = 0
            self.durable = self._pending_state
            self._emit(CheckpointSaved(self._pending_state[0], path, self._pending_stall))

    def is_durable(self, step: int, *, final: bool = False) -> bool:
        """Whether the checkpoint of a step is durable; with ``final``, as the final one."""
        return self.durable is not None and self.durable[0] == step and (self.durable[1] or not final)

    def describe_durable(self) -> str:
        """What stands, in a few words; waits for the save under way."""
        self.wait()
        return "nothing was saved yet" if self.durable is None else f"step {self.durable[0]} is saved"

    def _last(self, error: SaveFailed) -> SaveFailed:
        """The same error, with what stands: it stops the run."""
        times = f" {self._failures} times in a row" if self._failures > 1 else ""
        return SaveFailed(
            f"{error}. Saving failed{times}, so training stopped at step {self._pending_state[0]}; "
            f"{self.describe_remaining()}",
            path=error.path or self._manager.directory,
            needed=error.needed,
            free=error.free,
        )

    def describe_remaining(self) -> str:
        """What there is to go on from. Looked for: what failed may have taken the directory with it."""
        if self.durable is None:
            return "nothing was saved yet"
        step = self.durable[0]
        try:
            stands = step in self._manager.list_checkpoints()
        except CheckpointError:
            stands = False
        if stands:
            return f"step {step} is saved: mend the cause, and the same command goes on from there"
        return f"step {step} was saved, and cannot be found any more"

    @contextlib.contextmanager
    def _measure_stall(self) -> Iterator[None]:
        """The loop waits meanwhile, for the pending save."""
        began = time.perf_counter()
        try:
            yield
        finally:
            waited = time.perf_counter() - began
            self._pending_stall += waited
            self.stall_seconds += waited
