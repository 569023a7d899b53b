"""Ctrl-C in the middle of a save or a load: nothing is left that goes on, and nothing that lies about."""

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
BLOCKS = 5 * 8


@pytest.fixture
def interrupting(monkeypatch, no_collector):
    """Has SIGINT arrive at the main thread in a call, before that does its work; returns a list of calls."""
    main, arrived = threading.main_thread(), threading.Event()

    def on_interrupt(_, frame) -> None:
        # Python ignores what is raised in the callback of a weak reference, such as one to an ended thread.
        if frame.f_code.co_name != "_remove" and not arrived.is_set():
            arrived.set()
            raise KeyboardInterrupt

    def in_call(name: str, number: int) -> list[int]:
        honest, lock, calls = getattr(os, name), threading.Lock(), []

        def call(*arguments):
            with lock:
                calls.append(len(calls) + 1)
                now = calls[-1] == number
            if now:
                while not arrived.is_set():
                    signal.pthread_kill(main.ident, signal.SIGINT)
                    arrived.wait(0.1)
            return honest(*arguments)

        monkeypatch.setattr(os, name, call)
        return calls

    before = signal.signal(signal.SIGINT, on_interrupt)
    yield in_call
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("write_path")
@pytest.mark.parametrize("write", [1, 2, 7, BLOCKS])
def test_an_interrupted_save_leaves_what_stood_before(
    tmp_path, monkeypatch, interrupting, no_thread_left, write
):
    monkeypatch.setattr(stream_writer, "BLOCK_BYTES", EDGE)
    with CheckpointManager(tmp_path) as manager:
        before = manager.save(Checkpoint(step=1)).read_bytes()
        writes = interrupting("pwrite", write)

        with pytest.raises(KeyboardInterrupt):
            manager.save(STATE.checkpoint)

        there = len(writes)
        no_thread_left()
        assert len(writes) == there
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoint-1.safetensors"]
        assert (tmp_path / "checkpoint-1.safetensors").read_bytes() == before
        manager.save(STATE.checkpoint)
        manager.validate(1)


@pytest.mark.parametrize("step", ["create", "reserve"])
def test_an_interrupt_when_the_file_has_just_been_made_removes_it(tmp_path, monkeypatch, step):
    """A program that goes on would have it lie about until it is started again."""
    honest = getattr(Disk, step)

    def interrupted(*arguments):
        honest(*arguments)
        raise KeyboardInterrupt

    with CheckpointManager(tmp_path) as manager:
        manager.acquire()
        with monkeypatch.context() as patch:
            patch.setattr(Disk, step, interrupted)
            with pytest.raises(KeyboardInterrupt):
                manager.save(STATE.checkpoint)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        manager.save(STATE.checkpoint)


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
@pytest.mark.parametrize("read", [1, 2, 7, BLOCKS])
def test_an_interrupted_load_leaves_nothing_that_goes_on(
    tmp_path, monkeypatch, interrupting, no_thread_left, cold, read
):
    monkeypatch.setattr(verified_read, "_is_cold", lambda *_: cold)
    monkeypatch.setattr(verified_read, "FETCH_BYTES", EDGE)
    monkeypatch.setattr(verified_read, "PIECE_BYTES", EDGE)
    with CheckpointManager(tmp_path) as manager:
        manager.save(STATE.checkpoint)
        files = len(os.listdir("/dev/fd"))
        reads = interrupting("preadv", read)

        with pytest.raises(KeyboardInterrupt):
            manager.load(1)

        there = len(reads)
        no_thread_left()
        assert len(reads) == there
        assert len(os.listdir("/dev/fd")) == files
        assert manager.load(1).step == 1


def test_an_interrupted_close_lets_go_of_the_lock(tmp_path, monkeypatch):
    """A program that goes on could not open the directory again, and no other one could."""

    class Interrupting(set):
        def discard(self, _):
            raise KeyboardInterrupt

    manager = CheckpointManager(tmp_path)
    manager.acquire()
    with monkeypatch.context() as patch:
        patch.setattr(lock, "_open_lock_files", Interrupting())
        with pytest.raises(KeyboardInterrupt):
            manager.close()
    with CheckpointManager(tmp_path) as other:
        other.acquire()
