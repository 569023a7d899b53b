"""The campaign of full and failing disks, in short; and that it finds faults of the product."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections import Counter

import pytest

from campaigns import failing_disks
from campaigns.disks import volumes
from campaigns.disks.volumes import Skipped
from distrust.checkpoint import storage
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.lock import DirectoryLock
from distrust.checkpoint.storage import AtomicCheckpointFile
from distrust.training import saver

# Every case is a fork, and other tests in this process may have started threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*")


@pytest.fixture
def campaign(capsys, tmp_path):
    """Runs the campaign; returns its exit code, its counts and what it printed."""

    def run(*arguments: object) -> tuple[int, dict[str, int], str]:
        figures = tmp_path / "figures.json"
        code = failing_disks.main([*map(str, arguments), "--json", str(figures)])
        return code, json.loads(figures.read_text())["counts"], capsys.readouterr().out

    return run


def mounts() -> str:
    with open("/proc/self/mounts", encoding="utf-8") as file:
        return file.read()


def test_every_invariant_holds(campaign):
    mounts_at_first = mounts()
    code, counts, output = campaign("--seed", 1, "--cases", 20)
    assert code == 0, output
    cases = {name: number for name, number in counts.items() if name.startswith(("cases: ", "skipped: "))}
    assert sum(cases.values()) == 20
    assert {"cases: open files", "cases: directory replaced", "cases: toy training"} <= set(cases)
    assert sum(number for name, number in counts.items() if ": refused: " in name) >= 3
    assert mounts() == mounts_at_first


def test_what_the_machine_cannot_run_is_counted_with_the_reason(campaign, monkeypatch):
    def refuse(_home):
        raise Skipped("mount namespaces: Operation not permitted")

    monkeypatch.setattr(volumes, "private_mounts", refuse)
    code, counts, output = campaign("--seed", 1, "--cases", 12, "--only", "disk full")
    assert counts.keys() == {"skipped: disk full: mount namespaces: Operation not permitted"}
    assert code == 1  # nothing else was requested
    assert "nothing was run" in output


def removes_the_existing_checkpoint(monkeypatch):
    def leave(file, *exception):
        file.discard()
        if exception[0] is not None:
            with contextlib.suppress(OSError):
                os.unlink(file.path)

    monkeypatch.setattr(AtomicCheckpointFile, "__exit__", leave)


def removes_another(monkeypatch):
    def leave(file, *exception):
        file.discard()
        if exception[0] is not None:
            for path in file.path.parent.glob("checkpoint-*"):
                path.unlink()

    monkeypatch.setattr(AtomicCheckpointFile, "__exit__", leave)


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


def does_not_check_the_owner_of_the_directory(monkeypatch):
    monkeypatch.setattr(DirectoryLock, "confirm", lambda lock: None)


def lets_system_errors_escape(monkeypatch):
    monkeypatch.setattr(AtomicCheckpointFile, "_save_errors", lambda file: contextlib.nullcontext())
    for module in ("file_writer", "writer"):
        monkeypatch.setattr(
            f"distrust.checkpoint.{module}.save_errors", lambda path: contextlib.nullcontext()
        )


def omits_the_bytes(monkeypatch):
    monkeypatch.setattr(storage, "_free_bytes", lambda directory: None)
    original = storage.SaveFailed
    monkeypatch.setattr(
        storage, "SaveFailed", lambda message, *, path, **_: original(f"{path}: not saved", path=path)
    )


def ignores_failed_calls(monkeypatch):
    def silence(original):
        def call(*arguments):
            with contextlib.suppress(OSError):
                original(*arguments)

        return call

    for method in (Disk.reserve, Disk.write, Disk.truncate):
        monkeypatch.setattr(Disk, method.__name__, silence(method))


FAULTS = {
    removes_the_existing_checkpoint: ("file size", "removed checkpoint-"),
    removes_another: ("file size", "removed checkpoint-"),
    writes_in_place: ("file size", r"changed checkpoint-|left \["),
    leaves_half_a_file: ("file size", "temporary files are left"),
    leaves_a_file_open: ("file size", "open files or threads"),
    lets_system_errors_escape: ("file size", "OSError escaped"),
    omits_the_bytes: ("file size", "gives no reason"),
    ignores_failed_calls: ("file size", "CorruptCheckpoint|NoIntactCheckpoint|step . is loaded"),
    does_not_check_the_owner_of_the_directory: ("directory", "another writer's|saved into a directory"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_it_finds_a_product_that(campaign, monkeypatch, fault):
    only, finding = FAULTS[fault]
    fault(monkeypatch)
    code, _, output = campaign("--seed", 1, "--cases", 400, "--seconds", 60, "--only", only)
    assert code == 1
    (counter_example,) = [
        line for line in output.splitlines() if line.startswith("failing_disks: COUNTEREXAMPLE: ")
    ]
    assert re.search(finding, counter_example), output
    number = output.split("--case ")[1].split()[0]
    code, _, again = campaign("--seed", 1, "--case", number)
    assert code == 1
    assert "COUNTEREXAMPLE" in again


@pytest.mark.parametrize(
    ("most", "finding"),
    [(1, "stopped after 0 failures in a row"), (9, "failures in a row, and it continued")],
)
def test_it_finds_a_trainer_that_stops_too_early_or_too_late(campaign, monkeypatch, most, finding):
    monkeypatch.setattr(saver, "MAX_FAILURES", most)
    code, _, output = campaign("--seed", 1, "--cases", 300, "--seconds", 60, "--only", "toy")
    assert code == 1
    assert finding in output


def test_a_case_that_hangs_or_dies_is_a_counterexample():
    def hang(_counts: Counter[str]) -> None:
        while True:
            os.read(0, 0)

    assert "no answer within 0.3 s" in volumes.run_case(hang, seconds=0.3).violation
    killed = volumes.run_case(lambda _: os.kill(os.getpid(), 9), seconds=30)
    assert "the process died: exit code -9" in killed.violation


def test_an_exception_of_a_case_is_a_counterexample():
    def fail(counts: Counter[str]) -> None:
        counts["tried"] += 1
        raise OSError(errno.EIO, "Input/output error")

    findings = volumes.run_case(fail, seconds=30)
    assert findings.counts == {"tried": 1}
    assert findings.violation.startswith("OSError escaped: [Errno 5] Input/output error\nTraceback")


def test_if_nothing_was_run_no_invariant_is_reported(capsys):
    assert failing_disks.main(["--only", "no such kind", "--cases", "3"]) == 1
    out = capsys.readouterr().out
    assert "nothing was run" in out
    assert "held" not in out
