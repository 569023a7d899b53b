"""What an evaluation comes to: plain and weighted, in all and by source class; and what is done by it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distrust import CheckpointManager, DistrustWarning, TrainConfig, weighting
from distrust.data import NO_CLASS, Completion, Location, Record, Text, tokenize
from distrust.data.corpus import MAX_CLASSES, OTHER_CLASSES
from distrust.errors import ConfigError
from distrust.testing.toy_engine import ToyEngine, ToyTokenizer
from distrust.training.evaluation_set import CLASSES_MEASURED, evaluation_set
from distrust.training.events import Evaluated, RunStarted


def evaluated(events):
    return [event for event in events if isinstance(event, Evaluated)]


def write_classes(path, classes, *, column="source"):
    """A record of each class, or of none where it is None."""
    rows = [
        {
            "text": "ore salt melts"[: 5 + number % 9],
            "authority_weight": round(number % 10 / 11, 3),
            "provenance_entropy": number % 4,
        }
        | ({} if name is None else {column: name})
        for number, name in enumerate(classes)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


records = st.lists(
    st.builds(
        Record,
        location=st.just(Location("data", 1)),
        authority_weight=st.floats(0, 0.99),
        provenance_entropy=st.floats(0, 5),
        content=st.builds(Text, st.text("abc", min_size=2, max_size=6))
        | st.builds(Completion, st.text("abc", max_size=3), st.text("abc", min_size=1, max_size=3)),
        source=st.sampled_from(["notebook", "press", ""]),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(records, st.integers(1, 5), st.sampled_from(["monotone", "published", "off"]))
def test_losses_are_means_over_tokens_by_their_definition(rows, batch_size, how):
    corpus = tokenize(rows, ToyTokenizer(), max_length=8)
    engine = ToyEngine()
    found = evaluation_set(corpus, TrainConfig(weighting=how)).measure(
        lambda batch: engine.evaluate(batch).cross_entropy, batch_size=batch_size, pad_token_id=0
    )

    u = weighting.example_weights(corpus.authority_weight, corpus.provenance_entropy, weighting=how)
    each = [
        evaluation_set(corpus.select([number]), TrainConfig()).measure(
            lambda batch: engine.evaluate(batch).cross_entropy, batch_size=1, pad_token_id=0
        )["eval_loss"]
        for number in range(len(rows))
    ]
    tokens = corpus.loss_tokens

    def mean(weights):
        return pytest.approx(np.average(each, weights=weights), rel=1e-9)

    assert found["eval_loss"] == mean(tokens)
    assert found["eval_weighted_loss"] == mean(tokens * u)
    classes = {row.source for row in rows}
    shown = {name or NO_CLASS for name in classes} if len(classes) > 1 else set()
    assert {name.partition("/")[2] for name in found if "/" in name} == shown
    for name in classes if len(classes) > 1 else ():
        of_class = np.array([row.source == name for row in rows])
        assert found[f"eval_loss/{name or NO_CLASS}"] == mean(tokens * of_class)
    for name, loss in list(found.items()):
        if "loss" in name:
            assert found[name.replace("loss", "perplexity", 1)] == math.exp(loss)


def test_provenance_of_the_eval_set_is_no_duty_and_a_default_serves_it(run, tmp_path):
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"text": "ore"}\n{"text": "salt", "authority_weight": 0.1, "provenance_entropy": 4}\n')
    _, events = run(tmp_path / "a", eval_data=str(plain), max_steps=2)
    _, defaults = run(
        tmp_path / "b",
        eval_data=str(plain),
        max_steps=2,
        default_authority_weight=0.1,
        default_provenance_entropy=4.0,
    )
    (first,), (second,) = evaluated(events), evaluated(defaults)
    assert first.metrics["eval_weighted_loss"] != first.loss
    assert second.metrics["eval_weighted_loss"] == second.loss == first.loss


def test_the_source_class_is_any_column(run, tmp_path):
    data = write_classes(tmp_path / "eval.jsonl", ["final", "draft", 7, None, NO_CLASS], column="status")
    _, events = run(tmp_path / "run", eval_data=data, source_column="status", max_steps=1)
    (event,) = evaluated(events)
    assert {name.partition("/")[2] for name in event.metrics} - {""} == {"final", "draft", "7", NO_CLASS}
    _, events = run(tmp_path / "other", eval_data=data, max_steps=1)
    (event,) = evaluated(events)
    assert not [name for name in event.metrics if "/" in name]


def test_a_class_column_that_nobody_has_is_told(run, eval_data, tmp_path):
    with pytest.warns(DistrustWarning, match="--source-column statuss: no record has this column"):
        run(tmp_path, eval_data=str(eval_data), source_column="statuss", max_steps=1)


def test_a_class_that_nothing_is_evaluated_of_is_named(run, tmp_path):
    data = write_classes(tmp_path / "data.jsonl", ["final", "draft", "old"], column="status")
    eval_data = write_classes(tmp_path / "eval.jsonl", ["final", "draft"], column="status")
    with pytest.warns(DistrustWarning, match="status: the evaluation data has no examples of old, so"):
        run(tmp_path / "run", data=data, eval_data=eval_data, source_column="status", max_steps=1)


def test_a_column_of_identities_is_no_flood(run, tmp_path):
    count = MAX_CLASSES + 50
    data = write_classes(tmp_path / "data.jsonl", [f"https://{n}" for n in range(count)])
    _, events = run(tmp_path / "run", data=data, eval_data=data, max_steps=1)
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    assert sum(row.examples for row in started.distribution.classes) == count
    assert OTHER_CLASSES in {row.name for row in started.distribution.classes}
    (event,) = evaluated(events)
    assert sum(name.startswith("eval_loss/") for name in event.metrics) == CLASSES_MEASURED


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.none() | st.text(max_size=4) | st.integers() | st.booleans(), min_size=1, max_size=9)
)
def test_any_class_is_trained_on_as_any_other(run, tmp_path_factory, names):
    """What a record's class is called changes nothing of the run: it is shown, and no more."""
    folder = tmp_path_factory.mktemp("classes")
    named, _ = run(folder / "a", data=write_classes(folder / "a.jsonl", names), max_steps=2)
    plain, _ = run(folder / "b", data=write_classes(folder / "b.jsonl", [None] * len(names)), max_steps=2)
    assert named.state_digest == plain.state_digest


#: The toy overfits: its eval losses are best after a few steps.
OVERFITS = {"max_steps": 30, "learning_rate": 0.5}


def test_all_that_was_logged_is_in_the_checkpoint_and_any_of_it_tells_the_best(run, eval_data, tmp_path):
    rows = [json.loads(line) for line in eval_data.read_text().splitlines()]
    data = tmp_path / "eval.jsonl"
    data.write_text("".join(json.dumps({**row, "source": "ab"[i % 2]}) + "\n" for i, row in enumerate(rows)))
    _, events = run(
        tmp_path / "run", eval_data=str(data), eval_every=1, metric="eval_loss/b", save_every=7, **OVERFITS
    )
    losses = {event.step: event.metrics["eval_loss/b"] for event in evaluated(events)}
    manager = CheckpointManager(tmp_path / "run" / "checkpoints", metric="eval_loss/b")
    best = min(losses, key=losses.get)
    assert best % 7
    assert manager.load_best().step == best
    (event,) = [event for event in evaluated(events) if event.step == best]
    assert event.metrics.items() <= manager.inspect(best).metrics.items()


def test_the_best_one_does_not_wait_for_the_next_save(run, eval_data, tmp_path):
    """Between two saves due, and long before the first: it is there when it is wanted."""
    options = {"eval_data": str(eval_data), "eval_every": 2, **OVERFITS}
    _, events = run(tmp_path, save_every=100, **options)
    losses = {event.step: event.loss for event in evaluated(events)}
    best = min(losses, key=losses.get)
    assert best < 30
    assert CheckpointManager(tmp_path / "checkpoints").load_best().step == best
    run(tmp_path / "none", save_every=0, **options)
    assert CheckpointManager(tmp_path / "none" / "checkpoints").list_checkpoints() == [30]


def test_losses_on_other_data_are_not_compared(run, eval_data, tmp_path):
    """Neither for the best checkpoint, nor for the patience that ends a run."""
    hard = tmp_path / "hard.jsonl"
    rows = [json.loads(line) for line in eval_data.read_text().splitlines()]
    hard.write_text("".join(json.dumps({**row, "text": "xq zz"}) + "\n" for row in rows))
    options = {"eval_every": 2, "save_every": 2, "keep_last": 1, "schedule": "constant", "warmup_steps": 0}
    run(tmp_path / "run", eval_data=str(eval_data), max_steps=8, **options)
    manager = CheckpointManager(tmp_path / "run" / "checkpoints")
    easiest = manager.inspect(manager.load_best().step).metrics["eval_loss"]

    with pytest.warns(DistrustWarning, match="evaluation data differs from that of the run .* start afresh"):
        _, events = run(
            tmp_path / "run", eval_data=str(hard), max_steps=16, early_stopping_patience=2, **options
        )
    losses = {event.step: event.loss for event in evaluated(events)}
    assert min(losses.values()) > easiest
    assert len(losses) > 2  # were they compared, it would end after two
    assert manager.load_best().step == min(losses, key=losses.get)
    _, events = run(tmp_path / "run", eval_data=str(hard), max_steps=20, **options)
    losses |= {event.step: event.loss for event in evaluated(events)}
    assert manager.load_best().step == min(losses, key=losses.get)


@pytest.mark.parametrize(
    ("metric", "options", "says"),
    [
        ("eval_loss/press", {}, "nothing to evaluate on; give --eval-data"),
        ("eval_weighted_loss", {}, "nothing to evaluate on; give --eval-data"),
        (
            "eval_loss/press",
            {"eval_fraction": 0.2},
            "no such source class; the metrics are loss, weig",
        ),
    ],
)
def test_a_metric_that_is_never_logged_is_told_before_the_first_step(run, tmp_path, metric, options, says):
    with pytest.raises(ConfigError, match=f"--metric {metric}: .*{says}"):
        run(tmp_path, metric=metric, **options)
    assert CheckpointManager(tmp_path / "checkpoints").list_checkpoints() == []
