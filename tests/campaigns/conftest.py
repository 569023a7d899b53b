"""Campaigns in short form: on the toy engine, in a temporary folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from campaigns import training_run
from campaigns.session import Command, Forks

HERE = Path(__file__).parent


@pytest.fixture
def toy_runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Campaigns train the toy engine: the command without a fault, forks by a function of toy_training.py."""

    def use(function: str) -> None:
        command = Command([sys.executable, str(HERE / "toy_training.py")], name="a command")
        monkeypatch.setattr(training_run, "COMMAND", command)
        monkeypatch.setattr(
            training_run,
            "forks",
            lambda: Forks(
                f"toy_training:{function}",
                ["distrust.cli.train", "distrust.reporting.console", "numpy.random"],
                name="a fork",
            ),
        )
        monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=":")

    return use
