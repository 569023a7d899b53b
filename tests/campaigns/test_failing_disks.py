"""The campaign of full and failing disks, in short; and that it finds what a fault in the product does."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections import Counter

import pytest

from campaigns import failing_disks
from campaigns.disks import isolated, volumes
from campaigns.disks.isolated import Skipped
from distrust.checkpoint import storage
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.lock import DirectoryLock
from distrust.checkpoint.storage import AtomicFile
from distrust.training import saver

# Every case is a fork, and other tests in this process may have started threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*")


@pytest.fixture
def campaign(capsys, tmp_path):
    """Runs the campaign; gives its exit code, its counts and what it printed."""

    def run(*arguments: object) -> tuple[int, dict[str, int], str]:
        figures = tmp_path / "figures.json"
        code = failing_disks.main([*map(str, arguments), "--json", str(figures)])
        return code, json.loads(figures.read_text())["counts"], capsys.readouterr().out

    return run


def mounts() -> str:
    with open("/proc/self/mounts", encoding="utf-8") as file:
        return file.read()


def test_every_promise_is_kept(campaign):
    before = mounts()
    code, counts, said = campaign("--seed", 1, "--cases", 20)
    assert code == 0, said
    cases = {what: number for what, number in counts.items() if what.startswith(("cases: ", "skipped: "))}
    assert sum(cases.values()) == 20
    assert {"cases: open files", "cases: directory taken away", "cases: toy training"} <= set(cases)
    assert sum(number for what, number in counts.items() if ": refused: " in what) >= 3
    assert mounts() == before


def test_what_it_cannot_have_is_counted_with_the_reason(campaign, monkeypatch):
    def refused(_home):
        raise Skipped("mount namespaces: Operation not permitted")

    monkeypatch.setattr(volumes, "private_mounts", refused)
    code, counts, said = campaign("--seed", 1, "--cases", 12, "--only", "disk full")
    assert counts.keys() == {"skipped: disk full: mount namespaces: Operation not permitted"}
    assert code == 1  # it was all that was asked for
    assert "nothing was run" in said


def removes_what_stood(monkeypatch):
    def leave(file, *exception):
        file.discard()
        if exception[0] is not None:
            with contextlib.suppress(OSError):
                os.unlink(file._path)

    monkeypatch.setattr(AtomicFile, "__exit__", leave)


def removes_another(monkeypatch):
    def leave(file, *exception):
        file.discard()
        if exception[0] is not None:
            for path in file._path.parent.glob("checkpoint-*"):
                path.unlink()

    monkeypatch.setattr(AtomicFile, "__exit__", leave)


def writes_in_place(monkeypatch):
    def create(disk, path):
        final = path.with_name(path.name.removeprefix(".")[: path.name.rindex(".safetensors") + 11])
        return os.open(final, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

    monkeypatch.setattr(Disk, "create", create)
    monkeypatch.setattr(Disk, "rename", lambda disk, source, target: None)
    monkeypatch.setattr(Disk, "unlink", lambda disk, path: None)


def leaves_half_a_file(monkeypatch):
    monkeypatch.setattr(Disk, "unlink", lambda disk, path: None)


def leaves_a_file_open(monkeypatch):
    monkeypatch.setattr(Disk, "close", lambda disk, descriptor: None)


def does_not_ask_whose_directory_it_is(monkeypatch):
    monkeypatch.setattr(DirectoryLock, "confirm", lambda lock: None)


def lets_the_system_speak(monkeypatch):
    monkeypatch.setattr(AtomicFile, "_save_errors", lambda file: contextlib.nullcontext())
    monkeypatch.setattr("distrust.checkpoint.writer._save_errors", lambda path: contextlib.nullcontext())


def says_nothing_of_bytes(monkeypatch):
    monkeypatch.setattr(storage, "_free_bytes", lambda directory: None)
    honest = storage.SaveFailed
    monkeypatch.setattr(
        storage, "SaveFailed", lambda message, *, path, **_: honest(f"{path}: not saved", path=path)
    )


def takes_a_failure_for_a_success(monkeypatch):
    def silently(honest):
        def call(*arguments):
            with contextlib.suppress(OSError):
                honest(*arguments)

        return call

    for method in (Disk.reserve, Disk.write, Disk.truncate):
        monkeypatch.setattr(Disk, method.__name__, silently(method))


FAULTS = {
    removes_what_stood: ("file size", "took checkpoint-"),
    removes_another: ("file size", "took checkpoint-"),
    writes_in_place: ("file size", r"changed checkpoint-|left \["),
    leaves_half_a_file: ("file size", "left over: "),
    leaves_a_file_open: ("file size", "open files or threads"),
    lets_the_system_speak: ("file size", "OSError came out of it"),
    says_nothing_of_bytes: ("file size", "does not say what"),
    takes_a_failure_for_a_success: ("file size", "CorruptCheckpoint|NoGoodCheckpoint|step . is loaded"),
    does_not_ask_whose_directory_it_is: ("directory", "another writer's|saved into a directory"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_it_finds_a_product_that(campaign, monkeypatch, fault):
    only, finding = FAULTS[fault]
    fault(monkeypatch)
    code, _, said = campaign("--seed", 1, "--cases", 400, "--seconds", 60, "--only", only)
    assert code == 1
    (found,) = [line for line in said.splitlines() if line.startswith("failing_disks: COUNTEREXAMPLE: ")]
    assert re.search(finding, found), said
    number = said.split("--case ")[1].split()[0]
    code, _, again = campaign("--seed", 1, "--case", number)
    assert code == 1
    assert "COUNTEREXAMPLE" in again


@pytest.mark.parametrize(
    ("most", "finding"), [(1, "stopped after 0 failures in a row"), (9, "failures in a row, and it went on")]
)
def test_it_finds_a_trainer_that_stops_too_early_or_too_late(campaign, monkeypatch, most, finding):
    monkeypatch.setattr(saver, "MAX_FAILURES", most)
    code, _, said = campaign("--seed", 1, "--cases", 300, "--seconds", 60, "--only", "toy")
    assert code == 1
    assert finding in said


def test_a_case_that_hangs_or_dies_is_a_counterexample():
    def hangs(_counts: Counter[str]) -> None:
        while True:
            os.read(0, 0)

    assert "did not end within" in isolated.run(hangs, seconds=0.3).broken
    assert "without a word" in isolated.run(lambda _: os.kill(os.getpid(), 9), seconds=30).broken


def test_whatever_comes_out_of_a_case_is_a_counterexample():
    def fails(counts: Counter[str]) -> None:
        counts["tried"] += 1
        raise OSError(errno.EIO, "Input/output error")

    found = isolated.run(fails, seconds=30)
    assert found.counts == {"tried": 1}
    assert found.broken.startswith("OSError came out of it: [Errno 5] Input/output error\nTraceback")


def test_where_nothing_was_run_no_promise_was_kept(capsys):
    assert failing_disks.main(["--only", "no such kind", "--cases", "3"]) == 1
    out = capsys.readouterr().out
    assert "nothing was run" in out
    assert "kept" not in out
