"""Writes one checkpoint file, now or in the background: ``FileWriter._write`` has the phases of a save."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

from distrust.checkpoint import serialization, stream_writer
from distrust.checkpoint.arrays import Shard
from distrust.checkpoint.background import BackgroundWriter, PendingSave
from distrust.checkpoint.checkpoint import Checkpoint
from distrust.checkpoint.checkpoint_file import CheckpointFile
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.format import Kind
from distrust.checkpoint.memory import ReusableMemory
from distrust.checkpoint.snapshot import OVERLAPPED, PendingCopy, Snapshot
from distrust.checkpoint.storage import AtomicCheckpointFile
from distrust.errors import (
    CheckpointUnreadable,
    DistrustWarning,
    ErrorTranslator,
    SaveFailed,
    UnsupportedState,
    WarningCollector,
    defer_warning,
)

#: Writes the content of a new file, which the caller commits; returns the digest of its header.
WriteContent = Callable[[AtomicCheckpointFile], str]


class SaveState:
    """What saves need and keep between them: the disk, the background thread, the memory, the mutex."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.reset()
        _reset_after_fork().add(self)

    def reset(self) -> None:
        """Start without thread and memory: initially, and in a forked child."""
        self.background = BackgroundWriter()
        self.snapshot = Snapshot()
        self.block_buffer = ReusableMemory()
        # Every operation that writes holds it, so that several threads wait for each other.
        self.mutex = threading.RLock()  # reentrant: closing may release under it

    def release_memory(self) -> None:
        """Return the buffers to the system; no save is in progress."""
        self.snapshot.release()
        self.block_buffer.release()


class FileWriter:
    """Writes a checkpoint under a path. The caller holds the state's mutex; no save is in progress."""

    def __init__(self, state: SaveState, *, record_host: bool) -> None:
        self._state = state
        self._record_host = record_host

    def save(self, path: Path, checkpoint: Checkpoint, kind: Kind) -> None:
        """Write a checkpoint; it is durable when this returns."""
        with save_errors(path):
            prepared = self.prepare(checkpoint, kind)  # refuses bad values before any I/O
        self._write(path, prepared.layout.file_size, prepared.step, self._stream(prepared))

    def save_async(self, path: Path, checkpoint: Checkpoint, kind: Kind, *, overlap: bool) -> PendingSave:
        """Copy a checkpoint and write it in the background; write it now if there is no memory for a copy."""
        state = self._state
        try:
            with save_errors(path):
                prepared = self.prepare(checkpoint, kind)
                pending_copy = state.snapshot.start_copy(
                    prepared, deferred=OVERLAPPED if overlap else (), block_buffer=state.block_buffer
                )
        except SaveFailed as error:
            return self._give_up(path, error)
        size, step = prepared.layout.file_size, prepared.step
        if pending_copy is None:
            stream = self._stream(prepared)
            pending = state.background.run(path, lambda: self._write(path, size, step, stream))
            text = f"step {step}: saved synchronously: the snapshot would exceed 25% of free memory"
            defer_warning(DistrustWarning(text))
            return pending

        def write() -> None:
            with WarningCollector():  # the caller's block has ended by then
                self._write(path, size, step, pending_copy.write)

        # The thread gets no reference to `prepared`: the caller's arrays are freed once they are copied.
        pending = state.background.start(path, copy=lambda: self._copy(path, pending_copy), write=write)
        pending.add_done_callback(pending_copy.drop)
        return pending

    def prepare(self, checkpoint: Checkpoint, kind: Kind) -> serialization.PreparedCheckpoint:
        """Lay out a checkpoint; UnsupportedState if it could not be restored exactly."""
        return self.flatten(checkpoint, kind).lay_out()

    def flatten(self, checkpoint: Checkpoint, kind: Kind) -> serialization.FlatCheckpoint:
        """Flatten a checkpoint; UnsupportedState if it could not be restored exactly."""
        flat = serialization.flatten(checkpoint, kind, record_host=self._record_host)
        for label, array in flat.arrays.items():
            if isinstance(array, Shard):
                raise UnsupportedState(f"{label}: is one rank's shard: saving it needs share()", label=label)
        return flat

    def copy(self, source: CheckpointFile, path: Path) -> None:
        """Write a verified file of another name; it is durable when this returns."""
        buffer = self._state.block_buffer
        self._write(
            path, source.bytes, source.step, lambda file: stream_writer.copy_file(file, source, buffer)
        )

    def _copy(self, path: Path, pending_copy: PendingCopy) -> None:
        pending_copy.copy(path)

    def _give_up(self, path: Path, error: SaveFailed) -> PendingSave:
        """A save that failed before it began."""
        return self._state.background.finish(path, error)

    def _stream(self, prepared: serialization.PreparedCheckpoint) -> WriteContent:
        return lambda file: stream_writer.write_streaming(file, prepared, self._state.block_buffer)

    def _write(self, path: Path, size: int, step: int, write_content: WriteContent) -> None:
        """The phases of a save. Until the line that commits, the directory is as it was before."""
        self._confirm()
        with save_errors(path), AtomicCheckpointFile(path, size, self._state.disk) as file:  # reserves space
            digest = write_content(file)  # data first, header last, under a hidden name
            # Confirm again: if the directory was replaced before the file was created, it is another
            # writer's now; if it is replaced later, the file went with it and the rename fails.
            self._confirm()
            file.commit()  # COMMITS: fsync, rename, fsync of the directory; the checkpoint is durable
        self._after_commit(path, digest, step)

    def _confirm(self) -> None:
        """Raise SaveFailed if this process may no longer write here."""

    def _after_commit(self, path: Path, digest: str, step: int) -> None:
        """A checkpoint is durable."""


def save_errors(path: Path) -> ErrorTranslator:
    """Running out of memory or descriptors fails a save as a full disk does."""

    def translate(error: MemoryError | OSError | CheckpointUnreadable) -> SaveFailed:
        text = error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{path}: ")
        reason = text or "no memory"
        return SaveFailed(f"{path}: not saved: {reason}. Existing files are unchanged", path=path)

    return ErrorTranslator((MemoryError, OSError, CheckpointUnreadable), translate)


@functools.cache
def _reset_after_fork() -> weakref.WeakSet[SaveState]:
    """The states to reset in a forked child: neither the parent's threads nor its lock exist there."""
    # The hook runs before any other thread of the child can exist, so no two threads reset the same state.
    states: weakref.WeakSet[SaveState] = weakref.WeakSet()  # must not keep dropped managers alive

    def reset_all() -> None:
        for state in list(states):
            state.reset()

    os.register_at_fork(after_in_child=reset_all)
    return states
