"""Ctrl-C during a save or a load leaves no running thread and no temporary file."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest
from states import EDGE, random_items, state_of

from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import lock, stream_writer, verified_read
from distrust.checkpoint.disk import Disk

pytestmark = pytest.mark.usefixtures("no_thread_left")

STATE = state_of([random_items(np.dtype(np.float64), EDGE) for _ in range(5)])
CALLS = 5 * 8  # reads or writes of one block each


@pytest.fixture
def interrupt_call(monkeypatch, no_collector):
    """Deliver SIGINT to the main thread at the start of the n-th call; return the list of calls."""
    main_thread, arrived = threading.main_thread(), threading.Event()

    def on_interrupt(_, frame) -> None:
        # Python ignores exceptions in callbacks of weak references, such as one to an ended thread.
        if frame.f_code.co_name != "_remove" and not arrived.is_set():
            arrived.set()
            raise KeyboardInterrupt

    def interrupt(name: str, number: int) -> list[int]:
        original, lock, calls = getattr(os, name), threading.Lock(), []

        def call(*arguments):
            with lock:
                calls.append(len(calls) + 1)
                is_reached = calls[-1] == number
            if is_reached:
                while not arrived.is_set():
                    signal.pthread_kill(main_thread.ident, signal.SIGINT)
                    arrived.wait(0.1)
            return original(*arguments)

        monkeypatch.setattr(os, name, call)
        return calls

    previous = signal.signal(signal.SIGINT, on_interrupt)
    yield interrupt
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("write_path")
@pytest.mark.parametrize("write", [1, 2, 7, CALLS])
def test_interrupted_save_leaves_existing_files_unchanged(
    tmp_path, monkeypatch, interrupt_call, no_thread_left, write
):
    monkeypatch.setattr(stream_writer, "BLOCK_BYTES", EDGE)
    with CheckpointManager(tmp_path) as manager:
        previous = manager.save(Checkpoint(step=1)).read_bytes()
        writes = interrupt_call("pwrite", write)

        with pytest.raises(KeyboardInterrupt):
            manager.save(STATE.checkpoint)

        count = len(writes)
        no_thread_left()
        assert len(writes) == count
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoint-1.safetensors"]
        assert (tmp_path / "checkpoint-1.safetensors").read_bytes() == previous
        manager.save(STATE.checkpoint)
        manager.validate(1)


@pytest.mark.parametrize("step", ["create", "reserve"])
def test_interrupt_right_after_the_file_is_created_removes_it(tmp_path, monkeypatch, step):
    """Otherwise the file would remain until the next start of the program."""
    original = getattr(Disk, step)

    def call_and_interrupt(*arguments):
        original(*arguments)
        raise KeyboardInterrupt

    with CheckpointManager(tmp_path) as manager:
        manager.acquire()
        with monkeypatch.context() as patch:
            patch.setattr(Disk, step, call_and_interrupt)
            with pytest.raises(KeyboardInterrupt):
                manager.save(STATE.checkpoint)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        manager.save(STATE.checkpoint)


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
@pytest.mark.parametrize("read", [1, 2, 7, CALLS])
def test_interrupted_load_leaves_no_thread_and_no_open_file(
    tmp_path, monkeypatch, interrupt_call, no_thread_left, cold, read
):
    monkeypatch.setattr(verified_read, "is_cold", lambda *_: cold)
    monkeypatch.setattr(verified_read, "FETCH_BYTES", EDGE)
    monkeypatch.setattr(verified_read, "PIECE_BYTES", EDGE)
    with CheckpointManager(tmp_path) as manager:
        manager.save(STATE.checkpoint)
        files = len(os.listdir("/dev/fd"))
        reads = interrupt_call("preadv", read)

        with pytest.raises(KeyboardInterrupt):
            manager.load(1)

        count = len(reads)
        no_thread_left()
        assert len(reads) == count
        assert len(os.listdir("/dev/fd")) == files
        assert manager.load(1).step == 1


def test_interrupted_close_releases_the_lock(tmp_path, monkeypatch):
    """Otherwise neither this process nor another could write to the directory again."""

    class Interrupting(set):
        def discard(self, _):
            raise KeyboardInterrupt

    manager = CheckpointManager(tmp_path)
    manager.acquire()
    with monkeypatch.context() as patch:
        patch.setattr(lock, "_open_lock_files", Interrupting())
        with pytest.raises(KeyboardInterrupt):
            manager.close()
    with CheckpointManager(tmp_path) as second_manager:
        second_manager.acquire()
