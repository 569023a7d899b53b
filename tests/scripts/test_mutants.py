"""The planted faults: the tests notice them, and the runner says so when they do not."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from scripts import mutants

ROOT = Path(__file__).resolve().parents[2]

CODE = "def double(x):\n    return 2 * x\n"
TESTS = """
import pytest
from doubling import double

def test_double():
    assert double(2) == 4

def test_nothing():
    double(2)

@pytest.mark.skip
def test_skipped():
    assert double(2) == 4
"""


@pytest.fixture
def repository(tmp_path, forked_python, monkeypatch):
    """A repository with one function; ``plant(name, new, test, old)`` adds a row to its table.

    Its tests need nothing of this repository, so that their processes may be forks.
    """
    monkeypatch.setattr(sys, "executable", str(forked_python))
    for name, text in {"src/doubling.py": CODE, "tests/test_doubling.py": TESTS}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    table = tmp_path / mutants.TABLE / "toy.toml"
    table.parent.mkdir(parents=True)

    def plant(name: str, new: str, test: str, old: str = "2 * x") -> None:
        tests = [f"tests/test_doubling.py::{test}"]
        with table.open("a") as file:
            file.write(f'[[mutant]]\nname = "{name}"\nfile = "src/doubling.py"\n')
            file.write(f"old = '{old}'\nnew = '{new}'\ntests = {tests}\n")

    plant.root = tmp_path
    return plant


def test_every_row_of_the_table_applies():
    table = mutants.read_table(ROOT)
    problems = {f"{each.area}: {each.name}": each.check(ROOT) for each in table}
    assert {name: problem for name, problem in problems.items() if problem} == {}
    assert len(problems) == len(table), "two rows of one area have the same name"


def test_planted_faults_are_noticed():
    """One of the quick ones, each time another; `make mutants` plants all."""
    arguments = ["--quick", "--sample", "1", "--seed", str(random.randrange(10**6))]
    assert mutants.main(arguments) == 0, f"to repeat: python scripts/mutants.py {' '.join(arguments)}"


def test_verdicts(repository, capsys):
    repository("a caught one", "3 * x", "test_double")
    repository("one that survives", "3 * x", "test_nothing")
    repository("a skipped test", "3 * x", "test_skipped")
    repository("one that cannot run", "y * x", "test_double")
    repository("no Python", "2 *", "test_double")
    repository("a stale row", "3 * x", "test_double", old="4 * x")
    repository("an ambiguous row", "y", "test_double", old="x")
    repository("a removed test", "3 * x", "test_triple")
    assert mutants.main(["--root", str(repository.root), "--jobs", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    verdicts = {line.split("toy: ")[1]: line.split()[1] for line in lines if line.startswith("[")}
    assert verdicts == {
        "a caught one": "caught",
        "one that survives": "survived",
        "a skipped test": "skipped",
        "one that cannot run": "error",
        "no Python": "error",
        "a stale row": "error",
        "an ambiguous row": "error",
        "a removed test": "error",
    }
    assert "survived: toy: one that survives" in lines
    assert (repository.root / "src/doubling.py").read_text() == CODE


def test_without_a_fault_the_tests_must_pass(repository, capsys):
    repository("a fault", "3 * x", "test_double")
    (repository.root / "src/doubling.py").write_text(CODE + "\n\nprint(1 / 0)\n")
    assert mutants.main(["--root", str(repository.root)]) == 1
    assert "error: without a fault they must pass" in capsys.readouterr().out


def test_a_fault_that_makes_the_tests_hang_is_an_error(repository, tmp_path):
    repository("endless", '__import__("time").sleep(60)', "test_double")
    (mutant,) = mutants.read_table(repository.root)
    verdict, reason = mutants.judge(mutants.Copy(repository.root, tmp_path / "copy"), mutant, limit=1)
    assert (verdict, "more than 1 s" in reason) == ("error", True)


def test_faults_are_selected_by_area_and_name(repository, capsys):
    repository("a first fault", "3 * x", "test_double")
    repository("a second fault", "4 * x", "test_double")
    for names, count in ((["toy"], 2), (["second"], 1), ([], 2)):
        assert mutants.main(["--root", str(repository.root), "--list", *names]) == 0
        assert capsys.readouterr().out.count("fault") == count
    with pytest.raises(SystemExit):
        mutants.main(["--root", str(repository.root), "third"])
