"""In a notebook: one output that changes in place, and an interrupt that saves and then stops the cells."""

from __future__ import annotations

import asyncio
import signal
import sys
from types import ModuleType, SimpleNamespace

import pytest

from distrust import CheckpointManager, DistrustTrainer, TrainConfig
from distrust.activity import in_notebook
from distrust.reporting import notebook
from distrust.reporting.console import ConsoleReporter
from distrust.reporting.metrics import METRICS
from distrust.testing.toy_engine import TOY, ToyEngine
from distrust.training.events import Preparing, StepEnded


class Output:
    """An output of a cell, with each of its states."""

    def __init__(self, shown):
        self.states = [self.render(shown)]

    def update(self, shown):
        self.states.append(self.render(shown))

    @staticmethod
    def render(shown):
        return shown._repr_mimebundle_(include=None, exclude=None)["text/plain"].splitlines()


@pytest.fixture
def outputs(monkeypatch):
    """This process as the kernel of a notebook; the outputs of its cell."""
    outputs = []
    shell = SimpleNamespace(kernel=object())
    ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: shell

    def show(shown, *, display_id):
        outputs.append(Output(shown))
        return outputs[-1]

    display.display = show
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as ipykernel does
    monkeypatch.setattr(notebook, "INTERVAL_SECONDS", 0.0)
    return outputs


def trainer_of(out, data, *, max_steps=9, **arguments):
    options = {"data": str(data), "max_steps": max_steps, "eval_fraction": 0.3, "eval_every": 2}
    config = TrainConfig(out=str(out), **{**TOY, **options})
    return DistrustTrainer(config, engine=ToyEngine(), **arguments)


def interrupt(event):
    if isinstance(event, StepEnded) and event.step == 5:
        signal.raise_signal(signal.SIGINT)


def test_one_output_shows_the_run(outputs, data, tmp_path, capsys):
    trainer_of(tmp_path, data).train()
    assert in_notebook()
    assert capsys.readouterr() == ("", "")
    (output,) = outputs
    steps = [
        [line for line in state if line.startswith("step") and "/9: " in line] for state in output.states
    ]
    assert max(map(len, steps)) == 1  # each replaces the one before
    assert [line.split(":")[0] for line in {line: None for state in steps for line in state}] == [
        f"step {step}/9" for step in range(1, 10)
    ]
    last = output.states[-1]
    assert last[0] == "loading the model bundled"
    assert f"model bundled, data {data}" in last
    assert [line.split(":")[0] for line in last if line.startswith("step")] == [
        f"step {step}"
        for step in (2, 4, 6, 8, 9)  # of evaluations
    ]
    assert any(line.startswith("Finished step 9 in ") for line in last)
    assert (tmp_path / METRICS).exists()


def test_lines_are_bounded(outputs):
    with ConsoleReporter(log_every=1) as console:
        console(Preparing("checking <b>[bold]\x1b"))
        assert outputs[0].states[-1] == ["checking <b>[bold]\\u001b"]
        for number in range(2 * notebook.MAX_LINES):
            console(Preparing(f"task {number}"))
    assert len(outputs[0].states[-1]) == notebook.MAX_LINES


@pytest.fixture
def handler():
    """Python's own handler of Ctrl-C, as in a kernel: earlier tests may have left another one."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, previous)


def test_an_interrupt_saves_and_stops_the_cells(outputs, data, tmp_path, capfd, handler):
    with ConsoleReporter(log_every=1) as console, pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path, data, observers=[console, interrupt]).train()
    printed = capfd.readouterr().err + "".join(outputs.pop().states[-1])
    assert "stopping after this step; interrupt again" in printed
    assert "step 5 is saved. Train with the same config to resume" in printed
    assert not any(words in printed for words in ("Ctrl-C", "command"))
    assert CheckpointManager(tmp_path / "checkpoints").list_checkpoints()[-1] == 5
    assert signal.getsignal(signal.SIGINT) is handler
    assert trainer_of(tmp_path, data, observers=()).train().finished
    assert outputs == []  # no observer, no output


def test_an_interrupt_cancels_what_is_awaited(outputs, data, tmp_path, capfd):
    async def cell():
        # A KeyboardInterrupt would end the event loop, and with it the kernel.
        with pytest.raises(asyncio.CancelledError):
            await trainer_of(tmp_path, data, observers=[send], max_steps=10**6).train_async()

    def send(event):
        if isinstance(event, StepEnded) and event.step == 5:
            signal.raise_signal(signal.SIGINT)  # the main thread handles it, a few steps later

    asyncio.run(cell())
    assert CheckpointManager(tmp_path / "checkpoints").list_checkpoints()[-1] >= 5


def test_elsewhere_an_interrupt_returns(data, tmp_path, capfd):
    assert not in_notebook()
    ended = trainer_of(tmp_path, data, observers=[interrupt]).train()
    assert (ended.step, ended.reason, ended.signal) == (5, "signal", signal.SIGINT)


def test_without_observers_it_logs_as_the_command(data, tmp_path, capsys):
    trainer_of(tmp_path, data).train()
    printed = capsys.readouterr().out
    assert f"model bundled, data {data}\n" in printed
    assert "\nstep 1/9: loss " in printed
    assert (tmp_path / METRICS).exists()
