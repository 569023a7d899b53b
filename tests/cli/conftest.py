"""A small run, trained once by the command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from distrust.cli import main
from distrust.testing.models import make_model, train_arguments, write_records


@dataclass(frozen=True)
class Output:
    """What a command gave back."""

    code: int
    out: str
    err: str


@pytest.fixture
def distrust(capsys: pytest.CaptureFixture[str]) -> Callable[..., Output]:
    """Runs a command line in this process."""

    def distrust(*arguments: object) -> Output:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as left:  # argparse and tyro leave by it
            code = left.code
        captured = capsys.readouterr()
        return Output(code, captured.out, captured.err)

    return distrust


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the model ``model``, the data ``data.jsonl`` and the run ``run``."""
    folder = tmp_path_factory.mktemp("cli")
    make_model(folder / "model")
    write_records(folder / "data.jsonl")
    return folder


@pytest.fixture(scope="session")
def finished_run(folder: Path) -> Path:
    """A finished run, with checkpoints of the steps 2, 4 and 6."""
    assert main(train_arguments(folder, folder / "run")) == 0
    return folder / "run"


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[str]]:
    """Starts a command line as a process of its own; what runs at the end of the test is killed."""
    started = []

    def start(*arguments: object, python: Path | str = sys.executable) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [python, "-m", "distrust", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
