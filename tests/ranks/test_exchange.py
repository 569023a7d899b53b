"""Gradients of several ranks: their sum, the engine's steps, and the ranks that must not add up."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

PARAMETERS = 5
SCENARIOS = "tests.ranks.sum_scenarios"
missing = st.sets(st.integers(0, PARAMETERS - 1)).map(sorted)
#: For each step of up to nine micro-batches what each has no gradient of.
cases = st.lists(st.lists(missing, min_size=4, max_size=9), min_size=1, max_size=6)


@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])  # shrinking takes long if they hang
@given(cases=cases, count=st.integers(2, 4), bucket_bytes=st.sampled_from([32, 64 * 2**20]))
def test_the_sum_has_the_bits_of_one_process(world, cases, count, bucket_bytes):
    def sums(count: int) -> list[object]:
        options = {"cases": cases, "reduction": "exact", "bucket_bytes": bucket_bytes}
        return world.values(f"{SCENARIOS}:sums", count=count, **options)

    [expected] = sums(1)
    assert sums(count) == [expected] * count


def steps(world, model, count, **options):
    return world.values(f"{SCENARIOS}:engine_steps", count=count, model=str(model), **options)


@pytest.mark.parametrize("reduction", ["exact", "fast"])
def test_a_pass_that_is_made_again_counts_once(world, tiny_model, reduction):
    options = {"micro_batches": 6, "reduction": reduction, "lora_dropout": 0.1}
    expected, failed = (steps(world, tiny_model, 2, fails=fails, **options) for fails in (False, True))
    assert [rank["digest"] for rank in failed] == [rank["digest"] for rank in expected]


def test_a_fast_reduction(world, tiny_model):
    options = {"reduction": "fast", "micro_batches": 9, "lora_rank": 0}
    [exact], fast = (steps(world, tiny_model, count, **options) for count in (1, 3))
    digests = [rank["digest"] for rank in fast]
    assert digests == [digests[0]] * 3
    assert digests[0] != exact["digest"]
    norms = [[step[0] for step in rank["steps"]] for rank in (exact, fast[0])]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    assert [rank["recorded"] for rank in fast] == [{"reduction": "fast", "ranks": 3}] * 3
    assert exact["recorded"] == {"reduction": None, "ranks": None}
    notice = "--reduction fast: the last bits depend on the number of ranks, here 3"
    assert [rank["notices"] for rank in [exact, *fast]] == [[], [notice], [], []]


def test_too_few_micro_batches_are_refused(world, tiny_model):
    options = {"model": str(tiny_model), "micro_batches": 3}
    leader, *followers = world.run(f"{SCENARIOS}:engine_steps", count=4, **options)
    assert leader.error == ("ConfigError", "--gradient-accumulation 3: 4 ranks need 4 or more")
    assert all(follower.code for follower in followers)


def test_an_uneven_number_of_micro_batches_is_noticed_once(world, tiny_model):
    notice = "--gradient-accumulation 4: 3 ranks cannot share it evenly, so some wait; give a multiple"
    notices = [rank["notices"] for rank in steps(world, tiny_model, 3)]
    assert notices == [[notice], [], []]


@pytest.mark.parametrize("wrong", [{"step": 6}, {"data": 1}])
def test_ranks_at_different_steps_or_data_do_not_add_up(world, tiny_model, wrong):
    options = {"wrong": wrong, "model": str(tiny_model)}
    leader, *followers = world.run(f"{SCENARIOS}:different_steps", count=3, **options)
    assert leader.error is not None
    kind, text = leader.error
    assert kind == "RanksDiffer"
    assert re.fullmatch(
        r"the ranks are not at the same step of the same data: rank 0 \(.+\) at step 5 with 44 tokens .*, "
        r"rank 1 \(.+\) at step [56] with 44 tokens .*",
        text,
    )
    assert all(follower.code for follower in followers)


def test_a_checksum_tells_each_bit_of_the_state(world, tiny_model):
    [numbers] = world.values(f"{SCENARIOS}:checksums", count=1, model=str(tiny_model))
    assert len(numbers) > 8
    assert len(set(numbers[1:]) - {numbers[0]}) == len(numbers) - 1
