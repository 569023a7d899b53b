"""The campaign of killed steps in short form, and that it can find something."""

from __future__ import annotations

from campaigns import killed_steps
from distrust.checkpoint.step_snapshots import StepSnapshots


def test_at_most_one_step_is_lost(tmp_path, capsys):
    assert killed_steps.main(["--cases", "1", "--directory", str(tmp_path)]) == 0
    assert "every invariant held" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_steps_that_are_not_kept_are_found(tmp_path, capsys, monkeypatch):
    due, calls = StepSnapshots.is_due, []

    def is_due_once(snapshots, budget):  # in each process
        calls.append(budget)
        return len(calls) == 1 and due(snapshots, budget)

    monkeypatch.setattr(StepSnapshots, "is_due", is_due_once)
    assert killed_steps.main(["--cases", "3", "--directory", str(tmp_path)]) == 1
    assert "had ended; resumed from" in capsys.readouterr().out
