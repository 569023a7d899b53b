"""The toy run: the loop on the toy engine and a few records, stopped by real signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from toy_engine import TOY, ToyEngine

from distrust import DistrustTrainer, TrainConfig
from distrust.training.events import Event, Observer, RunEnded, StepEnded
from models import make_model, write_records


@pytest.fixture(scope="module", autouse=True)
def _disks_are_not_waited_for() -> Iterator[None]:
    """A sync matters where power fails: there (``test_power_cut``) the calls are seen, not the disk.

    Of a module and no longer: the same process may look for losses on failing disks next.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


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
