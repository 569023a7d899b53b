"""Failed saves, as found by the failing-disks campaign: messages, remaining files, and the lock."""

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

SAVES = {
    "blocking": lambda manager, checkpoint: manager.save(checkpoint),
    "background": lambda manager, checkpoint: manager.save_async(checkpoint).wait(),
}


@pytest.fixture(params=SAVES, ids=str)
def save(request):
    return SAVES[request.param]


def state(step: int) -> Checkpoint:
    return Checkpoint(step=step, model={"w": np.full(16, step, np.int64)})


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# The directory is not the one that was locked


def take_over(directory) -> CheckpointManager:
    manager = CheckpointManager(directory)
    manager.save(state(7))
    return manager


@pytest.mark.parametrize("how", ["removed", "renamed", "linked"])
def test_a_directory_that_another_writer_put_in_its_place_is_not_written_to(tmp_path, save, how):
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
        with take_over(directory) as second:
            for write in (lambda: save(manager, state(2)), manager.cleanup):
                with pytest.raises(
                    SaveFailed, match=r"run: cannot be written to: it is not .*another \.lock"
                ):
                    write()
            assert names(directory) == [".lock", "checkpoint-7.safetensors"]
            second.save(state(8))
        assert second.list_checkpoints() == [7, 8]


def test_a_directory_replaced_during_the_save_is_not_changed(tmp_path, save):
    directory = tmp_path / "run"
    writers = []

    class ReplacingDisk(Disk):
        """Replaces the directory just before the file is created, or renamed."""

        when = ""

        def create(self, path):
            self._replace("create")
            return super().create(path)

        def rename(self, source, target):
            self._replace("rename")
            super().rename(source, target)

        def _replace(self, call):
            if self.when == call:
                directory.rename(tmp_path / f"before {call}")
                writers.append(take_over(directory))

    disk = ReplacingDisk()
    for disk.when, message in (("create", "it is not the directory"), ("rename", "No such file")):
        with CheckpointManager(directory, disk=disk) as manager:
            with pytest.raises(SaveFailed, match=message):
                save(manager, state(2))
            assert names(directory) == [".lock", "checkpoint-7.safetensors"]
        writers.pop().close()


def test_a_cleanup_removes_nothing_in_a_replaced_directory(tmp_path, monkeypatch):
    """Replaced between a save and its cleanup."""
    directory = tmp_path / "run"
    original = Retainer.clean_up_after_save

    def replace_directory_first(retainer, *arguments):
        directory.rename(tmp_path / "away")
        for step in (1, 2, 3):
            second.save(state(step))
        return original(retainer, *arguments)

    with CheckpointManager(directory, keep_last=1) as manager:
        second = CheckpointManager(directory, keep_last=None)
        retainer = manager._retainer
        monkeypatch.setattr(retainer, "clean_up_after_save", replace_directory_first.__get__(retainer))
        monkeypatch.setattr(second._retainer, "clean_up_after_save", lambda *_: None)
        with pytest.warns(DistrustWarning, match="could not clean up: .*not the directory"):
            manager.save(state(9))
        assert second.list_checkpoints() == [1, 2, 3]
        second.close()


@pytest.mark.parametrize("missing", ["the directory", "the lock"])
def test_without_the_lock_nothing_is_saved_until_it_is_put_back(tmp_path, save, missing):
    directory = tmp_path / "run"
    path = directory if missing == "the directory" else directory / ".lock"
    with CheckpointManager(directory) as manager:
        manager.save(state(1))
        path.rename(tmp_path / "away")
        for _ in range(2):
            with pytest.raises(SaveFailed, match=r"cannot be written to: .*no \.lock exists there"):
                save(manager, state(2))
        assert not path.exists()
        (tmp_path / "away").rename(path)
        save(manager, state(2))
        assert names(directory) == [".lock", "checkpoint-1.safetensors", "checkpoint-2.safetensors"]
        with pytest.raises(CheckpointDirectoryLocked):
            CheckpointManager(directory).acquire()


def test_a_closed_manager_can_write_to_a_new_directory(tmp_path):
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


def test_a_directory_that_was_moved_and_linked_is_accepted(tmp_path, save):
    directory, away = tmp_path / "run", tmp_path / "away"
    with CheckpointManager(directory) as manager:
        manager.save(state(1))
        directory.rename(away)
        directory.symlink_to(away)
        save(manager, state(2))
        assert names(away) == [".lock", "checkpoint-1.safetensors", "checkpoint-2.safetensors"]


# The system runs out of a resource


def test_without_memory_for_the_blocks_a_save_fails_and_the_next_one_works(tmp_path, monkeypatch):
    def refuse(*_):
        raise MemoryError("no memory for 20,971,520 bytes: Cannot allocate memory")

    with CheckpointManager(tmp_path) as manager:
        manager.save(state(1))
        with monkeypatch.context() as patch:
            patch.setattr(stream_writer.ReusableMemory, "acquire", refuse)
            with pytest.raises(
                SaveFailed, match=r"checkpoint-2.*not saved: no memory for .*unchanged"
            ) as caught:
                manager.save(state(2))
            assert caught.value.path == tmp_path / "checkpoint-2.safetensors"
        manager.save(state(3))
        assert names(tmp_path) == [".lock", "checkpoint-1.safetensors", "checkpoint-3.safetensors"]


def test_a_save_that_cannot_start_is_reported_like_one_in_the_background(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with CheckpointManager(tmp_path) as manager:
        manager.acquire()
        with monkeypatch.context() as patch:
            patch.setattr(arrays, "is_array", refuse)
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
    """Once it is called, one more file can be opened, until the end of the test."""
    descriptors: list[int] = []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def begin() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                descriptors.append(os.open(os.devnull, os.O_RDONLY))
        os.close(descriptors.pop())

    yield begin
    for descriptor in descriptors:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_one_descriptor_is_enough(tmp_path, one_descriptor_left, write_path):
    manager = CheckpointManager(tmp_path)
    manager.save(state(1))
    manager.validate(1)
    one_descriptor_left()
    manager.save(state(2))
    assert manager.list_checkpoints() == [1, 2]
    manager.close()


# Rare disk failures


class FailsToClose(Disk):
    """Like a network file system that reports failed writes only at close."""

    fails = False

    def close(self, descriptor: int) -> None:
        super().close(descriptor)
        if self.fails:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def test_an_error_at_close_fails_the_save(tmp_path, save):
    disk = FailsToClose()
    with CheckpointManager(tmp_path, disk=disk) as manager:
        content = manager.save(state(1)).read_bytes()
        disk.fails = True
        with pytest.raises(SaveFailed, match=r"checkpoint-1.*not saved: Disk quota exceeded.*unchanged"):
            save(manager, Checkpoint(step=1, model={"w": np.zeros(3)}))
        assert (tmp_path / "checkpoint-1.safetensors").read_bytes() == content
        disk.fails = False
        save(manager, state(2))
        assert names(tmp_path) == [".lock", "checkpoint-1.safetensors", "checkpoint-2.safetensors"]


class FailsToRename(Disk):
    """Fails to rename and to remove, like one that was remounted read-only during a save."""

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


def test_the_next_successful_save_removes_what_a_failed_one_could_not(tmp_path, save):
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
