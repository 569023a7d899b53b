"""Packed rows: exact resume, counting of examples, and the mean of the weights."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distrust import DistrustTrainer, TrainConfig
from distrust.errors import NonFiniteLoss
from distrust.testing.models import write_records
from distrust.testing.toy_engine import TOY, ToyEngine
from distrust.training.data_sources import read_sources
from distrust.training.events import Evaluated, StepEnded
from distrust.training.prepare_data import PreparedData, prepare_data

CAPACITY = 70  # tokens of a row; the records have 8 to 30


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("two")
    return (
        str(write_records(folder / "many.jsonl", 23, seed=1)),
        str(write_records(folder / "few.jsonl", 9, seed=2)),
    )


@pytest.fixture(scope="module")
def plan_of(sources):
    def plan_of(**options: Any) -> PreparedData:
        config = TrainConfig(**{"data": sources, "packing": True, "max_length": CAPACITY, **TOY, **options})
        return prepare_data(
            config,
            read_sources(config),
            ToyEngine().tokenizer,
            context_length=None,
        )

    return plan_of


MIXED = {"mix": (1.0, 2.0), "eval_fraction": 0.2}


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stops=st.lists(st.integers(1, 11), min_size=1, max_size=3, unique=True).map(sorted),
    options=st.sampled_from([{}, {"mix": (0.3, 0.7)}, MIXED, {**MIXED, "batch_size": 1}]),
)
def test_stopped_run_ends_in_the_same_state(run, sources, stops, options):
    options = {"data": sources, "packing": True, "max_length": CAPACITY, "max_steps": 12, **options}
    with tempfile.TemporaryDirectory() as folder:
        alone, expected = run(Path(folder, "alone"), save_every=0, **options)
        losses = []
        for stop in [*stops, None]:
            ended, events = run(Path(folder, "stopped"), stop_after=stop, save_every=5, **options)
            losses += [event.loss for event in events if isinstance(event, StepEnded)]
        assert losses == [event.loss for event in expected if isinstance(event, StepEnded)]
        assert ended.state_digest == alone.state_digest
        assert any(isinstance(event, Evaluated) for event in events) == ("eval_fraction" in options)


def test_packing_reduces_the_steps(run, sources, tmp_path):
    options = {"data": sources, "max_length": CAPACITY, "max_steps": None, "epochs": 1}
    plain, _ = run(tmp_path / "plain", **options)
    packed, steps = run(tmp_path / "packed", packing=True, **options)
    assert packed.step < plain.step / 2
    assert packed.state_digest != plain.state_digest
    assert sum(event.tokens for event in steps if isinstance(event, StepEnded)) > 0


def tokens_and_weights(plan: PreparedData, *, epochs: int) -> tuple[int, float, list[int]]:
    """Trained tokens of whole epochs, the sum of their weights, and the examples in order."""
    steps = plan.batches.epoch_steps * epochs
    assert steps == int(steps)
    batches = [batch for step in range(1, int(steps) + 1) for batch in plan.batches.step(step)]
    sampled = [int(example) for batch in batches for example in batch.examples]
    weights = math.fsum(float(batch.weights.sum(dtype=np.float64)) for batch in batches)
    return sum(batch.tokens for batch in batches), weights, sampled


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("mix", [None, (1.0, 1.0), (0.2, 0.8), (1.0, 0.0)])
def test_weights_have_mean_one_over_sampled_tokens(plan_of, mix, packing):
    plan = plan_of(mix=mix, packing=packing, batch_size=1, gradient_accumulation=1)
    assert plan.weights.max() / plan.weights.min() > 2
    # After this many epochs, all rows of a source have been sampled equally often.
    epochs = 1 if mix is None else math.lcm(*(ROWS if packing else (23, 9)))
    tokens, weights, sampled = tokens_and_weights(plan, epochs=epochs)
    assert weights == pytest.approx(tokens, rel=1e-6)
    counts = np.bincount(sampled, minlength=32)
    assert len(set(counts[:23])) == len(set(counts[23:])) == 1
    assert (len(set(counts)) == 1) == (mix is None)
    contributions = plan.weights * counts  # each example's share of the gradient
    assert plan.distribution.effective_examples == pytest.approx(
        contributions.sum() ** 2 / (contributions**2).sum()
    )


def test_each_example_is_in_one_row_of_its_source(plan_of):
    plan = plan_of(batch_size=1, gradient_accumulation=1)
    assert plan.batches.epoch_steps == sum(ROWS)
    rows = [plan.batches.step(step)[0] for step in range(1, sum(ROWS) + 1)]
    assert sorted(example for row in rows for example in row.examples) == list(range(32))
    assert all(len(set(row.examples >= 23)) == 1 for row in rows)
    assert all(row.lengths.sum() <= CAPACITY for row in rows)
    assert sum(all(row.examples >= 23) for row in rows) == ROWS[1]


#: Numbers of rows of the two sources.
ROWS = (6, 2)


def test_mix_of_one_source_uses_all_of_it(plan_of, sources):
    alone = plan_of(data=sources[0], mix=(1.0,))
    assert alone.weights.tolist() == pytest.approx(plan_of(data=sources[0]).weights.tolist())


def test_non_finite_loss_names_the_example_in_a_row(sources, tmp_path):
    config = TrainConfig(
        out=str(tmp_path), **{**TOY, "data": sources[0], "packing": True, "max_length": CAPACITY}
    )
    with pytest.raises(NonFiniteLoss) as error:
        DistrustTrainer(config, engine=ToyEngine(poisoned=[4])).train()
    assert error.value.examples == (f"{sources[0]}:5",)
