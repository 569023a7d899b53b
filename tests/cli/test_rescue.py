"""The command ``distrust rescue``."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from distrust import Checkpoint, CheckpointManager, load_file
from distrust.checkpoint.step_snapshots import folder_of
from distrust.cli import main


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """The checkpoints of a run that died after step 7."""
    (tmp_path / "memory").mkdir()
    monkeypatch.setenv("DISTRUST_SHM", str(tmp_path / "memory"))
    directory = tmp_path / "run" / "checkpoints"
    pid = os.fork()
    if pid == 0:
        try:
            CheckpointManager(directory).snapshot(Checkpoint(step=7, model={"w": np.ones(9)})).wait()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    return directory


def test_lists_what_is_there(checkpoints, capsys):
    assert main(["rescue"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{checkpoints}: step 7, ")
    assert line.endswith(", verified")
    with CheckpointManager(checkpoints) as manager:
        manager.acquire()
        assert main(["rescue"]) == 0
        assert capsys.readouterr().out == f"{line}, of a process that still runs\n"
    slot = folder_of(checkpoints) / "0.safetensors"
    slot.write_bytes(bytes(8) + slot.read_bytes()[8:])
    assert main(["rescue"]) == 0
    assert capsys.readouterr().out == f"{checkpoints}: torn\n"


def test_saves_it_into_the_run(checkpoints, capsys):
    assert main(["rescue", str(checkpoints.parent)]) == 0
    assert capsys.readouterr().out == f"{checkpoints}/checkpoint-7.safetensors\n"
    assert CheckpointManager(checkpoints).load_latest().step == 7
    assert main(["rescue", str(checkpoints.parent)]) == 1
    assert "no process has left a step of it" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["folder", "file.safetensors"])
def test_saves_it_elsewhere_also_if_the_run_exists_no_more(checkpoints, tmp_path, capsys, target):
    (tmp_path / "folder").mkdir()
    shutil.rmtree(checkpoints.parent)
    run = str(checkpoints.parent)
    assert main(["rescue", run]) == 1
    assert "--to FILE saves what is intact" in capsys.readouterr().err
    assert main(["rescue", run, "--to", str(tmp_path / target)]) == 0
    assert load_file(capsys.readouterr().out.strip()).step == 7
    assert main(["rescue", run, "--remove"]) == 0
    assert main(["rescue"]) == 0
    assert capsys.readouterr().out == "no process has left a step in shared memory\n"
    assert not checkpoints.parent.exists()


def test_not_while_a_training_writes_there(checkpoints, capsys):
    with CheckpointManager(checkpoints) as manager:
        manager.acquire()
        assert main(["rescue", str(checkpoints.parent), "--remove"]) == 1
    assert "has locked this directory" in capsys.readouterr().err


def test_needs_a_run(checkpoints, capsys):
    assert main(["rescue", "--remove"]) == 2
    assert "name the run" in capsys.readouterr().err
