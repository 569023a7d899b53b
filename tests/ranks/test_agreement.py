"""Ranks that have other data, models or options than the leader are refused; other machines are reported."""

from __future__ import annotations

import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrust import Checkpoint, CheckpointManager, TrainConfig
from distrust.errors import RanksDiffer
from distrust.testing.toy_engine import ToyEngine
from distrust.training.agreement import (
    require_equal,
    require_equal_weights,
    require_same_options,
    require_same_run,
)
from distrust.training.data_sources import read_sources
from distrust.training.prepare_data import prepare_data
from distrust.training.resume_point import require_newest_on_leader
from tests.ranks.rank_threads import on_threads

MISSING = object()
VALUES = st.none() | st.integers() | st.floats(allow_nan=False) | st.text("xyz", max_size=9)


@settings(max_examples=20)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), VALUES), min_size=1, max_size=4))
def test_all_ranks_raise_the_same_or_none_does(values):
    def compare(ranks):
        try:
            require_equal(ranks, values[ranks.index])
        except RanksDiffer as error:
            return str(error)
        return ""

    (message,) = set(on_threads(len(values), compare))
    different = {name for entries in values for name in {**values[0], **entries} if differ(values, name)}
    assert {line[:1] for line in message.splitlines()} == different


def differ(values, name):
    # 1 and 1.0 are equal.
    return any(entries.get(name, MISSING) != values[0].get(name, MISSING) for entries in values)


def test_other_options_are_refused():
    configs = [TrainConfig(), TrainConfig(lora_rank=8, eval_every=3)]
    with pytest.raises(RanksDiffer) as raised:
        on_threads(2, lambda ranks: require_same_options(ranks, configs[ranks.index]))
    assert str(raised.value).splitlines() == [
        f"--{name}: rank 1 (node-1) has {value}, rank 0 (node-0) has none; give all ranks the same"
        for name, value in (("lora-rank", 8), ("eval-every", 3))
    ]


RECORDS = [
    {"text": f"word {number}", "authority_weight": 0.5, "provenance_entropy": 1} for number in range(8)
]


def compare_prepared(options, records=RECORDS, **engine_options):
    """Prepare the run of rank K with entry K of each list, and compare."""

    def compare(ranks):
        def at(values):
            return values[ranks.index] if isinstance(values, list) else values

        config = TrainConfig(max_steps=3, **{name: at(value) for name, value in options.items()})
        engine = ToyEngine(**{name: at(value) for name, value in engine_options.items()})
        rows = records[ranks.index] if isinstance(records[0], list) else records
        data = prepare_data(
            config, read_sources(config, examples=rows), engine.tokenizer, context_length=None
        )
        require_same_run(ranks, data, engine)

    on_threads(2, compare)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTRUST_CACHE", str(tmp_path))


def test_equal_ranks_pass():
    compare_prepared({"lora_rank": 8})


def test_everything_that_differs_is_named_at_once():
    with pytest.raises(RanksDiffer) as raised:
        compare_prepared({"lora_rank": [8, 4]}, records=[RECORDS, RECORDS[1:]], base=[0, 1])
    rank, data, *model = str(raised.value).splitlines()[0], *str(raised.value).splitlines()[-2:]
    assert rank == ("--lora-rank: rank 1 (node-1) has 4, rank 0 (node-0) has 8; give all ranks the same")
    assert data.startswith("the content of --data: rank 1 (node-1) has ")
    assert model[0].startswith("the content of --model: rank 1 (node-1) has toy of")


def test_other_evaluation_data_is_refused():
    with pytest.raises(RanksDiffer, match=r"--eval-fraction: .*\n.*--data: .*\n.*--eval-data: .* has none,"):
        compare_prepared({"eval_fraction": [0.5, 0.0]})


def test_another_machine_is_reported_by_the_leader_alone():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compare_prepared({}, environment=[{"device": "A100", "threads": 1}, {"device": "L4", "threads": 1}])
    assert [str(warning.message) for warning in caught] == [
        "no longer bit-identical: device: rank 1 (node-1) has L4, rank 0 (node-0) has A100"
    ]


class Checksummed(ToyEngine):
    def __init__(self, number):
        super().__init__()
        self.checksum = lambda: number


@pytest.mark.parametrize(
    ("checksums", "suspects"),
    [([1, 2, 1], "rank 1 (node-1)"), ([1, 2], "rank 0 (node-0) or rank 1 (node-1)")],
)
def test_a_minority_is_suspected_of_computing_wrongly(checksums, suspects):
    with pytest.raises(RanksDiffer, match=re.escape(f"on {suspects};")):
        on_threads(
            len(checksums),
            lambda ranks: require_equal_weights(ranks, Checksummed(checksums[ranks.index]), step=3),
        )


def test_a_leader_that_lacks_newer_checkpoints_is_refused(tmp_path):
    managers = [CheckpointManager(tmp_path / f"node-{index}") for index in range(2)]

    def begin(ranks):
        require_newest_on_leader(ranks, managers[ranks.index])

    with managers[0], managers[1]:
        managers[0].save(Checkpoint(step=8))
        on_threads(2, begin)  # the other machine has none: it is handed the leader's
        managers[1].save(Checkpoint(step=9))
        with pytest.raises(RanksDiffer, match=r"rank 1 \(node-1\) has the checkpoint of step 9, which the"):
            on_threads(2, begin)
