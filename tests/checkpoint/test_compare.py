"""Comparing two checkpoints reports every difference, and needs no more memory than reading them."""

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
def compare(tmp_path):
    """Save two states and return their differences."""

    def compare(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
        files = []
        for name, sections in (("a", a), ("b", b)):
            with CheckpointManager(tmp_path / name) as manager:
                files.append(catalog.read_header(manager.save(Checkpoint(step=1, **sections))))
        return differences(*files)

    return compare


@pytest.mark.parametrize(
    ("a", "b", "name", "text_a", "text_b"),
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
def test_difference_of_a_scalar(compare, a, b, name, text_a, text_b):
    result = compare({"metadata": {"x": a}}, {"metadata": {"x": b}})
    assert result == [Difference("state", name, text_a, text_b)]


def test_keys_of_different_types_differ(compare):
    result = compare({"metadata": {1: "x"}}, {"metadata": {"1": "x"}})
    assert [(difference.a, difference.b) for difference in result] == [("'x'", "absent"), ("absent", "'x'")]
    assert {difference.name for difference in result} == {"metadata.1"}


def test_equal_states_do_not_differ(compare):
    state = {"metadata": {"x": [float("nan"), -0.0, None, {"y": ()}]}, "model": {"a": np.ones(3)}}
    assert compare(state, state) == []


def test_arrays_are_compared_as_tensors(compare):
    result = compare({"model": {"a": np.ones(3), "b": np.ones(2)}}, {"model": {"a": np.zeros(3)}})
    assert [(difference.kind, difference.name) for difference in result] == [
        ("tensor", "model.a"), ("tensor", "model.b"),
    ]  # fmt: skip


def test_same_arrays_at_different_paths_differ(tmp_path):
    """Possible only in a forged file: a label normally is the path of its array."""
    tensors = [Tensor("model.a"), Tensor("model.b")]
    files = []
    for name, labels in (("a", ["model.a", "model.b"]), ("b", ["model.b", "model.a"])):
        path = tmp_path / name
        path.write_bytes(build(tensors, names={"d": {"s": {"l": [{"a": label} for label in labels]}}}))
        files.append(catalog.read_header(path))
    (difference,) = differences(*files)
    assert (difference.kind, difference.name) == ("state", "skeleton")
    assert difference.a != difference.b


def test_long_key_of_many_values_takes_no_memory(tmp_path):
    files = []
    for value in (0, 1):
        path = tmp_path / str(value)
        path.write_bytes(build(sections={"metadata": {"d": {"s" + "k" * 500_000: {"l": [value] * 2000}}}}))
        files.append(catalog.read_header(path))
        files[-1].require_intact()
    tracemalloc.start()
    try:
        result = differences(*files)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(result) == 2000
    assert max(len(difference.name) for difference in result) < 500
    assert peak < 10_000_000
