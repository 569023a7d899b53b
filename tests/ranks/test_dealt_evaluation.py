"""An evaluation that the ranks share has the numbers of one process, to the last bit."""

from __future__ import annotations

import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from distrust import TrainConfig
from distrust.data import evaluation_batches, tokenize
from distrust.data.records import Location, Record, Text
from distrust.testing.toy_engine import ToyEngine, ToyTokenizer
from distrust.training.evaluation import evaluation_set
from tests.ranks.rank_threads import on_threads

records = st.builds(
    Record,
    location=st.just(Location("data", 1)),
    authority_weight=st.floats(0, 0.99),
    provenance_entropy=st.floats(0, 5),
    content=st.builds(Text, st.text("abc", min_size=2, max_size=9)),
    source=st.sampled_from(["notebook", "press"]),
)


@settings(max_examples=20)
@given(rows=st.lists(records, min_size=1, max_size=12), batch_size=st.integers(1, 4), count=st.integers(2, 4))
def test_numbers_and_passes_are_equal_on_all_ranks(rows, batch_size, count):
    corpus = tokenize(rows, ToyTokenizer(), max_length=8)
    evaluation, engine = evaluation_set(corpus, TrainConfig(weighting="monotone")), ToyEngine()
    evaluated = []  # list.append is atomic

    def evaluate(batch):
        evaluated.append((threading.get_ident(), tuple(batch.examples)))
        return engine.evaluate(batch)

    alone = evaluation.measure(engine.evaluate, batch_size=batch_size)
    metrics = on_threads(
        count, lambda ranks: evaluation.measure(evaluate, batch_size=batch_size, ranks=ranks)
    )
    assert metrics == [alone] * count
    batches = [tuple(batch.examples) for batch in evaluation_batches(corpus, batch_size=batch_size)]
    passes = -(-len(batches) // count)
    threads = [thread for thread, _ in evaluated]
    assert len(evaluated) == passes * count
    assert {threads.count(thread) for thread in threads} == {passes}
    assert {examples for _, examples in evaluated} == set(batches)
