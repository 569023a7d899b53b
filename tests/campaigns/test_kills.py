"""The campaign of kills in short form, and that it can find something."""

from __future__ import annotations

import json

import pytest

from campaigns import kills


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


def test_a_run_that_resumes_without_its_optimizer_is_found(toy_runs, tmp_path, capsys):
    toy_runs("forgets_the_optimizer")
    # On a busy machine all kills of a case may come before the first checkpoint: then the next case finds it.
    arguments = ["--directory", str(tmp_path), "--case"]
    case = next((case for case in ("1", "2", "4", "5") if kills.main([*arguments, case]) == 1), None)
    output = capsys.readouterr().out
    assert "ended in another state than the undisturbed run" in output
    assert f"again: python -m campaigns.kills --seed 1 --case {case}" in output


def test_a_run_that_keeps_few_steps_is_found(toy_runs, tmp_path, capsys, monkeypatch):
    toy_runs("keeps_few_steps")
    monkeypatch.setattr(kills, "KILLS", 4)
    cases = ("2", "4", "8", "10")  # forks that keep their steps
    arguments = ["--directory", str(tmp_path), "--case"]
    assert any(kills.main([*arguments, case]) == 1 for case in cases)
    assert "had ended; resumed from" in capsys.readouterr().out
