"""The concurrency campaign in short; and that a broken product is found."""

from __future__ import annotations

import re

import pytest

from campaigns import training_run
from campaigns.concurrency import trainers
from campaigns.concurrency.__main__ import CYCLE, main

#: Of each part, a case: its number says which part it is.
FIRST = {part: str(CYCLE.index(part)) for part in CYCLE}


@pytest.mark.parametrize("part", ["races", "orphans", "programs"])
def test_a_case_of_each(capsys, part):
    assert main(["--case", FIRST[part]]) == 0, capsys.readouterr().out
    assert f"1  {part}: cases\n" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["direct", "buffered"])
def test_readers_beside_a_writer(capsys, path):
    arguments = ["--case", FIRST["readers"], "--readers", "2", "--saves", "20", "--path", path]
    assert main(arguments) == 0, capsys.readouterr().out
    output = capsys.readouterr().out
    assert f"20  saves beside 2 readers, {path}\n" in output
    assert "readers: loads" in output


def test_the_same_training_command_twice(toy_runs, capsys, monkeypatch):
    toy_runs("main")
    monkeypatch.setattr(trainers, "_command", lambda fault: training_run.COMMAND)
    assert main(["--case", FIRST["trainers"]]) == 0, capsys.readouterr().out
    assert "training commands refused with a clear line\n" in capsys.readouterr().out


FAULTS = {
    "no-lock": ("races", ["--cases", "4"], "may write at once|No such file"),
    "children-keep-the-lock": ("orphans", ["--cases", "10"], "of its children live"),
    "children-clean-up": ("orphans", ["--cases", "40"], "not saved: No such file"),
    "in-place": (
        "readers",
        ["--cases", "1", "--readers", "3", "--saves", "30"],
        "damaged|none of them is intact",
    ),
    "removes-the-best": ("readers", ["--cases", "1", "--readers", "3", "--saves", "60"], "is durable"),
    "no-mutex": ("programs", ["--cases", "20"], r"program \d+, rules "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(capsys, fault):
    part, arguments, finding = FAULTS[fault]
    assert main(["--only", part, "--fault", fault, *arguments]) == 1
    output = capsys.readouterr().out
    assert re.search(finding, output), output
    assert "again: python -m campaigns.concurrency --seed 1 --case " in output
