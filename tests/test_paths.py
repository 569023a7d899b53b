"""Links and special files at names that a stranger may have made: nothing is written through, none blocks.

Every call here would block forever, or change a file outside, without the check that it tests.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from distrust import Checkpoint, CheckpointManager, DistrustTrainer, TrainConfig
from distrust.atomic import atomic_file
from distrust.checkpoint.lock import LOCK_NAME
from distrust.cli import main
from distrust.errors import (
    CheckpointDirectoryLocked,
    DataError,
    DistrustWarning,
    ModelError,
    SaveFailed,
    WriteFailed,
)
from distrust.reporting.metrics import MetricsWriter
from distrust.testing.models import write_records
from distrust.testing.toy_engine import ToyEngine
from distrust.trainer import WRITTEN_NAMES
from distrust.training.events import Observer, RunStarted
from tests.older_files import FIELDS, write_directory
from tests.run_folders import write_run

SECRET = "another user's file"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder outside of the run, with one file."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_text(SECRET)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step=step, model={"a": np.zeros(4, np.float32)})


def toy_trainer(folder: Path, data: Path, *, before: Sequence[Observer] = (), **options: object):
    config = TrainConfig(out=str(folder), data=str(data), model="toy", max_steps=2, **options)
    observers = [*before, MetricsWriter(config)]
    return DistrustTrainer(config, engine=lambda _: ToyEngine(), observers=observers)


@pytest.mark.parametrize("name", WRITTEN_NAMES)
@pytest.mark.parametrize("target", ["secret", ".", "nowhere"])
def test_training_refuses_a_link_at_every_name_that_it_writes(tmp_path, outside, name, target):
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(outside / target)
    with pytest.raises(WriteFailed, match=f"{name}: is a link"):
        toy_trainer(run, write_records(tmp_path / "data.jsonl")).train()
    assert content(outside) == {"secret": SECRET.encode()}
    assert [path.name for path in run.iterdir()] == [name]


def test_a_run_folder_may_itself_be_a_link(tmp_path):
    (tmp_path / "run").symlink_to("disk")
    (tmp_path / "disk").mkdir()
    assert toy_trainer(tmp_path / "run", write_records(tmp_path / "data.jsonl")).train().step == 2
    assert (tmp_path / "disk" / "checkpoints").is_dir()


def test_a_link_that_appears_during_a_run_is_refused(tmp_path, outside):
    """Training goes on, as after any failed write of the log."""
    run = tmp_path / "run"

    def replace_log(event):
        if isinstance(event, RunStarted):
            (run / "provenance.json").symlink_to(outside / "secret")

    trainer = toy_trainer(run, write_records(tmp_path / "data.jsonl"), before=[replace_log])
    with pytest.warns(DistrustWarning, match=r"provenance.json: is a link"):
        assert trainer.train().step == 2
    assert content(outside) == {"secret": SECRET.encode()}


def test_pruning_a_run_does_not_reach_another_run(tmp_path, distrust_command):
    other_run = tmp_path / "other"
    with CheckpointManager(other_run / "checkpoints", keep_last=None) as manager:
        for step in (1, 2, 3):
            manager.save(checkpoint(step))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(other_run / "checkpoints")
    code, error = distrust_command("prune", tmp_path / "run", "--keep-last", 1)
    assert (code, error.count("\n")) == (1, 1)
    assert "checkpoints: is a link" in error
    assert len(list((other_run / "checkpoints").glob("*.safetensors"))) == 3
    (tmp_path / "named").symlink_to(other_run)
    assert distrust_command("prune", tmp_path / "named", "--keep-last", 1) == (0, "")
    assert len(list((other_run / "checkpoints").glob("*.safetensors"))) == 1


def test_converting_does_not_write_through_a_link(tmp_path, distrust_command, outside):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(outside)
    source = write_directory(tmp_path / "old" / "checkpoint-40", {**FIELDS, "step": 40})
    code, error = distrust_command("convert", source, "--to", tmp_path / "run")
    assert code == 1
    assert "checkpoints: is a link" in error
    assert content(outside) == {"secret": SECRET.encode()}


@pytest.fixture
def distrust_command(capsys: pytest.CaptureFixture[str]):
    """Runs a command line in this process; returns its exit code and what it wrote to standard error."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, capsys.readouterr().err

    return run


def test_a_hard_link_in_place_of_the_lock_is_refused(tmp_path, outside):
    run = tmp_path / "checkpoints"
    run.mkdir()
    os.link(outside / "secret", run / LOCK_NAME)
    with CheckpointManager(run) as manager, pytest.raises(SaveFailed, match=r"\.lock: a hard link"):
        manager.save(checkpoint(1))
    assert content(outside) == {"secret": SECRET.encode()}


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (os.mkfifo, "not a regular file; remove it"),
        (os.mkdir, "a folder; remove it"),
        (lambda path: path.symlink_to("/dev/zero"), "a link; remove it"),
    ],
)
def test_anything_but_a_file_in_place_of_the_lock_is_refused(tmp_path, make, problem):
    make(tmp_path / LOCK_NAME)
    with CheckpointManager(tmp_path) as manager, pytest.raises(SaveFailed, match=rf"\.lock: {problem}"):
        manager.save(checkpoint(1))


@pytest.mark.parametrize(("directory_mode", "lock_mode"), [(0o755, 0o600), (0o2775, 0o660)])
def test_only_who_may_write_to_the_directory_can_open_the_lock(tmp_path, directory_mode, lock_mode):
    tmp_path.chmod(directory_mode)
    mask = os.umask(0)
    try:
        with CheckpointManager(tmp_path) as manager:
            manager.save(checkpoint(1))
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / LOCK_NAME).stat().st_mode) == lock_mode


@pytest.mark.skipif(not os.path.exists("/proc/locks"), reason="only Linux lists the locks")
def test_the_message_names_the_process_that_has_the_lock(tmp_path, start_python):
    """Not the one that wrote the note: whoever can open the file can lock it without a note."""
    (tmp_path / LOCK_NAME).write_text("pid 1 on elsewhere\n")
    code = "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX)"
    code += "; print(1, flush=True); input()"
    process = start_python(code, tmp_path / LOCK_NAME)
    assert process.stdout.readline() == "1\n"
    with CheckpointManager(tmp_path) as manager, pytest.raises(CheckpointDirectoryLocked) as caught:
        manager.acquire()
    assert f"(pid {process.pid} on {os.uname().nodename})" in str(caught.value)


def test_a_file_is_written_through_a_link_only_if_that_link_was_named(tmp_path, outside):
    link = tmp_path / "link"
    link.symlink_to(outside / "secret")
    with pytest.raises(WriteFailed, match="is a link"), atomic_file(link, force=True) as file:
        file.write(b"overwritten")
    assert content(outside) == {"secret": SECRET.encode()}
    with atomic_file(link, force=True, follow_link=True) as file:
        file.write(b"as asked")
    assert content(outside) == {"secret": b"as asked"}
    with atomic_file(tmp_path / "new", force=True) as file:
        file.write(b"text")
        (tmp_path / "new").symlink_to(outside / "secret")  # it is replaced
    assert content(outside) == {"secret": b"as asked"}


@pytest.mark.parametrize("name", ["report.html", "metrics.jsonl", "provenance.json"])
def test_a_pipe_named_like_a_leftover_does_not_block(tmp_path, distrust_command, name):
    run = write_run(tmp_path / "run", steps=3)
    os.mkfifo(run / f".{name}.0123456789abcdef.tmp")
    assert distrust_command("report", run) == (0, "")
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    for log in ("metrics.jsonl", "provenance.json"):
        (run / log).unlink(missing_ok=True)
    assert toy_trainer(run, write_records(tmp_path / "data.jsonl")).train().step == 2


def test_a_pipe_in_a_folder_of_data_or_of_a_model_is_refused(tmp_path, tiny_model):
    data = tmp_path / "data"
    data.mkdir()
    write_records(data / "a.jsonl")
    os.mkfifo(data / "b.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl: not a regular file; remove it"):
        toy_trainer(tmp_path / "run", data).train()
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    os.mkfifo(model / "tokenizer.model")
    config = TrainConfig(out=str(tmp_path / "run"), data=str(data / "a.jsonl"), model=str(model))
    with pytest.raises(ModelError, match=r"tokenizer\.model: not a regular file; remove it"):
        DistrustTrainer(config).train()


def test_a_lock_that_somebody_else_holds_does_not_stop_a_write(tmp_path, monkeypatch):
    """Whoever locks the new file first, to remove it as a leftover, does not block its writer."""
    real, earlier = fcntl.flock, []

    def lock_first(file, operation):
        if not earlier:
            (path,) = tmp_path.glob(".new.*.tmp")
            earlier.append(path.open("rb"))
            real(earlier[0], fcntl.LOCK_EX)
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock_first)
    with atomic_file(tmp_path / "new", force=False) as file:
        file.write(b"text")
    earlier[0].close()
    assert content(tmp_path) == {"new": b"text"}
