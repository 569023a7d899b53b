"""CheckpointManager: one directory of checkpoints, written by one process and read by any number."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from distrust.checkpoint import (
    arrays,
    catalog,
    damage,
    foreign,
    retention,
    serialization,
    storage,
    stream_writer,
)
from distrust.checkpoint.checkpoint import Checkpoint
from distrust.checkpoint.checkpoint_file import CheckpointFile, DamagedFile, Scan
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.files import checkpoint_file_name
from distrust.checkpoint.format import Kind
from distrust.checkpoint.manager_state import ManagerState
from distrust.checkpoint.retention import Candidate, MetricMode, Retention
from distrust.checkpoint.storage import AtomicFile
from distrust.checkpoint.writer import PendingSave
from distrust.errors import (
    CheckpointError,
    CheckpointNotFound,
    ConfigError,
    CorruptCheckpoint,
    DistrustWarning,
    NoIntactCheckpoint,
    SaveFailed,
    quote_untrusted,
    shorten,
)

if TYPE_CHECKING:
    from typing import Self

Verify = Literal["full", "lazy"]
Found = TypeVar("Found")

#: What changes only in the optimizer's step: its copy may run beside the next forward and backward pass.
_OVERLAPPED = ("model.", "optimizer.")


class CheckpointManager:
    """Saves, lists, loads and cleans up the checkpoints of one directory.

    Reading needs no lock. The first save takes the directory's lock; so does :meth:`acquire`. ``copy.copy``
    gives a manager of the same directory and writer; one that was pickled, deep-copied or forked is a reader
    until it takes the lock itself.

    Args:
        directory: made at the first save.
        keep_last: checkpoints to keep, newest first; None keeps all.
        keep_best: checkpoints to keep by ``metric``, besides.
        keep_every: keep each whose step is a multiple of it, besides.
        metric: a key of ``Checkpoint.metrics`` or of the numbers in ``Checkpoint.metadata``.
        metric_mode: ``min`` if lower is better, or ``max``.
        disk: what is written to, in place of the operating system's: one that fails, for tests of failures.
            Not pickled.

    Raises:
        ConfigError: for rules that make no sense.
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
        disk: Disk | None = None,
    ) -> None:
        self.directory = Path(directory).absolute()
        self._rules = Retention(keep_last, keep_best, keep_every, metric, metric_mode)
        self._session = ManagerState(self.directory, disk or Disk())

    def acquire(self) -> None:
        """Take the directory's lock, and sweep what dead writers left there.

        Raises:
            CheckpointDirectoryLocked: if another writer holds it.
            SaveFailed: if the directory cannot be made or written to.
        """
        with self._session.mutex:
            self._session.lock.acquire()

    def save(self, checkpoint: Checkpoint, *, final: bool = False) -> Path:
        """Write a checkpoint and return its path once it is durable; then clean up.

        Args:
            checkpoint: its arrays may be changed again after the call.
            final: write ``checkpoint-{step}-final.safetensors``, which is never cleaned up.

        Raises:
            SaveFailed: if it could not be written, or the background save before it could not.
            UnsupportedState: for a value that would not come back exactly.
            CheckpointDirectoryLocked: if another writer holds the directory.
        """
        with self._session.mutex:
            path, kind = self._begin(checkpoint, final=final)
            with _resource_errors(path):
                prepared = serialization.prepare(checkpoint, kind)
            self._commit(path, prepared.layout.file_size, prepared.step, self._write_streaming(prepared))
            return path

    def save_async(
        self, checkpoint: Checkpoint, *, final: bool = False, overlap: bool = False
    ) -> PendingSave:
        """Copy a checkpoint and write it in the background.

        Returns when everything is copied: the arrays may be changed again. Those of jax and mlx are held, not
        copied, until they are written; what the program makes of them meanwhile has memory of its own. At
        most one write is under way: the next call waits for it. A state that is larger than a quarter of
        the free memory is saved before this returns, with a warning.

        Args:
            checkpoint: what to save.
            final: write ``checkpoint-{step}-final.safetensors``, which is never cleaned up.
            overlap: return while the arrays in ``model`` and ``optimizer`` are still being copied. Call
                :meth:`PendingSave.wait_copied` before they change.

        Raises:
            SaveFailed: if the background save before this one failed and nobody has been told.
            UnsupportedState: for a value that would not come back exactly.
            CheckpointDirectoryLocked: if another writer holds the directory.
        """
        with self._session.mutex:
            path, kind = self._begin(checkpoint, final=final)
            session = self._session
            try:
                with _resource_errors(path):
                    prepared = serialization.prepare(checkpoint, kind)
                    capture = session.snapshot.start_copy(
                        prepared, deferred=_OVERLAPPED if overlap else (), block_buffer=session.ring
                    )
            except SaveFailed as error:
                return session.writer.record_failure(path, error)
            # The thread holds no more than it needs: the caller's arrays are to go when they are copied.
            size, step = prepared.layout.file_size, prepared.step
            if capture is None:
                pending = session.writer.run(
                    path, lambda: self._commit(path, size, step, self._write_streaming(prepared))
                )
                warnings.warn(
                    f"step {checkpoint.step}: no memory for its copy, which may take a quarter of the free "
                    "memory, so nothing went on until it was saved",
                    DistrustWarning,
                    stacklevel=2,
                )
                return pending
            return session.writer.start(
                path,
                copy=lambda: capture.copy(path),
                write=lambda: self._commit(path, size, step, capture.write),
            )

    def reserve(self, nbytes: int) -> bool:
        """Have memory ready for background saves, so that the first one is as quick as the next.

        Args:
            nbytes: of all arrays of a checkpoint together.

        Returns:
            Whether it is ready; not if it would take more than a quarter of the free memory.

        Raises:
            ConfigError: if ``nbytes`` is no number of bytes.
            SaveFailed: if the background save before this failed and nobody has been told.
        """
        if type(nbytes) is not int or nbytes < 0:
            raise ConfigError(f"reserve({nbytes!r}): give a whole number of bytes, 0 or more")
        with self._session.mutex:
            self._session.writer.wait()
            return self._session.snapshot.reserve(nbytes)

    def list_checkpoints(self) -> list[int]:
        """The steps that are there, finals and those in an older format included, in ascending order."""
        return list(self.scan().by_step())

    def scan(self) -> Scan:
        """The files that are there, those that are damaged, and those in an older format."""
        return catalog.scan(self.directory, self._session.listed)

    def load(
        self,
        checkpoint: int | str | os.PathLike[str],
        *,
        framework: arrays.Framework = "numpy",
        mmap: bool = False,
        verify: Verify = "full",
    ) -> Checkpoint:
        """Read and verify a checkpoint, in our format or an older one.

        One in an older format is always read and verified as a whole, whatever ``mmap`` and ``verify`` say.
        The arrays of one in ours lie
        side by side in one block of memory, which goes when the last of them has gone; those of mlx have
        memory of their own.

        Args:
            checkpoint: a step (where both stand, the final one is read), or a path.
            framework: of the arrays: ``numpy``, ``torch``, ``jax`` or ``mlx``.
            mmap: give views of the file instead of reading it (copies, where jax or mlx take no view): pages
                come when they are touched, and what is written to the arrays stays in memory. Should the
                disk fail then, or somebody cut the file, the system ends the program; a file that is
                replaced or removed does no harm.
            verify: ``lazy``, with ``mmap``, verifies each tensor when it is first taken out of its section
                instead of all of them now; what is damaged raises CorruptCheckpoint there.

        Raises:
            CheckpointNotFound: listing what there is.
            CorruptCheckpoint: if any byte of it is not what was written.
            CheckpointUnreadable: if this process cannot read it: permissions, memory.
            ConfigError: if the framework, or a dtype of it, is not at hand; for ``lazy`` without ``mmap``.
        """
        if verify not in get_args(Verify):
            raise ConfigError(f"verify={verify!r} is none of {', '.join(get_args(Verify))}")
        lazy = verify == "lazy"
        if lazy and not mmap:
            raise ConfigError('verify="lazy" goes with mmap=True: without it everything is read now')
        file, loaded = self._resolve(
            checkpoint, lambda path: _read(path, framework=framework, mapped=mmap, lazy=lazy)
        )
        if file.path.parent == self.directory and not lazy:
            self._mark_resumed(file)
        return loaded

    def load_latest(self, *, framework: arrays.Framework = "numpy", mmap: bool = False) -> Checkpoint:
        """Read the newest checkpoint that verifies, warning of each newer one that does not.

        One in an older format that holds no model is passed over in the same way.
        ``framework`` and ``mmap`` are those of :meth:`load`.

        Raises:
            CheckpointNotFound: if there are none at all.
            NoGoodCheckpoint: if there are some, and none of them is whole and holds a model.
            UnsupportedVersion: if a later version of this program wrote the newest: going on from an older
                one would lose what it did.
        """
        return self._first_good(self._newest_first, framework, mmap=mmap)[1]

    def load_best(self, *, framework: arrays.Framework = "numpy", mmap: bool = False) -> Checkpoint:
        """Read the checkpoint with the best metric that verifies, warning of each better one that does not.

        One in an older format that holds no model is passed over in the same way.
        ``framework`` and ``mmap`` are those of :meth:`load`.

        Raises:
            CheckpointNotFound: if none has the metric.
            NoGoodCheckpoint: if none of those that have it is whole and holds a model.
        """
        return self._first_good(self._best_first, framework, mmap=mmap)[1]

    def choose(
        self, *, step: int | None = None, best: bool = False, framework: arrays.Framework = "numpy"
    ) -> tuple[CheckpointFile, Checkpoint]:
        """Read the checkpoint that is asked for, and say which file it was.

        Args:
            step: this one, as :meth:`load` reads it.
            best: the best one, as :meth:`load_best` does; without either, as :meth:`load_latest`.
            framework: of the arrays.

        Raises:
            CheckpointError: as those do; if it is in an older format, which says nothing of a base model.
            ConfigError: for a step and the best one together.
        """
        if step is not None and best:
            raise ConfigError("a step and the best one were asked for: give one of them")
        if step is not None:
            file, loaded = self._resolve(step, lambda path: _read(path, framework=framework))
            self._mark_resumed(file)
        else:
            candidates = self._best_first if best else self._newest_first
            file, loaded = self._first_good(candidates, framework, mmap=False)
        foreign.require_converted(file)
        return file, loaded

    def inspect(self, checkpoint: int | str | os.PathLike[str]) -> CheckpointFile:
        """What a checkpoint's header says: step, kind, metadata, digests and tensors; of an older format, its
        metadata, without digests.

        Raises:
            CheckpointNotFound: listing what there is.
            CorruptCheckpoint: if the header is damaged.
        """
        return self._resolve(checkpoint, catalog.read_header)

    def validate(self, checkpoint: int | str | os.PathLike[str]) -> None:
        """Check every byte of a checkpoint, and that it is the one that its name says.

        Raises:
            CheckpointNotFound: listing what there is.
            CorruptCheckpoint: with what is wrong, and where.
        """
        file = self._resolve(checkpoint, catalog.verify)
        if (
            file.path.parent == self.directory and not file.is_foreign
        ):  # a copy elsewhere proves nothing of the one here
            self._session.good.add(_identity(file))

    def cleanup(self, *, keep_last: int | None = None) -> list[int]:
        """Remove what no rule keeps.

        Args:
            keep_last: in place of the manager's own, for this call.

        Returns:
            The steps removed, in ascending order.

        Raises:
            CheckpointDirectoryLocked: if another writer holds the directory.
            SaveFailed: if the directory cannot be written to, or is not the one any more that this process
                locked; if the background save before this failed and nobody has been told.
            CheckpointError: if one cannot be removed.
        """
        with self._session.mutex:
            self._session.writer.wait()
            self.acquire()
            storage.sync_names(self.directory, self._session.disk)
            rules = self._rules if keep_last is None else replace(self._rules, keep_last=keep_last)
            return self._clean_up(rules)

    def list_superseded(self) -> list[CheckpointFile]:
        """What :meth:`cleanup` would remove, by step. Needs no lock."""
        with self._session.mutex:
            return self._divide(self._rules)[1]

    def list_damaged(self) -> list[DamagedFile]:
        """What :meth:`remove_damaged` would remove, by step. Needs no lock, and warns as that does.

        Raises:
            CheckpointError: if the directory cannot be read.
        """
        return list(damage.find_damaged(self.directory))

    def remove_damaged(self, report: Callable[[DamagedFile], None] | None = None) -> list[DamagedFile]:
        """Read every byte of every checkpoint and remove those that are damaged: nothing else ever does.

        What may be worth something to somebody is left, with a warning for each that says why: a file that
        this process cannot read, one of a later version of the format or of another program, a whole
        checkpoint under another's name, a directory. Of a symbolic link only the link is removed.

        Args:
            report: told of each file once it is removed: to read them all may take long.

        Returns:
            The files removed, by step, each with what was wrong with it.

        Raises:
            CheckpointDirectoryLocked: if another writer holds the directory.
            SaveFailed: if the directory cannot be written to, or a background save failed and nobody has
                been told.
            CheckpointError: if the directory cannot be read, or a file of it cannot be removed.
        """
        with self._session.mutex:
            self._session.writer.wait()
            self.acquire()
            removed = []
            for file in damage.find_damaged(self.directory):
                self._session.lock.confirm()
                storage.remove([file.path], self._session.disk)
                removed.append(file)
                if report is not None:
                    report(file)
            return removed

    def close(self) -> None:
        """Wait for the save under way, and let go of the directory.

        Raises:
            SaveFailed: if a background save failed and nobody has been told.
        """
        with self._session.mutex:
            try:
                self._session.writer.wait()
            finally:
                self._session.release_when_idle()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is KeyboardInterrupt and not self._session.writer.idle:
            self._session.release_when_idle()  # whoever interrupts does not want to wait
        else:
            self.close()

    def __copy__(self) -> CheckpointManager:
        clone = object.__new__(type(self))
        clone.__dict__.update(self.__dict__)
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckpointManager:
        return type(self)(self.directory, disk=self._session.disk, **copy.deepcopy(asdict(self._rules), memo))

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": str(self.directory), **asdict(self._rules)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # a fresh one: it holds no lock

    def _begin(self, checkpoint: Checkpoint, *, final: bool) -> tuple[Path, Kind]:
        self._session.writer.wait()
        self._session.leaving = False
        self.acquire()
        kind: Kind = "final" if final else "periodic"
        path = self.directory / checkpoint_file_name(checkpoint.step, kind)
        if foreign.find_reader(path):
            raise SaveFailed(
                f"{path}: not saved: a checkpoint in an older format has this name, and is never replaced. "
                "Move it away, or save elsewhere",
                path=path,
            )
        return path, kind

    def _write_streaming(self, prepared: serialization.PreparedCheckpoint) -> Callable[[AtomicFile], str]:
        return lambda file: stream_writer.write_streaming(file, prepared, self._session.ring)

    def _commit(self, path: Path, size: int, step: int, write: Callable[[AtomicFile], str]) -> None:
        session = self._session
        session.lock.confirm()
        with _resource_errors(path), AtomicFile(path, size, session.disk) as file:
            digest = write(file)
            # Once more: replaced before the file was made, the directory is another's; replaced since, it
            # took the file with it, which then cannot be renamed.
            session.lock.confirm()
            file.commit()
        session.good.add((path.name, digest))
        if session.resumed_from is not None and step > session.resumed_from.step:
            session.resumed_from = None  # a newer one stands
        try:
            self._clean_up(self._rules, written=path)
        except CheckpointError as error:
            # The checkpoint is durable: failing to remove another one is no failure to save.
            warnings.warn(f"{self.directory}: could not clean up: {error}", DistrustWarning, stacklevel=3)

    def _clean_up(self, rules: Retention, *, written: Path | None = None) -> list[int]:
        """Remove what no rule keeps; ``written`` is the file of the save that this follows."""
        session = self._session
        session.lock.confirm()
        storage.remove_stale_files(
            self.directory, session.disk
        )  # what could not be removed when its save failed
        files, superseded = self._divide(rules, written=written)
        storage.remove([file.path for file in superseded], session.disk)
        remaining = {file.step for file in files if file not in superseded}
        return sorted({file.step for file in superseded} - remaining)

    def _divide(
        self, rules: Retention, *, written: Path | None = None
    ) -> tuple[list[CheckpointFile], list[CheckpointFile]]:
        """All that counts, and of that what no rule keeps.

        Only good checkpoints count towards a rule, and only good ones are superseded: those that this
        process did not write are verified before, once.
        """
        session = self._session
        resumed_from = session.resumed_from and _identity(session.resumed_from)
        while True:
            files = [file for file in self._scan_again() if _identity(file) not in session.damaged]
            by_step = Scan(tuple(files), ()).by_step()
            candidates = _candidates(by_step.values())
            kept = {by_step[step].path for step in retention.steps_to_keep(candidates, rules)}
            superseded = [
                file
                for file in files
                if file.path not in kept and file.path != written and _identity(file) != resumed_from
            ]
            # The final of a step has to be good before its periodic twin goes.
            relied_on = retention.steps_that_displace(candidates, rules) | {file.step for file in superseded}
            unknown = [
                file
                for file in [*(by_step[step] for step in relied_on), *superseded]
                if _identity(file) not in session.good
            ]
            if not unknown:
                return files, superseded
            for file in unknown:
                self._judge(file)

    def _scan_again(self) -> tuple[CheckpointFile, ...]:
        """The files that are there; what is known of others is forgotten: a long run writes many."""
        session = self._session
        known = session.good | session.damaged  # a save that ends meanwhile adds its own
        files = self.scan().files
        gone = known - {_identity(file) for file in files}
        session.good -= gone
        session.damaged -= gone
        return files

    def _judge(self, file: CheckpointFile) -> None:
        try:
            catalog.verify(file.path)
        except CheckpointNotFound:
            return
        except CorruptCheckpoint as error:
            self._session.damaged.add(_identity(file))
            warnings.warn(f"{error}; it counts for nothing and was left", DistrustWarning, stacklevel=6)
        else:
            self._session.good.add(_identity(file))

    def _newest_first(self) -> list[CheckpointFile | DamagedFile]:
        found = self.scan()
        everything: list[CheckpointFile | DamagedFile] = sorted(
            [*found.all_intact, *found.damaged], key=_newness, reverse=True
        )
        if not everything:
            raise CheckpointNotFound(f"{self.directory}: no checkpoints here", path=self.directory)
        return everything

    def _best_first(self) -> list[CheckpointFile]:
        files = self.scan().by_step()
        steps = retention.rank_by_metric(_candidates(files.values()), self._rules)
        if not steps:
            known = sorted({quote_untrusted(name) for file in files.values() for name in file.metrics})
            raise CheckpointNotFound(
                f"{self.directory}: no checkpoint has the metric {self._rules.metric!r}; "
                f"there are {shorten(', '.join(known)) or 'no metrics'} in steps {_format_steps(files)}",
                path=self.directory,
            )
        return [files[step] for step in steps]

    def _first_good(
        self,
        candidates: Callable[[], Sequence[CheckpointFile | DamagedFile]],
        framework: arrays.Framework,
        *,
        mmap: bool,
    ) -> tuple[CheckpointFile, Checkpoint]:
        while True:
            files = candidates()
            try:
                return self._first_good_of(files, framework, mmap=mmap)
            except CheckpointNotFound:
                continue  # a writer removed one between listing and reading it: a better one may stand

    def _first_good_of(
        self, files: Sequence[CheckpointFile | DamagedFile], framework: arrays.Framework, *, mmap: bool
    ) -> tuple[CheckpointFile, Checkpoint]:
        reasons, bare = [], []
        for file in files:
            try:
                if isinstance(file, DamagedFile):
                    raise file.error
                read, loaded = _read(file.path, framework=framework, mapped=mmap)
            except CorruptCheckpoint as error:
                reasons.append(str(error))
                if isinstance(file, CheckpointFile) and not file.is_foreign:
                    self._session.damaged.add(_identity(file))
                continue
            if read.is_foreign and not loaded.model:
                bare.append(read.path)
                continue
            told = [f"skipped a damaged checkpoint: {reason}" for reason in reasons]
            told += [f"skipped a checkpoint without a model, metadata alone: {path}" for path in bare]
            for line in told:
                warnings.warn(line, DistrustWarning, stacklevel=4)
            self._mark_resumed(read)
            return read, loaded
        if not reasons:
            raise NoIntactCheckpoint(
                f"{self.directory}: there are checkpoints, and none of them holds a model: they are metadata "
                "alone, which load(step) reads; there are "
                f"{_format_steps(sorted({file.step for file in files}))}",
                path=self.directory,
            )
        raise NoIntactCheckpoint(
            "\n".join(
                [
                    f"{self.directory}: there are checkpoints, and none of them is whole:",
                    *reasons,
                    *(f"{path}: holds no model" for path in bare),
                    "move them away to start over, or restore one from a copy",
                ]
            ),
            path=self.directory,
        )

    def _mark_resumed(self, file: CheckpointFile) -> None:
        if not file.is_foreign:  # no rule ever counts or removes one
            self._session.good.add(_identity(file))
            self._session.resumed_from = file

    def _resolve(self, checkpoint: int | str | os.PathLike[str], read: Callable[[Path], Found]) -> Found:
        """Read what a step or a path stands for."""
        while True:
            path = self._path_of(checkpoint)
            try:
                return read(path)
            except CheckpointNotFound:
                if not isinstance(checkpoint, int):
                    raise
                # A writer removed it between listing and reading: the final one of its step may stand.

    def _path_of(self, checkpoint: int | str | os.PathLike[str]) -> Path:
        if not isinstance(checkpoint, int):
            return Path(checkpoint).absolute()
        found = self.scan()
        file = found.by_step().get(checkpoint)
        if file is not None:
            for damaged in found.damaged:
                if damaged.step == checkpoint:
                    warnings.warn(f"{damaged.error}; {file.path} is read", DistrustWarning, stacklevel=4)
            return file.path
        for damaged in found.damaged:
            if damaged.step == checkpoint:
                raise damaged.error
        raise CheckpointNotFound(
            f"{self.directory}: no checkpoint of step {checkpoint}; "
            f"there are {_format_steps(found.by_step())}",
            path=self.directory,
        )


@contextlib.contextmanager
def _resource_errors(path: Path) -> Iterator[None]:
    """Without memory, or a descriptor to load a module with, a save fails as it does without room."""
    try:
        yield
    except (MemoryError, OSError) as error:
        what = (error.strerror if isinstance(error, OSError) else str(error)) or "no memory"
        raise SaveFailed(
            f"{path}: not saved: {what}. What stood there before is untouched", path=path
        ) from error


def _read(
    path: Path, *, framework: arrays.Framework, mapped: bool = False, lazy: bool = False
) -> tuple[CheckpointFile, Checkpoint]:
    """Read what is there, in our format or in an older one."""
    if reader := foreign.find_reader(path):
        header, loaded = reader.read(path, framework=framework)
        file = CheckpointFile(path, header)
        file.require_name()
        return file, loaded
    return serialization.load(path, framework=framework, mapped=mapped, lazy=lazy)


def _newness(file: CheckpointFile | DamagedFile) -> tuple[int, bool, bool]:
    ours = not (isinstance(file, CheckpointFile) and file.is_foreign)
    return file.step, ours, file.path.stem.endswith("-final")


def _identity(file: CheckpointFile) -> tuple[str, str]:
    return file.path.name, file.digest


def _candidates(files: Iterable[CheckpointFile]) -> list[Candidate]:
    return [Candidate(file.step, file.kind == "final", file.metrics, file.measured_on) for file in files]


def _format_steps(steps: Iterable[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
