"""The campaign of kills in short form, and that it can find something."""

from __future__ import annotations

import json

import pytest

from campaigns import kills
from campaigns.triggers import once_on_disk, once_printed


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(kills, "KILLS", 1)


def test_killed_as_a_command_and_as_forks(toy_runs, tmp_path, capsys):
    toy_runs("main")
    figures = tmp_path / "figures.json"
    assert kills.main(["--cases", "3", "--directory", str(tmp_path), "--json", str(figures)]) == 0
    counts = json.loads(figures.read_text())["counts"]
    assert counts["kills of a command"] >= 1
    assert counts["kills of a fork"] >= 1
    assert "every invariant held" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_a_run_that_resumes_without_its_optimizer_is_found(toy_runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kills, "random_instant", lambda *_, **__: (once_on_disk("renamed", 2), 0.0))
    toy_runs("forgets_the_optimizer")
    assert kills.main(["--directory", str(tmp_path), "--case", "1"]) == 1
    output = capsys.readouterr().out
    assert "ended in another state than the undisturbed run" in output
    assert "again: python -m campaigns.kills --seed 1 --case 1" in output


def test_a_run_that_keeps_few_steps_is_found(toy_runs, tmp_path, capsys, monkeypatch):
    toy_runs("keeps_few_steps")
    monkeypatch.setattr(kills, "KILLS", 4)
    # Of four steps only the first is kept.
    monkeypatch.setattr(kills, "random_instant", lambda *_, **__: (once_printed("step ", 3), 0.0))
    cases = ("2", "4", "8", "10")  # forks that keep their steps
    arguments = ["--directory", str(tmp_path), "--case"]
    assert any(kills.main([*arguments, case]) == 1 for case in cases)
    assert "had ended; resumed from" in capsys.readouterr().out
