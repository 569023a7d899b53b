"""The campaign of killed saves in short form, and that it finds common mistakes of other savers."""

from __future__ import annotations

import json

import pytest

from campaigns import killed_saves


def test_what_was_durable_stays(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    assert killed_saves.main(["--cases", "1", "--directory", str(tmp_path), "--json", str(figures)]) == 0
    counts = json.loads(figures.read_text())["counts"]
    assert counts["kills"] >= killed_saves.KILLS / 2
    assert "every invariant held" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.parametrize("fault", ["in-place", "one-only", "removed-first"])
def test_a_fault_is_found(tmp_path, capsys, fault):
    assert killed_saves.main(["--fault", fault, "--seconds", "60", "--directory", str(tmp_path)]) == 1
    assert "COUNTEREXAMPLE" in capsys.readouterr().out
