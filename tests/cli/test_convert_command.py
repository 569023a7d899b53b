"""Checkpoints of other programs become ours: verified before, compared behind, and left as they are."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from distrust import Checkpoint, CheckpointManager
from distrust.cli import main
from distrust.convert import convert
from distrust.errors import CheckpointDirectoryLocked, CheckpointNotFound
from older_files import (
    FIELDS,
    arrays,
    moments,
    write_byte_tensors,
    write_checksums,
    write_directory,
)

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "directory-checkpoints"


@pytest.fixture
def source(tmp_path):
    """One of each format, and a final one."""
    source = tmp_path / "source"
    write_directory(source / "checkpoint-10")
    write_byte_tensors(source / "checkpoint-20.safetensors", {**FIELDS, "step": 20})
    write_directory(source / "checkpoint-30-final", {**FIELDS, "step": 30})
    return source


def content(directory):
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in directory.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def outcomes(done):
    return [(one.step, one.outcome) for one in done]


def test_what_is_converted_is_what_was_there(source, tmp_path):
    before = content(source)
    told = []
    done = convert(source, tmp_path / "checkpoints", report=told.append)
    assert told == done
    assert outcomes(done) == [(10, "converted"), (20, "converted"), (30, "converted")]
    manager = CheckpointManager(tmp_path / "checkpoints")
    assert manager.list_checkpoints() == [10, 20, 30]
    assert manager.inspect(30).kind == "final"
    there = CheckpointManager(source)
    for step in (10, 20, 30):
        old, new = there.load(step), manager.load(step)
        for name, array in arrays().items():
            assert new.model[name].tobytes() == array.tobytes()
        for part, group in moments().items():
            assert all(np.array_equal(new.optimizer[part][name], array) for name, array in group.items())
        assert (new.config, new.metadata, new.metrics) == (old.config, old.metadata, old.metrics)
        assert new.run["begun_elsewhere"] == old.run["begun_elsewhere"]
        assert new.run["converted_from"] == str(there.inspect(step).path)
    assert [manager.inspect(one.step).state_digest for one in done] == [one.state_digest for one in done]
    assert content(source) == before


def test_again_it_is_there_already(source, tmp_path):
    convert(source, tmp_path / "checkpoints")
    before = content(tmp_path / "checkpoints")
    done = convert(source, tmp_path / "checkpoints")
    assert {one.outcome for one in done} == {"already there"}
    assert content(tmp_path / "checkpoints") == before


def test_another_state_is_replaced_only_by_force(source, tmp_path):
    target = tmp_path / "checkpoints"
    with CheckpointManager(target) as manager:
        path = manager.save(Checkpoint(step=10, model={"mine": np.zeros(3)}))
    raw = path.read_bytes()
    assert outcomes(convert(source, target)) == [(10, "refused"), (20, "converted"), (30, "converted")]
    assert path.read_bytes() == raw
    assert outcomes(convert(source, target, force=True))[0] == (10, "converted")
    path.write_bytes(b"damaged")
    (first, *_) = convert(source, target)
    assert (first.outcome, "a damaged file" in first.reason) == ("refused", True)
    assert all(one.is_well for one in convert(source, target, force=True))


def test_beside_themselves(source):
    """Folders and our files have different names; a single file is never replaced, by force neither."""
    before = content(source)
    done = convert(source, source, force=True)
    assert outcomes(done) == [(10, "converted"), (20, "refused"), (30, "converted")]
    assert "never replaced" in done[1].reason
    assert before.items() <= content(source).items()
    assert CheckpointManager(source).load_latest().run["converted_from"]


def test_the_damaged_one_is_named_and_the_others_are_converted(source, tmp_path, capsys):
    (source / "checkpoint-10" / "model.npz").write_bytes(b"x")
    write_directory(source / "checkpoint-40", {**FIELDS, "step": 40}, bare=True)
    assert main(["convert", str(source), "--to", str(tmp_path / "checkpoints")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        f"{source / 'checkpoint-10'}: damaged: model.npz is not what checksum.txt says"
    )
    assert "converted" in lines[1]
    assert "converted" in lines[2]
    assert f"{source / 'checkpoint-40'}: incomplete: it holds no model" in lines[3]
    assert "2 of 4" in lines[4]
    assert CheckpointManager(tmp_path / "checkpoints").list_checkpoints() == [20, 30]


def test_without_an_optimizer(tmp_path, capsys):
    path = write_directory(tmp_path / "checkpoint-10", {**FIELDS, "optimizer_scalars": {}})
    (path / "optimizer.npz").unlink()
    write_checksums(path)
    assert main(["convert", str(path), "--to", str(tmp_path / "checkpoints")]) == 0
    assert "its moments begin anew" in capsys.readouterr().out


def test_a_run_gets_them_into_its_checkpoints(source, tmp_path, capsys):
    assert main(["convert", str(source), "--to", str(tmp_path / "run"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["outcome"]) for row in rows] == [(s, "converted") for s in (10, 20, 30)]
    assert CheckpointManager(tmp_path / "run" / "checkpoints").list_checkpoints() == [10, 20, 30]
    assert main(["verify", str(tmp_path / "run")]) == 0


def test_nothing_to_convert(tmp_path):
    with pytest.raises(CheckpointNotFound, match="no such file"):
        convert(tmp_path / "nowhere", tmp_path / "checkpoints")
    with pytest.raises(CheckpointNotFound, match="no checkpoints here"):
        convert(tmp_path, tmp_path / "checkpoints")
    with CheckpointManager(tmp_path / "ours") as manager:
        path = manager.save(Checkpoint(step=1))
    with pytest.raises(CheckpointNotFound, match="1 are in this program's own format"):
        convert(tmp_path / "ours", tmp_path / "checkpoints")
    with pytest.raises(CheckpointNotFound, match="that can be converted"):
        convert(path, tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()


def test_a_target_that_is_written_to_is_refused(source, tmp_path):
    with CheckpointManager(tmp_path / "checkpoints") as writer:
        writer.acquire()
        with pytest.raises(CheckpointDirectoryLocked):
            convert(source, tmp_path / "checkpoints")


def test_a_folder_of_the_trainer_goes_to_its_reader(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    reader = types.ModuleType("distrust.engines.torch.trainer_folder")
    reader.read = lambda path, model: Checkpoint(
        step=5,
        model={"w": np.ones(2)},
        optimizer={"m": {}},
        run={"begun_elsewhere": "transformers Trainer", "model": model},
    )
    monkeypatch.setitem(sys.modules, reader.__name__, reader)
    done = convert(tmp_path, tmp_path / "run", model="a-model")
    assert outcomes(done) == [(5, "converted")]
    run = CheckpointManager(tmp_path / "run" / "checkpoints").load(5).run
    assert (run["begun_elsewhere"], run["model"]) == ("transformers Trainer", "a-model")


@pytest.mark.skipif(not REAL.exists(), reason="the shared checkpoints are not here")
def test_real_ones(tmp_path):
    target = tmp_path / "checkpoints"
    assert outcomes(convert(REAL, target)) == [(10, "converted"), (20, "converted"), (30, "converted")]
    old, new = CheckpointManager(REAL).load(30), CheckpointManager(target).load(30)
    assert set(new.optimizer) == {"step", "learning_rate", "m", "v"}
    for part in ("m", "v"):
        for name, array in old.optimizer[part].items():
            assert new.optimizer[part][name].tobytes() == array.tobytes()
