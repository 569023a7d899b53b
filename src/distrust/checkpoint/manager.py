"""CheckpointManager: one directory of checkpoints, written by one process and read by any number.

A facade: :class:`Writer` saves, :class:`Reader` loads, :class:`Retainer` cleans up. Each public method here
takes the mutex if it writes, and issues the warnings of the methods that it calls.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from distrust.checkpoint import arrays, catalog
from distrust.checkpoint.background import PendingSave
from distrust.checkpoint.checkpoint import Checkpoint
from distrust.checkpoint.checkpoint_file import CheckpointFile, DamagedFile, Scan
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.manager_state import ManagerState
from distrust.checkpoint.reader import Reader, Verify
from distrust.checkpoint.remote.location import require_path
from distrust.checkpoint.remote.mirror import Mirror, MirrorWriter
from distrust.checkpoint.retainer import Retainer, collect_damaged, find_damaged
from distrust.checkpoint.retention import MetricMode, Retention
from distrust.checkpoint.shared_writer import Peers
from distrust.checkpoint.step_snapshots import StepSnapshots
from distrust.checkpoint.writer import Writer
from distrust.errors import ConfigError, WarningCollector


class CheckpointManager:
    """Saves, lists, loads and cleans up the checkpoints of one directory.

    Reading needs no lock. The first save takes the directory's lock, and so does :meth:`acquire`.
    ``copy.copy`` gives a manager that shares directory, lock and background writer. A pickled, deep-copied or
    forked manager only reads until it takes the lock itself.

    Args:
        directory: created by the first save.
        keep_last: number of newest checkpoints to keep; None keeps all.
        keep_best: number of best checkpoints by ``metric`` to keep in addition.
        keep_every: keep each checkpoint whose step is a multiple of this in addition.
        metric: a key of ``Checkpoint.metrics``, or of the numbers in ``Checkpoint.metadata``.
        metric_mode: ``min`` if lower is better, or ``max``.
        record_host: whether checkpoints get the name of this machine.
        mirror: a URL or a :class:`Mirror`, to which each checkpoint is copied in the background. A forked
            child has none.
        disk: replaces the operating system's calls, to test failures. Not pickled.

    Raises:
        ConfigError: for invalid rules.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int | None = 3,
        keep_best: int = 1,
        keep_every: int | None = None,
        metric: str = "eval_loss",
        metric_mode: MetricMode = "min",
        record_host: bool = True,
        mirror: str | os.PathLike[str] | Mirror | None = None,
        disk: Disk | None = None,
    ) -> None:
        path = require_path(directory, "CheckpointManager:", "give a local folder, and the URL as mirror=")
        self.directory = path.absolute()  # a later chdir must not change it
        self._rules = Retention(keep_last, keep_best, keep_every, metric, metric_mode)
        self._state = ManagerState(self.directory, disk or Disk())  # takes no lock: readers need none
        self._retainer = Retainer(self._state, self._rules)
        self._record_host = record_host
        self._writer = Writer(self._state, self._retainer, record_host=record_host)
        self._reader = Reader(self._state, self._rules)
        self._mirror = mirror
        if mirror is not None:
            settings = mirror if isinstance(mirror, Mirror) else Mirror(mirror)
            self._state.mirror = MirrorWriter(settings, self._rules, self._state, record_host=record_host)

    def acquire(self) -> None:
        """Take the directory's lock, and remove the temporary files of dead writers.

        Begins to watch whether another writer of the mirror is alive; the first save waits for the result.

        Raises:
            CheckpointDirectoryLocked: if another writer has the lock.
            SaveFailed: if the directory cannot be created or written to.
            RemoteError: if no credentials of the mirror are found.
        """
        with self._state.mutex:
            self._state.acquire()

    def begin(self, base: int | None = None, *, on_wait: Callable[[], None] = lambda: None) -> None:
        """Take the right to write to the mirror, as the first save does. Later calls make no request.

        Args:
            base: the step to go on from; what is there beyond it no longer counts. Default: the one that was
                loaded last, else the newest one there.
            on_wait: called every half second while another writer is watched; what it raises ends that.

        Raises:
            CheckpointDirectoryLocked: if another writer is alive; TakenOver if one has taken over.
            RemoteError, ConfigError: if the store fails, or cannot be a mirror.
        """
        with self._state.mutex, WarningCollector():
            self._state.begin(base, on_wait)

    @property
    def mirrored(self) -> int | None:
        """The newest step that is in the mirror; None if there is none, or before the first save."""
        return self._state.mirror.mirrored if self._state.mirror is not None else None

    def wait_mirrored(self) -> None:
        """Wait until all is in the mirror, for at most its timeout; warn of the rest. Raises as close()."""
        with self._state.mutex:
            self._state.background.wait()
            if self._state.mirror is not None:
                self._state.mirror.finish()

    def fetch_newest(self) -> Path | None:
        """Download the newest checkpoint of the mirror, unless an intact one here is as new.

        Takes the lock. Returns the path of the download, or None. Raises as :meth:`acquire`; RemoteError if
        the store fails, NoIntactCheckpoint if all there are damaged.
        """
        with self._state.mutex, WarningCollector():
            return self._state.mirror.fetch_newest() if self._state.mirror is not None else None

    def share(self, peers: Peers) -> None:
        """Write every later checkpoint together with the other ranks of a run, each a part of the file.

        Each rank saves the same checkpoints, in the same order, with a manager of the one directory. Divided
        arrays are a :class:`~distrust.checkpoint.arrays.Shard`. Only the leader locks, commits and cleans up.
        """
        with self._state.mutex:
            self._writer.share(peers)

    def save(self, checkpoint: Checkpoint, *, final: bool = False) -> Path:
        """Write a checkpoint and return its path once it is durable; then clean up.

        Args:
            checkpoint: its arrays may change again after the call.
            final: write ``checkpoint-{step}-final.safetensors``, which cleanup never removes.

        Raises:
            SaveFailed: if it, or the background save before it, could not be written.
            UnsupportedState: for a value that would not load exactly as it was saved.
            CheckpointDirectoryLocked: if another writer has the lock.
        """
        with self._state.mutex, WarningCollector():
            return self._writer.save(checkpoint, final=final)

    def save_async(
        self, checkpoint: Checkpoint, *, final: bool = False, overlap: bool = False
    ) -> PendingSave:
        """Copy a checkpoint, and write it in the background.

        Returns when everything is copied: the arrays may change again. Arrays of jax and mlx are referenced,
        not copied, until they are written. At most one write is in progress: the next call waits for it. A
        state that exceeds a quarter of the free memory is saved before this returns, with a warning.

        Args:
            checkpoint: what to save.
            final: as for :meth:`save`.
            overlap: return while the arrays in ``model`` and ``optimizer`` are still being copied. Call
                :meth:`PendingSave.wait_copied` before they change.

        Raises:
            CheckpointError: as :meth:`save` does; a failure of this save is raised by the next call instead.
        """
        with self._state.mutex, WarningCollector():
            return self._writer.save_async(checkpoint, final=final, overlap=overlap)

    def snapshot(
        self, checkpoint: Checkpoint | Callable[[], Checkpoint], *, budget: float = 1.0, overlap: bool = False
    ) -> StepSnapshots:
        """Keep a checkpoint, or what makes it, in shared memory: if this process dies, it is not lost.

        Call it after each step: it skips what would take more than ``budget`` percent of the time. With
        ``overlap``, call ``wait_copied()`` of what it returns before model or optimizer change. Without room
        it warns once. Takes the lock, and raises, as :meth:`save` does.
        """
        with self._state.mutex, WarningCollector():
            return self._writer.snapshot(checkpoint, budget=budget, overlap=overlap)

    def rescue(self) -> Path | None:
        """Save a dead process's snapshot if it is newer than all checkpoints; raises as :meth:`save` does."""
        with self._state.mutex, WarningCollector():
            return self._writer.rescue()

    def reserve(self, nbytes: int, *, device: str | None = None) -> bool:
        """Allocate the memory for background saves, so that the first one is as fast as the next.

        ``nbytes`` is the total size of all arrays of a checkpoint; for tensors of torch on a ``device`` such
        as ``cuda:0`` the memory is page-locked. Returns False, and allocates nothing, if ``nbytes`` exceeds a
        quarter of the free memory.

        Raises:
            ConfigError: if ``nbytes`` is not a number of bytes, or torch cannot use the device.
            SaveFailed: if the background save before this failed and no call has raised that.
        """
        if type(nbytes) is not int or nbytes < 0:  # bool is an int, too
            raise ConfigError(f"reserve({nbytes!r}): give a whole number of bytes, 0 or more")
        page_lock = arrays.page_lock(device) if device is not None else None
        with self._state.mutex, WarningCollector():
            self._state.background.wait()  # a save may be using the buffer
            return self._state.snapshot.reserve(nbytes, page_lock)

    def list_checkpoints(self) -> list[int]:
        """The steps that have a checkpoint, in ascending order, final and foreign ones included."""
        return list(self.scan().by_step())

    def scan(self) -> Scan:
        """The intact checkpoints, the damaged files, and the checkpoints in foreign formats."""
        return self._state.scan()

    def load(
        self,
        checkpoint: int | str | os.PathLike[str],
        *,
        framework: arrays.Framework = "numpy",
        mmap: bool = False,
        verify: Verify = "full",
        device: str | None = None,
    ) -> Checkpoint:
        """Read and verify a checkpoint, in this library's format or a foreign one.

        The arrays share one block of memory, which is freed with the last of them; arrays of mlx have their
        own. A foreign checkpoint is always read and verified completely, without ``mmap``.

        Args:
            checkpoint: a step (if it has a periodic and a final one, the final one is read), or a path.
            framework: of the arrays: ``numpy``, ``torch``, ``jax`` or ``mlx``.
            mmap: give views of the file instead of reading it (copies, where jax or mlx accept no view).
                Pages are read on first access, and writes to the arrays stay in memory. If the disk fails
                later, or the file is truncated, the system kills the program; replacing or removing the file
                does no harm.
            verify: ``lazy``, with ``mmap``, verifies each tensor when it is first taken out of its section,
                and raises CorruptCheckpoint there.
            device: of the tensors of torch in ``model`` and ``optimizer``, such as ``cuda:0``. They are read
                through a few page-locked blocks, and are never in host memory as a whole.

        Raises:
            CheckpointNotFound: listing the steps that exist.
            CorruptCheckpoint: if any byte differs from what was written.
            CheckpointUnreadable: if this process cannot read it: permissions, memory.
            ConfigError: if the framework, or a dtype or device of it, is not available; for ``lazy`` without
                ``mmap``; for ``device`` with ``mmap``, or for a foreign checkpoint.
        """
        with WarningCollector():  # no mutex: reading never waits for a save
            return self._reader.load(checkpoint, framework, verify=verify, mapped=mmap, device=device)[1]

    def load_latest(
        self, *, framework: arrays.Framework = "numpy", mmap: bool = False, device: str | None = None
    ) -> Checkpoint:
        """Read the newest checkpoint that verifies; warn of each newer one that does not.

        A foreign one without a model is skipped likewise. First comes :meth:`fetch_newest` with a mirror, and
        :meth:`rescue` with the lock. The arguments are those of :meth:`load`.

        Raises:
            CheckpointNotFound: if there are none at all.
            NoIntactCheckpoint: if there are some, and none of them is intact and has a model.
            UnsupportedVersion: if a later version of this program wrote the newest: resuming from an older
                one would lose what it did.
        """
        self.fetch_newest()
        if self._state.lock.is_held and not self._state.snapshots.has_any:  # a plain reader never writes
            self.rescue()
        with WarningCollector():
            return self._reader.load_first_intact(framework, mapped=mmap, device=device)[1]

    def load_best(self, *, framework: arrays.Framework = "numpy", mmap: bool = False) -> Checkpoint:
        """As :meth:`load_latest`, the checkpoint with the best metric.

        Raises:
            CheckpointError: as there; CheckpointNotFound if none has the metric.
        """
        with WarningCollector():
            return self._reader.load_first_intact(framework, best=True, mapped=mmap)[1]

    def choose(
        self, *, step: int | None = None, best: bool = False, framework: arrays.Framework = "numpy"
    ) -> tuple[CheckpointFile, Checkpoint]:
        """Read a ``step``, the ``best`` checkpoint or else the newest, and return its file with it.

        Raises:
            CheckpointError: as :meth:`load`, :meth:`load_best` and :meth:`load_latest`; if the file is in a
                foreign format.
            ConfigError: for both a step and the best one.
        """
        with WarningCollector():
            return self._reader.choose(step, framework, best=best)

    def inspect(self, checkpoint: int | str | os.PathLike[str]) -> CheckpointFile:
        """Read a header, of a foreign one without digests, and not the data. Raises as :meth:`load` does."""
        with WarningCollector():
            return self._reader.read(checkpoint, catalog.read_header)

    def validate(self, checkpoint: int | str | os.PathLike[str]) -> None:
        """Check every byte of a checkpoint, and that its name is right. Raises as :meth:`load` does."""
        with WarningCollector():
            self._reader.validate(checkpoint)

    def cleanup(self, *, keep_last: int | None = None) -> list[int]:
        """Remove what no rule keeps; return the removed steps, in ascending order.

        Args:
            keep_last: replaces the manager's own, for this call.

        Raises:
            CheckpointDirectoryLocked: if another writer has the lock.
            SaveFailed: if the directory cannot be written to, or is not the one that this process locked; if
                a background save failed and no call has raised that.
            CheckpointError: if a file cannot be removed.
        """
        # An invalid value raises before the lock is taken.
        rules = self._rules if keep_last is None else replace(self._rules, keep_last=keep_last)
        with self._state.mutex, WarningCollector():
            return self._retainer.clean_up(rules)

    def pin(self, step: int | None) -> None:
        """Keep a step whatever the rules say, until another one is pinned; None pins nothing.

        For a caller that chooses the best checkpoint by a rule of its own. Not recorded in the directory.
        """
        self._state.pinned = step

    def list_superseded(self) -> list[CheckpointFile]:
        """What :meth:`cleanup` would remove, by step. Needs no lock."""
        with self._state.mutex, WarningCollector():
            return self._retainer.select(self._rules)[1]

    def list_damaged(self) -> list[DamagedFile]:
        """What :meth:`remove_damaged` would remove, by step; warns as that does. Needs no lock.

        Raises:
            CheckpointError: if the directory cannot be read.
        """
        return collect_damaged(find_damaged(self.directory), None)

    def remove_damaged(self, report: Callable[[DamagedFile], None] | None = None) -> list[DamagedFile]:
        """Read every byte of every checkpoint; remove and return the damaged ones. Nothing else ever does.

        Files that may be worth something are left, each with a warning that says why: a file that this
        process cannot read, one of a later version or of another program, an intact checkpoint under a wrong
        name, a directory. Of a symbolic link only the link is removed.

        Args:
            report: called with each file once it is removed, as reading them all may take long.

        Raises:
            CheckpointError: as :meth:`cleanup` does; if the directory cannot be read.
        """
        with self._state.mutex:
            return collect_damaged(self._retainer.remove_damaged(), report)

    def close(self, *, wait: bool = True) -> None:
        """Wait for the save in progress, and for the uploads to the mirror; release the lock.

        Without ``wait``, a save in progress ends in the background, and a warning names what is not uploaded.

        Raises:
            SaveFailed: if a background save failed and no call has raised that; TakenOver if another writer
                has taken over the mirror.
        """
        with self._state.mutex:
            try:
                self._state.finish(wait=wait)  # raises the error of the last save
            finally:
                self._state.release_when_idle()  # also if the save failed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        # It raises a background error, which the block could not see. An interrupt means: do not wait.
        self.close(wait=kind is not KeyboardInterrupt)

    def __copy__(self) -> CheckpointManager:
        clone = object.__new__(type(self))
        clone.__dict__.update(self.__dict__)  # shares the state: two locks of one directory would conflict
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckpointManager:
        return type(self)(disk=self._state.disk, **copy.deepcopy(self.__getstate__(), memo))

    def __getstate__(self) -> dict[str, Any]:
        # No lock, threads or disk.
        return {
            "directory": str(self.directory),
            "record_host": self._record_host,
            "mirror": self._mirror,
            **asdict(self._rules),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # a new state: it has no lock
