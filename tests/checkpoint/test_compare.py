"""What differs between two checkpoints is told, all of it, and at no more than it costs to read them."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from campaigns.fuzz.forging import Tensor, build
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import catalog
from distrust.checkpoint.compare import Difference, differences


@pytest.fixture
def compared(tmp_path):
    def compared(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
        files = []
        for name, sections in (("a", a), ("b", b)):
            with CheckpointManager(tmp_path / name) as manager:
                files.append(catalog.read_header(manager.save(Checkpoint(step=1, **sections))))
        return differences(*files)

    return compared


@pytest.mark.parametrize(
    ("a", "b", "name", "was", "now"),
    [
        (1, 1.0, "metadata.x", "1", "1.0"),
        (1, True, "metadata.x", "1", "True"),
        (1, "1", "metadata.x", "1", "'1'"),
        (0.0, -0.0, "metadata.x", "0.0", "-0.0"),
        ([1, 2], (1, 2), "metadata.x", "a list of 2", "a tuple of 2"),
        ([], {}, "metadata.x", "a list of 0", "a dict of 0"),
        ([1], [1, 2], "metadata.x.1", "absent", "2"),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "metadata.x.a.b", "1", "2"),
        ({"a": 1}, {}, "metadata.x.a", "1", "absent"),
        ({"a": [1, 2]}, {}, "metadata.x.a", "a list of 2", "absent"),
    ],
)
def test_each_difference_of_a_scalar(compared, a, b, name, was, now):
    found = compared({"metadata": {"x": a}}, {"metadata": {"x": b}})
    assert found == [Difference("state", name, was, now)]


def test_keys_that_look_alike_are_told_apart(compared):
    found = compared({"metadata": {1: "x"}}, {"metadata": {"1": "x"}})
    assert [(difference.a, difference.b) for difference in found] == [("'x'", "absent"), ("absent", "'x'")]
    assert {difference.name for difference in found} == {"metadata.1"}


def test_equal_states_do_not_differ(compared):
    state = {"metadata": {"x": [float("nan"), -0.0, None, {"y": ()}]}, "model": {"a": np.ones(3)}}
    assert compared(state, state) == []


def test_arrays_are_compared_as_tensors(compared):
    found = compared({"model": {"a": np.ones(3), "b": np.ones(2)}}, {"model": {"a": np.zeros(3)}})
    assert [(difference.kind, difference.name) for difference in found] == [
        ("tensor", "model.a"), ("tensor", "model.b"),
    ]  # fmt: skip


def test_the_same_arrays_in_other_places_differ(tmp_path):
    """Only a forger can do that: a label says where its array stands."""
    tensors = [Tensor("model.a"), Tensor("model.b")]
    files = []
    for name, labels in (("a", ["model.a", "model.b"]), ("b", ["model.b", "model.a"])):
        path = tmp_path / name
        path.write_bytes(build(tensors, names={"d": {"s": {"l": [{"a": label} for label in labels]}}}))
        files.append(catalog.read_header(path))
    (found,) = differences(*files)
    assert (found.kind, found.name) == ("state", "skeleton")
    assert found.a != found.b


def test_a_long_key_above_many_values_costs_no_memory(tmp_path):
    files = []
    for value in (0, 1):
        path = tmp_path / str(value)
        path.write_bytes(build(sections={"metadata": {"d": {"s" + "k" * 500_000: {"l": [value] * 2000}}}}))
        files.append(catalog.read_header(path))
        files[-1].require_intact()
    tracemalloc.start()
    try:
        found = differences(*files)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 2000
    assert max(len(difference.name) for difference in found) < 500
    assert peak < 10_000_000
