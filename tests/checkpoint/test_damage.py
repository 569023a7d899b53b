"""Which files are removed as damaged, and which are left to the user."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrust import Checkpoint, CheckpointManager, DistrustWarning
from distrust.checkpoint import CheckpointFile, DamagedFile, catalog
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.files import checkpoint_file_name
from distrust.checkpoint.format import header_digest
from distrust.errors import CheckpointDirectoryLocked, CheckpointError, CorruptCheckpoint, SaveFailed


@pytest.fixture
def manager(tmp_path):
    """With intact checkpoints of steps 10, 20 and 30."""
    with CheckpointManager(tmp_path, keep_last=None) as manager:
        for step in (10, 20, 30):
            manager.save(Checkpoint(step=step, model={"w": np.full(8, step, np.float32)}))
        yield manager


def path_of(manager: CheckpointManager, step: int) -> Path:
    return manager.directory / checkpoint_file_name(step, "periodic")


def damage(path: Path, at: int = -1) -> bytes:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    return bytes(raw)


def file_names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {".lock"}


def remove_damaged(manager: CheckpointManager) -> list[Path]:
    """Remove damaged files; checks that ``list_damaged`` listed exactly those."""
    names = file_names(manager.directory)
    listed = manager.list_damaged()
    assert file_names(manager.directory) == names
    removed = manager.remove_damaged()
    assert [(file.path, file.step, file.reason) for file in removed] == [
        (file.path, file.step, file.reason) for file in listed
    ]
    assert file_names(manager.directory) == names - {file.path.name for file in removed}
    return [file.path for file in removed]


def assert_left(manager: CheckpointManager, path: Path, reason: str) -> None:
    """The file is not removed, with a warning that says why."""
    for method in (manager.list_damaged, manager.remove_damaged):
        with pytest.warns(DistrustWarning, match=reason) as warned:
            assert method() == []
        assert [str(warning.message).startswith(f"{path}: left: ") for warning in warned] == [True]
        assert os.path.lexists(path)


@pytest.mark.parametrize("at", [3, 20, 100, 4000, -1], ids=["length", "opening", "header", "padding", "data"])
def test_damaged_files_are_removed_and_intact_ones_kept(manager, at):
    damage(path_of(manager, 20), at)
    assert remove_damaged(manager) == [path_of(manager, 20)]
    assert remove_damaged(manager) == []
    for step in (10, 30):
        assert manager.load(step).model["w"].tolist() == [step] * 8


@pytest.mark.parametrize("content", [b"", b"x", bytes(9000)], ids=["empty", "a byte", "zeros"])
def test_all_files_may_be_damaged(manager, content):
    for step in (10, 20, 30):
        path_of(manager, step).write_bytes(content)
    assert remove_damaged(manager) == [path_of(manager, step) for step in (10, 20, 30)]


def test_nothing_is_removed_while_another_writer_has_the_lock(manager):
    damage(path_of(manager, 20))
    second = CheckpointManager(manager.directory)
    with pytest.raises(CheckpointDirectoryLocked):
        second.remove_damaged()
    assert [file.step for file in second.list_damaged()] == [20]  # listing needs no lock
    assert path_of(manager, 20).exists()


def later_version(path: Path) -> None:
    """Make it a file of a later version, by the rules that all versions follow."""
    raw = bytearray(path.read_bytes().replace(b'"version":"1"', b'"version":"2"'))
    end = 8 + int.from_bytes(raw[:8], "little")
    digest = header_digest(raw[:end]).encode()
    start = raw.index(b'"digest":"') + len(b'"digest":"')
    raw[start : start + 64] = digest
    path.write_bytes(raw)


def test_a_file_of_a_later_version_is_left(manager):
    later_version(path_of(manager, 30))
    assert_left(manager, path_of(manager, 30), "version 2 of the format")


def test_a_file_of_another_program_is_left(manager):
    path = manager.directory / "checkpoint-40.safetensors"
    header = b'{"w":{"dtype":"F64","shape":[3],"data_offsets":[0,24]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + np.ones(3).tobytes())
    assert_left(manager, path, "another program")
    damage(path, at=12)  # not recognizable as another program's any more
    assert remove_damaged(manager) == [path]


@pytest.mark.parametrize("name", ["checkpoint-40.safetensors", "checkpoint-30-final.safetensors"])
def test_an_intact_checkpoint_under_a_wrong_name_is_left(manager, name):
    """It may be the only copy of its step."""
    path = path_of(manager, 30).rename(manager.directory / name)
    assert_left(manager, path, r"holds step 30 \(periodic\).*rename it checkpoint-30\.safetensors")
    with pytest.raises(CorruptCheckpoint, match="not what its name says"):
        manager.validate(path)
    damage(path)
    assert remove_damaged(manager) == [path]


def test_a_directory_is_left(manager):
    path = manager.directory / "checkpoint-40.safetensors"
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"x")
    assert_left(manager, path, "a directory")
    assert (path / "model.safetensors").exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EMFILE, errno.EIO, errno.ESTALE])
def test_an_unreadable_file_is_left(manager, monkeypatch, code):
    path = path_of(manager, 20)
    original = os.open

    def refuse(name: Any, *arguments: Any, **options: Any) -> int:
        if str(name) == str(path):
            raise OSError(code, os.strerror(code))
        return original(name, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert_left(manager, path, "cannot be read")


def test_a_file_is_left_if_the_disk_fails_while_reading_it(manager, monkeypatch):
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for step in (10, 20):
        path_of(manager, step).unlink()
    monkeypatch.setattr(os, "preadv", fail)
    assert_left(manager, path_of(manager, 30), "cannot be read")


@pytest.fixture
def link_target(manager, tmp_path_factory) -> Path:
    """The file of step 20, moved to another directory and replaced by a link to it."""
    path = path_of(manager, 20)
    copy = tmp_path_factory.mktemp("target") / path.name
    shutil.move(path, copy)
    path.symlink_to(copy)
    return copy


def test_a_link_to_an_intact_file_is_intact(manager, link_target):
    assert remove_damaged(manager) == []
    assert manager.load(20).step == 20


def test_a_link_to_a_damaged_file_is_removed_and_its_target_kept(manager, link_target):
    raw = damage(link_target)
    assert remove_damaged(manager) == [path_of(manager, 20)]
    assert link_target.read_bytes() == raw


EMPTY_ENTRIES = {
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to a directory": lambda path: path.symlink_to(path.parent.parent),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a pipe": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("kind", EMPTY_ENTRIES)
def test_entries_without_content_are_removed(manager, kind):
    path = manager.directory / "checkpoint-40.safetensors"
    EMPTY_ENTRIES[kind](path)
    assert remove_damaged(manager) == [path]
    assert Path("/dev/zero").exists()
    assert manager.directory.parent.is_dir()


def test_an_intact_file_that_replaces_a_damaged_one_during_the_read_is_kept(manager, monkeypatch):
    path = path_of(manager, 20)
    intact = path.read_bytes()
    damage(path)
    original = catalog.verify_content

    def verify_then_replace(name: Path) -> CheckpointFile:
        try:
            return original(name)
        finally:
            if name == path:
                new = path.with_suffix(".new")
                new.write_bytes(intact)
                new.replace(path)

    monkeypatch.setattr(catalog, "verify_content", verify_then_replace)
    with pytest.warns(DistrustWarning, match="changed while it was read"):
        assert manager.remove_damaged() == []
    assert path.read_bytes() == intact


def test_nothing_is_removed_from_a_directory_that_replaced_the_locked_one(manager, tmp_path_factory):
    """Reading takes long: another writer may have locked what is there by now."""
    for step in (10, 20):
        damage(path_of(manager, step))
    moved = tmp_path_factory.mktemp("moved") / "run"
    removed: list[int] = []

    def replace_directory(file: DamagedFile) -> None:
        removed.append(file.step)
        if len(removed) == 1:
            manager.directory.rename(moved)
            shutil.copytree(moved, manager.directory)

    with pytest.raises(SaveFailed, match="it is not the directory that this process locked"):
        manager.remove_damaged(replace_directory)
    assert removed == [10]
    assert path_of(manager, 20).exists()


def test_a_file_that_cannot_be_removed_is_named_in_the_error(manager, monkeypatch):
    damage(path_of(manager, 20))

    def refuse(disk: Disk, path: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Disk, "unlink", refuse)
    with pytest.raises(CheckpointError, match=r"checkpoint-20\.safetensors: cannot be removed"):
        manager.remove_damaged()
    with pytest.raises(CheckpointError, match=r"checkpoint-10\.safetensors: cannot be removed"):
        manager.cleanup(keep_last=1)


def test_files_with_other_names_are_ignored(manager):
    for name in ("model.safetensors", "checkpoint-05.safetensors", "checkpoint-5.safetensors.bak"):
        (manager.directory / name).write_bytes(b"")
    assert remove_damaged(manager) == []


def test_list_superseded_lists_what_cleanup_removes(manager):
    manager.close()
    manager = CheckpointManager(manager.directory, keep_last=1)
    damage(path_of(manager, 30))
    with pytest.warns(DistrustWarning, match="checkpoint-30.*counts towards no rule"):
        assert [file.step for file in manager.list_superseded()] == [10]
    assert file_names(manager.directory) == {path_of(manager, step).name for step in (10, 20, 30)}
    with manager:
        assert manager.cleanup() == [10]
    assert file_names(manager.directory) == {path_of(manager, step).name for step in (20, 30)}


def test_a_link_into_a_folder_without_permission_is_doubtful(manager, tmp_path, monkeypatch):
    link = manager.directory / "checkpoint-40.safetensors"
    link.symlink_to(tmp_path / "closed" / "file")
    originals = {name: getattr(os, name) for name in ("stat", "open")}

    def refuse_link(name: str) -> Any:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if path == link and options.get("follow_symlinks", True):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return originals[name](path, *arguments, **options)

        return call

    for name in originals:
        monkeypatch.setattr(os, name, refuse_link(name))
    with pytest.warns(DistrustWarning, match=r"checkpoint-40\.safetensors: left: cannot be read"):
        assert manager.list_damaged() == []
