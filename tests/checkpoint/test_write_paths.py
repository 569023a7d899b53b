"""Whatever the way, the same bytes: blocking or behind, direct or buffered, whatever the system refuses."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from states import EDGE, State, random_items, state_of, states, zeros

from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import direct_io, parallel, stream_writer
from distrust.checkpoint.disk import Disk
from distrust.errors import SaveFailed

pytestmark = pytest.mark.usefixtures("no_thread_left")
on_both_paths = pytest.mark.usefixtures("write_path")

SAVES: dict[str, Callable[[CheckpointManager, Checkpoint], Path]] = {
    "blocking": lambda manager, checkpoint: manager.save(checkpoint),
    "behind": lambda manager, checkpoint: manager.save_async(checkpoint).wait(),
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
    """The data of a checkpoint that proves itself."""
    manager.validate(path)
    file = manager.inspect(path)
    return path.read_bytes()[file.bytes - sum(tensor.nbytes for tensor in file.tensors) :]


ONE = np.dtype(np.uint8)
PAGES = np.dtype(np.float64)


@on_both_paths
@settings(max_examples=30, deadline=None)
@given(states(), st.sampled_from([EDGE, 2 * EDGE]), st.booleans())
@example(state_of([]), EDGE, False)
@example(state_of([np.zeros(0), zeros(0, 3)]), EDGE, False)
@example(state_of([random_items(PAGES, 5 * EDGE // 8)]), EDGE, False)
@example(state_of([random_items(ONE, EDGE - 1), random_items(ONE, 1), random_items(ONE, 1)]), EDGE, False)
@example(state_of([random_items(ONE, 1)] * 3 + [random_items(ONE, 9 * EDGE)]), EDGE, True)
@example(state_of([random_items(PAGES, 512), np.zeros(0), zeros(1), np.zeros(0, "?")]), EDGE, True)
def test_every_way_to_save_writes_the_same_bytes(manager, state: State, block_bytes, on_all_cores):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_writer, "BLOCK_BYTES", block_bytes)
        patch.setattr(Disk, "sync", lambda *_: None)  # most of the time it would take
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
def test_blocks_of_their_real_size_hold_the_same_bytes(manager, save):
    count = 5 * stream_writer.BLOCK_BYTES // 8
    state = state_of([random_items(PAGES, count), zeros(count), random_items(ONE, 7)])

    assert data_of(manager, save(manager, state.checkpoint)) == state.data


@pytest.mark.usefixtures("direct_io", "small_blocks")
def test_writes_go_past_the_page_cache_where_the_file_system_lets_them(tmp_path, monkeypatch, save):
    state = state_of([random_items(PAGES, 10 * EDGE)])
    seen = []
    honest = os.pwrite

    def watched(descriptor, view, offset):
        written = honest(descriptor, view, offset)
        seen.append((direct_io.is_enabled(descriptor), written == len(view)))
        return written

    with CheckpointManager(tmp_path) as manager:
        manager.acquire()  # it writes, too
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", watched)
            path = save(manager, state.checkpoint)

    assert len(seen) == 81
    assert set(seen) == {(True, True)}
    assert data_of(manager, path) == state.data


def test_where_direct_io_is_refused_when_the_file_is_opened_it_is_written_all_the_same(
    tmp_path, monkeypatch, save
):
    state = state_of([random_items(PAGES, 3 * EDGE)])
    honest = os.open
    refused = []

    def refusing(path, flags, *more, **named):
        if flags & direct_io.FLAG and flags & os.O_CREAT:
            os.close(honest(path, flags & ~direct_io.FLAG, *more, **named))  # Linux refuses after making it
            refused.append(path)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return honest(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refusing)
    with CheckpointManager(tmp_path) as manager:
        path = save(manager, state.checkpoint)

    assert len(refused) == bool(direct_io.FLAG)
    assert data_of(manager, path) == state.data
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", path.name]


#: What the system makes of a write. Direct I/O may refuse any, and takes nothing that is no whole page.
ANSWERS = ["whole", "refused", "a page", "some bytes"]


class FickleSystem:
    """``os.pwrite`` that answers as it was told to, then honestly."""

    def __init__(self, answers: list[str]) -> None:
        self._answers = iter(answers)
        self._lock = threading.Lock()
        self._honest = os.pwrite

    def pwrite(self, descriptor: int, view: memoryview, offset: int) -> int:
        with self._lock:
            answer = next(self._answers, "whole")
        if answer == "refused" and direct_io.is_enabled(descriptor):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if answer == "a page":
            return self._honest(descriptor, view[:EDGE], offset)
        # As where the disk is full or a signal comes: less than was asked for, and no whole number of pages.
        written = self._honest(descriptor, view, offset)
        return min(written, 1000) if answer == "some bytes" else written


@on_both_paths
@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(ANSWERS), max_size=12), st.sampled_from(sorted(SAVES)))
@example(["refused"], "blocking")
@example(["whole", "whole", "refused"], "blocking")
@example(["some bytes", "some bytes", "whole", "some bytes"], "behind")
@example(["whole", "a page", "some bytes", "refused"], "behind")
def test_refused_and_short_writes_change_nothing_in_the_file(manager, answers, how):
    state = state_of([random_items(PAGES, 5 * EDGE // 4), random_items(ONE, 5)])
    manager.acquire()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_writer, "BLOCK_BYTES", 2 * EDGE)
        patch.setattr(os, "pwrite", FickleSystem(answers).pwrite)
        path = SAVES[how](manager, state.checkpoint)

    assert data_of(manager, path) == state.data


def failing(call: Callable, error: int, *, after: int = 0) -> Callable:
    """A call that fails every time, once it went well ``after`` times."""
    calls = itertools.count()

    def fail(*arguments, **named):
        if next(calls) < after:
            return call(*arguments, **named)
        raise OSError(error, os.strerror(error))

    return fail


FAILURES = {
    "no file can be made": (Disk, "create", errno.EROFS, 0),
    "a full disk, seen before": (Disk, "reserve", errno.ENOSPC, 0),
    "a full disk, seen at the first write": (os, "pwrite", errno.ENOSPC, 0),
    "a full disk, seen later": (os, "pwrite", errno.ENOSPC, 9),
    "a broken disk": (os, "pwrite", errno.EIO, 3),
    "a refusal that is none of direct I/O": (os, "pwrite", errno.EINVAL, 0),
    "the header cannot be written": (os, "pwrite", errno.EIO, 20),
    "the tail cannot be cut": (os, "ftruncate", errno.EIO, 0),
    "the sync fails": (Disk, "sync", errno.EIO, 0),
    "the rename fails": (os, "replace", errno.EACCES, 0),
}


@on_both_paths
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("how", ["blocking", "behind"])
@pytest.mark.parametrize("what", FAILURES)
def test_a_save_that_fails_leaves_what_stood_before_and_the_next_one_works(tmp_path, monkeypatch, what, how):
    state = state_of([random_items(PAGES, 20 * EDGE // 8)])
    module, name, error, after = FAILURES[what]
    with CheckpointManager(tmp_path) as manager:
        before = manager.save(Checkpoint(step=1)).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing(getattr(module, name), error, after=after))
            with pytest.raises(SaveFailed, match=r"checkpoint-1\.safetensors: not saved") as caught:
                SAVES[how](manager, state.checkpoint)

        assert os.strerror(error) in str(caught.value)
        assert caught.value.path == tmp_path / "checkpoint-1.safetensors"
        assert caught.value.needed > 20 * EDGE
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoint-1.safetensors"]
        assert caught.value.path.read_bytes() == before
        assert data_of(manager, SAVES[how](manager, state.checkpoint)) == state.data


def test_a_sync_that_failed_is_not_tried_again_on_the_same_file(tmp_path, monkeypatch):
    """The second one would report success, though the kernel may have dropped what it could not write."""
    synced = []
    honest = Disk.sync

    def sync(disk, descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        if len(synced) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        honest(disk, descriptor)

    with CheckpointManager(tmp_path) as manager:
        manager.acquire()
        monkeypatch.setattr(Disk, "sync", sync)
        with pytest.raises(SaveFailed):
            manager.save(Checkpoint(step=1))
        assert len(synced) == 1
        assert manager.list_checkpoints() == []


def test_where_only_the_directory_cannot_be_synced_the_file_stays_and_nothing_is_cleaned_up(
    tmp_path, monkeypatch
):
    with CheckpointManager(tmp_path, keep_last=1) as manager:
        manager.save(Checkpoint(step=1))
        monkeypatch.setattr(Disk, "sync_directory", failing(Disk.sync_directory, errno.EIO))
        with pytest.raises(SaveFailed, match="written and whole"):
            manager.save(Checkpoint(step=2))
        assert manager.list_checkpoints() == [1, 2]
        manager.validate(2)
