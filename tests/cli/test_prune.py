"""``distrust prune``: what goes by which flag, what it says, and what it never touches."""

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
    ("rules", "stay"),
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
def test_what_no_rule_keeps_goes(distrust, run, rules, stay):
    goes = [step for step in ALL if step not in stay]
    foretold = distrust("prune", run, *rules, "--dry-run")
    assert (foretold.code, foretold.err) == (0, "")
    assert steps(run) == ALL
    assert foretold.out.count("would remove ") == len(goes)

    given = distrust("prune", run, *rules)

    assert (given.code, given.err) == (0, "")
    assert steps(run) == stay
    *lines, last = given.out.splitlines()
    assert [line.partition(" (")[0] for line in lines] == [
        f"removed {run}/checkpoints/checkpoint-{step}.safetensors" for step in goes
    ]
    assert last.startswith(f"{len(goes)} file" if goes else "nothing to remove")


def test_json_says_what_goes_and_how_much_that_frees(distrust, run):
    sizes = {
        str(path): path.stat().st_blocks * 512 for path in (run / "checkpoints").glob("checkpoint-[1234]0.*")
    }
    for flags, dry in ((["--dry-run"], True), ([], False)):
        said = json.loads(distrust("prune", run, "--keep-last", 1, "--json", *flags).out)
        assert said["dry_run"] is dry
        assert {row["path"]: row["bytes"] for row in said["removed"]} == sizes
        assert [row["step"] for row in said["removed"]] == [10, 20, 30, 40]
        assert {row["reason"] for row in said["removed"]} == {"no rule keeps it"}
        assert said["bytes_freed"] == sum(sizes.values()) > 0


def test_what_another_name_holds_frees_nothing(distrust, run):
    os.link(run / "checkpoints" / "checkpoint-10.safetensors", run / "kept")
    said = json.loads(distrust("prune", run, "--keep-last", 4, "--json").out)
    assert [row["bytes"] for row in said["removed"]] == [0]


def test_damaged_ones_go_by_their_flag_alone(distrust, run):
    raw = damage(run, 40)
    path = run / "checkpoints" / "checkpoint-40.safetensors"
    given = distrust("prune", run, "--keep-last", 2)
    assert given.code == 0
    assert steps(run) == ["30", "40", "50-final"]  # it counts for nothing
    assert path.read_bytes() == raw
    assert given.err.startswith(f"distrust: warning: {path}: tensor model.w is damaged")

    given = distrust("prune", run, "--damaged", "--dry-run")
    assert (given.code, given.err, path.exists()) == (0, "", True)
    assert f"would remove {path} (" in given.out
    assert "): damaged: tensor model.w is damaged (bytes" in given.out

    given = distrust("prune", run, "--damaged")
    assert (given.code, given.err) == (0, "")
    assert f"removed {path} (" in given.out
    assert "\n1 file removed, " in given.out
    assert steps(run) == ["30", "50-final"]
    assert distrust("prune", run, "--damaged").out == "nothing to remove\n"
    assert distrust("verify", run).code == 0


def test_both_at_once(distrust, run):
    damage(run, 30)
    said = json.loads(distrust("prune", run / "checkpoints", "--damaged", "--keep-every", 20, "--json").out)
    assert [row["step"] for row in said["removed"]] == [30, 10]
    assert said["removed"][0]["reason"].startswith("damaged: ")
    assert steps(run) == ["20", "40", "50-final"]


def test_what_is_left_is_said(distrust, run):
    path = run / "checkpoints" / "checkpoint-60.safetensors"
    path.mkdir()
    given = distrust("prune", run, "--damaged", "--json")
    assert (given.code, json.loads(given.out)["removed"]) == (0, [])
    assert given.err.startswith(f"distrust: warning: {path}: left: a directory")
    assert path.is_dir()


def test_where_nothing_is_left_the_next_start_is_from_the_beginning(distrust, run):
    for path in (run / "checkpoints").glob("c*"):
        path.write_bytes(b"")
    given = distrust("prune", run, "--damaged")
    assert given.code == 0
    assert "no checkpoint is left" in given.err


def test_while_a_training_runs_there_nothing_goes(distrust, run):
    with CheckpointManager(run / "checkpoints") as manager:
        manager.acquire()
        given = distrust("prune", run, "--keep-last", 1)
        assert (given.code, given.out) == (1, "")
        assert "has locked this directory" in given.err
        assert distrust("prune", run, "--keep-last", 1, "--dry-run").out.count("would remove") == 4
    assert steps(run) == ALL


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "say what to remove: --damaged, or what to keep: --keep-last N"),
        (["--dry-run"], "say what to remove"),
        (["--keep-last", 0], "--keep-last is 0: give 1 or more"),
        (["--keep-best", -1], "--keep-best is -1: give 0 or more"),
        (["--keep-every", 0], "--keep-every is 0: give 1 or more"),
        (["--keep-last", 1, "--metric", "loss"], "--metric needs --keep-best N"),
        (["--damaged", "--metric-mode", "max"], "--metric-mode needs --keep-best N"),
        (["--keep-best", 1], "no checkpoint has the metric 'eval_loss'; there are loss"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(distrust, run, flags, said):
    given = distrust("prune", run, *flags)
    assert (given.code, given.out) == (2, "")
    assert said in given.err
    assert steps(run) == ALL


def test_one_file_is_no_directory(distrust, run):
    path = run / "checkpoints" / "checkpoint-10.safetensors"
    given = distrust("prune", path, "--damaged")
    assert (given.code, given.out) == (2, "")
    assert f"{path} is a file" in given.err


def test_a_misspelt_directory_is_not_made(distrust, tmp_path):
    assert distrust("prune", tmp_path / "nowhere", "--damaged").code == 1
    assert not (tmp_path / "nowhere").exists()
    given = distrust("prune", tmp_path, "--damaged")
    assert (given.code, given.err) == (1, f"distrust: {tmp_path}: no checkpoints here\n")
    assert list(tmp_path.iterdir()) == []


def test_verify_does_not_call_whole_what_is_skipped_for_its_name(distrust, run):
    path = run / "checkpoints" / "checkpoint-40.safetensors"
    path = path.rename(path.with_name("checkpoint-60.safetensors"))
    given = distrust("verify", run)
    assert given.code == 1
    assert f"{path}: DAMAGED: it holds step 40 (periodic), not what its name says\n" in given.out


@pytest.mark.parametrize("form", ["lines", "json"])
@pytest.mark.parametrize("what", [["--damaged"], ["--keep-last", 1]], ids=["damaged", "superseded"])
def test_where_one_cannot_be_removed_the_others_are_told_of(distrust, run, monkeypatch, what, form):
    if what == ["--damaged"]:
        damage(run, 10)
        damage(run, 20)
    honest = Disk.unlink

    def unlink(disk, path):
        if path.name == "checkpoint-20.safetensors":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        honest(disk, path)

    monkeypatch.setattr(Disk, "unlink", unlink)
    done = distrust("prune", run, *what, *(["--json"] if form == "json" else []))
    assert done.code == 1
    assert "checkpoint-20.safetensors: cannot be removed" in done.err
    gone = ["10"] if what == ["--damaged"] else ["10", "30", "40"]
    assert steps(run) == [step for step in ALL if step not in gone]
    for step in gone:
        assert f"checkpoint-{step}.safetensors" in done.out
    assert ("bytes_freed" if form == "json" else " removed, ") in done.out


def test_a_dry_run_does_not_say_both_that_a_file_goes_and_that_it_was_left(distrust, run):
    damage(run, 40)
    done = distrust("prune", run, "--damaged", "--keep-last", 2, "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert "would remove" in done.out
    assert steps(run) == ALL


def test_a_relative_path_is_told_as_it_was_given_with_its_size(distrust, run, monkeypatch):
    monkeypatch.chdir(run.parent)
    done = distrust("prune", run.name, "--keep-last", 1, "--json", "--dry-run")
    told = json.loads(done.out)
    assert {row["path"] for row in told["removed"]} == {
        f"{run.name}/checkpoints/checkpoint-{step}.safetensors" for step in (10, 20, 30, 40)
    }
    assert told["bytes_freed"] >= 4 * 16_000


def test_a_dry_run_warns_where_nothing_would_be_left(distrust, run):
    for step in (10, 20, 30, 40):
        damage(run, step)
    (run / "checkpoints" / "checkpoint-50-final.safetensors").write_bytes(b"")
    done = distrust("prune", run, "--damaged", "--dry-run")
    assert "no checkpoint would be left" in done.err
    assert steps(run) == ALL
