"""Saves that fail, found by the campaign of failing disks: what is said, what is left, and who may write."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil

import numpy as np
import pytest

from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import arrays, stream_writer
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.retainer import Retainer
from distrust.errors import CheckpointDirectoryLocked, DistrustWarning, SaveFailed

WAYS = {
    "blocking": lambda manager, checkpoint: manager.save(checkpoint),
    "background": lambda manager, checkpoint: manager.save_async(checkpoint).wait(),
}


@pytest.fixture(params=WAYS, ids=str)
def save(request):
    return WAYS[request.param]


def state(step: int) -> Checkpoint:
    return Checkpoint(step=step, model={"w": np.full(16, step, np.int64)})


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# A directory that is not the one that was locked


def take_over(directory) -> CheckpointManager:
    other = CheckpointManager(directory)
    other.save(state(7))
    return other


@pytest.mark.parametrize("how", ["removed", "renamed", "linked"])
def test_a_directory_that_another_writer_made_in_place_of_ours_is_not_written_to(tmp_path, save, how):
    directory, away = tmp_path / "run", tmp_path / "away"
    with CheckpointManager(directory) as manager:
        manager.save(state(1))
        if how == "removed":
            shutil.rmtree(directory)
        else:
            directory.rename(away)
        if how == "linked":
            (tmp_path / "another").mkdir()
            directory.symlink_to(tmp_path / "another")
        with take_over(directory) as other:
            for write in (lambda: save(manager, state(2)), manager.cleanup):
                with pytest.raises(
                    SaveFailed, match=r"run: cannot be written to: it is not .*another \.lock"
                ):
                    write()
            assert names(directory) == [".lock", "checkpoint-7.safetensors"]
            other.save(state(8))
        assert other.list_checkpoints() == [7, 8]


def test_a_directory_that_is_replaced_in_the_last_instant_is_left_as_it_is(tmp_path, save):
    directory = tmp_path / "run"
    others = []

    class Late(Disk):
        """Replaces the directory when the file is to be made, or renamed."""

        when = ""

        def create(self, path):
            self._replace("create")
            return super().create(path)

        def rename(self, source, target):
            self._replace("rename")
            super().rename(source, target)

        def _replace(self, now):
            if self.when == now:
                directory.rename(tmp_path / f"before {now}")
                others.append(take_over(directory))

    disk = Late()
    for disk.when, what in (("create", "it is not the directory"), ("rename", "No such file")):
        with CheckpointManager(directory, disk=disk) as manager:
            with pytest.raises(SaveFailed, match=what):
                save(manager, state(2))
            assert names(directory) == [".lock", "checkpoint-7.safetensors"]
        others.pop().close()


def test_a_clean_up_in_a_directory_that_was_replaced_removes_nothing(tmp_path, monkeypatch):
    """Replaced in the instant between a save and its clean-up."""
    directory = tmp_path / "run"
    honest = Retainer.clean_up_after_save

    def replaced_before(retainer, *arguments):
        directory.rename(tmp_path / "away")
        for step in (1, 2, 3):
            elsewhere.save(state(step))
        return honest(retainer, *arguments)

    with CheckpointManager(directory, keep_last=1) as manager:
        elsewhere = CheckpointManager(directory, keep_last=None)
        retainer = manager._retainer
        monkeypatch.setattr(retainer, "clean_up_after_save", replaced_before.__get__(retainer))
        monkeypatch.setattr(elsewhere._retainer, "clean_up_after_save", lambda *_: None)
        with pytest.warns(DistrustWarning, match="could not clean up: .*not the directory"):
            manager.save(state(9))
        assert elsewhere.list_checkpoints() == [1, 2, 3]
        elsewhere.close()


@pytest.mark.parametrize("what", ["the directory", "the lock"])
def test_without_the_lock_nothing_is_saved_until_it_is_put_back(tmp_path, save, what):
    directory = tmp_path / "run"
    path = directory if what == "the directory" else directory / ".lock"
    with CheckpointManager(directory) as manager:
        manager.save(state(1))
        path.rename(tmp_path / "away")
        for _ in range(2):
            with pytest.raises(SaveFailed, match=r"cannot be written to: .*no \.lock stands there"):
                save(manager, state(2))
        assert not path.exists()
        (tmp_path / "away").rename(path)
        save(manager, state(2))
        assert names(directory) == [".lock", "checkpoint-1.safetensors", "checkpoint-2.safetensors"]
        with pytest.raises(CheckpointDirectoryLocked):
            CheckpointManager(directory).acquire()


def test_after_close_a_manager_begins_again_in_what_is_there(tmp_path):
    directory = tmp_path / "run"
    manager = CheckpointManager(directory)
    manager.save(state(1))
    shutil.rmtree(directory)
    with pytest.raises(SaveFailed):
        manager.save(state(2))
    manager.close()
    with manager:
        manager.save(state(2))
        assert manager.list_checkpoints() == [2]


def test_a_directory_that_was_moved_and_linked_to_is_the_same(tmp_path, save):
    directory, away = tmp_path / "run", tmp_path / "away"
    with CheckpointManager(directory) as manager:
        manager.save(state(1))
        directory.rename(away)
        directory.symlink_to(away)
        save(manager, state(2))
        assert names(away) == [".lock", "checkpoint-1.safetensors", "checkpoint-2.safetensors"]


# What the system has no more of


def test_without_memory_for_the_blocks_a_save_fails_and_the_next_one_works(tmp_path, monkeypatch):
    def none(*_):
        raise MemoryError("no memory for 20,971,520 bytes: Cannot allocate memory")

    with CheckpointManager(tmp_path) as manager:
        manager.save(state(1))
        with monkeypatch.context() as patch:
            patch.setattr(stream_writer.ReusableMemory, "acquire", none)
            with pytest.raises(
                SaveFailed, match=r"checkpoint-2.*not saved: no memory for .*unchanged"
            ) as caught:
                manager.save(state(2))
            assert caught.value.path == tmp_path / "checkpoint-2.safetensors"
        manager.save(state(3))
        assert names(tmp_path) == [".lock", "checkpoint-1.safetensors", "checkpoint-3.safetensors"]


def test_a_save_that_cannot_even_begin_is_told_like_one_in_the_background(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with CheckpointManager(tmp_path) as manager:
        manager.acquire()
        with monkeypatch.context() as patch:
            patch.setattr(arrays, "is_array", none)
            pending = manager.save_async(state(1))
            assert pending.done
            pending.wait_copied()
            with pytest.raises(SaveFailed, match=r"checkpoint-1.*not saved: Too many open files"):
                pending.wait()
            with pytest.raises(SaveFailed, match=r"checkpoint-1.*not saved: Too many open files"):
                manager.save(state(1))
        manager.save(state(1))


@pytest.fixture
def one_descriptor_left():
    """As long as it is called, one file can be opened, and no more."""
    taken: list[int] = []
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def begin() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        os.close(taken.pop())

    yield begin
    for descriptor in taken:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_one_descriptor_is_enough(tmp_path, one_descriptor_left, write_path):
    manager = CheckpointManager(tmp_path)
    manager.save(state(1))
    manager.validate(1)
    one_descriptor_left()
    manager.save(state(2))
    assert manager.list_checkpoints() == [1, 2]
    manager.close()


# Disks that fail where few do


class FailsToClose(Disk):
    """As a network's file system, which tells only then of what it could not write."""

    fails = False

    def close(self, descriptor: int) -> None:
        super().close(descriptor)
        if self.fails:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def test_what_a_disk_tells_at_close_is_a_failed_save(tmp_path, save):
    disk = FailsToClose()
    with CheckpointManager(tmp_path, disk=disk) as manager:
        before = manager.save(state(1)).read_bytes()
        disk.fails = True
        with pytest.raises(SaveFailed, match=r"checkpoint-1.*not saved: Disk quota exceeded.*unchanged"):
            save(manager, Checkpoint(step=1, model={"w": np.zeros(3)}))
        assert (tmp_path / "checkpoint-1.safetensors").read_bytes() == before
        disk.fails = False
        save(manager, state(2))
        assert names(tmp_path) == [".lock", "checkpoint-1.safetensors", "checkpoint-2.safetensors"]


class FailsToRename(Disk):
    """And to remove: as one that was mounted again, read only, in the middle of a save."""

    fails = False

    def rename(self, source, target) -> None:
        self._fail()
        super().rename(source, target)

    def unlink(self, path) -> None:
        self._fail()
        super().unlink(path)

    def _fail(self) -> None:
        if self.fails:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_what_could_not_be_removed_goes_with_the_next_save_that_succeeds(tmp_path, save):
    disk = FailsToRename()
    with CheckpointManager(tmp_path, disk=disk) as manager:
        manager.save(state(1))
        disk.fails = True
        for _ in range(2):
            with pytest.raises(SaveFailed, match="Read-only file system"):
                save(manager, state(2))
        assert len(list(tmp_path.glob(".checkpoint-2*.tmp"))) == 2
        disk.fails = False
        save(manager, state(3))
        assert names(tmp_path) == [".lock", "checkpoint-1.safetensors", "checkpoint-3.safetensors"]
