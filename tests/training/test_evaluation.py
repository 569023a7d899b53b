"""Evaluations: plain and weighted losses, by source class, and the selection of the best checkpoint."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distrust import CheckpointManager, DistrustWarning, TrainConfig, weighting
from distrust.data import NO_CLASS, tokenize
from distrust.data.corpus import MAX_CLASSES, OTHER_CLASSES
from distrust.data.records import Completion, Location, Record, Text
from distrust.errors import ConfigError
from distrust.testing.toy_engine import ToyEngine, ToyTokenizer
from distrust.training.evaluation import CLASSES_MEASURED, evaluation_set
from distrust.training.events import Evaluated, RunStarted


def evaluation_events(events):
    return [event for event in events if isinstance(event, Evaluated)]


def write_classes(path, classes, *, column="source"):
    """Write a record of each class; None for no class."""
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


@settings(max_examples=60)
@given(records, st.integers(1, 5), st.sampled_from(["monotone", "published", "off"]))
def test_losses_are_means_over_tokens(rows, batch_size, how):
    corpus = tokenize(rows, ToyTokenizer(), max_length=8)
    engine = ToyEngine()
    metrics = evaluation_set(corpus, TrainConfig(weighting=how)).measure(
        engine.evaluate, batch_size=batch_size
    )

    u = weighting.example_weights(corpus.authority_weight, corpus.provenance_entropy, weighting=how)
    each = [
        evaluation_set(corpus.select([number]), TrainConfig()).measure(engine.evaluate, batch_size=1)[
            "eval_loss"
        ]
        for number in range(len(rows))
    ]
    tokens = corpus.loss_tokens

    def mean(weights):
        return pytest.approx(np.average(each, weights=weights), rel=1e-9)

    assert metrics["eval_loss"] == mean(tokens)
    weighted = {name for name in metrics if "weighted" in name}
    if how == "off":
        assert not weighted
    else:
        assert weighted == {"eval_weighted_loss", "eval_weighted_perplexity"}
        assert metrics["eval_weighted_loss"] == mean(tokens * u)
    classes = {row.source for row in rows}
    shown = {name or NO_CLASS for name in classes} if len(classes) > 1 else set()
    assert {name.partition("/")[2] for name in metrics if "/" in name} == shown
    for name in classes if len(classes) > 1 else ():
        of_class = np.array([row.source == name for row in rows])
        assert metrics[f"eval_loss/{name or NO_CLASS}"] == mean(tokens * of_class)
    for name, loss in list(metrics.items()):
        if "loss" in name:
            assert metrics[name.replace("loss", "perplexity", 1)] == math.exp(loss)


def test_eval_data_needs_no_provenance(run, tmp_path):
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
    (first,), (second,) = evaluation_events(events), evaluation_events(defaults)
    assert first.metrics["eval_weighted_loss"] != first.loss
    assert second.metrics["eval_weighted_loss"] == second.loss == first.loss


def test_source_column_selects_the_class(run, tmp_path):
    data = write_classes(tmp_path / "eval.jsonl", ["final", "draft", 7, None, NO_CLASS], column="status")
    _, events = run(tmp_path / "run", eval_data=data, source_column="status", max_steps=1)
    (event,) = evaluation_events(events)
    assert {name.partition("/")[2] for name in event.metrics} - {""} == {"final", "draft", "7", NO_CLASS}
    _, events = run(tmp_path / "other", eval_data=data, max_steps=1)
    (event,) = evaluation_events(events)
    assert not [name for name in event.metrics if "/" in name]


def test_unknown_source_column_warns(run, eval_data, tmp_path):
    with pytest.warns(DistrustWarning, match="--source-column statuss: no record has this column"):
        run(tmp_path, eval_data=str(eval_data), source_column="statuss", max_steps=1)


def test_classes_without_eval_data_warn(run, tmp_path):
    data = write_classes(tmp_path / "data.jsonl", ["final", "draft", "old"], column="status")
    eval_data = write_classes(tmp_path / "eval.jsonl", ["final", "draft"], column="status")
    with pytest.warns(DistrustWarning, match="status: the evaluation data has no examples of old, so"):
        run(tmp_path / "run", data=data, eval_data=eval_data, source_column="status", max_steps=1)


def test_unique_classes_do_not_flood_the_metrics(run, tmp_path):
    count = MAX_CLASSES + 50
    data = write_classes(tmp_path / "data.jsonl", [f"https://{n}" for n in range(count)])
    _, events = run(tmp_path / "run", data=data, eval_data=data, max_steps=1)
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    assert sum(row.examples for row in started.distribution.classes) == count
    assert OTHER_CLASSES in {row.name for row in started.distribution.classes}
    (event,) = evaluation_events(events)
    assert sum(name.startswith("eval_loss/") for name in event.metrics) == CLASSES_MEASURED


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.none() | st.text(max_size=4) | st.integers() | st.booleans(), min_size=1, max_size=5)
)
def test_class_names_do_not_change_the_run(run, tmp_path_factory, names):
    """The class of a record is only shown."""
    folder = tmp_path_factory.mktemp("classes")
    named, _ = run(folder / "a", data=write_classes(folder / "a.jsonl", names), max_steps=2)
    plain, _ = run(folder / "b", data=write_classes(folder / "b.jsonl", [None] * len(names)), max_steps=2)
    assert named.state_digest == plain.state_digest


#: The toy model overfits: its eval losses are best after a few steps.
OVERFITS = {"max_steps": 30, "learning_rate": 0.5}


def test_logged_metrics_are_saved_and_select_the_best(run, eval_data, tmp_path):
    rows = [json.loads(line) for line in eval_data.read_text().splitlines()]
    data = tmp_path / "eval.jsonl"
    data.write_text("".join(json.dumps({**row, "source": "ab"[i % 2]}) + "\n" for i, row in enumerate(rows)))
    _, events = run(
        tmp_path / "run", eval_data=str(data), eval_every=1, metric="eval_loss/b", save_every=7, **OVERFITS
    )
    losses = {event.step: event.metrics["eval_loss/b"] for event in evaluation_events(events)}
    manager = CheckpointManager(tmp_path / "run" / "checkpoints", metric="eval_loss/b")
    best = min(losses, key=losses.get)
    assert best % 7
    assert manager.load_best().step == best
    (event,) = [event for event in evaluation_events(events) if event.step == best]
    assert event.metrics.items() <= manager.inspect(best).metrics.items()


def test_best_checkpoint_is_saved_at_once(run, eval_data, tmp_path):
    """Also between two regular saves, and before the first."""
    options = {"eval_data": str(eval_data), "eval_every": 2, **OVERFITS}
    _, events = run(tmp_path, save_every=100, **options)
    losses = {event.step: event.loss for event in evaluation_events(events)}
    best = min(losses, key=losses.get)
    assert best < 30
    assert CheckpointManager(tmp_path / "checkpoints").load_best().step == best
    run(tmp_path / "none", save_every=0, **options)
    assert CheckpointManager(tmp_path / "none" / "checkpoints").list_checkpoints() == [30]


def test_evaluations_on_other_data_are_not_compared(run, eval_data, tmp_path):
    """This applies to the best checkpoint and to the patience."""
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
    losses = {event.step: event.loss for event in evaluation_events(events)}
    assert min(losses.values()) > easiest
    assert len(losses) > 2  # a comparison would have ended the run after two
    assert manager.load_best().step == min(losses, key=losses.get)
    _, events = run(tmp_path / "run", eval_data=str(hard), max_steps=20, **options)
    losses |= {event.step: event.loss for event in evaluation_events(events)}
    assert manager.load_best().step == min(losses, key=losses.get)


@pytest.mark.parametrize(
    ("metric", "options", "says"),
    [
        ("eval_loss/press", {}, "nothing to evaluate on; give --eval-data"),
        ("eval_weighted_loss", {}, "nothing to evaluate on; give --eval-data"),
        (
            "eval_loss/press",
            {"eval_fraction": 0.2},
            "this run has no such metric; its metrics are loss, weig",
        ),
    ],
)
def test_unlogged_metric_is_refused(run, tmp_path, metric, options, says):
    with pytest.raises(ConfigError, match=f"--metric {metric}: .*{says}"):
        run(tmp_path, metric=metric, **options)
    assert CheckpointManager(tmp_path / "checkpoints").list_checkpoints() == []
