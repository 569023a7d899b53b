"""Fixtures that several folders of tests share."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from distrust import DistrustTrainer, TrainConfig
from distrust.testing.models import make_model, write_records
from distrust.testing.toy_engine import TOY, ToyEngine
from distrust.training.events import Event, Observer, RunEnded, StepEnded

# A shell has what it starts in the background ignore Ctrl-C, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests keep tokenized data to themselves, and so do the processes they start."""
    os.environ["DISTRUST_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def start_python() -> Callable[..., subprocess.Popen[str]]:
    """Starts ``python -c code arguments…`` with pipes; what runs at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def run_python(start_python) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``python -c code arguments…`` to its end."""

    def run(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        process = start_python(code, *arguments, **environment)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run


#: Steps of four examples each, on the tiny model.
TINY: dict[str, Any] = {
    "engine": "torch",
    "device": "cpu",
    "max_steps": 7,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "learning_rate": 5e-3,
    "warmup_steps": 2,
    "lora_rank": 4,
    "lora_dropout": 0.2,
    "save_every": 3,
    "threads": 1,
}


@pytest.fixture(scope="module")
def no_fsync() -> Iterator[None]:
    """A sync matters where power fails: there (``test_power_cut``) the calls are seen, not the disk.

    Of a module and no longer: the same process may look for losses on failing disks next.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def _only_what_is_new_is_searched() -> Iterator[None]:
    """A search for what can go takes half a second among all that the tests before have imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven records: an epoch does not end where a step does."""
    return write_records(tmp_path_factory.mktemp("data") / "records.jsonl")


@pytest.fixture(scope="session")
def eval_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "eval.jsonl", 5, seed=9)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny-model"))


class Stopper:
    """An observer that sends a real signal to this process once a step has ended."""

    def __init__(self, step: int | None, number: int = signal.SIGTERM) -> None:
        self.step = step
        self.number = number

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepEnded) and event.step == self.step:
            signal.raise_signal(self.number)


Run = Callable[..., tuple[RunEnded, list[Event]]]


@pytest.fixture
def run(data: Path) -> Run:
    """Runs the loop on a toy engine: ``run(out, stop_after=3, **options)`` gives the end and all events."""

    def run(
        out: Path,
        *,
        stop_after: int | None = None,
        engine: ToyEngine | None = None,
        observers: Sequence[Observer] = (),
        examples: Iterable[dict[str, Any]] | None = None,
        **options: Any,
    ) -> tuple[RunEnded, list[Event]]:
        events: list[Event] = []
        config = TrainConfig(out=str(out), **{**TOY, "data": str(data), **options})
        trainer = DistrustTrainer(
            config,
            engine=engine or ToyEngine(),
            observers=[events.append, Stopper(stop_after), *observers],
            examples=examples,
        )
        return trainer.train(), events

    return run


@pytest.fixture(scope="session")
def train(tiny_model: Path, data: Path) -> Run:
    """The same on the tiny model, by torch unless told: seven steps, and eleven records make an epoch.

    With ``awaited`` it runs in a thread of its own, and is stopped by a call.
    """

    def train(
        out: Path, *, stop_after: int | None = None, awaited: bool = False, **options: Any
    ) -> tuple[RunEnded, list[Event]]:
        events: list[Event] = []

        def watch(event: Event) -> None:
            events.append(event)
            if isinstance(event, StepEnded) and event.step == stop_after:
                trainer.stop() if awaited else signal.raise_signal(signal.SIGTERM)

        config = TrainConfig(out=str(out), **{**TINY, "model": str(tiny_model), "data": str(data), **options})
        trainer = DistrustTrainer(config, observers=[watch])
        return asyncio.run(trainer.train_async()) if awaited else trainer.train(), events

    return train
