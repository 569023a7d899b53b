"""Asynchronous runs: the event loop is not blocked, cancelling loses nothing, one run at a time."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest

from distrust import CheckpointManager, DistrustTrainer, TrainConfig
from distrust.errors import ConfigError, ResumeRefused, RunInProgress, SaveFailed
from distrust.testing.toy_engine import TOY, ToyEngine
from distrust.training.events import Preparing, RunEnded, StepEnded


class Blocker:
    """An observer that blocks the run after its first step until it is released."""

    def __init__(self) -> None:
        self.stepped, self.released = threading.Event(), threading.Event()
        self.events = []

    def __call__(self, event) -> None:
        self.events.append(event)
        if isinstance(event, StepEnded) and not self.stepped.is_set():
            self.stepped.set()
            assert self.released.wait(30)


@pytest.fixture
def trainer(data):
    def make(out, *observers, **options):
        config = TrainConfig(out=str(out), **{**TOY, "data": str(data), **options})
        return DistrustTrainer(config, engine=ToyEngine(), observers=observers)

    return make


async def first_step(blocker):
    while not blocker.stepped.is_set():
        await asyncio.sleep(0.001)


def test_async_run_equals_sync_run_and_does_not_block_the_event_loop(trainer, alone, tmp_path):
    async def main():
        blocker = Blocker()
        task = asyncio.create_task(trainer(tmp_path / "run", blocker).train_async())
        await first_step(blocker)
        for _ in range(10):  # the event loop runs while the training is blocked
            await asyncio.sleep(0.001)
        blocker.released.set()
        return await task, blocker.events

    ended, events = asyncio.run(main())
    assert (ended.state_digest, ended.reason, ended.finished) == (alone.state_digest, "finished", True)
    assert events[-1] == ended


@pytest.mark.parametrize("cancels", [1, 3])
def test_cancelled_run_is_saved_first(trainer, alone, tmp_path, cancels):
    blocker = Blocker()

    async def main():
        task = asyncio.create_task(trainer(tmp_path / "run", blocker).train_async())
        await first_step(blocker)
        for _ in range(cancels):
            task.cancel()
            await asyncio.sleep(0.001)
        assert not task.done()
        blocker.released.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    ended = blocker.events[-1]
    assert isinstance(ended, RunEnded)
    assert (ended.step, ended.reason, ended.signal, ended.finished) == (1, "stop", None, False)
    CheckpointManager(ended.path.parent).validate(1)
    assert trainer(tmp_path / "run").train().state_digest == alone.state_digest


def test_closing_event_loop_waits_for_cancelled_run(trainer, tmp_path):
    blocker = Blocker()

    async def main():
        task = asyncio.create_task(trainer(tmp_path, blocker).train_async())
        await first_step(blocker)
        asyncio.get_running_loop().call_later(0.01, blocker.released.set)
        return task  # not awaited

    asyncio.run(main())
    assert isinstance(blocker.events[-1], RunEnded)
    assert CheckpointManager(tmp_path / "checkpoints").list_checkpoints() == [1]


def test_timeout_stops_the_run(trainer, tmp_path):
    blocker = Blocker()

    async def main():
        task = asyncio.create_task(trainer(tmp_path, blocker).train_async())
        await first_step(blocker)
        asyncio.get_running_loop().call_later(0.05, blocker.released.set)
        await asyncio.wait_for(task, 0.001)

    with pytest.raises(TimeoutError):
        asyncio.run(main())
    assert blocker.events[-1].path.name == "checkpoint-1.safetensors"
    assert blocker.events[-1].path.exists()


def test_cancel_before_the_thread_starts(trainer, tmp_path):
    events = []
    released = threading.Event()

    def blocker(event):
        assert released.wait(60)  # otherwise a fast thread would make steps
        events.append(event)

    async def main():
        task = asyncio.create_task(trainer(tmp_path, blocker).train_async())
        await asyncio.sleep(0)  # the task starts waiting
        task.cancel()
        await asyncio.sleep(0)  # the task has asked to stop
        released.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert (events[-1].step, events[-1].reason) == (0, "stop")


def test_cancel_raises_a_failed_save(trainer, tmp_path):
    blocker = Blocker()

    async def main():
        task = asyncio.create_task(trainer(tmp_path / "run", blocker, save_every=0).train_async())
        await first_step(blocker)
        os.rename(tmp_path / "run", tmp_path / "elsewhere")
        task.cancel()
        await asyncio.sleep(0.001)
        blocker.released.set()
        await task

    with pytest.raises(SaveFailed):
        asyncio.run(main())


def test_errors_reach_the_awaiting_task(trainer, tmp_path):
    with pytest.raises(ConfigError, match=r"--early-stopping-patience: .*--eval-data"):
        asyncio.run(trainer(tmp_path, early_stopping_patience=1).train_async())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("awaited", [False, True])
def test_observer_stops_the_run(trainer, alone, tmp_path, awaited):
    def stop(event):
        if isinstance(event, StepEnded) and event.step == 4:
            mine.stop()

    mine = trainer(tmp_path / "run", stop)
    ended = asyncio.run(mine.train_async()) if awaited else mine.train()
    assert (ended.step, ended.reason, ended.signal) == (4, "stop", None)
    # A stop applies to one call only; the next one resumes.
    assert mine.train().state_digest == alone.state_digest


def test_stop_during_preparation(trainer, tmp_path):
    mine = trainer(tmp_path, lambda event: mine.stop() if isinstance(event, Preparing) else None)
    ended = mine.train()
    assert (ended.step, ended.path, ended.reason) == (0, None, "stop")
    mine.stop()  # no effect without a run


def test_simultaneous_run_is_refused(trainer, alone, tmp_path):
    blocker = Blocker()

    async def main():
        task = asyncio.create_task(trainer(tmp_path / "run", blocker).train_async())
        await first_step(blocker)
        with pytest.raises(RunInProgress, match="this process is training") as error:
            await trainer(tmp_path / "other").train_async()
        with pytest.raises(RunInProgress):
            trainer(tmp_path / "other").train()
        assert error.value.out == tmp_path / "run"
        blocker.released.set()
        return await task

    assert asyncio.run(main()).state_digest == alone.state_digest
    assert not (tmp_path / "other").exists()
    assert trainer(tmp_path / "other").train().state_digest == alone.state_digest  # one after another


def test_forked_child_may_train(trainer, data, tmp_path, run_python):
    code = """
import os, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from distrust.training.process import exclusive_run
from distrust.errors import RunInProgress
with exclusive_run(Path("a")):
    child = os.fork()
    if child == 0:
        with exclusive_run(Path("b")):
            os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_python(code).stdout == "7\n"


def test_trained_engine_without_checkpoint_is_refused(trainer, tmp_path):
    class Broken(Exception):
        pass

    def fail(event):
        if isinstance(event, StepEnded):
            raise Broken

    events = []
    mine = trainer(tmp_path / "run", events.append, fail)
    with pytest.raises(Broken):
        mine.train()
    assert (events[-1].step, events[-1].reason, events[-1].finished) == (1, "error", False)
    for file in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"):
        file.unlink()
    with pytest.raises(ResumeRefused, match="give a new engine"):
        mine.train()


ASYNC_RUN = """
import asyncio, sys
sys.path[:0] = sys.argv[3:]
from distrust.testing.toy_engine import TOY, ToyEngine
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
def test_signals_stop_an_awaited_run(start_python, forked_python, data, tmp_path, number):
    folder = os.path.dirname(__file__)
    folders = (folder, os.path.dirname(folder))
    process = start_python(ASYNC_RUN, tmp_path, data, *folders, python=forked_python)
    assert process.stdout.readline() == "step 1\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    steps = out.count("step")
    assert out.splitlines()[-1] == f"ended {steps + 1} signal {int(number)}"
    assert CheckpointManager(tmp_path / "checkpoints").list_checkpoints() == [steps + 1]


def test_second_ctrl_c_on_an_awaited_run_still_saves(start_python, forked_python, data, tmp_path):
    folder = os.path.dirname(__file__)
    folders = (folder, os.path.dirname(folder))
    process = start_python(ASYNC_RUN, tmp_path, data, *folders, python=forked_python)
    assert process.stdout.readline() == "step 1\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    (step,) = CheckpointManager(tmp_path / "checkpoints").list_checkpoints()
    assert step == 1 + out.count("step")
    CheckpointManager(tmp_path / "checkpoints").validate(step)
