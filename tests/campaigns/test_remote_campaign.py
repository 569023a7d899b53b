"""The campaign of mirrored runs in short form, and that it finds a fault, one at random."""

from __future__ import annotations

import json
import random

import pytest

from campaigns.remote import __main__ as command
from campaigns.remote import cases
from campaigns.remote.faults import FAULTS

#: The cases that find each fault soonest.
FOUND_BY = {
    "by-name": "late",
    "exists-is-mine": "several",
    "exists-is-not-mine": "flaky",
    "no-base": "late",
    "no-condition": "several",
    "no-confirmation": "late",
    "no-verification": "damage",
}


@pytest.fixture
def campaign(share_server, tmp_path, monkeypatch):
    """Runs the campaign with few kills of each run; returns the exit code and the counts."""
    store = share_server("seaweedfs")
    for name in store.environment:
        monkeypatch.setenv(name, "")  # restored after the campaign has set it
    monkeypatch.setattr(cases, "KILLS", 4)
    monkeypatch.setattr(cases, "STEPS", 60)

    def run(*arguments):
        figures = tmp_path / "figures.json"
        options = ["--directory", str(tmp_path), "--json", str(figures), *arguments]
        code = command.main(options, store=store)
        return code, json.loads(figures.read_text())["counts"]

    return run


def test_a_run_survives_the_loss_of_its_machines(campaign, tmp_path, capsys):
    code, counts = campaign("--only", "kills", "--cases", "1")
    assert code == 0, capsys.readouterr().out
    assert counts["killed runs that ended in the undisturbed state"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_a_planted_fault_is_found(campaign, capsys):
    assert FOUND_BY.keys() == FAULTS.keys()
    fault = random.choice(sorted(FAULTS))
    code, _ = campaign("--fault", fault, "--only", FOUND_BY[fault], "--seconds", "120")
    assert code == 1, f"{fault}: {capsys.readouterr().out}"
    assert "COUNTEREXAMPLE" in capsys.readouterr().out
