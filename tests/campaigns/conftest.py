"""Campaigns in short form: on the toy engine, in a temporary folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest

from campaigns import training_run
from campaigns.session import Command, Forks

HERE = Path(__file__).parent
IMPORTS = ("distrust.cli.train", "distrust.reporting.console", "numpy.random")


@pytest.fixture(scope="session")
def start_forks() -> Iterator[Callable[[str], Forks]]:
    """Gives the fork server of a function of toy_training.py: one for all tests."""
    with ExitStack() as stack:
        servers: dict[str, Forks] = {}

        def start(function: str) -> Forks:
            if function not in servers:
                forks = Forks(f"toy_training:{function}", IMPORTS, name="a fork")
                servers[function] = stack.enter_context(forks)
            return servers[function]

        yield start


@pytest.fixture(scope="session")
def references() -> dict[Any, Any]:
    """What the undisturbed runs of the campaigns returned: they have no fault, and need no repetition."""
    return {}


@pytest.fixture
def toy_runs(
    monkeypatch: pytest.MonkeyPatch,
    data: Path,
    start_forks: Callable[[str], Forks],
    references: dict[Any, Any],
) -> Callable[[str], None]:
    """Campaigns train the toy engine: the command without a fault, forks by a function of toy_training.py."""
    disturb_runs = training_run.disturb_runs

    def disturb(campaign: Any, *, reference: Callable[[Any], Any], **options: Any) -> None:
        def train_once(training: Any) -> Any:
            if reference not in references:
                references[reference] = reference(training)
            return references[reference]

        disturb_runs(campaign, reference=train_once, **options)

    def use(function: str) -> None:
        command = Command([sys.executable, str(HERE / "toy_training.py")], name="a command")
        training = [*training_run.TRAINING, "--data", str(data)]
        training[training.index("--eval-fraction") + 1] = "0.3"
        monkeypatch.setattr(training_run, "COMMAND", command)
        monkeypatch.setattr(training_run, "TRAINING", training)
        monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=":")
        monkeypatch.setattr(training_run, "forks", lambda: nullcontext(start_forks(function)))
        monkeypatch.setattr(training_run, "disturb_runs", disturb)

    return use
