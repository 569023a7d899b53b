"""``python -m benchmarks.ranks``: it times steps of both kinds, and compares within a round."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import ranks as benchmark


def test_it_compares_within_a_round(world, tiny_model, monkeypatch, capsys):
    calls = []

    def measure(setting, *, ranks):
        assert Path(setting.model).is_dir()
        calls.append(ranks)
        if len(calls) <= 2:  # the first round, which times real steps
            values = {**vars(setting), "model": str(tiny_model), "vocabulary": 259}
            timed = world.values("benchmarks.ranks:time_steps", count=ranks, threads=1, **values)[0]
            assert {name: len(times) for name, times in timed.items()} == dict.fromkeys(timed, setting.steps)
            assert [*timed] == ["exact", "fast"][:ranks]
        factor = (len(calls) + 1) // 2  # both of a round are as slow
        if ranks == 1:
            return {"exact": [1.4 * factor]}
        return {"exact": [2.04 * factor, 1.02 * factor], "fast": [2.0 * factor, 1.0 * factor]}

    monkeypatch.setattr(benchmark, "_measure", measure)
    options = ("--size", "tiny", "--row", "16", "--micro-batches", "2", "--steps", "2", "--rounds", "2")
    monkeypatch.setattr(sys, "argv", ["benchmark", *options, "--lora-ranks", "2"])
    assert benchmark.main() == 0
    assert calls == [2, 1, 2, 1]
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "LoRA of rank 2: an exact reduction costs 2.00 % of a step (aim: at most 3 %: reached)",
        "LoRA of rank 2: 2 ranks of one thread have 0.915 of the tokens/s of one process of 2 threads "
        "(aim: at least 0.95: NOT reached)",
    ]
