"""A run awaited, stopped and cancelled: the event loop stays free, nothing is lost, one run at a time."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

import pytest
from toy_engine import ToyEngine

from conftest import TOY
from distrust import CheckpointManager, DistrustTrainer, TrainConfig
from distrust.errors import ConfigError, RunInProgress, SaveFailed
from distrust.training.events import Preparing, RunEnded, StepEnded


class Slow:
    """An observer that holds each step up: what runs beside it has time to act."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.seconds = seconds
        self.stepped = threading.Event()
        self.events = []

    def __call__(self, event) -> None:
        self.events.append(event)
        if isinstance(event, StepEnded):
            self.stepped.set()
            time.sleep(self.seconds)


@pytest.fixture
def trainer(data):
    def make(out, *observers, **options):
        config = TrainConfig(out=str(out), **{**TOY, "data": str(data), **options})
        return DistrustTrainer(config, engine=ToyEngine(), observers=observers)

    return make


@pytest.fixture
def alone(run, tmp_path):
    return run(tmp_path / "alone")[0]


async def first_step(slow):
    while not slow.stepped.is_set():
        await asyncio.sleep(0.001)


def test_awaited_it_makes_the_same_run_and_leaves_the_event_loop_free(trainer, alone, tmp_path):
    async def main():
        slow = Slow()
        turns = 0
        task = asyncio.create_task(trainer(tmp_path / "run", slow).train_async())
        while not task.done():
            turns += 1
            await asyncio.sleep(0.001)
        return await task, turns, slow.events

    ended, turns, events = asyncio.run(main())
    assert (ended.state_digest, ended.reason, ended.finished) == (alone.state_digest, "finished", True)
    assert events[-1] == ended
    assert turns > 20


@pytest.mark.parametrize("cancels", [1, 3])
def test_cancelled_it_is_saved_first(trainer, alone, tmp_path, cancels):
    slow = Slow()

    async def main():
        task = asyncio.create_task(trainer(tmp_path / "run", slow).train_async())
        await first_step(slow)
        for _ in range(cancels):
            task.cancel()
            await asyncio.sleep(0.001)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    ended = slow.events[-1]
    assert isinstance(ended, RunEnded)
    assert (ended.reason, ended.signal, ended.finished) == ("stop", None, False)
    assert 1 <= ended.step < 9
    CheckpointManager(ended.path.parent).validate(ended.step)
    assert trainer(tmp_path / "run").train().state_digest == alone.state_digest


def test_an_event_loop_that_ends_waits_for_what_it_cancels(trainer, tmp_path):
    slow = Slow()

    async def main():
        asyncio.get_running_loop().create_task(trainer(tmp_path, slow).train_async())
        await first_step(slow)

    asyncio.run(main())
    assert isinstance(slow.events[-1], RunEnded)
    assert CheckpointManager(tmp_path / "checkpoints").list_checkpoints()[-1] == slow.events[-1].step


def test_a_timeout_stops_a_run(trainer, tmp_path):
    slow = Slow(0.05)

    async def main():
        async with asyncio.timeout(0.2):
            await trainer(tmp_path, slow).train_async()

    with pytest.raises(TimeoutError):
        asyncio.run(main())
    assert slow.events[-1].path.exists()


def test_cancelled_before_its_thread_began_it_stops_too(trainer, tmp_path):
    events = []

    async def main():
        task = asyncio.create_task(trainer(tmp_path, events.append).train_async())
        await asyncio.sleep(0)  # it has begun to wait
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert (events[-1].step, events[-1].reason) == (0, "stop")


def test_who_cancels_hears_that_it_could_not_be_saved(trainer, tmp_path):
    def spoil(event):
        if isinstance(event, StepEnded) and event.step == 3:
            os.rename(tmp_path / "run", tmp_path / "elsewhere")
            stepped.set()
            time.sleep(0.1)

    stepped = threading.Event()

    async def main():
        task = asyncio.create_task(trainer(tmp_path / "run", spoil, save_every=0).train_async())
        while not stepped.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        await task

    with pytest.raises(SaveFailed):
        asyncio.run(main())


def test_what_a_run_raises_whoever_awaits_it_gets(trainer, tmp_path):
    with pytest.raises(ConfigError, match=r"--early-stopping-patience: .*--eval-data"):
        asyncio.run(trainer(tmp_path, early_stopping_patience=1).train_async())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("awaited", [False, True])
def test_stopped_by_an_observer(trainer, alone, tmp_path, awaited):
    def stop(event):
        if isinstance(event, StepEnded) and event.step == 4:
            mine.stop()

    mine = trainer(tmp_path / "run", stop)
    ended = asyncio.run(mine.train_async()) if awaited else mine.train()
    assert (ended.step, ended.reason, ended.signal) == (4, "stop", None)
    # A stop is of one call: the next one goes on.
    assert mine.train().state_digest == alone.state_digest


def test_stopped_while_it_prepares_there_is_nothing_to_save(trainer, tmp_path):
    mine = trainer(tmp_path, lambda event: mine.stop() if isinstance(event, Preparing) else None)
    ended = mine.train()
    assert (ended.step, ended.path, ended.reason) == (0, None, "stop")
    mine.stop()  # without a run under way, nothing happens


def test_a_second_run_at_once_is_refused(trainer, alone, tmp_path):
    slow = Slow()

    async def main():
        task = asyncio.create_task(trainer(tmp_path / "run", slow).train_async())
        await first_step(slow)
        with pytest.raises(RunInProgress, match="this process is training") as error:
            await trainer(tmp_path / "other").train_async()
        with pytest.raises(RunInProgress):
            trainer(tmp_path / "other").train()
        assert error.value.out == tmp_path / "run"
        return await task

    assert asyncio.run(main()).state_digest == alone.state_digest
    assert not (tmp_path / "other").exists()
    assert trainer(tmp_path / "other").train().state_digest == alone.state_digest  # one after another


def test_a_child_of_a_process_that_trains_may_train(trainer, data, tmp_path, run_python):
    code = """
import os, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from distrust.training.turn import only_run
from distrust.errors import RunInProgress
with only_run(Path("a")):
    child = os.fork()
    if child == 0:
        with only_run(Path("b")):
            os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_python(code).stdout == "7\n"


def test_an_engine_that_cannot_go_back_is_not_gone_on_with(trainer, tmp_path):
    class Broken(Exception):
        pass

    def fail(event):
        if isinstance(event, StepEnded):
            raise Broken

    mine = trainer(tmp_path / "run", fail)
    with pytest.raises(Broken):
        mine.train()
    for file in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"):
        file.unlink()
    with pytest.raises(Exception, match="give a new engine"):
        mine.train()


ASYNC_RUN = """
import asyncio, sys
sys.path[:0] = sys.argv[3:]
from conftest import TOY
from toy_engine import ToyEngine
from distrust import DistrustTrainer, TrainConfig
from distrust.training.events import StepEnded
import signal, time

def watch(event):
    if isinstance(event, StepEnded):
        print("step", event.step, flush=True)
        time.sleep(0.05)

async def main():
    config = TrainConfig(out=sys.argv[1], data=sys.argv[2], **{**TOY, "max_steps": 200, "save_every": 0})
    before = signal.getsignal(signal.SIGINT)
    ended = await DistrustTrainer(config, engine=ToyEngine(), observers=[watch]).train_async()
    assert signal.getsignal(signal.SIGINT) == before
    print("ended", ended.step, ended.reason, ended.signal, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_heeded_while_it_is_awaited(start_python, data, tmp_path, number):
    here = os.path.dirname(__file__)
    process = start_python(ASYNC_RUN, tmp_path, data, here, os.path.dirname(here))
    assert process.stdout.readline() == "step 1\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    steps = out.count("step")
    assert out.splitlines()[-1] == f"ended {steps + 1} signal {int(number)}"
    assert CheckpointManager(tmp_path / "checkpoints").list_checkpoints() == [steps + 1]


def test_ctrl_c_twice_while_it_is_awaited_saves_all_the_same(start_python, data, tmp_path):
    here = os.path.dirname(__file__)
    process = start_python(ASYNC_RUN, tmp_path, data, here, os.path.dirname(here))
    assert process.stdout.readline() == "step 1\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    (step,) = CheckpointManager(tmp_path / "checkpoints").list_checkpoints()
    assert step == 1 + out.count("step")
    CheckpointManager(tmp_path / "checkpoints").validate(step)
