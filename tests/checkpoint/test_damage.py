"""What may be removed as damaged, and what is left to a person."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrust import Checkpoint, CheckpointManager, DistrustWarning
from distrust.checkpoint import CheckpointFile, catalog
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.files import checkpoint_file_name
from distrust.checkpoint.format import header_digest
from distrust.errors import CheckpointDirectoryLocked, CheckpointError, CorruptCheckpoint


@pytest.fixture
def manager(tmp_path):
    """Of the steps 10, 20 and 30, all whole."""
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


def there(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {".lock"}


def removed(manager: CheckpointManager) -> list[Path]:
    """What goes, which is what was foretold."""
    before = there(manager.directory)
    foretold = manager.list_damaged()
    assert there(manager.directory) == before
    gone = manager.remove_damaged()
    assert [(file.path, file.step, file.reason) for file in gone] == [
        (file.path, file.step, file.reason) for file in foretold
    ]
    assert there(manager.directory) == before - {file.path.name for file in gone}
    return [file.path for file in gone]


def left(manager: CheckpointManager, path: Path, why: str) -> None:
    """That a file is left, with a warning of why."""
    for use in (manager.list_damaged, manager.remove_damaged):
        with pytest.warns(DistrustWarning, match=why) as warned:
            assert use() == []
        assert [str(one.message).startswith(f"{path}: left: ") for one in warned] == [True]
        assert os.path.lexists(path)


@pytest.mark.parametrize("at", [3, 20, 100, 4000, -1], ids=["length", "opening", "header", "padding", "data"])
def test_damaged_ones_go_and_good_ones_stay(manager, at):
    damage(path_of(manager, 20), at)
    assert removed(manager) == [path_of(manager, 20)]
    assert removed(manager) == []
    for step in (10, 30):
        assert manager.load(step).model["w"].tolist() == [step] * 8


@pytest.mark.parametrize("content", [b"", b"x", bytes(9000)], ids=["empty", "a byte", "zeros"])
def test_all_of_them_may_be_damaged(manager, content):
    for step in (10, 20, 30):
        path_of(manager, step).write_bytes(content)
    assert removed(manager) == [path_of(manager, step) for step in (10, 20, 30)]


def test_nothing_is_removed_while_another_writes_there(manager):
    damage(path_of(manager, 20))
    other = CheckpointManager(manager.directory)
    with pytest.raises(CheckpointDirectoryLocked):
        other.remove_damaged()
    assert [file.step for file in other.list_damaged()] == [20]  # looking needs no lock
    assert path_of(manager, 20).exists()


def later_version(path: Path) -> None:
    """As a later version of this program would write it, by what all versions keep to."""
    raw = bytearray(path.read_bytes().replace(b'"version":"1"', b'"version":"2"'))
    end = 8 + int.from_bytes(raw[:8], "little")
    digest = header_digest(raw[:end]).encode()
    place = raw.index(b'"digest":"') + len(b'"digest":"')
    raw[place : place + 64] = digest
    path.write_bytes(raw)


def test_a_file_of_a_later_version_is_left(manager):
    later_version(path_of(manager, 30))
    left(manager, path_of(manager, 30), "version 2 of the format")


def test_a_file_of_another_program_is_left(manager):
    path = manager.directory / "checkpoint-40.safetensors"
    header = b'{"w":{"dtype":"F64","shape":[3],"data_offsets":[0,24]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + np.ones(3).tobytes())
    left(manager, path, "another program")
    damage(path, at=12)  # what it was, nobody can tell now
    assert removed(manager) == [path]


@pytest.mark.parametrize("name", ["checkpoint-40.safetensors", "checkpoint-30-final.safetensors"])
def test_a_whole_checkpoint_under_another_name_is_left(manager, name):
    """It may be the only copy of its step."""
    path = path_of(manager, 30).rename(manager.directory / name)
    left(manager, path, r"holds step 30 \(periodic\).*rename it checkpoint-30\.safetensors")
    with pytest.raises(CorruptCheckpoint, match="not what its name says"):
        manager.validate(path)
    damage(path)
    assert removed(manager) == [path]


def test_a_directory_is_left(manager):
    path = manager.directory / "checkpoint-40.safetensors"
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"x")
    left(manager, path, "a directory")
    assert (path / "model.safetensors").exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EMFILE, errno.EIO, errno.ESTALE])
def test_what_cannot_be_read_is_left(manager, monkeypatch, code):
    path = path_of(manager, 20)
    real = os.open

    def refuse(name: Any, *arguments: Any, **more: Any) -> int:
        if str(name) == str(path):
            raise OSError(code, os.strerror(code))
        return real(name, *arguments, **more)

    monkeypatch.setattr(os, "open", refuse)
    left(manager, path, "cannot be read")


def test_a_disk_that_fails_while_a_file_is_read_leaves_it(manager, monkeypatch):
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for step in (10, 20):
        path_of(manager, step).unlink()
    monkeypatch.setattr(os, "preadv", fail)
    left(manager, path_of(manager, 30), "cannot be read")


@pytest.fixture
def elsewhere(manager, tmp_path_factory) -> Path:
    """A copy of step 20 in another directory, to which a link of that name points."""
    path = path_of(manager, 20)
    copy = tmp_path_factory.mktemp("elsewhere") / path.name
    shutil.move(path, copy)
    path.symlink_to(copy)
    return copy


def test_a_link_to_a_good_one_is_a_good_one(manager, elsewhere):
    assert removed(manager) == []
    assert manager.load(20).step == 20


def test_a_link_to_a_damaged_one_goes_and_that_one_stays(manager, elsewhere):
    raw = damage(elsewhere)
    assert removed(manager) == [path_of(manager, 20)]
    assert elsewhere.read_bytes() == raw


THINGS = {
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to a directory": lambda path: path.symlink_to(path.parent.parent),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a pipe": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("thing", THINGS)
def test_things_that_hold_nothing_go(manager, thing):
    path = manager.directory / "checkpoint-40.safetensors"
    THINGS[thing](path)
    assert removed(manager) == [path]
    assert Path("/dev/zero").exists()
    assert manager.directory.parent.is_dir()


def test_a_good_one_put_there_while_the_damaged_one_was_read_stays(manager, monkeypatch):
    path = path_of(manager, 20)
    good = path.read_bytes()
    damage(path)
    real = catalog.verify_content

    def verify_while_it_is_replaced(name: Path) -> CheckpointFile:
        try:
            return real(name)
        finally:
            if name == path:
                new = path.with_suffix(".new")
                new.write_bytes(good)
                new.replace(path)

    monkeypatch.setattr(catalog, "verify_content", verify_while_it_is_replaced)
    with pytest.warns(DistrustWarning, match="changed while it was read"):
        assert manager.remove_damaged() == []
    assert path.read_bytes() == good


def test_one_that_cannot_be_removed_is_an_error_that_names_it(manager, monkeypatch):
    damage(path_of(manager, 20))

    def refuse(disk: Disk, path: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Disk, "unlink", refuse)
    with pytest.raises(CheckpointError, match=r"checkpoint-20\.safetensors: cannot be removed"):
        manager.remove_damaged()
    with pytest.raises(CheckpointError, match=r"checkpoint-10\.safetensors: cannot be removed"):
        manager.cleanup(keep_last=1)


def test_files_of_other_names_are_nobodys_business(manager):
    for name in ("model.safetensors", "checkpoint-05.safetensors", "checkpoint-5.safetensors.bak"):
        (manager.directory / name).write_bytes(b"")
    assert removed(manager) == []


def test_what_would_be_superseded_is_what_goes(manager):
    manager.close()
    manager = CheckpointManager(manager.directory, keep_last=1)
    damage(path_of(manager, 30))
    with pytest.warns(DistrustWarning, match="checkpoint-30.*counts towards no rule"):
        assert [file.step for file in manager.list_superseded()] == [10]
    assert there(manager.directory) == {path_of(manager, step).name for step in (10, 20, 30)}
    with manager:
        assert manager.cleanup() == [10]
    assert there(manager.directory) == {path_of(manager, step).name for step in (20, 30)}


def test_a_link_into_a_closed_folder_is_doubtful_not_an_error_of_another_kind(manager, tmp_path, monkeypatch):
    link = manager.directory / "checkpoint-40.safetensors"
    link.symlink_to(tmp_path / "closed" / "file")
    honest = {name: getattr(os, name) for name in ("stat", "open")}

    def refusing(name: str) -> Any:
        def call(path: Any, *rest: Any, **named: Any) -> Any:
            if path == link and named.get("follow_symlinks", True):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return honest[name](path, *rest, **named)

        return call

    for name in honest:
        monkeypatch.setattr(os, name, refusing(name))
    with pytest.warns(DistrustWarning, match=r"checkpoint-40\.safetensors: left: cannot be read"):
        assert manager.list_damaged() == []
