"""Both ways in which files are written, and the threads that work on them."""

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
    """Direct I/O where the file system takes it, and then none; what a child process has to run first."""
    if request.param == "direct":
        return ""
    monkeypatch.setattr(direct_io, "FLAG", 0)
    return BUFFERED


@pytest.fixture(name="direct_io")
def _direct_io(tmp_path) -> None:
    """Only where the file system of the test takes direct I/O."""
    if not takes_direct_io(tmp_path):
        pytest.skip("this file system takes no direct I/O")


def takes_direct_io(directory: Path) -> bool:
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
    """Python ignores what a signal raises in a callback of the garbage collector, such as hypothesis has."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def no_thread_left():
    """Whatever the test does, what it began ends with it; calling this waits for what is about to end."""
    before = set(threading.enumerate())

    def wait() -> None:
        deadline = time.monotonic() + 10
        while not set(threading.enumerate()) <= before:
            assert time.monotonic() < deadline, "a thread goes on"
            time.sleep(0.001)

    yield wait
    wait()
