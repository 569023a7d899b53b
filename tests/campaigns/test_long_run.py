"""The long runs in short; and that each kind of growth is found, which is the product's fault or planted."""

from __future__ import annotations

import argparse

import pytest

from campaigns.campaign import Campaign, CounterExample
from campaigns.faults import FAULTS
from campaigns.long_run import verdict
from campaigns.long_run.__main__ import main


def test_some_hundred_saves_leave_nothing_behind(tmp_path, capsys):
    picture = tmp_path / "run.png"
    assert main(["--only", "saves", "--cases", "240", "--picture", str(picture)]) == 0, (
        capsys.readouterr().out
    )
    told = capsys.readouterr().out
    assert "240  saves\n" in told
    assert "saves: save, µs at the end" in told
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_so_does_training(capsys):
    assert main(["--only", "training", "--steps", "120"]) == 0, capsys.readouterr().out
    assert "120  steps trained\n" in capsys.readouterr().out


def test_a_directory_that_keeps_many(capsys):
    assert main(["--only", "standing", "--standing", "40"]) == 0, capsys.readouterr().out
    assert "80  saves into a directory that keeps many\n" in capsys.readouterr().out


FOUND = {
    "descriptors": "descriptors differ",
    "threads": "threads differ",
    "memory": "resident grew by",
    "removes-nothing": "saves the rules keep",
}


@pytest.mark.parametrize("fault", FOUND)
def test_what_is_left_behind_is_found(capsys, fault):
    assert fault in FAULTS
    # Removed is what no rule keeps: that nothing is, shows at once.
    cases = "30" if fault == "removes-nothing" else "120"
    assert main(["--only", "saves", "--cases", cases, "--fault", fault, "--seed", "3"]) == 1
    told = capsys.readouterr().out
    assert FOUND[fault] in told
    assert "again: python -m campaigns.long_run --seed 3 --case " in told


def samples(**at_the_end: float) -> list[dict[str, float]]:
    usual = {"save": 1.0, "returns": 1.0, "disk": 1.0, "cpu": 1.0}
    return [{**usual, **(at_the_end if number >= 15 else {})} for number in range(20)]


@pytest.mark.parametrize(
    ("at_the_end", "found"),
    [
        ({}, False),
        ({"save": 1.4}, False),
        ({"save": 2.0}, True),
        ({"save": 2.0, "disk": 2.0}, False),
        ({"save": 4.0, "disk": 2.0}, True),
        ({"cpu": 2.0}, True),
    ],
)
def test_saves_that_get_slower_are_found_and_a_disk_that_does_is_not(at_the_end, found):
    campaign = Campaign("long_run", argparse.Namespace(seed=1, seconds=None, cases=None, case=None), cases=1)
    verdict.slowed(campaign, "saves", samples(**at_the_end), counts=False)
    if found:
        with pytest.raises(CounterExample, match=r"times"):
            verdict.slowed(campaign, "saves", samples(**at_the_end), counts=True)
    else:
        verdict.slowed(campaign, "saves", samples(**at_the_end), counts=True)
