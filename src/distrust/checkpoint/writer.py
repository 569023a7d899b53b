"""Saves checkpoints. :meth:`Writer._write` contains the phases of every save, in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from distrust.checkpoint import foreign, serialization, stream_writer
from distrust.checkpoint.background import PendingSave
from distrust.checkpoint.checkpoint import Checkpoint
from distrust.checkpoint.files import checkpoint_file_name
from distrust.checkpoint.format import Kind
from distrust.checkpoint.manager_state import ManagerState
from distrust.checkpoint.retainer import Retainer
from distrust.checkpoint.storage import AtomicCheckpointFile
from distrust.errors import (
    CheckpointUnreadable,
    DistrustWarning,
    ErrorTranslator,
    SaveFailed,
    WarningCollector,
    defer_warning,
)

#: Sections that change only in the optimizer's step: their copy may overlap the next forward and backward.
_OVERLAPPED = ("model.", "optimizer.")
#: Writes the content of a new file, which the caller commits; returns the digest of its header.
WriteContent = Callable[[AtomicCheckpointFile], str]


class Writer:
    """Saves, blocking or in the background. The caller holds the state's mutex."""

    def __init__(self, state: ManagerState, retainer: Retainer, *, record_host: bool) -> None:
        self._state = state
        self._record_host = record_host
        self._retainer = retainer

    def save(self, checkpoint: Checkpoint, *, final: bool) -> Path:
        """Write a checkpoint; it is durable when this returns."""
        path, kind = self._begin(checkpoint.step, final=final)
        with _save_errors(path):
            prepared = self._prepare(checkpoint, kind)  # refuses bad values before any I/O
        self._write(path, prepared.layout.file_size, prepared.step, self._stream(prepared))
        return path

    def _prepare(self, checkpoint: Checkpoint, kind: Kind) -> serialization.PreparedCheckpoint:
        return serialization.prepare(checkpoint, kind, record_host=self._record_host)

    def save_async(self, checkpoint: Checkpoint, *, final: bool, overlap: bool) -> PendingSave:
        """Copy a checkpoint and write it in the background; write it now if there is no memory for a copy."""
        path, kind = self._begin(checkpoint.step, final=final)
        state = self._state
        try:
            with _save_errors(path):
                prepared = self._prepare(checkpoint, kind)
                pending_copy = state.snapshot.start_copy(
                    prepared, deferred=_OVERLAPPED if overlap else (), block_buffer=state.block_buffer
                )
        except SaveFailed as error:
            return state.background.finish(path, error)
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
        return state.background.start(path, copy=lambda: pending_copy.copy(path), write=write)

    def _begin(self, step: int, *, final: bool) -> tuple[Path, Kind]:
        self._state.background.wait()  # raises the error of the save before, if no call has
        self._state.acquire()  # the first save takes the lock
        kind: Kind = "final" if final else "periodic"
        path = self._state.directory / checkpoint_file_name(step, kind)
        with _save_errors(path):
            is_foreign = foreign.find_reader(path) is not None
        if is_foreign:
            reason = "a checkpoint in an older format has this name, and is never replaced"
            remedy = "Move it away, or save in another directory"
            raise SaveFailed(f"{path}: not saved: {reason}. {remedy}", path=path)
        return path, kind

    def _stream(self, prepared: serialization.PreparedCheckpoint) -> WriteContent:
        return lambda file: stream_writer.write_streaming(file, prepared, self._state.block_buffer)

    def _write(self, path: Path, size: int, step: int, write_content: WriteContent) -> None:
        """The phases of a save. Until the line that commits, the directory is as it was before."""
        state = self._state
        state.lock.confirm()
        with _save_errors(path), AtomicCheckpointFile(path, size, state.disk) as file:  # reserves the space
            digest = write_content(file)  # data first, header last, under a hidden name
            # Confirm again: if the directory was replaced before the file was created, it is another
            # writer's now; if it is replaced later, the file went with it and the rename fails.
            state.lock.confirm()
            file.commit()  # COMMITS: fsync, rename, fsync of the directory; the checkpoint is durable
        state.record_saved(path, digest, step)
        self._retainer.clean_up_after_save(path)  # only now: the new checkpoint may displace others


def _save_errors(path: Path) -> ErrorTranslator:
    """Running out of memory or descriptors fails a save as a full disk does."""

    def translate(error: MemoryError | OSError | CheckpointUnreadable) -> SaveFailed:
        text = error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{path}: ")
        reason = text or "no memory"
        return SaveFailed(f"{path}: not saved: {reason}. Existing files are unchanged", path=path)

    return ErrorTranslator((MemoryError, OSError, CheckpointUnreadable), translate)
