"""What the other ranks do when one of them is killed, stops, is stopped or fails."""

from __future__ import annotations

import json
import random
import time

import pytest

RANKS = """
import json, os, random, signal, sys, time
import numpy as np
from distrust import TrainConfig
from distrust.engines import join_ranks
from distrust.errors import ConfigError, NonFiniteLoss

def scenario(timeout=20, **options):
    config = TrainConfig(model="m", data=("d",), out="o", device="cpu", rank_timeout=timeout)
    with join_ranks(config) as ranks:
        work(ranks, **options)
    return "ended"

def observe(ranks, path, victim, number, delay=0.0):
    '''Signal a rank; writes how long each of the others lived on. A stopped rank goes on after them.'''
    pids = dict(enumerate(ranks.gather(np.array(os.getpid())).tolist()))
    if ranks.index != victim or os.fork() > 0:
        return
    os.closerange(3, 1000)  # the sockets end with the rank
    pid, lives = pids.pop(victim), {}
    time.sleep(delay)
    os.kill(pid, number)
    began = time.monotonic()
    while pids and time.monotonic() - began < 20:
        for index in list(pids):
            try:
                os.kill(pids[index], 0)
            except ProcessLookupError:
                lives[index] = round(time.monotonic() - began, 3)
                del pids[index]
        time.sleep(0.002)
    with open(path + ".tmp", "w") as file:
        json.dump(lives, file)
    os.rename(path + ".tmp", path)
    if number == signal.SIGSTOP:
        os.kill(pid, signal.SIGCONT)
    os._exit(0)

def step(ranks):
    ranks.gather(np.zeros(3))
"""
KILL = """
def work(ranks, path, victim, moment, delay):
    observe(ranks, path, victim, signal.SIGKILL, delay)
    if moment == "collective" and ranks.index == victim:
        time.sleep(60)  # the others wait for it
    if moment == "patient" and ranks.index:
        ranks.broadcast(np.zeros(3))
    if moment == "end":  # while the leader still saves
        time.sleep(60 if ranks.index == 0 else 0)
        return
    while True:
        step(ranks)
        time.sleep(random.uniform(0, 0.05) if ranks.index else 0)
        if moment == "elsewhere":
            time.sleep(60)
"""


def read_lives(path):
    """Rank -> seconds that it lived on, for all but the victim."""
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return {int(index): seconds for index, seconds in json.loads(path.read_text()).items()}


def lines(outcomes):
    return [line for outcome in outcomes for line in outcome.stderr.splitlines() if "distrust:" in line]


@pytest.mark.parametrize("moments", [["steps", "end"], ["collective", "patient", "elsewhere"]])
def test_survivors_of_a_kill_end_within_a_second(world, tmp_path, moments):
    path, moment, victim = tmp_path / "lives", random.choice(moments), random.randrange(4)
    delay = random.uniform(0, 0.3)
    outcomes = world.run(RANKS + KILL, count=4, path=str(path), victim=victim, moment=moment, delay=delay)
    survivors = [outcome for index, outcome in enumerate(outcomes) if index != victim]
    lives = read_lives(path)
    print(moment, victim, lives)
    assert outcomes[victim].code == -9
    assert sorted(lives) == [index for index in range(4) if index != victim]
    assert max(lives.values()) < 2  # 1 where nothing else runs
    for outcome in survivors:
        assert outcome.code == 1 or outcome.error[0] == "RankLost", outcome
    texts = [*lines(survivors), *(outcome.error[1] for outcome in survivors if outcome.error)]
    assert len(texts) == 1, texts
    assert f"rank {victim} (" in texts[0]
    assert "is gone" in texts[0]


STOP = """
def work(ranks, path, victim, patient):
    observe(ranks, path, victim, signal.SIGSTOP, 0.2)
    while True:
        ranks.gather(np.zeros(3), patient=patient)
        time.sleep(0.01)
"""


def test_a_rank_that_is_stopped(world, tmp_path):
    path, patient, victim = tmp_path / "lives", random.random() < 0.5, random.randrange(3)
    outcomes = world.run(RANKS + STOP, count=3, path=str(path), victim=victim, patient=patient, timeout=0.8)
    lives = read_lives(path)
    print(patient, victim, lives)
    assert max(lives.values()) < 0.8 + 2
    assert outcomes[victim].code == 1 or outcomes[victim].error, "it ends when it goes on"
    errors = [outcome.error[1] for outcome in outcomes if outcome.error]
    assert any(f"rank {victim} (" in text for text in errors + lines(outcomes))


SUSPEND = """
def work(ranks):
    pids = ranks.gather(np.array(os.getpid())).tolist()
    if ranks.index == 0 and os.fork() == 0:
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in pids:
                os.kill(pid, number)
            time.sleep(1)
        os._exit(0)
    begin = time.monotonic()
    while ranks.gather(np.array(time.monotonic() - begin), patient=True).min() < 1.3:
        time.sleep(0.01)
"""


def test_a_suspended_job_goes_on(world):
    assert world.values(RANKS + SUSPEND, count=2, timeout=0.6) == ["ended"] * 2


FAIL = """
def work(ranks, failing, kind):
    ranks.gather(np.zeros(1))
    if ranks.index in failing:
        raise eval(kind)
    step(ranks)
"""


@pytest.mark.parametrize(
    ("kind", "code", "text"),
    [
        ("ConfigError('--no: this\\x1bone')", 2, "--no: this\\u001bone"),
        ("SystemExit(143)", 143, "interrupted (143)"),
    ],
)
def test_an_error_of_a_follower_is_reported_by_the_leader(world, kind, code, text):
    outcomes = world.run(RANKS + FAIL, count=3, failing=[2], kind=kind)
    assert [outcome.code for outcome in outcomes] == [code] * 3
    (line,) = lines(outcomes)
    assert line.startswith("distrust: rank 2 (")
    assert line.endswith(f"): {text}")
    assert line in outcomes[0].stderr


def test_an_error_of_all_ranks_is_reported_once(world):
    kind = "NonFiniteLoss('not finite', step=3, examples=[])"
    outcomes = world.run(RANKS + FAIL, count=3, failing=[0, 1, 2], kind=kind)
    assert outcomes[0].error == ("NonFiniteLoss", "not finite")
    assert [outcome.code for outcome in outcomes[1:]] == [1, 1]
    assert [outcome.stderr for outcome in outcomes[1:]] == ["", ""]


SAVE = """
def work(ranks, saved, path, victim):
    def finish():
        time.sleep(0.3)
        open(saved, "w").close()
    if ranks.index == 0:
        ranks.before_exit(finish)
    observe(ranks, path, victim, signal.SIGKILL)
    while True:
        step(ranks)
"""


def test_the_leader_finishes_its_save_and_ends_first(world, tmp_path):
    path, saved = tmp_path / "lives", tmp_path / "saved"
    world.run(RANKS + SAVE, count=3, saved=str(saved), path=str(path), victim=1)
    lives = read_lives(path)
    print(lives)
    assert saved.exists()
    assert 0.3 < lives[0] < 3
    assert lives[0] <= lives[2] + 0.2  # on a busy machine


END = """
def scenario(runs):
    for run in range(runs):
        config = TrainConfig(model="m", data=("d",), out="o", device="cpu")
        with join_ranks(config) as ranks:
            ranks.store.set("failure", '["of", "a stranger", 5, true]')  # is ignored
            step(ranks)
            time.sleep(random.choice([0, 0, 0.01, 0.05]))
    if ranks.index == 0:
        time.sleep(0.3)
    os._exit(0)
"""


def test_no_end_of_a_run_is_taken_for_a_death(world):
    outcomes = world.run(RANKS + END, count=4, runs=3)
    assert [(outcome.code, outcome.stderr) for outcome in outcomes] == [(0, "")] * 4
