"""Every way to read gives the same arrays and detects damage: cached or not, read or mapped."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from states import (
    EDGE,
    FRAMEWORKS,
    INSTALLED,
    SECTIONS,
    State,
    as_tensor,
    content,
    random_items,
    state_of,
    states,
)

from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import catalog, direct_io, memory, verified_read
from distrust.errors import CheckpointUnreadable, CorruptCheckpoint

pytestmark = pytest.mark.usefixtures("no_thread_left")

MODES = ["cached", "direct", "mapped", "lazy"]
UINT8 = np.dtype(np.uint8)
FLOAT64 = np.dtype(np.float64)


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    with CheckpointManager(tmp_path_factory.mktemp("read")) as manager:
        yield manager


@pytest.fixture(params=["cached", "direct"])
def read_path(request, monkeypatch) -> str:
    """Both ways to read files into memory, in small blocks."""
    use_mode(request.param, monkeypatch)
    return request.param


def use_mode(mode: str, patch: pytest.MonkeyPatch, *, fetch_bytes: int = EDGE) -> None:
    patch.setattr(verified_read, "is_cold", lambda _, header: mode == "direct" and header.tensors)
    patch.setattr(verified_read, "FETCH_BYTES", fetch_bytes)
    patch.setattr(verified_read, "PIECE_BYTES", EDGE)
    patch.setattr(verified_read, "LARGE_TENSOR_BYTES", 9 * EDGE)  # both kinds occur among the states
    patch.setattr(verified_read, "LARGE_PIECE_BYTES", 2 * EDGE)


def drop_from_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def is_cold(manager: CheckpointManager, path: Path) -> bool:
    with path.open("rb") as file:
        return verified_read.is_cold(file.fileno(), manager.inspect(path).header)


def load(manager: CheckpointManager, path: Path, mode: str, framework: str = "numpy") -> Checkpoint:
    if mode == "direct":
        drop_from_cache(path)
    with pytest.MonkeyPatch.context() as patch:
        use_mode(mode, patch)
        return manager.load(
            path,
            framework=framework,
            mmap=mode in ("mapped", "lazy"),
            verify="lazy" if mode == "lazy" else "full",
        )


def arrays_of(checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    for section in SECTIONS:
        for name, array in getattr(checkpoint, section).items():
            yield f"{section}.{name}", array


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


@settings(max_examples=30)
@given(states(), st.sampled_from(INSTALLED))
@example(state_of([]), INSTALLED[-1])
@example(state_of([np.zeros((0, 3)), np.zeros(0, ">i4"), as_tensor(np.zeros(0))]), INSTALLED[-1])
@example(state_of([random_items(FLOAT64, EDGE)]), "numpy")
@example(state_of([random_items(UINT8, 1)] * 70), INSTALLED[-1])
def test_every_mode_loads_the_same_arrays(manager, state: State, framework):
    path = manager.save(state.checkpoint)
    saved = dict(arrays_of(state.checkpoint))

    for mode in MODES:
        loaded = dict(arrays_of(load(manager, path, mode, framework)))
        assert loaded.keys() == saved.keys()
        for label, array in loaded.items():
            assert content(array) == state.contents[label], (mode, label)
            assert tuple(array.shape) == tuple(saved[label].shape)


@pytest.mark.parametrize("mode", ["cached", "direct"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_array_begins_on_a_cache_line(manager, mode, framework):
    """The alignment of an array decides how some libraries sum it, and so the last bits of results."""
    sizes = [0, 1, 7, 63, 64, 65, 4095, 4097, 3, 128]
    path = manager.save(state_of([random_items(UINT8, size) for size in sizes]).checkpoint)

    for label, array in arrays_of(load(manager, path, mode, framework)):
        address = array.data_ptr() if framework == "torch" else array.ctypes.data
        assert address % 64 == 0, label


@pytest.mark.usefixtures("direct_io")
def test_uncached_file_is_read_with_direct_io_and_stays_uncached(tmp_path, monkeypatch):
    """Otherwise a checkpoint as large as the memory would evict everything else from the page cache."""
    if sys.platform != "linux":
        pytest.skip("the page cache is probed only on Linux")
    state = state_of([random_items(FLOAT64, 3 * verified_read.FETCH_BYTES // 8)])
    reads = []
    original = os.preadv

    def record(descriptor, buffers, offset):
        reads.append(direct_io.is_enabled(descriptor))
        return original(descriptor, buffers, offset)

    with CheckpointManager(tmp_path) as manager:
        path = manager.save(state.checkpoint)
        drop_from_cache(path)
        if not is_cold(manager, path):
            pytest.skip("this file system keeps everything in memory")
        monkeypatch.setattr(os, "preadv", record)
        for _ in range(2):
            loaded = dict(arrays_of(manager.load(path)))
            assert content(loaded["model.000"]) == state.data
        assert reads == [True] * 2 * 3

        path.read_bytes()
        reads.clear()
        manager.load(path)
        assert not any(reads)  # a cached file is read from the cache


@settings(max_examples=20)
@given(st.lists(st.sampled_from(["complete", "rejected", "a page", "some bytes"]), max_size=9))
@example(["rejected"])
@example(["complete", "some bytes", "rejected"])
def test_rejected_and_short_reads_do_not_change_the_result(manager, results):
    state = state_of([random_items(FLOAT64, EDGE), random_items(UINT8, 5)])
    path = manager.save(state.checkpoint)
    original, lock, remaining = os.preadv, threading.Lock(), iter(results)

    def unreliable_preadv(descriptor, buffers, offset):
        with lock:
            result = next(remaining, "complete")
        if result == "rejected" and direct_io.is_enabled(descriptor):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if result == "a page":
            return original(descriptor, [buffers[0][:EDGE]], offset)
        count = original(descriptor, buffers, offset)
        return min(count, 1000) if result == "some bytes" else count

    for mode in ("cached", "direct"):
        with pytest.MonkeyPatch.context() as patch:
            use_mode(mode, patch, fetch_bytes=2 * EDGE)
            patch.setattr(os, "preadv", unreliable_preadv)
            loaded = manager.load(path)
        assert {label: content(array) for label, array in arrays_of(loaded)} == state.contents


# Damage


@settings(max_examples=25)
@given(states(max_arrays=5).filter(lambda state: state.data), st.data())
def test_every_mode_names_the_first_damaged_tensor(manager, state: State, data):
    path = manager.save(state.checkpoint)
    begin = path.stat().st_size - len(state.data)
    positions = data.draw(st.sets(st.integers(0, len(state.data) - 1), min_size=1, max_size=4))
    for position in positions:
        flip(path, begin + position)
    damaged = [tensor.name for tensor in tensors_at(manager, path, {begin + index for index in positions})]

    for mode in ("cached", "direct", "mapped"):
        with pytest.raises(CorruptCheckpoint, match="is damaged") as caught:
            load(manager, path, mode)
        assert (caught.value.tensor, caught.value.path) == (damaged[0], path)
        assert damaged[0] in str(caught.value)
    with pytest.raises(CorruptCheckpoint) as caught:
        manager.validate(path)
    assert caught.value.tensor == damaged[0]

    lazy = load(manager, path, "lazy")
    for label, expected in state.contents.items():
        section, name = label.split(".")
        if label in damaged:
            for _ in range(2):  # the error must be raised on every access
                with pytest.raises(CorruptCheckpoint) as caught:
                    getattr(lazy, section)[name]
                assert (caught.value.tensor, caught.value.path) == (label, path)
        else:
            assert content(getattr(lazy, section)[name]) == expected


def test_damage_of_a_large_tensor_is_detected(tmp_path, monkeypatch):
    """All cores hash one piece of it together: embeddings, most of a full fine-tuning checkpoint."""
    monkeypatch.setattr(verified_read, "LARGE_TENSOR_BYTES", 64 << 10)
    monkeypatch.setattr(verified_read, "LARGE_PIECE_BYTES", 16 << 10)
    with CheckpointManager(tmp_path) as manager:
        path = manager.save(Checkpoint(step=1, model={"embedding": random_items(UINT8, (64 << 10) + 1)}))
        manager.validate(1)
        flip(path, path.stat().st_size - 1)
        lazy = manager.load(1, mmap=True, verify="lazy")
        for read in (
            lambda: manager.load(1),
            lambda: manager.load(1, mmap=True),
            lambda: manager.validate(1),
            lambda: lazy.model["embedding"],
        ):
            with pytest.raises(CorruptCheckpoint, match=r"model\.embedding is damaged"):
                read()


def tensors_at(manager: CheckpointManager, path: Path, positions: set[int]) -> list[Any]:
    return [
        tensor
        for tensor in manager.inspect(path).tensors
        if any(tensor.offset <= position < tensor.offset + tensor.nbytes for position in positions)
    ]


LARGE = state_of([random_items(FLOAT64, EDGE) for _ in range(8)])
LARGE_BYTES = len(LARGE.data)


@pytest.fixture
def file(tmp_path) -> tuple[CheckpointManager, Path]:
    manager = CheckpointManager(tmp_path)
    path = manager.save(LARGE.checkpoint)
    manager.close()
    return manager, path


def on_read(patch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
    """Call ``action`` before the read of that number, counted from 1, and before each later one."""
    original, lock, count = os.preadv, threading.Lock(), iter(range(1, 1_000_000))

    def preadv(*arguments):
        with lock:
            if next(count) >= number:
                action()
        return original(*arguments)

    patch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.3001, 1.0])
@pytest.mark.parametrize("number", [1, 3, 9])
def test_file_truncated_during_the_read_is_damaged(file, monkeypatch, read_path, number, share):
    manager, path = file
    size = path.stat().st_size - LARGE_BYTES + int(share * (LARGE_BYTES - 1))
    on_read(monkeypatch, number, lambda: os.truncate(path, size))

    with pytest.raises(CorruptCheckpoint, match=r"cut while it was read|is damaged") as caught:
        manager.load(path)
    assert caught.value.path == path


@pytest.mark.parametrize("number", [1, 2, 9, 40])
def test_read_error_becomes_a_checkpoint_error(file, monkeypatch, read_path, number):
    manager, path = file

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    on_read(monkeypatch, number, fail)
    with pytest.raises(CorruptCheckpoint, match="cannot be read: Input/output error") as caught:
        manager.load(path)
    assert caught.value.path == path
    monkeypatch.undo()
    assert manager.load(path).step == 1


#: The file may be intact: this process lacks permissions, descriptors, memory, or a device.
PROCESS_ERRORS = ["EACCES", "EPERM", "EMFILE", "ENFILE", "ENOMEM", "ENODEV"]


@pytest.mark.parametrize("is_listed", [False, True])
@pytest.mark.parametrize("error", PROCESS_ERRORS)
def test_load_latest_passes_over_no_file_that_this_process_cannot_open(
    tmp_path, monkeypatch, error, is_listed
):
    """Resuming from an older checkpoint would lose what the newest did."""
    monkeypatch.setattr(catalog, "STABLE_AFTER_NANOSECONDS", -(10**12))  # a listed file is not read again
    with CheckpointManager(tmp_path) as manager:
        manager.save(Checkpoint(step=1))
        newest = manager.save(Checkpoint(step=2))
    reader, original = CheckpointManager(tmp_path), os.open
    if is_listed:
        assert reader.list_checkpoints() == [1, 2]

    def refuse(path, *arguments, **options):
        if os.fspath(path) == str(newest):
            raise OSError(getattr(errno, error), os.strerror(getattr(errno, error)))
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointUnreadable, match="checkpoint-2") as caught:
        reader.load_latest()
    assert caught.value.path == newest


@pytest.mark.parametrize("error", [getattr(errno, name) for name in PROCESS_ERRORS])
def test_error_of_the_process_is_not_damage(file, monkeypatch, read_path, error):
    manager, path = file

    def fail() -> None:
        raise OSError(error, os.strerror(error))

    on_read(monkeypatch, 2, fail)
    with pytest.raises(CheckpointUnreadable) as caught:
        manager.load(path)
    assert caught.value.path == path


def test_lack_of_memory_is_not_damage(file, monkeypatch, read_path):
    manager, path = file
    monkeypatch.setattr(verified_read, "allocate", refuse_above(LARGE_BYTES // 2))
    for load in (manager.load_latest, lambda: manager.load(path)):
        with pytest.raises(CheckpointUnreadable, match="memory") as caught:
            load()
        assert caught.value.path == path


def test_lack_of_memory_in_a_thread_does_not_hang(file, monkeypatch):
    manager, path = file
    use_mode("direct", monkeypatch)
    original = memory.allocate

    def refuse(nbytes: int):
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("no memory for it")
        return original(nbytes)

    monkeypatch.setattr(verified_read, "allocate", refuse)
    with pytest.raises(CheckpointUnreadable, match="no memory for it"):
        manager.load(path)


@pytest.mark.parametrize("defect", ["damaged", "unreadable"])
def test_failed_load_releases_its_memory_at_once(file, monkeypatch, read_path, defect):
    """The fallback to the previous checkpoint needs that memory."""
    manager, path = file
    allocations = []
    original = memory.allocate

    def allocate(nbytes: int):
        block = original(nbytes)
        allocations.append(weakref.ref(block))
        return block

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(verified_read, "allocate", allocate)
    if defect == "damaged":
        flip(path, path.stat().st_size - 1)
    else:
        on_read(monkeypatch, 5, fail)
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(CorruptCheckpoint):
            manager.load(path)
        assert allocations
        assert [reference() for reference in allocations] == [None] * len(allocations)
    finally:
        gc.enable()


def refuse_above(limit: int) -> Callable:
    original = memory.allocate

    def allocate(nbytes: int):
        if nbytes > limit:
            raise MemoryError
        return original(nbytes)

    return allocate


def test_file_truncated_before_it_is_mapped_is_damaged(file, monkeypatch):
    manager, path = file
    original = verified_read.map_file

    def truncate_first(*arguments):
        os.truncate(path, path.stat().st_size - 1)
        return original(*arguments)

    monkeypatch.setattr(verified_read, "map_file", truncate_first)
    with pytest.raises(CorruptCheckpoint, match="cut while it was read"):
        manager.load(path, mmap=True)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_load_with_fewer_threads_than_requested(file, monkeypatch, read_path, number):
    manager, path = file
    original, permits = threading.Thread.start, iter(range(number))

    def start(thread: threading.Thread) -> None:
        if next(permits, None) is None:
            raise RuntimeError("can't start new thread")
        original(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    loaded = manager.load(path)
    assert {label: content(array) for label, array in arrays_of(loaded)} == LARGE.contents
