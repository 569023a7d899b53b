"""Conversion: each checkpoint is verified and compared, and the original is not changed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distrust import Checkpoint, CheckpointManager, DistrustTrainer, DistrustWarning, TrainConfig
from distrust.cli import main
from distrust.errors import (
    CheckpointDirectoryLocked,
    CheckpointError,
    CheckpointNotFound,
    ConfigError,
    DataError,
    ResumeRefused,
)
from distrust.importers.convert import convert
from distrust.importers.imported import Imported
from distrust.training import imported
from older_files import (
    FIELDS,
    arrays,
    file_fields,
    moments,
    write_checksums,
    write_directory,
    write_tensor_file,
)

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "directory-checkpoints"


@pytest.fixture
def source(tmp_path):
    """A checkpoint of each older format, and a final one."""
    source = tmp_path / "source"
    write_directory(source / "checkpoint-10")
    write_tensor_file(source / "checkpoint-20.safetensors", file_fields(20))
    write_directory(source / "checkpoint-30-final", {**FIELDS, "step": 30})
    return source


def content(directory):
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in directory.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def outcomes(results):
    return [(one.step, one.outcome) for one in results]


def test_the_converted_state_is_the_original_state(source, tmp_path):
    original = content(source)
    reported = []
    results = convert(source, tmp_path / "checkpoints", report=reported.append)
    assert reported == results
    assert outcomes(results) == [(10, "converted"), (20, "converted"), (30, "converted")]
    manager = CheckpointManager(tmp_path / "checkpoints")
    assert manager.list_checkpoints() == [10, 20, 30]
    assert manager.inspect(30).kind == "final"
    source_manager = CheckpointManager(source)
    for step in (10, 20, 30):
        old, new = source_manager.load(step), manager.load(step)
        for name, array in arrays().items():
            assert new.model[name].tobytes() == array.tobytes()
        for part, group in moments().items():
            assert all(np.array_equal(new.optimizer[part][name], array) for name, array in group.items())
        assert (new.config, new.metadata, new.metrics) == (old.config, old.metadata, old.metrics)
        assert new.run["imported_from"] == old.run["imported_from"]
        # Relative to the new folder: no path of this machine, and valid if both move.
        path = source_manager.inspect(step).path
        assert new.run["converted_from"] == os.path.relpath(path, manager.directory)
        assert str(tmp_path) not in new.run["converted_from"]
    assert [manager.inspect(one.step).state_digest for one in results] == [
        one.state_digest for one in results
    ]
    assert content(source) == original


def test_again_it_is_already_converted(source, tmp_path):
    convert(source, tmp_path / "checkpoints")
    original = content(tmp_path / "checkpoints")
    results = convert(source, tmp_path / "checkpoints")
    assert {one.outcome for one in results} == {"already converted"}
    assert content(tmp_path / "checkpoints") == original


def test_another_state_is_replaced_only_by_force(source, tmp_path):
    target = tmp_path / "checkpoints"
    with CheckpointManager(target) as manager:
        path = manager.save(Checkpoint(step=10, model={"mine": np.zeros(3)}))
    raw = path.read_bytes()
    results = convert(source, target)
    assert outcomes(results) == [(10, "refused"), (20, "refused"), (30, "refused")]
    assert "has another state" in results[0].reason
    assert "belongs to a run that was resumed there" in results[1].reason
    assert path.read_bytes() == raw
    assert all(one.outcome == "converted" for one in convert(source, target, force=True))
    path.write_bytes(b"damaged")
    (first, *_) = convert(source, target)
    assert (first.outcome, "a damaged file" in first.reason) == ("refused", True)
    assert all(one.succeeded for one in convert(source, target, force=True))


def test_the_target_may_be_the_source(source):
    """Folders and our files have different names; a tensor file is never replaced, not even by force."""
    original = content(source)
    results = convert(source, source, force=True)
    assert outcomes(results) == [(10, "converted"), (20, "refused"), (30, "converted")]
    assert "never replaced" in results[1].reason
    assert original.items() <= content(source).items()
    assert CheckpointManager(source).load_latest().run["converted_from"]


def test_a_damaged_one_is_named_and_the_others_are_converted(source, tmp_path, capsys):
    (source / "checkpoint-10" / "model.npz").write_bytes(b"x")
    write_directory(source / "checkpoint-40", {**FIELDS, "step": 40}, bare=True)
    assert main(["convert", str(source), "--to", str(tmp_path / "checkpoints")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{source / 'checkpoint-10'}: damaged: model.npz does not match checksum.txt")
    assert "converted" in lines[1]
    assert "converted" in lines[2]
    assert f"{source / 'checkpoint-40'}: incomplete: it has no model" in lines[3]
    assert "2 of 4" in lines[4]
    assert CheckpointManager(tmp_path / "checkpoints").list_checkpoints() == [20, 30]


def test_without_an_optimizer(tmp_path, capsys):
    path = write_directory(tmp_path / "checkpoint-10", {**FIELDS, "optimizer_scalars": {}})
    (path / "optimizer.npz").unlink()
    write_checksums(path)
    assert main(["convert", str(path), "--to", str(tmp_path / "checkpoints")]) == 0
    assert "dropped: AdamW's moments" in capsys.readouterr().out


def test_the_target_may_be_a_run(source, tmp_path, capsys):
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
    with pytest.raises(CheckpointNotFound, match="1 are already in this program's own format"):
        convert(tmp_path / "ours", tmp_path / "checkpoints")
    with pytest.raises(CheckpointNotFound, match="that can be converted"):
        convert(path, tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()


def test_a_target_that_is_written_to_is_refused(source, tmp_path):
    with CheckpointManager(tmp_path / "checkpoints") as writer:
        writer.acquire()
        with pytest.raises(CheckpointDirectoryLocked):
            convert(source, tmp_path / "checkpoints")


def test_a_folder_of_the_trainer_is_read_by_its_importer(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    trainer_folder = pytest.importorskip("distrust.importers.trainer_folder")

    def read(path, model):
        return Imported(
            format="transformers Trainer",
            step=5,
            model={"w": np.ones(2)},
            optimizer={"m": {}},
            source={"model": model},
        )

    monkeypatch.setattr(trainer_folder, "read", read)
    results = convert(tmp_path, tmp_path / "run", model="a-model")
    assert outcomes(results) == [(5, "converted")]
    run = CheckpointManager(tmp_path / "run" / "checkpoints").load(5).run
    assert (run["imported_from"], run["model"]) == ("transformers Trainer", "a-model")


def test_a_refusal_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    """One that no run can resume from, one with a wrong step in its name, and a valid one."""
    for step in (5, 6, 7):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")

    def read(path, model):
        if path.name == "checkpoint-5":
            raise ResumeRefused(f"{path}: trained in a way that is not results here")
        return Imported(format="transformers Trainer", step=7, model={"w": np.ones(2)})

    trainer_folder = pytest.importorskip("distrust.importers.trainer_folder")
    monkeypatch.setattr(trainer_folder, "read", read)
    assert main(["convert", str(tmp_path), "--to", str(tmp_path / "run")]) == 1
    refused, damaged, converted, _, summary, _ = capsys.readouterr().out.splitlines()
    assert refused == f"{tmp_path / 'checkpoint-5'}: refused: trained in a way that is not results here"
    assert "checkpoint-6: damaged: trainer_state.json says step 7, its name says 6" in damaged
    assert "checkpoint-7: converted" in converted
    assert summary.startswith("1 of them in a format without checksums")
    assert CheckpointManager(tmp_path / "run" / "checkpoints").list_checkpoints() == [7]


def test_two_trainings_never_share_a_folder(source, tmp_path):
    target = tmp_path / "run" / "checkpoints"
    convert(source / "checkpoint-10", target)
    assert outcomes(convert(source / "checkpoint-20.safetensors", target)) == [(20, "converted")]
    with CheckpointManager(target) as manager:  # the run is resumed here
        manager.save(Checkpoint(step=25, model={"mine": np.zeros(3)}))
    original = content(target)
    assert outcomes(convert(source, target)) == [
        (10, "already converted"),
        (20, "already converted"),
        (30, "refused"),
    ]
    foreign = write_directory(tmp_path / "other" / "checkpoint-40", {**FIELDS, "step": 40})
    (results,) = convert(foreign, target)
    assert (results.outcome, "two trainings never share a folder" in results.reason) == ("refused", True)
    assert content(target) == original
    assert outcomes(convert(foreign, target, force=True)) == [(40, "converted")]


def test_both_folders_may_move_and_files_with_absolute_paths_count_too(source, tmp_path):
    former, moved = tmp_path / "former", tmp_path / "moved"
    former.mkdir()
    source.rename(former / "source")
    convert(former / "source" / "checkpoint-10", former / "checkpoints")
    former.rename(moved)
    final = moved / "source" / "checkpoint-30-final"
    assert outcomes(convert(final, moved / "checkpoints")) == [(30, "converted")]
    earlier = tmp_path / "earlier" / "checkpoints"
    with CheckpointManager(earlier) as manager:
        checkpoint = CheckpointManager(moved / "checkpoints").load(10)
        path = str(moved / "source" / "checkpoint-10")
        manager.save(replace(checkpoint, run={**checkpoint.run, "converted_from": path}))
    assert outcomes(convert(final, earlier)) == [(30, "converted")]


def test_checkpoints_from_another_folder_are_another_training_unless_it_was_moved(
    source, tmp_path, monkeypatch
):
    target = tmp_path / "run" / "checkpoints"
    convert(source / "checkpoint-10", target)
    foreign = write_directory(tmp_path / "other" / "checkpoint-40", {**FIELDS, "step": 40})
    (results,) = convert(foreign, target)
    assert (results.outcome, f"came from {source}, another training" in results.reason) == ("refused", True)
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(foreign)
    relative = Path("..", "..", "link", "checkpoint-20.safetensors")
    assert outcomes(convert(relative, target)) == [(20, "converted")]
    moved = source.rename(tmp_path / "moved")
    assert outcomes(convert(moved, target)) == [
        (10, "already converted"),
        (20, "already converted"),
        (30, "converted"),
    ]


def test_the_run_may_be_created_around_the_source(source):
    """The run is created in the folder of the old checkpoints; an interrupted conversion is resumed."""
    convert(source / "checkpoint-10", source / "checkpoints")
    assert outcomes(convert(source, source / "checkpoints")) == [
        (10, "already converted"),
        (20, "converted"),
        (30, "converted"),
    ]


def test_nothing_is_written_into_a_checkpoint_of_another_program(source, tmp_path, capsys):
    original = content(source)
    folder = source / "checkpoint-10"
    for to in (folder, folder / "new" / "run"):
        assert main(["convert", str(folder), "--to", str(to)]) == 2
        assert "is a checkpoint of another program" in capsys.readouterr().err
    assert content(source) == original
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["metadata.json", "checksum.txt", "model.npz", "optimizer.npz"]
    )


def test_damaged_checkpoints_alone_create_no_run(tmp_path):
    path = write_directory(tmp_path / "checkpoint-10")
    (path / "model.npz").write_bytes(b"x")
    assert outcomes(convert(path, tmp_path / "run")) == [(None, "damaged")]
    assert not (tmp_path / "run").exists()


def test_a_folder_with_the_name_of_the_target_is_kept(source, tmp_path):
    (tmp_path / "checkpoints" / "checkpoint-10.safetensors").mkdir(parents=True)
    for force in (False, True):
        results = convert(source / "checkpoint-10", tmp_path / "checkpoints", force=force)
        assert [(one.outcome, "a folder has this name" in one.reason) for one in results] == [
            ("refused", True)
        ]


@pytest.mark.parametrize("lacks", ["optimizer.npz", "steps"])
def test_a_resumed_run_warns_of_what_was_dropped(tmp_path, lacks):
    """Missing moments, and losses of unknown steps."""
    path = write_directory(tmp_path / "checkpoint-10")
    if lacks == "optimizer.npz":
        (path / lacks).unlink()
        write_checksums(path)
    convert(path, tmp_path / "run")
    checkpoint = CheckpointManager(tmp_path / "run" / "checkpoints").load(10)
    adopted, record = imported.adopt_imported(checkpoint, TrainConfig())
    dropped = "the loss of 2 steps: it is not known which of the 10 steps they are of"
    with pytest.warns(DistrustWarning, match="not recorded.*--lora-alpha") as caught:
        imported.warn_imported(adopted, record, where=tmp_path)
    message = str(caught[0].message)
    assert f"dropped: {dropped}" in message
    assert ("history are" in message, "AdamW's moments" in message) == (False, lacks == "optimizer.npz")
    assert bool(adopted.optimizer) == (lacks == "steps")


@pytest.mark.parametrize("inner", ["", "checkpoints"])
def test_a_training_does_not_start_above_checkpoints(tmp_path, inner):
    write_directory(tmp_path / inner / "checkpoint-10")
    with pytest.raises((ConfigError, CheckpointError), match="distrust convert"):
        DistrustTrainer(TrainConfig(out=str(tmp_path), data="nothing")).train()
    our_directory = tmp_path / "ours" / "checkpoints"
    with CheckpointManager(our_directory) as manager:
        manager.save(Checkpoint(step=1))
    with pytest.raises(ConfigError, match=f"give --out {our_directory.parent}"):
        DistrustTrainer(TrainConfig(out=str(our_directory), data="nothing")).train()
    assert sorted(path.name for path in our_directory.iterdir()) == [".lock", "checkpoint-1.safetensors"]


@pytest.mark.parametrize("name", ["checkpoint-5/trainer_state.json", "trainer_state.json"])
def test_a_training_does_not_start_in_a_folder_of_the_trainer(tmp_path, name):
    path = tmp_path / "output" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="a folder of the transformers Trainer: distrust convert"):
        DistrustTrainer(TrainConfig(out=str(tmp_path / "output"), data="nothing")).train()
    (tmp_path / "new" / "checkpoint-7").mkdir(parents=True)  # empty: nothing to resume from
    with pytest.raises(DataError):
        DistrustTrainer(TrainConfig(out=str(tmp_path / "new"), data="./nothing.jsonl")).train()


@pytest.mark.skipif(not REAL.exists(), reason="the shared checkpoints are not here")
def test_real_checkpoints(tmp_path):
    target = tmp_path / "checkpoints"
    assert outcomes(convert(REAL, target)) == [(10, "converted"), (20, "converted"), (30, "converted")]
    old, new = CheckpointManager(REAL).load(30), CheckpointManager(target).load(30)
    assert set(new.optimizer) == {"step", "learning_rate", "m", "v"}
    for part in ("m", "v"):
        for name, array in old.optimizer[part].items():
            assert new.optimizer[part][name].tobytes() == array.tobytes()
