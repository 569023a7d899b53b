"""One file under a name of the caller's choice: save_file, load_file, verify_file, FileSaver."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

import numpy as np
import pytest

import distrust
from distrust import (
    Checkpoint,
    CheckpointManager,
    CheckpointNotFound,
    ConfigError,
    CorruptCheckpoint,
    SaveFailed,
    UnsupportedState,
)
from distrust.checkpoint import FileSaver
from distrust.checkpoint.disk import Disk


def checkpoint(step=3, value=1.0):
    return Checkpoint(step=step, model={"w": np.full(1000, value)}, optimizer={"m": [np.arange(3), 0.1]})


def value_in(path):
    loaded = distrust.load_file(path)
    assert set(np.unique(loaded.model["w"])) == {loaded.model["w"][0]}  # never a mixture
    return loaded.model["w"][0]


@pytest.mark.parametrize("name", ["epoch=1.ckpt", "last", "new/folders/checkpoint-3.safetensors"])
def test_a_file_of_any_name_comes_back(tmp_path, name):
    path = distrust.save_file(tmp_path / name, checkpoint())
    assert path == tmp_path / name
    distrust.verify_file(path)
    assert distrust.load_file(path).optimizer == {"m": [pytest.approx(np.arange(3)), 0.1]}
    assert os.listdir(path.parent) == [path.name]  # nothing else, such as a lock or a temporary file


def test_a_relative_path_is_that_of_the_call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pending = distrust.save_file_async("a.ckpt", checkpoint())
    monkeypatch.chdir("/")
    assert pending.wait() == tmp_path / "a.ckpt"
    assert value_in(tmp_path / "a.ckpt") == 1.0


def test_a_save_in_the_background_keeps_the_state_of_the_call(tmp_path):
    state = checkpoint()
    pending = distrust.save_file_async(tmp_path / "a", state)
    state.model["w"][:] = 2.0
    assert value_in(pending.wait()) == 1.0


def test_it_can_be_awaited(tmp_path):
    async def save():
        return await distrust.save_file_async(tmp_path / "a", checkpoint())

    assert asyncio.run(save()) == tmp_path / "a"


def test_one_saver_writes_one_file_after_the_other(tmp_path):
    saver = FileSaver()
    for number in range(5):
        saver.save_async(tmp_path / f"{number % 2}", checkpoint(step=number, value=number))
    saver.close()
    assert [value_in(tmp_path / name) for name in ("0", "1")] == [4, 3]


def test_damage_is_found_under_any_name(tmp_path):
    path = distrust.save_file(tmp_path / "a", checkpoint())
    damaged = bytearray(path.read_bytes())
    damaged[-9] ^= 1
    path.write_bytes(damaged)
    for read in (distrust.verify_file, distrust.load_file):
        with pytest.raises(CorruptCheckpoint, match=f"{path}: "):
            read(path)
    with pytest.raises(CheckpointNotFound):
        distrust.load_file(tmp_path / "none")
    (tmp_path / "text").write_text("no checkpoint")
    with pytest.raises(CorruptCheckpoint):
        distrust.verify_file(tmp_path / "text")


def test_a_failed_save_leaves_the_previous_file(tmp_path):
    class FullDisk(Disk):
        def sync(self, descriptor):
            raise OSError(28, "No space left on device")

    path = distrust.save_file(tmp_path / "a", checkpoint())
    saver = FileSaver(disk=FullDisk())
    with pytest.raises(SaveFailed, match="No space left"):
        saver.save(path, checkpoint(value=2.0))
    saver.save_async(path, checkpoint(value=2.0))
    with pytest.raises(SaveFailed, match="No space left"):
        saver.wait()
    with pytest.raises(UnsupportedState, match=r"model\.w: a pathlib\.[\w.]*Path"):
        saver.save(path, Checkpoint(step=1, model={"w": tmp_path}))
    saver.close()
    assert value_in(path) == 1.0
    assert os.listdir(tmp_path) == ["a"]


KILLED_WHILE_WRITING = """
import os, signal, sys, numpy as np
from distrust import Checkpoint
from distrust.checkpoint import FileSaver
from distrust.checkpoint.disk import Disk

class Killed(Disk):
    def sync(self, descriptor):
        os.kill(os.getpid(), signal.{signal})

FileSaver(disk=Killed()).save(sys.argv[1], Checkpoint(step=1, model={{"w": np.zeros(1000)}}))
"""


def kill_a_writer(path, signal):
    writer = subprocess.Popen([sys.executable, "-c", KILLED_WHILE_WRITING.format(signal=signal), path])
    while not [name for name in os.listdir(path.parent) if name.endswith(".tmp")]:
        assert writer.poll() is None
        time.sleep(0.01)
    return writer


def make_older(directory):
    """As if two minutes had passed; returns the temporary files."""
    temporary = [path for path in directory.iterdir() if path.suffix == ".tmp"]
    for path in temporary:
        os.utime(path, (0, time.time() - 120))
    return temporary


def test_the_temporary_file_of_a_killed_writer_is_removed_by_the_next_save(tmp_path):
    path = distrust.save_file(tmp_path / "a", checkpoint())
    kill_a_writer(path, "SIGKILL").wait()
    distrust.save_file(path, checkpoint())
    assert len(make_older(tmp_path)) == 1  # too young: its writer might just have created it
    distrust.save_file(tmp_path / "b", checkpoint())  # another one's is not searched for
    assert len(make_older(tmp_path)) == 1
    distrust.save_file(path, checkpoint())
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_the_temporary_file_of_a_living_writer_stays(tmp_path):
    path = distrust.save_file(tmp_path / "checkpoint-7.safetensors", checkpoint(step=7))
    writer = kill_a_writer(path, "SIGSTOP")
    try:
        os.waitpid(writer.pid, os.WUNTRACED)
        (temporary,) = make_older(tmp_path)
        distrust.save_file(path, checkpoint())
        with CheckpointManager(tmp_path) as manager:
            manager.save(checkpoint())
        assert temporary.exists()
    finally:
        writer.kill()
        writer.wait()


def test_files_that_only_look_temporary_stay(tmp_path):
    for name in (
        ".secret.0123456789abcdef.tmp",
        ".a.0123456789abcdef.tmp.bak",
        "a.0123456789abcdef.tmp",
        ".a.0123456789ABCDEF.tmp",
    ):
        (tmp_path / name).write_text("mine")
    (tmp_path / ".d.0123456789abcdef.tmp").mkdir()
    make_older(tmp_path)
    distrust.save_file(tmp_path / "a", checkpoint())
    assert len(os.listdir(tmp_path)) == 6


def test_of_a_link_the_target_is_replaced(tmp_path):
    target = distrust.save_file(tmp_path / "a", checkpoint())
    (tmp_path / "link").symlink_to("a")
    assert distrust.save_file(tmp_path / "link", checkpoint(value=2.0)) == target
    assert (tmp_path / "link").is_symlink()
    assert value_in(target) == 2.0


def test_names_that_cannot_be_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("pipe", "folder", "file/inside"):
        with pytest.raises(SaveFailed, match=f"{tmp_path / name.split('/')[0]}"):
            distrust.save_file(tmp_path / name, checkpoint())
    for name in ("a\0b", "a\ud800"):
        for act in (
            lambda path: distrust.save_file(path, checkpoint()),
            distrust.load_file,
            distrust.verify_file,
        ):
            with pytest.raises(ConfigError, match="no path"):
                act(f"{tmp_path}/{name}")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "pipe"]
