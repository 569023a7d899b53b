"""The campaign of signals in short form, and that it can find something."""

from __future__ import annotations

import json
import signal

import pytest

from campaigns import signals
from campaigns.signals import Moment, Stop
from campaigns.triggers import once_printed


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(signals, "SIGNALS", 2)


def test_signals_to_a_command_and_to_forks(toy_runs, tmp_path, capsys):
    toy_runs("main")
    figures = tmp_path / "figures.json"
    assert signals.main(["--cases", "2", "--directory", str(tmp_path), "--json", str(figures)]) == 0
    counts = json.loads(figures.read_text())["counts"]
    assert counts["signals to a command"] >= 1
    assert counts["signals to a fork"] >= 1
    assert "every invariant held" in capsys.readouterr().out


def test_a_run_that_stops_without_saving_is_found(toy_runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(signals, "random_stop", lambda rng: Stop(signal.SIGTERM))
    in_the_loop = Moment("in the loop", once_printed("step ", 3), 0.0)
    monkeypatch.setattr(signals, "random_moment", lambda rng, last: in_the_loop)
    toy_runs("stops_without_saving")
    assert signals.main(["--case", "5", "--directory", str(tmp_path)]) == 1
    assert "] was trained, " in capsys.readouterr().out
