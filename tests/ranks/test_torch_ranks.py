"""TorchRanks: values between processes, and how they meet."""

from __future__ import annotations

import pytest

VALUES = """
import numpy as np
from distrust import TrainConfig
from distrust.engines import join_ranks
from distrust.ranks import gather_json, of_leader

def scenario():
    with join_ranks(TrainConfig(model="m", data=("d",), out="o", device="cpu")) as ranks:
        gathered = []
        for dtype in ("bool", "uint8", "int64", "float64", "float32", ">i4"):
            array = (np.arange(6).reshape(2, 3) + ranks.index).astype(dtype)
            rows = ranks.gather(array, patient=dtype == "uint8")
            assert rows.dtype == array.dtype and rows.shape == (ranks.count, 2, 3)
            gathered.append([row.astype(int).sum().item() for row in rows])
        assert ranks.gather(np.float64(ranks.index + 0.5)).tolist() == [0.5, 1.5, 2.5]
        assert ranks.gather(np.zeros((0, 4))).shape == (ranks.count, 0, 4)
        array = np.arange(9.0) if ranks.index == 0 else np.zeros(9)
        array.flags.writeable = ranks.index > 0
        ranks.broadcast(array)
        assert array.tolist() == list(range(9))
        scalar = np.array(7 - ranks.index)
        ranks.broadcast(scalar)
        empty = np.zeros(0)
        ranks.broadcast(empty)
        texts = gather_json(ranks, "x" * ranks.index)
        of_first = of_leader(ranks, lambda: {"rank": ranks.index})
        return [ranks.index, ranks.local_index, gathered, scalar.item(), texts, of_first, ranks.describe(1)]
"""


def test_arrays_and_json_between_ranks(world):
    values = world.values(VALUES, count=3)
    assert [value[:2] for value in values] == [[0, 0], [1, 1], [2, 2]]
    assert values[0][2:] == values[1][2:] == values[2][2:]
    sums, scalar, texts, of_first, name = values[0][2:]
    assert sums == [[5, 6, 6], [15, 21, 27], *[[15, 21, 27]] * 4]
    assert [scalar, texts, of_first] == [7, ["", "x", "xx"], {"rank": 0}]
    assert name.startswith("rank 1 (")


JOIN = """
from distrust import TrainConfig
from distrust.engines import join_ranks

def scenario(timeout=20.0):
    join_ranks(TrainConfig(model="m", data=("d",), out="o", device="cpu", rank_timeout=timeout))
"""


@pytest.mark.parametrize(
    "variables",
    [
        {"LOCAL_RANK": ""},
        {"WORLD_SIZE": "two"},
        {"LOCAL_WORLD_SIZE": "0"},
        {"RANK": "2"},
        {"MASTER_ADDR": ""},
    ],
)
def test_wrong_variables_are_shown(world, variables):
    (outcome,) = world.run(JOIN, count=1, environment={"WORLD_SIZE": "2", **variables})
    name, text = outcome.error
    assert name == "ConfigError"
    assert all(f"{variable}={value}" in text for variable, value in variables.items())
    assert "torchrun" in text
    assert "\n" not in text


def test_no_rank_without_a_rendezvous(world):
    (outcome,) = world.run(JOIN, count=1, environment={"WORLD_SIZE": "2", "MASTER_PORT": "1"}, timeout=0.5)
    name, text = outcome.error
    assert name == "RankLost"
    assert text.startswith("rank 0 does not meet the others at 127.0.0.1:1 (MASTER_ADDR, MASTER_PORT): ")
    assert "\n" not in text


EXPLICIT = """
import os
import numpy as np
import torch.distributed as dist
from distrust.engines.torch.ranks import TorchRanks

def scenario():
    index, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")  # as a program does that uses torch.distributed itself
    store = dist.distributed_c10d._get_default_store()
    for name in ("first", "second"):
        place = dist.PrefixStore(name, store)
        with TorchRanks(place, index, count, local_index=index, local_count=count, timeout=20) as ranks:
            ranks.gather(np.zeros(1))
    assert dist.is_initialized()
    with TorchRanks(dist.PrefixStore("third", store), index, count, local_index=0, local_count=1, timeout=20):
        raise ValueError(f"of rank {index}")
"""


def test_errors_pass_and_a_group_of_the_program_stays(world):
    outcomes = world.run(EXPLICIT, count=2)
    assert [outcome.error for outcome in outcomes] == [("ValueError", f"of rank {index}") for index in (0, 1)]


ENTER_TWICE = """
import numpy as np
from distrust import TrainConfig
from distrust.engines import join_ranks

def scenario():
    ranks, sums = join_ranks(TrainConfig(rank_timeout=5)), []
    for number in (1, 2):
        with ranks:
            sums.append(int(ranks.gather(np.array([number])).sum()))
    return sums
"""


def test_the_block_of_ranks_may_be_entered_again(world):
    assert world.values(ENTER_TWICE, count=2) == [[2, 4]] * 2
