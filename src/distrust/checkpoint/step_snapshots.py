"""The state after a step, in shared memory: what a process leaves behind that dies between two saves.

A snapshot is a checkpoint file, in one of two slots of a private folder in /dev/shm: it outlives the process,
not the machine. The slots take turns. A slot's header is made invalid before its data changes and is written
last, so a torn slot never verifies, and the other one has the snapshot before. Only the holder of the
directory's lock writes here, and rescues; a note says which lock that was.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

from blake3 import blake3

from distrust.checkpoint import arrays, catalog, parallel
from distrust.checkpoint.background import BackgroundWriter, PendingSave
from distrust.checkpoint.checkpoint_file import CheckpointFile
from distrust.checkpoint.files import open_regular, open_to_write
from distrust.checkpoint.format import LENGTH_BYTES
from distrust.checkpoint.lock import LOCK_NAME
from distrust.checkpoint.memory import Memory, PageLock, ReusableMemory, available_bytes, round_up
from distrust.checkpoint.serialization import FlatCheckpoint
from distrust.checkpoint.snapshot import BUDGET, CHANGED, OVERLAPPED, PendingCopy, Snapshot
from distrust.errors import CheckpointError, DistrustWarning, SaveFailed, defer_warning

#: Replaces /dev/shm; if it is empty, no snapshots are kept.
FOLDER_VARIABLE = "DISTRUST_SHM"
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - of Linux; each run has a private folder there
_SLOTS, _NOTE, _NEW_NOTE = ("0.safetensors", "1.safetensors"), "run.txt", "run.new"
_FILES = (*_SLOTS, _NOTE, _NEW_NOTE)
_STALLS = 5  # the median of so many is what a snapshot costs
_CAPACITY_BYTES = 2 << 20  # the unit of a slot's address space


def seconds_between(*, stall: float, background: float, idle: float, cores: int, budget: float) -> float:
    """Return the least time from one snapshot to the next, in seconds.

    Args:
        stall: how long a snapshot stops its caller.
        background: CPU time that it takes beside the caller, at no cost if ``idle`` is more.
        idle: CPU time of all ``cores`` that this process did not use meanwhile.
        cores: of this process.
        budget: percent of the time that snapshots may cost.
    """
    return (stall + max(0.0, background - idle) / cores) / (budget / 100)


class Note(NamedTuple):
    """What is known of a folder of snapshots without reading them. Not trusted."""

    durable_step: int  # the newest one of the run when a snapshot was begun
    lock: str  # of the run: device and inode
    directory: str  # of its checkpoints


def folder_of(directory: Path) -> Path | None:
    """The folder of the snapshots of a directory of checkpoints. It may not exist; None without /dev/shm."""
    name = blake3(os.fsencode(os.path.realpath(directory))).hexdigest()[:32]
    return None if (prefix := _prefix()) is None else prefix.with_name(prefix.name + name)


def list_folders() -> list[Path]:
    """The folders of this user's snapshots, of all runs."""
    prefix = _prefix()
    return [] if prefix is None else sorted(prefix.parent.glob(f"{prefix.name}*"))


def _prefix() -> Path | None:
    base = os.environ.get(FOLDER_VARIABLE, _SHARED_MEMORY if os.path.isdir(_SHARED_MEMORY) else "")
    return Path(base).absolute() / f"distrust-{os.geteuid()}-" if base else None


def read_note(folder: Path) -> Note:
    """The note of a folder of snapshots."""
    with contextlib.suppress(OSError, ValueError, CheckpointError):
        with open_regular(folder / _NOTE) as (descriptor, _):
            text = os.pread(descriptor, 1 << 16, 0).decode(errors="replace")
        step, lock, directory = text.split("\n", 2)
        return Note(int(step), lock, directory.rstrip("\n"))
    return Note(0, "", "?")


def read_slots(folder: Path, read: Callable[[Path], CheckpointFile]) -> list[CheckpointFile]:
    """The snapshots that ``read`` accepts, the newest first; none of a folder that is not private."""
    files = []
    for path in (folder / name for name in _SLOTS):
        with contextlib.suppress(CheckpointError, OSError):  # torn, or none
            _require_private(folder, path)
            files.append(read(path))
    return sorted(files, key=lambda file: file.step, reverse=True)


def find_snapshot(directory: Path) -> CheckpointFile | None:
    """The newest snapshot that verifies, if it is newer than every intact checkpoint of its directory.

    None if it was taken with another lock file: then another directory had this path, here or in another
    container. None if checkpoints were removed that were durable: a snapshot must not bring them back.
    """
    folder = folder_of(directory)
    if folder is None or not folder.exists():
        return None
    note, names = read_note(folder), catalog.list_names(directory)
    if note.lock != _lock_of(directory) or note.durable_step > max((name.step for name in names), default=0):
        return None
    newest = max((file.step for file in catalog.scan(directory).files), default=0)
    return next((file for file in read_slots(folder, catalog.verify_content) if file.step > newest), None)


def _lock_of(directory: Path) -> str | None:
    with contextlib.suppress(OSError):
        status = os.lstat(directory / LOCK_NAME)
        return f"{status.st_dev}:{status.st_ino}"
    return None


def remove_snapshots(folder: Path) -> None:
    """Remove a folder of snapshots. What cannot be removed stays."""
    with contextlib.suppress(OSError):
        _require_private(folder)
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _require_private(*paths: Path) -> None:
    """Raise OSError unless all belong to this user alone, and none is a link."""
    for path in paths:
        status = os.lstat(path)
        is_plain = stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)
        if not is_plain or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise OSError(errno.EPERM, f"{path} is a link, or is not private to this user; remove it")


class StepSnapshots:
    """The snapshots of one directory. The caller holds the directory's lock and its manager's mutex."""

    def __init__(self, directory: Path) -> None:
        self.durable_step = 0  # the newest one of the directory
        self.total_stall = 0.0  # how long snapshots have stalled the caller, in seconds
        self.has_any = False  # whether the folder's are this process's
        self._directory, self._folder = directory, folder_of(directory)
        self._is_enabled = os.environ.get(FOLDER_VARIABLE) != ""
        self._slots: list[_Slot] = []  # the next one to write comes first
        self._noted_step: int | None = None
        self._background, self._block_buffer = BackgroundWriter(), ReusableMemory()
        self._pending: PendingSave | None = None
        # Of the last snapshot, in seconds: what it cost, and when it began.
        self._stall = self._background_cpu = self._begin = self._begin_cpu = 0.0
        self._stalls: deque[float] = deque(maxlen=_STALLS)
        self._budget = 0.0

    def disable(self, reason: str) -> None:
        """Take no snapshots from now on, with one notice."""
        if self._is_enabled:
            self._is_enabled = False
            text = f"{self._directory}: no step is kept in shared memory: {reason}"
            defer_warning(DistrustWarning(text))

    def _give_up(self, error: Exception) -> None:
        self.disable(getattr(error, "strerror", None) or str(error) or "no memory")
        has_any = self.has_any  # one that is newer than every checkpoint stays
        self.close()
        self.has_any = has_any

    def is_due(self, budget: float) -> bool:
        """Whether to take one now: the one before has ended, and its cost is within the budget (percent)."""
        self._budget = budget
        if self._folder is None:
            self.disable(f"this system has no {_SHARED_MEMORY}")
        if not self._is_enabled or self._pending is None:
            return self._is_enabled
        self.wait_copied()
        try:
            self._pending.wait(0)
            self._background.wait()  # it has ended: so that nothing refers to it
        except TimeoutError:
            return False
        except Exception as error:  # arrays changed while they were copied, no memory: the slot is torn
            self._give_up(error)
            return False
        elapsed, cores = time.perf_counter() - self._begin, parallel.cores()
        return elapsed >= seconds_between(
            stall=median(self._stalls) if self._stalls else 0.0,
            background=self._background_cpu,
            idle=elapsed * cores - (time.process_time() - self._begin_cpu),
            cores=cores,
            budget=budget,
        )

    def take(self, flatten: Callable[[], FlatCheckpoint], *, overlap: bool) -> None:
        """Copy a checkpoint into a slot; model and optimizer after the return, if they ``overlap``."""
        self._begin, self._begin_cpu = time.perf_counter(), time.process_time()
        if self._stall:
            self._stalls.append(self._stall)
        state, is_first = flatten(), not self._slots
        try:
            if is_first:
                assert self._folder is not None  # noqa: S101 - it is enabled
                self._open(self._folder, state.step)
            slot = self._slots[0]
            self._slots.reverse()
            if overlap and not is_first and arrays.are_in_host_memory([*state.arrays.values()]):
                pending = self._copy_later(slot, state)
            else:
                pending = self._start_copy(slot, state, OVERLAPPED if overlap else ())
        except (OSError, MemoryError) as error:
            self._give_up(error)
            return

        def write() -> None:
            pending.write(slot)
            self._background_cpu = time.thread_time()  # all of this thread's

        self._pending = self._background.start(slot.path, copy=lambda: pending.copy(slot.path), write=write)
        self._pending.add_done_callback(pending.drop)
        self._stall = time.perf_counter() - self._begin
        self.total_stall += self._stall
        if is_first:  # it also allocates, which says nothing about the next
            self._stall = 0.0

    def _start_copy(self, slot: _Slot, state: FlatCheckpoint, deferred: tuple[str, ...] = ()) -> PendingCopy:
        """Lay out a state and copy into the slot all but what is deferred; raises OSError or MemoryError."""
        prepared = state.lay_out()
        state.arrays.clear()  # they are freed once they are copied
        self._begin_slot(slot, prepared.layout.file_size)
        pending = Snapshot(slot, origin=prepared.layout.data_offset).start_copy(
            prepared, deferred=deferred, block_buffer=self._block_buffer
        )
        if pending is None:
            raise MemoryError("no memory for a copy")
        return pending

    def _copy_later(self, slot: _Slot, state: FlatCheckpoint) -> PendingCopy:
        """Copy now what may change at once; the thread that copies the other arrays lays them out, too."""
        changing = [label for label in state.arrays if not label.startswith(OVERLAPPED)]
        state.arrays.update((label, arrays.private_copy(state.arrays[label])) for label in changing)
        values = [*state.arrays.values()]
        versions, started = arrays.versions(values), list[PendingCopy]()

        def copy(path: Path) -> None:
            try:
                with parallel.alone():
                    started.append(self._start_copy(slot, state))
                if arrays.versions(values) != versions:
                    raise ValueError(CHANGED)
            except Exception as error:  # without its frames: they refer to the arrays, and it may live long
                raise SaveFailed(str(error) or "no memory", path=path) from error.with_traceback(None)
            finally:
                values.clear()
                state.arrays.clear()

        return PendingCopy(copy, lambda file: started[0].write(file), lambda: None)

    def wait_copied(self) -> None:
        """Wait until the arrays of the last snapshot may change and, within the budget, until it is complete.

        So a process that dies once the next step has ended still loses only that one.
        """
        if self._pending is not None:
            begin = time.perf_counter()
            self._pending.wait_copied()
            self.wait((begin - self._begin) * self._budget / 100)
            stall = time.perf_counter() - begin
            self._stall, self.total_stall = self._stall + stall, self.total_stall + stall

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the last snapshot is complete. If it fails, the next request gives a notice."""
        if self._pending is not None:
            with contextlib.suppress(Exception):
                self._pending.wait(timeout)

    def close(self) -> None:
        """Let go of the slots once no snapshot is in progress; remove them unless a step in them is newer."""
        self.wait()
        self._background.wait()  # so that nothing refers to its error
        for slot in self._slots:
            slot.close()
        self._slots, self._pending, self.has_any = [], None, False
        if self._folder is not None and not self._newest_above(self.durable_step):
            remove_snapshots(self._folder)

    def _newest_above(self, step: int) -> int:
        """The newest step in the slots if it is above ``step``, otherwise 0."""
        files = read_slots(self._folder, catalog.read_header) if self._folder is not None else []
        return max((file.step for file in files if file.step > step), default=0)

    def _begin_slot(self, slot: _Slot, size: int) -> None:
        """Make the slot of the older snapshot invalid, and of that size; raises OSError or MemoryError."""
        folder, other_slot = slot.path.parent, self._slots[0]
        if size > slot.touched_bytes:
            status = os.statvfs(folder)
            free = min(available_bytes(), status.f_bavail * status.f_frsize)
            if len(_SLOTS) * size > BUDGET * free:
                raise MemoryError(f"two copies of {size:,} bytes exceed a quarter of the free {free:,}")
            if not other_slot.touched_bytes:
                other_slot.begin(size)  # all memory at once
        slot.begin(size)
        if self._noted_step != (durable_step := self.durable_step):  # another thread may raise it
            text = f"{durable_step}\n{_lock_of(self._directory)}\n{self._directory}\n"
            (folder / _NEW_NOTE).write_bytes(os.fsencode(text))
            (folder / _NEW_NOTE).replace(folder / _NOTE)
            self._noted_step = durable_step

    def _open(self, folder: Path, step: int) -> None:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        _require_private(folder)
        if newest := self._newest_above(step):
            text = f"{self._directory}: step {newest} was in memory and was not rescued: it is dropped"
            defer_warning(DistrustWarning(text))
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)
        self._slots = [_Slot(folder / name) for name in _SLOTS]
        self._noted_step, self.has_any = None, True


class _Slot(ReusableMemory):
    """A file that is mapped into memory; written like a new checkpoint file, but in place."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._size = 0
        self._descriptor = open_to_write(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)

    def begin(self, size: int) -> None:
        """Make the slot invalid and give it a size, with memory for every page: else a write could kill."""
        if self._size:
            self._map[:LENGTH_BYTES] = bytes(LENGTH_BYTES)  # FIRST: from here on it has no header
        if size > self._size and hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(self._descriptor, self._size, size - self._size)
        if size > self.touched_bytes:  # the size of the mapping
            capacity = round_up(size + size // 4, _CAPACITY_BYTES)  # states grow with the history
            os.ftruncate(self._descriptor, capacity)
            self._memory = Memory(self._descriptor, capacity)
            self.touched_bytes = capacity  # last: an interrupt may come before
        os.ftruncate(self._descriptor, size)  # pages that no file has use no memory
        self._size = size

    def acquire(self, nbytes: int, page_lock: PageLock | None = None) -> Memory:  # noqa: ARG002
        """The mapped file. It is never page-locked."""
        return self._map

    def write(self, block: memoryview, offset: int) -> threading.Event:
        """Copy a block now; of the header, its length last."""
        if block.obj is not self._map:  # else it was copied there at once
            first, end = max(offset, LENGTH_BYTES), min(offset + len(block), self._size)
            self._map[first:end] = block[first - offset : end - offset]
        if offset == 0:
            self._map[:LENGTH_BYTES] = block[:LENGTH_BYTES]  # LAST: now the snapshot is complete
        written = threading.Event()
        written.set()
        return written

    def close(self) -> None:
        """Unmap the file, which stays."""
        self.release()
        os.close(self._descriptor)

    @property
    def _map(self) -> Memory:
        assert self._memory is not None  # noqa: S101 - since begin()
        return self._memory
