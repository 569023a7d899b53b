"""One checkpoint file under a name of the caller's choice: saved, loaded and verified without a directory.

For trainers that name and remove their files themselves. A file is written as a
:class:`~distrust.checkpoint.CheckpointManager` writes it: under a hidden name, synced, then renamed, so that
at every instant its name has the previous content or the new one. There is no lock: of two processes that
save under one name, the last to end wins.
"""

from __future__ import annotations

import os
from pathlib import Path

from distrust.checkpoint import arrays, catalog, serialization, storage
from distrust.checkpoint.background import PendingSave
from distrust.checkpoint.checkpoint import Checkpoint
from distrust.checkpoint.checkpoint_file import CheckpointFile
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.file_writer import FileWriter, SaveState
from distrust.checkpoint.remote.location import require_path
from distrust.errors import ConfigError, SaveFailed, WarningCollector

_Path = str | os.PathLike[str]
#: A writer locks its temporary file right after it creates it; a younger one may not be locked yet.
_LOCKED_AFTER_SECONDS = 60


class FileSaver:
    """Saves checkpoints under any names, one at a time, and keeps the memory for the next one.

    Args:
        record_host: whether checkpoints get the name of this machine.
        disk: replaces the operating system's calls, to test failures.
    """

    def __init__(self, *, record_host: bool = True, disk: Disk | None = None) -> None:
        self._state = SaveState(disk or Disk())
        self._files = FileWriter(self._state, record_host=record_host)

    def save(self, path: _Path, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, and return its absolute path once it is durable.

        Folders that do not exist are created. An existing file is replaced; of a link, its target.

        Raises:
            SaveFailed: if it, or the background save before it, could not be written.
            UnsupportedState: for a value that would not load exactly as it was saved.
            ConfigError: ``path`` is no path.
        """
        with self._state.mutex, WarningCollector():
            target = self._begin(path)
            self._files.save(target, checkpoint, "periodic")
            return target

    def save_async(self, path: _Path, checkpoint: Checkpoint, *, overlap: bool = False) -> PendingSave:
        """Copy a checkpoint, and write it in the background, as ``CheckpointManager.save_async`` does.

        Raises:
            CheckpointError: as :meth:`save`; a failure of this save is raised by the next call instead.
        """
        with self._state.mutex, WarningCollector():
            target = self._begin(path)
            return self._files.save_async(target, checkpoint, "periodic", overlap=overlap)

    def copy(self, source: CheckpointFile, path: _Path) -> Path:
        """Write a verified file under another name; as :meth:`save`."""
        with self._state.mutex:
            target = self._begin(path)
            self._files.copy(source, target)
            return target

    def wait(self) -> None:
        """Wait for the save in progress.

        Raises:
            SaveFailed: if it failed and no call has raised that.
        """
        with self._state.mutex:
            self._state.background.wait()

    def close(self) -> None:
        """As :meth:`wait`, and return the memory. The next save allocates it again."""
        with self._state.mutex:
            try:
                self._state.background.wait()
            finally:
                if self._state.background.idle:  # not if the wait was interrupted
                    self._state.release_memory()

    def _begin(self, path: _Path) -> Path:
        self._state.background.wait()  # raises the error of the save before, if no call has
        target = _absolute(path)
        directory, disk = target.parent, self._state.disk
        with storage.errors_for_directory(directory):
            is_new = not directory.is_dir()
            storage.make_directory(directory, disk)
            if os.path.lexists(target) and not target.is_file():
                raise SaveFailed(
                    f"{target}: not saved: it is no regular file; give another name", path=target
                )
        if is_new:
            storage.sync_names(directory, disk)
        storage.remove_stale_files(directory, disk, name=target.name, min_age=_LOCKED_AFTER_SECONDS)
        return target


def save_file(path: _Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint under ``path``; see :meth:`FileSaver.save`."""
    return FileSaver().save(path, checkpoint)


def save_file_async(path: _Path, checkpoint: Checkpoint, *, overlap: bool = False) -> PendingSave:
    """Copy a checkpoint, and write it in the background; see :meth:`FileSaver.save_async`.

    Each call allocates its own memory. Whoever saves often keeps a :class:`FileSaver`.
    """
    return FileSaver().save_async(path, checkpoint, overlap=overlap)


def load_file(path: _Path, *, framework: arrays.Framework = "numpy", device: str | None = None) -> Checkpoint:
    """Read a checkpoint under any name, and verify every byte.

    Args:
        path: the file.
        framework: of the arrays: ``numpy``, ``torch``, ``jax`` or ``mlx``.
        device: of the tensors of torch in ``model`` and ``optimizer``, as for ``CheckpointManager.load``.

    Raises:
        CheckpointNotFound: there is no such file.
        CorruptCheckpoint: a byte differs from what was written, or it is no checkpoint.
        CheckpointUnreadable: this process cannot read it: permissions, memory.
        UnsupportedVersion: a later version of this program wrote it.
        ConfigError: the framework, or a dtype or device of it, is not available.
    """
    with WarningCollector():
        return serialization.load(_absolute(path), framework=framework, device=device)[1]


def verify_file(path: _Path) -> None:
    """Check every byte of a checkpoint under any name; raise as :func:`load_file` does."""
    catalog.verify_content(_absolute(path))


def _absolute(path: _Path) -> Path:
    """The absolute path, of a link that of its target: that is what is replaced."""
    require_path(path, "a checkpoint file:", "copy it to or from there with `distrust copy`")
    try:
        os.stat(path)
    except OSError:
        pass  # whoever uses it says why
    except ValueError as error:  # a null byte, or what no file system can name
        raise ConfigError(f"{os.fspath(path)!r} is no path: {error}") from None
    return Path(os.path.realpath(path) if os.path.islink(path) else path).absolute()
