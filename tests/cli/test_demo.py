"""The demo with trainings of a few steps: what it prints and draws, and that it resumes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from distrust import demo


@pytest.fixture
def short(monkeypatch):
    demo_config = demo.demo_config

    def config(weighting, *, out, seed):
        return replace(demo_config(weighting, out=out, seed=seed), max_steps=2, batch_size=4)

    monkeypatch.setattr(demo, "demo_config", config)
    questions = demo.read_questions()
    few = [question for question in questions if question.fact in {q.fact for q in questions[:6]}]
    monkeypatch.setattr(demo, "read_questions", lambda: few)


def test_the_output(short, distrust, tmp_path):
    first = distrust("demo", "--out", tmp_path, "--json")
    assert first.code == 0, first.err
    figures = json.loads(first.out)
    assert list(figures["models"]) == ["before", "off", "monotone"]
    assert figures["facts"] == len({question.fact for question in demo.read_questions()})
    for model in figures["models"].values():
        assert all(0 <= value <= 1 for value in model.values())
    # Both were trained: neither holds what the base model holds, nor what the other one does.
    assert len({model["coordinated"] for model in figures["models"].values()}) == 3
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")

    again = distrust("demo", "--out", tmp_path)
    assert again.code == 0
    assert again.out.count("Nothing to do: the run finished at step 2") == 2
    assert f"{figures['models']['monotone']['preferred']:.0%}" in again.out


def test_a_belief_is_a_mean_over_the_questions_of_a_fact():
    beliefs = [
        demo.Belief("a", primary=0.5, coordinated=0.1, margin=1.6),
        demo.Belief("b", primary=0.1, coordinated=0.3, margin=-1.1),
    ]
    means = {"preferred": 0.5, "primary": 0.3, "coordinated": 0.2}
    assert demo.summarize(beliefs) == pytest.approx(means)
