"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

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
