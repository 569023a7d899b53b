"""Every way to save writes the same bytes: blocking or background, direct or buffered, with any I/O error."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from states import EDGE, State, as_tensor, random_items, state_of, states

from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import direct_io, parallel, stream_writer
from distrust.checkpoint.disk import Disk
from distrust.errors import SaveFailed

pytestmark = pytest.mark.usefixtures("no_thread_left")
on_both_paths = pytest.mark.usefixtures("write_path")

SAVES: dict[str, Callable[[CheckpointManager, Checkpoint], Path]] = {
    "blocking": lambda manager, checkpoint: manager.save(checkpoint),
    "background": lambda manager, checkpoint: manager.save_async(checkpoint).wait(),
    "overlapped": lambda manager, checkpoint: manager.save_async(checkpoint, overlap=True).wait(),
}


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    with CheckpointManager(tmp_path_factory.mktemp("written"), keep_last=None) as manager:
        yield manager


@pytest.fixture(params=SAVES)
def save(request) -> Callable[[CheckpointManager, Checkpoint], Path]:
    return SAVES[request.param]


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(stream_writer, "BLOCK_BYTES", EDGE)


def data_of(manager: CheckpointManager, path: Path) -> bytes:
    """Validate a checkpoint and return its data."""
    manager.validate(path)
    file = manager.inspect(path)
    return path.read_bytes()[file.bytes - sum(tensor.nbytes for tensor in file.tensors) :]


UINT8 = np.dtype(np.uint8)
FLOAT64 = np.dtype(np.float64)
#: With empty arrays, between others and at the end.
WITH_EMPTY = [random_items(FLOAT64, 512), np.zeros(0), as_tensor(np.zeros(1, np.float32)), np.zeros(0, "?")]


@settings(max_examples=30)
@given(states(), st.sampled_from([EDGE, 2 * EDGE]), st.booleans(), st.booleans())
@example(state_of([]), EDGE, False, False)
@example(state_of([np.zeros(0), as_tensor(np.zeros((0, 3)))]), EDGE, False, True)
@example(state_of([random_items(FLOAT64, 5 * EDGE // 8)]), EDGE, False, False)
@example(state_of([random_items(FLOAT64, 5 * EDGE // 8)]), EDGE, False, True)
@example(
    state_of([random_items(UINT8, EDGE - 1), random_items(UINT8, 1), random_items(UINT8, 1)]),
    EDGE,
    False,
    False,
)
@example(state_of([random_items(UINT8, 1)] * 3 + [random_items(UINT8, 9 * EDGE)]), EDGE, True, False)
@example(state_of([random_items(UINT8, 1)] * 3 + [random_items(UINT8, 9 * EDGE)]), EDGE, True, True)
@example(
    state_of([random_items(FLOAT64, 512), np.zeros(0), as_tensor(np.zeros(1, np.float32)), np.zeros(0, "?")]),
    EDGE,
    True,
    False,
)
def test_every_way_to_save_writes_the_same_bytes(
    manager, state: State, block_bytes, on_all_cores, is_buffered
):
    with pytest.MonkeyPatch.context() as patch:
        if is_buffered:
            patch.setattr(direct_io, "FLAG", 0)
        patch.setattr(stream_writer, "BLOCK_BYTES", block_bytes)
        patch.setattr(Disk, "sync", lambda *_: None)  # most of the running time
        if on_all_cores:
            patch.setattr(parallel, "worthwhile_threads", lambda nbytes: 3)
        paths = []
        for step, save in enumerate(SAVES.values()):
            path = save(manager, state.checkpoint)
            assert data_of(manager, path) == state.data
            paths.append(path.rename(path.with_name(f"{step}.safetensors")))

    digests = {manager.inspect(path).state_digest for path in paths}
    assert len(digests) == 1
    names = {tuple(tensor.name for tensor in manager.inspect(path).tensors) for path in paths}
    assert names == {tuple(state.contents)}


@on_both_paths
def test_blocks_of_the_default_size_write_the_same_bytes(manager, save):
    count = 5 * stream_writer.BLOCK_BYTES // 8
    state = state_of([random_items(FLOAT64, count), as_tensor(np.arange(count)), random_items(UINT8, 7)])

    assert data_of(manager, save(manager, state.checkpoint)) == state.data


@pytest.mark.usefixtures("direct_io", "small_blocks")
def test_writes_use_direct_io_where_the_file_system_allows_it(tmp_path, monkeypatch, save):
    state = state_of([random_items(FLOAT64, 10 * EDGE)])
    writes = []
    original = os.pwrite

    def record(descriptor, view, offset):
        written = original(descriptor, view, offset)
        writes.append((direct_io.is_enabled(descriptor), written == len(view)))
        return written

    with CheckpointManager(tmp_path) as manager:
        manager.acquire()  # writes to the lock file, which must not be counted
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", record)
            path = save(manager, state.checkpoint)

    assert len(writes) == 81
    assert set(writes) == {(True, True)}
    assert data_of(manager, path) == state.data


def test_save_succeeds_where_open_rejects_direct_io(tmp_path, monkeypatch, save):
    state = state_of([random_items(FLOAT64, 3 * EDGE)])
    original = os.open
    rejected = []

    def reject(path, flags, *arguments, **options):
        if flags & direct_io.FLAG and flags & os.O_CREAT:
            # Linux rejects the flag after it has created the file.
            os.close(original(path, flags & ~direct_io.FLAG, *arguments, **options))
            rejected.append(path)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return original(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", reject)
    with CheckpointManager(tmp_path) as manager:
        path = save(manager, state.checkpoint)

    assert len(rejected) == bool(direct_io.FLAG)
    assert data_of(manager, path) == state.data
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", path.name]


#: Results of a write. Direct I/O may reject any of them, and accepts only whole pages.
RESULTS = ["complete", "rejected", "a page", "some bytes"]


class UnreliableSystem:
    """``os.pwrite`` with the given results for its first calls."""

    def __init__(self, results: list[str]) -> None:
        self._results = iter(results)
        self._lock = threading.Lock()
        self._original = os.pwrite

    def pwrite(self, descriptor: int, view: memoryview, offset: int) -> int:
        with self._lock:
            result = next(self._results, "complete")
        if result == "rejected" and direct_io.is_enabled(descriptor):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if result == "a page":
            return self._original(descriptor, view[:EDGE], offset)
        # A short write that ends inside a page, as with a full disk or a signal.
        written = self._original(descriptor, view, offset)
        return min(written, 1000) if result == "some bytes" else written


@on_both_paths
@settings(max_examples=25)
@given(st.lists(st.sampled_from(RESULTS), max_size=12), st.sampled_from(sorted(SAVES)))
@example(["rejected"], "blocking")
@example(["complete", "complete", "rejected"], "blocking")
@example(["some bytes", "some bytes", "complete", "some bytes"], "background")
@example(["complete", "a page", "some bytes", "rejected"], "background")
def test_rejected_and_short_writes_do_not_change_the_file(manager, results, mode):
    state = state_of([random_items(FLOAT64, 5 * EDGE // 4), random_items(UINT8, 5)])
    manager.acquire()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_writer, "BLOCK_BYTES", 2 * EDGE)
        patch.setattr(os, "pwrite", UnreliableSystem(results).pwrite)
        path = SAVES[mode](manager, state.checkpoint)

    assert data_of(manager, path) == state.data


def failing(call: Callable, error: int, *, after: int = 0) -> Callable:
    """Return a call that succeeds ``after`` times and then always fails."""
    calls = itertools.count()

    def fail(*arguments, **options):
        if next(calls) < after:
            return call(*arguments, **options)
        raise OSError(error, os.strerror(error))

    return fail


FAILURES = {
    "the file cannot be created": (Disk, "create", errno.EROFS, 0),
    "a full disk, detected by the reservation": (Disk, "reserve", errno.ENOSPC, 0),
    "a full disk, detected by the first write": (os, "pwrite", errno.ENOSPC, 0),
    "a full disk, detected by a later write": (os, "pwrite", errno.ENOSPC, 9),
    "a broken disk": (os, "pwrite", errno.EIO, 3),
    "EINVAL that is not due to direct I/O": (os, "pwrite", errno.EINVAL, 0),
    "the header cannot be written": (os, "pwrite", errno.EIO, 20),
    "the truncation fails": (os, "ftruncate", errno.EIO, 0),
    "the sync fails": (Disk, "sync", errno.EIO, 0),
    "the rename fails": (os, "replace", errno.EACCES, 0),
}


@on_both_paths
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("mode", ["blocking", "background"])
@pytest.mark.parametrize("failure", FAILURES)
def test_failed_save_leaves_existing_files_unchanged_and_the_next_one_succeeds(
    tmp_path, monkeypatch, failure, mode
):
    state = state_of([random_items(FLOAT64, 20 * EDGE // 8)])
    module, name, error, fail_after = FAILURES[failure]
    with CheckpointManager(tmp_path) as manager:
        previous = manager.save(Checkpoint(step=1)).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing(getattr(module, name), error, after=fail_after))
            with pytest.raises(SaveFailed, match=r"checkpoint-1\.safetensors: not saved") as caught:
                SAVES[mode](manager, state.checkpoint)

        assert os.strerror(error) in str(caught.value)
        assert caught.value.path == tmp_path / "checkpoint-1.safetensors"
        assert caught.value.needed > 20 * EDGE
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoint-1.safetensors"]
        assert caught.value.path.read_bytes() == previous
        assert data_of(manager, SAVES[mode](manager, state.checkpoint)) == state.data


@pytest.fixture
def reserve(tmp_path, monkeypatch) -> Callable[..., None]:
    """``reserve(size, fallocate=code)`` reserves space on a system whose fallocate fails with this code."""
    if sys.platform != "linux":
        pytest.skip("fallocate exists only on Linux")

    def reserve(size: int, *, fallocate: int) -> None:
        def fail(*arguments: int) -> int:
            ctypes.set_errno(fallocate)
            return -1

        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **options: SimpleNamespace(fallocate=fail))
        with (tmp_path / "file").open("wb") as file:
            Disk().reserve(file.fileno(), size)

    return reserve


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_space_that_the_file_system_refuses_is_an_error(reserve, code):
    """Such as beyond a quota, although the file system has free space."""
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        reserve(1, fallocate=code)
    assert caught.value.errno == code


def test_without_fallocate_the_free_space_is_compared(reserve):
    for code in (errno.EOPNOTSUPP, errno.ENOSYS):
        reserve(1, fallocate=code)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            reserve(2**62, fallocate=code)


def test_failed_fsync_is_never_retried_on_the_same_file(tmp_path, monkeypatch):
    """A second fsync would report success, although the kernel may have dropped the unwritten pages."""
    synced = []
    original = Disk.sync

    def sync(disk, descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        if len(synced) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(disk, descriptor)

    with CheckpointManager(tmp_path) as manager:
        manager.acquire()
        monkeypatch.setattr(Disk, "sync", sync)
        with pytest.raises(SaveFailed):
            manager.save(Checkpoint(step=1))
        assert len(synced) == 1
        assert manager.list_checkpoints() == []


def test_failed_fsync_of_the_directory_keeps_the_file_and_skips_the_cleanup(tmp_path, monkeypatch):
    with CheckpointManager(tmp_path, keep_last=1) as manager:
        manager.save(Checkpoint(step=1))
        monkeypatch.setattr(Disk, "sync_directory", failing(Disk.sync_directory, errno.EIO))
        with pytest.raises(SaveFailed, match="written completely"):
            manager.save(Checkpoint(step=2))
        assert manager.list_checkpoints() == [1, 2]
        manager.validate(2)
