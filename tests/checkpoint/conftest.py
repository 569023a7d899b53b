"""Fixtures for direct and buffered I/O, and for the threads of a test."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import threading
import time
from pathlib import Path

import pytest

from distrust.checkpoint import direct_io

BUFFERED = "from distrust.checkpoint import direct_io; direct_io.FLAG = 0\n"


@pytest.fixture(params=["direct", "buffered"])
def write_path(request, monkeypatch) -> str:
    """Run with direct I/O, then without; return the code that a child process must run first."""
    if request.param == "direct":
        return ""
    monkeypatch.setattr(direct_io, "FLAG", 0)
    return BUFFERED


@pytest.fixture(name="direct_io")
def _direct_io(tmp_path) -> None:
    """Skip where the file system of the test does not support direct I/O."""
    if not supports_direct_io(tmp_path):
        pytest.skip("this file system does not support direct I/O")


def supports_direct_io(directory: Path) -> bool:
    probe = directory / "probe"
    flags = os.O_RDWR | os.O_CREAT
    try:
        descriptor = os.open(probe, flags | direct_io.FLAG)
    except OSError:
        return False
    try:
        os.pwrite(descriptor, mmap.mmap(-1, 4096), 0)
        return direct_io.is_enabled(descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):
            probe.unlink()


@pytest.fixture
def no_collector():
    """Disable the garbage collector: Python ignores exceptions of signals in its callbacks."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def no_thread_left():
    """Check that no thread outlives the test; return a function that waits for the threads to end."""
    initial = set(threading.enumerate())

    def wait() -> None:
        deadline = time.monotonic() + 10
        while not set(threading.enumerate()) <= initial:
            assert time.monotonic() < deadline, "a thread still runs"
            time.sleep(0.001)

    yield wait
    wait()
