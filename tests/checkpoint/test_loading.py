"""Whatever the way to the data, the same arrays, and damage is found: cached or not, read or mapped."""

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
from states import EDGE, FRAMEWORKS, SECTIONS, State, content, random_items, state_of, states, zeros

from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import direct_io, memory, verified_read
from distrust.errors import CheckpointUnreadable, CorruptCheckpoint

pytestmark = pytest.mark.usefixtures("no_thread_left")

WAYS = ["cached", "past the cache", "mapped", "lazy"]
BYTES = np.dtype(np.uint8)
WORDS = np.dtype(np.float64)


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    with CheckpointManager(tmp_path_factory.mktemp("read")) as manager:
        yield manager


@pytest.fixture(params=["cached", "past the cache"])
def read_path(request, monkeypatch) -> str:
    """Both ways in which files are read into memory, in small blocks."""
    take(request.param, monkeypatch)
    return request.param


def take(way: str, patch: pytest.MonkeyPatch, *, fetch_bytes: int = EDGE) -> None:
    patch.setattr(verified_read, "_is_cold", lambda _, header: way == "past the cache" and header.tensors)
    patch.setattr(verified_read, "FETCH_BYTES", fetch_bytes)
    patch.setattr(verified_read, "PIECE_BYTES", EDGE)


def drop_from_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def is_cold(manager: CheckpointManager, path: Path) -> bool:
    with path.open("rb") as file:
        return verified_read._is_cold(file.fileno(), manager.inspect(path).header)


def load(manager: CheckpointManager, path: Path, way: str, framework: str = "numpy") -> Checkpoint:
    if way == "past the cache":
        drop_from_cache(path)
    with pytest.MonkeyPatch.context() as patch:
        take(way, patch)
        return manager.load(
            path,
            framework=framework,
            mmap=way in ("mapped", "lazy"),
            verify="lazy" if way == "lazy" else "full",
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


@settings(max_examples=30, deadline=None)
@given(states(), st.sampled_from(FRAMEWORKS))
@example(state_of([]), FRAMEWORKS[-1])
@example(state_of([np.zeros((0, 3)), np.zeros(0, ">i4"), zeros(0)]), FRAMEWORKS[-1])
@example(state_of([random_items(WORDS, EDGE)]), "numpy")
@example(state_of([random_items(BYTES, 1)] * 70), FRAMEWORKS[-1])
def test_every_way_gives_the_same_arrays(manager, state: State, framework):
    path = manager.save(state.checkpoint)
    given = dict(arrays_of(state.checkpoint))

    for way in WAYS:
        loaded = dict(arrays_of(load(manager, path, way, framework)))
        assert loaded.keys() == given.keys()
        for label, array in loaded.items():
            assert content(array) == state.contents[label], (way, label)
            assert tuple(array.shape) == tuple(given[label].shape)


@pytest.mark.parametrize("way", ["cached", "past the cache"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_array_begins_on_a_cache_line(manager, way, framework):
    """Where one begins decides how some libraries add up, and so the last bits of what is computed."""
    sizes = [0, 1, 7, 63, 64, 65, 4095, 4097, 3, 128]
    path = manager.save(state_of([random_items(BYTES, size) for size in sizes]).checkpoint)

    for label, array in arrays_of(load(manager, path, way, framework)):
        address = array.data_ptr() if framework == "torch" else array.ctypes.data
        assert address % 64 == 0, label


@pytest.mark.usefixtures("direct_io")
def test_a_file_that_is_not_cached_is_read_past_the_cache_and_stays_out_of_it(tmp_path, monkeypatch):
    """A checkpoint of the size of the memory would drive out everything else."""
    if sys.platform != "linux":
        pytest.skip("only there the system is asked what it has cached")
    state = state_of([random_items(WORDS, 3 * verified_read.FETCH_BYTES // 8)])
    seen = []
    honest = os.preadv

    def watched(descriptor, buffers, offset):
        seen.append(direct_io.is_enabled(descriptor))
        return honest(descriptor, buffers, offset)

    with CheckpointManager(tmp_path) as manager:
        path = manager.save(state.checkpoint)
        drop_from_cache(path)
        if not is_cold(manager, path):
            pytest.skip("this file system holds everything in memory")
        monkeypatch.setattr(os, "preadv", watched)
        for _ in range(2):
            loaded = dict(arrays_of(manager.load(path)))
            assert content(loaded["model.000"]) == state.data
        assert seen == [True] * 2 * 3

        path.read_bytes()
        seen.clear()
        manager.load(path)
        assert not any(seen)  # what is cached is read from there


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["whole", "refused", "a page", "some bytes"]), max_size=9))
@example(["refused"])
@example(["whole", "some bytes", "refused"])
def test_refused_and_short_reads_change_nothing(manager, answers):
    state = state_of([random_items(WORDS, EDGE), random_items(BYTES, 5)])
    path = manager.save(state.checkpoint)
    honest, lock, left = os.preadv, threading.Lock(), iter(answers)

    def fickle(descriptor, buffers, offset):
        with lock:
            answer = next(left, "whole")
        if answer == "refused" and direct_io.is_enabled(descriptor):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if answer == "a page":
            return honest(descriptor, [buffers[0][:EDGE]], offset)
        count = honest(descriptor, buffers, offset)
        return min(count, 1000) if answer == "some bytes" else count

    for way in ("cached", "past the cache"):
        with pytest.MonkeyPatch.context() as patch:
            take(way, patch, fetch_bytes=2 * EDGE)
            patch.setattr(os, "preadv", fickle)
            loaded = manager.load(path)
        assert {label: content(array) for label, array in arrays_of(loaded)} == state.contents


# Damage


@settings(max_examples=25, deadline=None)
@given(states(max_arrays=5).filter(lambda state: state.data), st.data())
def test_the_first_damaged_tensor_is_named_on_every_way(manager, state: State, data):
    path = manager.save(state.checkpoint)
    begin = path.stat().st_size - len(state.data)
    positions = data.draw(st.sets(st.integers(0, len(state.data) - 1), min_size=1, max_size=4))
    for position in positions:
        flip(path, begin + position)
    damaged = [tensor.name for tensor in tensors_at(manager, path, {begin + place for place in positions})]

    for way in ("cached", "past the cache", "mapped"):
        with pytest.raises(CorruptCheckpoint, match="is damaged") as caught:
            load(manager, path, way)
        assert (caught.value.tensor, caught.value.path) == (damaged[0], path)
        assert damaged[0] in str(caught.value)
    with pytest.raises(CorruptCheckpoint) as caught:
        manager.validate(path)
    assert caught.value.tensor == damaged[0]

    lazy = load(manager, path, "lazy")
    for label, whole in state.contents.items():
        section, name = label.split(".")
        if label in damaged:
            for _ in range(2):  # whoever asks again is told again
                with pytest.raises(CorruptCheckpoint) as caught:
                    getattr(lazy, section)[name]
                assert (caught.value.tensor, caught.value.path) == (label, path)
        else:
            assert content(getattr(lazy, section)[name]) == whole


def tensors_at(manager: CheckpointManager, path: Path, positions: set[int]) -> list[Any]:
    return [
        tensor
        for tensor in manager.inspect(path).tensors
        if any(tensor.offset <= position < tensor.offset + tensor.nbytes for position in positions)
    ]


LARGE = state_of([random_items(WORDS, EDGE) for _ in range(8)])
LARGE_BYTES = len(LARGE.data)


@pytest.fixture
def file(tmp_path) -> tuple[CheckpointManager, Path]:
    manager = CheckpointManager(tmp_path)
    path = manager.save(LARGE.checkpoint)
    manager.close()
    return manager, path


def on_read(patch: pytest.MonkeyPatch, number: int, then: Callable[[], None]) -> None:
    """Do something before the read of that number, counted from 1, and before each later one."""
    honest, lock, count = os.preadv, threading.Lock(), iter(range(1, 1_000_000))

    def preadv(*arguments):
        with lock:
            if next(count) >= number:
                then()
        return honest(*arguments)

    patch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("left", [0.0, 0.3, 0.3001, 1.0])
@pytest.mark.parametrize("number", [1, 3, 9])
def test_a_file_that_is_cut_while_it_is_read_is_damaged(file, monkeypatch, read_path, number, left):
    manager, path = file
    size = path.stat().st_size - LARGE_BYTES + int(left * (LARGE_BYTES - 1))
    on_read(monkeypatch, number, lambda: os.truncate(path, size))

    with pytest.raises(CorruptCheckpoint, match=r"cut while it was read|is damaged") as caught:
        manager.load(path)
    assert caught.value.path == path


@pytest.mark.parametrize("number", [1, 2, 9, 40])
def test_a_read_error_is_an_error_of_the_library(file, monkeypatch, read_path, number):
    manager, path = file

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    on_read(monkeypatch, number, fail)
    with pytest.raises(CorruptCheckpoint, match="cannot be read: Input/output error") as caught:
        manager.load(path)
    assert caught.value.path == path
    monkeypatch.undo()
    assert manager.load(path).step == 1


@pytest.mark.parametrize("error", [errno.ENOMEM, errno.EACCES])
def test_a_failure_that_is_not_the_files_fault_is_no_damage(file, monkeypatch, read_path, error):
    manager, path = file

    def fail() -> None:
        raise OSError(error, os.strerror(error))

    on_read(monkeypatch, 2, fail)
    with pytest.raises(CheckpointUnreadable) as caught:
        manager.load(path)
    assert caught.value.path == path


def test_where_the_whole_finds_no_memory_the_file_is_not_damaged(file, monkeypatch, read_path):
    manager, path = file
    monkeypatch.setattr(verified_read, "allocate", refuse_above(LARGE_BYTES // 2))
    for load in (manager.load_latest, lambda: manager.load(path)):
        with pytest.raises(CheckpointUnreadable, match="memory") as caught:
            load()
        assert caught.value.path == path


def test_threads_that_find_no_memory_leave_nobody_waiting(file, monkeypatch):
    manager, path = file
    take("past the cache", monkeypatch)
    honest = memory.allocate

    def refuse(nbytes: int):
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("no memory for it")
        return honest(nbytes)

    monkeypatch.setattr(verified_read, "allocate", refuse)
    with pytest.raises(CheckpointUnreadable, match="no memory for it"):
        manager.load(path)


@pytest.mark.parametrize("how", ["damaged", "unreadable"])
def test_a_load_that_failed_gives_its_memory_back_at_once(file, monkeypatch, read_path, how):
    """Whoever falls back to the checkpoint before needs it for that one."""
    manager, path = file
    taken = []
    honest = memory.allocate

    def allocate(nbytes: int):
        found = honest(nbytes)
        taken.append(weakref.ref(found))
        return found

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(verified_read, "allocate", allocate)
    if how == "damaged":
        flip(path, path.stat().st_size - 1)
    else:
        on_read(monkeypatch, 5, fail)
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(CorruptCheckpoint):
            manager.load(path)
        assert taken
        assert [reference() for reference in taken] == [None] * len(taken)
    finally:
        gc.enable()


def refuse_above(limit: int) -> Callable:
    honest = memory.allocate

    def allocate(nbytes: int):
        if nbytes > limit:
            raise MemoryError
        return honest(nbytes)

    return allocate


def test_a_file_that_is_cut_before_it_is_mapped_is_damaged(file, monkeypatch):
    manager, path = file
    honest = verified_read.map_file

    def cut_first(*arguments):
        os.truncate(path, path.stat().st_size - 1)
        return honest(*arguments)

    monkeypatch.setattr(verified_read, "map_file", cut_first)
    with pytest.raises(CorruptCheckpoint, match="cut while it was read"):
        manager.load(path, mmap=True)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_where_the_system_gives_few_threads_it_is_read_by_those(file, monkeypatch, read_path, number):
    manager, path = file
    honest, left = threading.Thread.start, iter(range(number))

    def start(thread: threading.Thread) -> None:
        if next(left, None) is None:
            raise RuntimeError("can't start new thread")
        honest(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    loaded = manager.load(path)
    assert {label: content(array) for label, array in arrays_of(loaded)} == LARGE.contents
