"""``distrust prune``: what each flag removes, what it reports, and what it never removes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint.disk import Disk


@pytest.fixture
def run(tmp_path) -> Path:
    """With the steps 10 to 50, of which 50 is a final; lower steps have the better loss."""
    with CheckpointManager(tmp_path / "run" / "checkpoints", keep_last=None) as manager:
        for step in (10, 20, 30, 40, 50):
            state = Checkpoint(step=step, model={"w": np.full(2000, step)}, metrics={"loss": step / 10})
            manager.save(state, final=step == 50)
    return tmp_path / "run"


def steps(run: Path) -> list[str]:
    names = [path.stem.removeprefix("checkpoint-") for path in (run / "checkpoints").glob("c*")]
    return sorted(names, key=lambda name: int(name.split("-")[0]))


ALL = ["10", "20", "30", "40", "50-final"]


def damage(run: Path, step: int) -> bytes:
    path = run / "checkpoints" / f"checkpoint-{step}.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    return bytes(raw)


@pytest.mark.parametrize(
    ("rules", "remaining"),
    [
        (["--keep-last", 3], ["30", "40", "50-final"]),
        (["--keep-last", 1], ["50-final"]),
        (["--keep-best", 2, "--metric", "loss"], ["10", "20", "50-final"]),
        (["--keep-best", 1, "--metric", "loss", "--metric-mode", "max"], ["50-final"]),
        (["--keep-every", 20], ["20", "40", "50-final"]),
        (["--keep-last", 2, "--keep-best", 1, "--metric", "loss"], ["10", "40", "50-final"]),
        (["--keep-best", 0], ["50-final"]),
        (["--keep-last", 9], ALL),
    ],
    ids=str,
)
def test_checkpoints_that_no_rule_keeps_are_removed(distrust, run, rules, remaining):
    removed = [step for step in ALL if step not in remaining]
    dry_run = distrust("prune", run, *rules, "--dry-run")
    assert (dry_run.code, dry_run.err) == (0, "")
    assert steps(run) == ALL
    assert dry_run.out.count("would remove ") == len(removed)

    output = distrust("prune", run, *rules)

    assert (output.code, output.err) == (0, "")
    assert steps(run) == remaining
    *lines, last = output.out.splitlines()
    assert [line.partition(" (")[0] for line in lines] == [
        f"removed {run}/checkpoints/checkpoint-{step}.safetensors" for step in removed
    ]
    assert last.startswith(f"{len(removed)} file" if removed else "nothing to remove")


def test_json_lists_the_removed_files_and_the_freed_space(distrust, run):
    sizes = {
        str(path): path.stat().st_blocks * 512 for path in (run / "checkpoints").glob("checkpoint-[1234]0.*")
    }
    for flags, dry in ((["--dry-run"], True), ([], False)):
        report = json.loads(distrust("prune", run, "--keep-last", 1, "--json", *flags).out)
        assert report["dry_run"] is dry
        assert {row["path"]: row["bytes"] for row in report["removed"]} == sizes
        assert [row["step"] for row in report["removed"]] == [10, 20, 30, 40]
        assert {row["reason"] for row in report["removed"]} == {"no rule keeps it"}
        assert report["bytes_freed"] == sum(sizes.values()) > 0


def test_a_file_with_another_hard_link_frees_nothing(distrust, run):
    os.link(run / "checkpoints" / "checkpoint-10.safetensors", run / "kept")
    report = json.loads(distrust("prune", run, "--keep-last", 4, "--json").out)
    assert [row["bytes"] for row in report["removed"]] == [0]


def test_damaged_checkpoints_are_removed_only_by_their_flag(distrust, run):
    raw = damage(run, 40)
    path = run / "checkpoints" / "checkpoint-40.safetensors"
    output = distrust("prune", run, "--keep-last", 2)
    assert output.code == 0
    assert steps(run) == ["30", "40", "50-final"]  # it counts towards no rule
    assert path.read_bytes() == raw
    assert output.err.startswith(f"distrust: warning: {path}: tensor model.w is damaged")

    output = distrust("prune", run, "--damaged", "--dry-run")
    assert (output.code, output.err, path.exists()) == (0, "", True)
    assert f"would remove {path} (" in output.out
    assert "): damaged: tensor model.w is damaged (bytes" in output.out

    output = distrust("prune", run, "--damaged")
    assert (output.code, output.err) == (0, "")
    assert f"removed {path} (" in output.out
    assert "\n1 file removed, " in output.out
    assert steps(run) == ["30", "50-final"]
    assert distrust("prune", run, "--damaged").out == "nothing to remove\n"
    assert distrust("verify", run).code == 0


def test_both_at_once(distrust, run):
    damage(run, 30)
    report = json.loads(distrust("prune", run / "checkpoints", "--damaged", "--keep-every", 20, "--json").out)
    assert [row["step"] for row in report["removed"]] == [30, 10]
    assert report["removed"][0]["reason"].startswith("damaged: ")
    assert steps(run) == ["20", "40", "50-final"]


def test_a_folder_that_stays_is_reported(distrust, run):
    path = run / "checkpoints" / "checkpoint-60.safetensors"
    path.mkdir()
    output = distrust("prune", run, "--damaged", "--json")
    assert (output.code, json.loads(output.out)["removed"]) == (0, [])
    assert output.err.startswith(f"distrust: warning: {path}: left: a directory")
    assert path.is_dir()


def test_a_warning_if_no_checkpoint_is_left(distrust, run):
    for path in (run / "checkpoints").glob("c*"):
        path.write_bytes(b"")
    output = distrust("prune", run, "--damaged")
    assert output.code == 0
    assert "no checkpoint is left" in output.err


def test_nothing_is_removed_while_a_training_runs(distrust, run):
    with CheckpointManager(run / "checkpoints") as manager:
        manager.acquire()
        output = distrust("prune", run, "--keep-last", 1)
        assert (output.code, output.out) == (1, "")
        assert "has locked this directory" in output.err
        assert distrust("prune", run, "--keep-last", 1, "--dry-run").out.count("would remove") == 4
    assert steps(run) == ALL


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "specify what to remove (--damaged) or what to keep: --keep-last N"),
        (["--dry-run"], "specify what to remove"),
        (["--keep-last", 0], "--keep-last is 0: give 1 or more"),
        (["--keep-best", -1], "--keep-best is -1: give 0 or more"),
        (["--keep-every", 0], "--keep-every is 0: give 1 or more"),
        (["--keep-last", 1, "--metric", "loss"], "--metric needs --keep-best N"),
        (["--damaged", "--metric-mode", "max"], "--metric-mode needs --keep-best N"),
        (["--keep-best", 1], "no checkpoint has the metric 'eval_loss'; there are loss"),
    ],
    ids=str,
)
def test_contradicting_flags_are_refused(distrust, run, flags, message):
    output = distrust("prune", run, *flags)
    assert (output.code, output.out) == (2, "")
    assert message in output.err
    assert steps(run) == ALL


def test_a_file_is_refused(distrust, run):
    path = run / "checkpoints" / "checkpoint-10.safetensors"
    output = distrust("prune", path, "--damaged")
    assert (output.code, output.out) == (2, "")
    assert f"needs a run or a directory of checkpoints; {path} is none" in output.err


def test_a_misspelt_directory_is_not_created(distrust, tmp_path):
    assert distrust("prune", tmp_path / "nowhere", "--damaged").code == 1
    assert not (tmp_path / "nowhere").exists()
    output = distrust("prune", tmp_path, "--damaged")
    assert (output.code, output.err) == (1, f"distrust: {tmp_path}: no checkpoints here\n")
    assert list(tmp_path.iterdir()) == []


def test_verify_rejects_a_file_with_a_wrong_name(distrust, run):
    path = run / "checkpoints" / "checkpoint-40.safetensors"
    path = path.rename(path.with_name("checkpoint-60.safetensors"))
    output = distrust("verify", run)
    assert output.code == 1
    assert f"{path}: DAMAGED: it holds step 40 (periodic), not what its name says\n" in output.out


@pytest.mark.parametrize("form", ["lines", "json"])
@pytest.mark.parametrize("what", [["--damaged"], ["--keep-last", 1]], ids=["damaged", "superseded"])
def test_if_one_cannot_be_removed_the_others_are_reported(distrust, run, monkeypatch, what, form):
    if what == ["--damaged"]:
        damage(run, 10)
        damage(run, 20)
    honest = Disk.unlink

    def unlink(disk, path):
        if path.name == "checkpoint-20.safetensors":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        honest(disk, path)

    monkeypatch.setattr(Disk, "unlink", unlink)
    output = distrust("prune", run, *what, *(["--json"] if form == "json" else []))
    assert output.code == 1
    assert "checkpoint-20.safetensors: cannot be removed" in output.err
    removed_steps = ["10"] if what == ["--damaged"] else ["10", "30", "40"]
    assert steps(run) == [step for step in ALL if step not in removed_steps]
    for step in removed_steps:
        assert f"checkpoint-{step}.safetensors" in output.out
    assert ("bytes_freed" if form == "json" else " removed, ") in output.out


def test_a_dry_run_reports_a_file_once(distrust, run):
    damage(run, 40)
    output = distrust("prune", run, "--damaged", "--keep-last", 2, "--dry-run")
    assert (output.code, output.err) == (0, "")
    assert "would remove" in output.out
    assert steps(run) == ALL


def test_a_relative_path_is_reported_as_given(distrust, run, monkeypatch):
    monkeypatch.chdir(run.parent)
    output = distrust("prune", run.name, "--keep-last", 1, "--json", "--dry-run")
    report = json.loads(output.out)
    assert {row["path"] for row in report["removed"]} == {
        f"{run.name}/checkpoints/checkpoint-{step}.safetensors" for step in (10, 20, 30, 40)
    }
    assert report["bytes_freed"] >= 4 * 16_000


def test_a_dry_run_warns_if_nothing_would_be_left(distrust, run):
    for step in (10, 20, 30, 40):
        damage(run, step)
    (run / "checkpoints" / "checkpoint-50-final.safetensors").write_bytes(b"")
    output = distrust("prune", run, "--damaged", "--dry-run")
    assert "no checkpoint would be left" in output.err
    assert steps(run) == ALL
