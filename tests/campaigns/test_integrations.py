"""The campaign of the integrations in short form, and that it can find something."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext

import pytest

from campaigns.integrations import __main__ as command
from campaigns.integrations import protocol, trials
from campaigns.session import Forks

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def forks(forked_python):
    with Forks(protocol.PROGRAM, protocol.IMPORTS, name="a fork", python=[forked_python]) as forks:
        yield forks


@pytest.fixture(autouse=True)
def _few(forks, monkeypatch):
    monkeypatch.setattr(command, "forks", lambda imports: nullcontext(forks))
    monkeypatch.setattr(trials, "KILLS", 2)


def test_ours_and_the_trainers_own_resume_get_the_same_kills(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trials, "KILLS", 1)
    figures, table = tmp_path / "figures.json", tmp_path / "table.md"
    outputs = ["--json", str(figures), "--markdown", str(table), "--directory", str(tmp_path)]
    assert command.main(["--cases", "2", "--subjects", "^(Trainer|SFTTrainer)$", *outputs]) == 0
    counts = json.loads(figures.read_text())["counts"]
    equal, not_resumed = (
        counts.get(f"runs kept by distrust: {end}", 0) for end in ("equal", "equal, never resumed")
    )
    assert equal + not_resumed == 2
    assert counts["kills, kept by distrust"] >= 1  # on a busy machine some come too late
    assert sum(number for name, number in counts.items() if "runs kept by trainer" in name) == 2
    assert re.search(r"\| Trainer \| distrust \| 1 \| \d \| \d \|", table.read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "table.md"]
    assert "every invariant held" in capsys.readouterr().out


def test_a_resume_without_the_generators_is_found(tmp_path, capsys):
    arguments = [
        "--subjects",
        "^Trainer$",
        "--fault",
        "generators",
        "--ours-only",
        "--directory",
        str(tmp_path),
    ]
    # On a busy machine all kills of a case may come before the first checkpoint: then the next case finds it.
    case = next(case for case in "01234" if command.main([*arguments, "--case", case]) == 1)
    output = capsys.readouterr().out
    assert "COUNTEREXAMPLE: Trainer: other weights, moments or generators" in output
    assert f"--seed 1 --case {case}" in output
