"""``python -m benchmarks.training``: it says which trainers it leaves out."""

from __future__ import annotations

import sys

import pytest

from benchmarks.training import __main__ as benchmark
from benchmarks.training import trainers


@pytest.mark.parametrize("named", [(), ("--trainers", "TRL", "distrust")])
def test_a_trainer_whose_library_is_missing_is_named(monkeypatch, capsys, named):
    monkeypatch.setattr(trainers, "find_spec", lambda library: None if library == "trl" else library)

    def end(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "make", end)
    monkeypatch.setattr(sys, "argv", ["benchmark", *named])
    with pytest.raises(KeyboardInterrupt):
        benchmark.main()
    expected = [name for name in trainers.TRAINERS if "TRL" in name and (name in named or not named)]
    assert expected
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == sorted(f"{name}: left out, because trl is not installed" for name in expected)
