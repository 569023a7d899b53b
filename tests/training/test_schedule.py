"""The learning rate is a pure function of the step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrust.training.events import StepEnded
from distrust.training.schedule import learning_rate, warmup

options = st.fixed_dictionaries(
    {
        "peak": st.floats(1e-8, 1.0),
        "warmup_steps": st.integers(0, 50),
        "schedule": st.sampled_from(["cosine", "linear", "constant", "wsd"]),
        "schedule_steps": st.integers(1, 200),
        "decay_ratio": st.floats(0, 1),
    }
)


def rates(of, last=300):
    return {step: learning_rate(step, **of) for step in range(1, last)}


@given(options)
def test_rises_to_the_peak_once(of):
    values = rates(of)
    top = max(of["warmup_steps"], 1)
    for step in range(2, 300):
        if step <= top:
            assert values[step] > values[step - 1]
        else:
            assert values[step] <= values[step - 1]
    assert all(0 <= rate <= of["peak"] for rate in values.values())
    if of["warmup_steps"]:
        assert values[top] == of["peak"]
        assert values[1] == pytest.approx(of["peak"] / top)


@given(options)
def test_rate_is_positive_until_the_schedule_ends(of):
    values = rates(of)
    for step, rate in values.items():
        if of["schedule"] == "constant" or step <= max(of["schedule_steps"], of["warmup_steps"]):
            assert rate > 0
        else:
            assert rate == 0


@given(options, st.integers(1, 10**9))
def test_rate_is_a_pure_function_of_the_step(of, step):
    assert learning_rate(step, **of) == learning_rate(step, **of)
    if of["schedule"] == "constant" and step >= of["warmup_steps"]:
        assert learning_rate(step, **of) == of["peak"]


def test_known_values():
    cosine = {"peak": 1.0, "warmup_steps": 2, "schedule": "cosine", "schedule_steps": 9}
    assert rates(cosine, 4) == {1: 0.5, 2: 1.0, 3: pytest.approx(0.9619397662556434)}
    assert learning_rate(6, **cosine) == pytest.approx(0.5)  # half way from 2 to 10
    linear = {**cosine, "schedule": "linear"}
    assert [learning_rate(step, **linear) for step in (2, 4, 8, 9, 10, 10**6)] == [1, 0.75, 0.25, 0.125, 0, 0]


@given(options, st.integers(1, 200))
def test_a_stable_phase_ends_with_a_line_to_zero(of, longer):
    of = of | {"schedule": "wsd"}
    last, warm = of["schedule_steps"], of["warmup_steps"]
    decay = math.ceil(of["decay_ratio"] * last)
    values, grown = rates(of), rates(of | {"schedule_steps": last + longer})
    for step in range(1, 300):
        if warm <= step <= last - decay:
            assert values[step] == of["peak"]
        if step <= last - decay:
            assert grown[step] == values[step]  # a longer schedule changes no step before the decay
    if last - decay >= warm:
        for step in range(last - decay + 1, last + 1):
            assert values[step] == pytest.approx(of["peak"] * (last + 1 - step) / (decay + 1))


def test_warmup_ratio_is_a_share_of_the_schedule():
    assert warmup(10, None, schedule_steps=50) == 10
    assert [warmup(10, ratio, schedule_steps=50) for ratio in (0.0, 0.03, 0.1, 1.0)] == [0, 2, 5, 50]


def test_run_uses_the_warmup_ratio(run, tmp_path):
    _, events = run(tmp_path / "ratio", warmup_ratio=0.4, max_steps=5, schedule_steps=10)
    _, same = run(tmp_path / "steps", warmup_steps=4, max_steps=5, schedule_steps=10)
    values = [[e.learning_rate for e in es if isinstance(e, StepEnded)] for es in (events, same)]
    assert values[0] == values[1]
