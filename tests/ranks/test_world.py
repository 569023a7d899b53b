"""The ranks of the tests."""

from __future__ import annotations

SUM = """
import os, torch
import torch.distributed as dist

def scenario(add):
    dist.init_process_group("gloo")
    total = torch.tensor(add + dist.get_rank())
    dist.all_reduce(total)
    print("rank", dist.get_rank())
    return [int(total), os.getpid(), torch.get_num_threads()]
"""
FAIL = """
import os, signal

def scenario():
    if os.environ["RANK"] == "0":
        raise ValueError("as asked")
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(3)
"""


def test_scenarios_on_any_number_of_ranks(world):
    first, second = world.run(SUM, count=3, add=1), world.run(SUM, count=2, add=0)
    assert [outcome.value[0] for outcome in first] == [6, 6, 6]
    assert [outcome.value[0] for outcome in second] == [1, 1]
    assert [outcome.stdout for outcome in first] == ["rank 0\n", "rank 1\n", "rank 2\n"]
    processes = [[outcome.value[1:] for outcome in outcomes] for outcomes in (first, second)]
    assert processes[0][:2] == processes[1], "the processes stay"
    assert {threads for _, threads in processes[0]} == {1}


def test_a_rank_that_fails_is_forked_again(world):
    raised, killed, ended = world.run(FAIL, count=3)
    assert raised.error == ("ValueError", "as asked")
    assert "Traceback" in raised.stderr
    assert [killed.code, ended.code] == [-9, 3]
    assert [value[0] for value in world.values(SUM, count=3, add=2)] == [9, 9, 9]
