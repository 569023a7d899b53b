"""Saves the checkpoints of a directory: names them, under the directory's lock, and cleans up after each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from distrust.checkpoint import foreign
from distrust.checkpoint.background import PendingSave
from distrust.checkpoint.checkpoint import Checkpoint
from distrust.checkpoint.file_writer import FileWriter, save_errors
from distrust.checkpoint.files import checkpoint_file_name
from distrust.checkpoint.format import Kind
from distrust.checkpoint.manager_state import ManagerState
from distrust.checkpoint.retainer import Retainer
from distrust.checkpoint.shared_writer import Peers, SharedFileWriter
from distrust.checkpoint.step_snapshots import StepSnapshots, remove_snapshots
from distrust.errors import ConfigError, SaveFailed


class Writer:
    """Saves, blocking or in the background. The caller holds the state's mutex."""

    def __init__(self, state: ManagerState, retainer: Retainer, *, record_host: bool) -> None:
        self._state = state
        self._locked_files = _LockedFileWriter(state, retainer, record_host=record_host)
        self._files: FileWriter = self._locked_files
        self._follows = False  # another process has the lock, and commits

    def share(self, peers: Peers) -> None:
        """Write every later checkpoint together with other processes."""
        self._follows = peers.index > 0
        self._files = SharedFileWriter(self._locked_files, peers)

    def save(self, checkpoint: Checkpoint, *, final: bool) -> Path:
        """Write a checkpoint; it is durable when this returns."""
        path, kind = self._begin(checkpoint.step, final=final)
        self._files.save(path, checkpoint, kind)
        return path

    def save_async(self, checkpoint: Checkpoint, *, final: bool, overlap: bool) -> PendingSave:
        """Copy a checkpoint and write it in the background; write it now if there is no memory for a copy."""
        path, kind = self._begin(checkpoint.step, final=final)
        pending = self._files.save_async(path, checkpoint, kind, overlap=overlap)
        pending.mirror = None if self._follows else self._state.mirror
        return pending

    def snapshot(
        self, checkpoint: Checkpoint | Callable[[], Checkpoint], *, budget: float, overlap: bool
    ) -> StepSnapshots:
        """Keep a checkpoint in shared memory, if that is due."""
        if not budget > 0:
            raise ConfigError(f"snapshot: budget={budget!r}: give percent, above 0")
        snapshots = self._state.snapshots
        if self._files is not self._locked_files:
            snapshots.disable("the state is divided among processes")
        if snapshots.is_due(budget):
            self._state.acquire()
            self._state.lock.confirm()
            make = checkpoint if callable(checkpoint) else lambda: checkpoint
            snapshots.take(lambda: self._locked_files.flatten(make(), "periodic"), overlap=overlap)
        return snapshots

    def rescue(self) -> Path | None:
        """Write the snapshot of a dead process as a checkpoint; it is durable when this returns."""
        if self._state.find_snapshot() is None:
            return None
        if self._state.mirror is not None:
            self._state.mirror.fetch_newest()  # first: the run may have gone on elsewhere
        if (snapshot := self._state.find_snapshot()) is None:
            return None
        path, _ = self._begin(snapshot.step, final=False)
        self._locked_files.copy(snapshot, path)
        if not self._state.snapshots.has_any:
            remove_snapshots(snapshot.path.parent)
        return path

    def _begin(self, step: int, *, final: bool) -> tuple[Path, Kind]:
        self._state.background.wait()  # raises the error of the save before, if no call has
        kind: Kind = "final" if final else "periodic"
        path = self._state.directory / checkpoint_file_name(step, kind)
        if self._follows:
            return path, kind
        self._state.begin()  # the first save takes the lock, and the right to write to the mirror
        with save_errors(path):
            is_foreign = foreign.find_reader(path) is not None
        if is_foreign:
            reason = "a checkpoint in an older format has this name, and is never replaced"
            remedy = "Move it away, or save in another directory"
            raise SaveFailed(f"{path}: not saved: {reason}. {remedy}", path=path)
        return path, kind


class _LockedFileWriter(FileWriter):
    """Writes into a locked directory, and cleans it up after each save."""

    def __init__(self, state: ManagerState, retainer: Retainer, *, record_host: bool) -> None:
        super().__init__(state, record_host=record_host)
        self._directory = state
        self._retainer = retainer

    def _confirm(self) -> None:
        self._directory.lock.confirm()

    def _after_commit(self, path: Path, digest: str, step: int) -> None:
        self._directory.record_saved(path, digest, step)
        self._retainer.clean_up_after_save(path)  # only now: the new checkpoint may displace others
