"""The long runs in short; and that each planted kind of growth is found."""

from __future__ import annotations

import argparse

import pytest

from campaigns.campaign import Campaign, CounterExample
from campaigns.faults import FAULTS
from campaigns.long_run import growth
from campaigns.long_run.__main__ import main


def test_some_hundred_saves_leak_nothing(tmp_path, capsys):
    picture = tmp_path / "run.png"
    assert main(["--only", "saves", "--cases", "120", "--picture", str(picture)]) == 0, (
        capsys.readouterr().out
    )
    output = capsys.readouterr().out
    assert "120  saves\n" in output
    assert "saves: save, µs at the end" in output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_training_leaks_nothing(capsys):
    assert main(["--only", "training", "--steps", "40"]) == 0, capsys.readouterr().out
    assert "40  steps trained\n" in capsys.readouterr().out


def test_a_directory_that_keeps_many(capsys):
    assert main(["--only", "many", "--many", "20"]) == 0, capsys.readouterr().out
    assert "40  saves into a directory that keeps many\n" in capsys.readouterr().out


FINDINGS = {
    "descriptors": "descriptors differ",
    "threads": "threads differ",
    "memory": "resident grew by",
    "removes-nothing": "saves the rules retain",
}


@pytest.mark.parametrize("fault", FINDINGS)
def test_a_leak_is_found(capsys, fault):
    assert fault in FAULTS
    # A clean-up that removes nothing is found at once.
    cases = "30" if fault == "removes-nothing" else "120"
    assert main(["--only", "saves", "--cases", cases, "--fault", fault, "--seed", "3"]) == 1
    output = capsys.readouterr().out
    assert FINDINGS[fault] in output
    assert "again: python -m campaigns.long_run --seed 3 --case " in output


def samples(**at_the_end: float) -> list[dict[str, float]]:
    usual = {"save": 1.0, "returns": 1.0, "disk": 1.0, "cpu": 1.0}
    return [{**usual, **(at_the_end if number >= 15 else {})} for number in range(20)]


@pytest.mark.parametrize(
    ("at_the_end", "is_slower"),
    [
        ({}, False),
        ({"save": 1.4}, False),
        ({"save": 2.0}, True),
        ({"save": 2.0, "disk": 2.0}, False),
        ({"save": 4.0, "disk": 2.0}, True),
        ({"cpu": 2.0}, True),
    ],
)
def test_saves_that_get_slower_are_found_and_a_disk_that_does_is_not(at_the_end, is_slower):
    campaign = Campaign("long_run", argparse.Namespace(seed=1, seconds=None, cases=None, case=None), cases=1)
    growth.require_no_slowdown(campaign, "saves", samples(**at_the_end), enforce=False)
    if is_slower:
        with pytest.raises(CounterExample, match=r"times"):
            growth.require_no_slowdown(campaign, "saves", samples(**at_the_end), enforce=True)
    else:
        growth.require_no_slowdown(campaign, "saves", samples(**at_the_end), enforce=True)
