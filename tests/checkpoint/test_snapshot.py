"""What a background save holds: the state as it was, within a budget, in memory that was ready before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from states import torch

from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import arrays, memory, snapshot, stream_writer, writer
from distrust.checkpoint.disk import Disk
from distrust.errors import DistrustWarning

pytestmark = pytest.mark.usefixtures("no_thread_left")


class Gate:
    """A call that waits, on every thread but the main one, until it is opened."""

    def __init__(self, call: Callable) -> None:
        self._call = call
        self._open = threading.Event()

    def __call__(self, *arguments, **named):
        if threading.current_thread() is not threading.main_thread():
            self._open.wait()
        return self._call(*arguments, **named)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(monkeypatch):
    """Holds up a call of a module, or a method."""
    gates = []

    def close(owner, name: str) -> Gate:
        gate = Gate(getattr(owner, name))
        monkeypatch.setattr(owner, name, lambda *given, **named: gate(*given, **named))
        gates.append(gate)
        return gate

    yield close
    for gate in gates:
        gate.open()


@pytest.fixture
def manager(tmp_path, gate):  # the gates open before it is closed
    manager = CheckpointManager(tmp_path / "run", keep_last=None)
    yield manager
    manager.close()


@pytest.fixture
def free_memory(monkeypatch) -> Callable[[int], None]:
    """Says how many bytes are free."""
    return lambda nbytes: monkeypatch.setattr(snapshot, "available_bytes", lambda: nbytes)


class Training:
    """A state that changes in place, of numpy and torch."""

    def __init__(self) -> None:
        self.numbers = {
            section: {"numpy": np.full(3000, 1, np.int64), "torch": (torch or np).full((3000,), 1)}
            for section in ("model", "optimizer", "rng", "history")
        }

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(step=1, **self.numbers)

    def change(self, *sections: str) -> None:
        for section in sections:
            for array in self.numbers[section].values():
                array[:] = 2

    @staticmethod
    def is_as_it_was(loaded: Checkpoint) -> bool:
        return all(
            (array == 1).all()
            for section in ("model", "optimizer", "rng", "history")
            for array in getattr(loaded, section).values()
        )


@pytest.mark.usefixtures("write_path")
def test_without_overlap_everything_may_change_at_once(manager, gate):
    training = Training()
    writing = gate(writer, "AtomicFile")

    pending = manager.save_async(training.checkpoint)
    pending.wait_copied()
    training.change("model", "optimizer", "rng", "history")
    writing.open()
    pending.wait()

    assert training.is_as_it_was(manager.load(1))


@pytest.mark.usefixtures("write_path")
def test_with_overlap_weights_may_change_once_they_are_copied_and_the_rest_at_once(manager, gate):
    training = Training()
    copying, writing = gate(arrays, "fill"), gate(writer, "AtomicFile")

    pending = manager.save_async(training.checkpoint, overlap=True)
    training.change("rng", "history")
    copying.open()
    pending.wait_copied()
    training.change("model", "optimizer")
    assert not pending.done
    writing.open()
    pending.wait()

    assert training.is_as_it_was(manager.load(1))


def test_what_is_saved_while_the_one_before_is_being_written_does_not_change_it(manager, gate):
    """There is one buffer: the second save has to wait for it."""
    syncing = gate(Disk, "sync")
    first = manager.save_async(Checkpoint(step=1, model={"w": np.full(3000, 1)}), overlap=True)
    second: list = []
    other = threading.Thread(
        target=lambda: second.append(manager.save_async(Checkpoint(step=2, model={"w": np.full(3000, 2)})))
    )
    other.start()
    assert not second
    syncing.open()
    other.join()
    assert first.done
    second[0].wait()
    for step in (1, 2):
        assert (manager.load(step).model["w"] == step).all()


def test_who_waits_for_a_copy_that_fails_is_not_left_waiting(manager, monkeypatch):
    honest = arrays.fill

    def fail(*arguments) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(5, "the device is gone")
        honest(*arguments)

    monkeypatch.setattr(arrays, "fill", fail)
    pending = manager.save_async(Training().checkpoint, overlap=True)
    pending.wait_copied()
    with pytest.raises(OSError, match="the device is gone"):
        pending.wait()
    monkeypatch.undo()

    assert manager.list_checkpoints() == []
    manager.save_async(Training().checkpoint, overlap=True).wait()
    assert Training.is_as_it_was(manager.load(1))


def test_a_save_that_needs_no_copy_is_copied_already(manager, gate):
    syncing = gate(Disk, "sync")
    pending = manager.save_async(Checkpoint(step=1))
    pending.wait_copied()
    assert not pending.done
    syncing.open()
    assert pending.wait() == pending.path


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.usefixtures("write_path")
def test_a_state_over_the_budget_is_saved_before_the_call_returns(manager, free_memory, overlap):
    training = Training()
    free_memory(4 * 8 * 8 * 3000 - 1)  # a quarter of it is one byte too few

    with pytest.warns(DistrustWarning, match="step 1.*25% of free"):
        pending = manager.save_async(training.checkpoint, overlap=overlap)

    assert pending.done
    assert pending.path == pending.wait(timeout=0) == manager.directory / "checkpoint-1.safetensors"
    pending.wait_copied()
    training.change("model", "optimizer", "rng", "history")
    manager.validate(1)
    assert training.is_as_it_was(manager.load(1))


def test_a_state_within_the_budget_is_saved_behind(manager, free_memory, gate):
    free_memory(4 * 8 * 8 * 3000)
    syncing = gate(Disk, "sync")
    pending = manager.save_async(Training().checkpoint)
    assert not pending.done
    syncing.open()
    pending.wait()


def test_what_was_reserved_is_there_however_little_is_free_later(manager, free_memory, gate):
    free_memory(1 << 30)
    assert manager.reserve(8 * 8 * 3000)
    free_memory(0)
    assert manager.reserve(8 * 8 * 3000)  # it is there already
    syncing = gate(Disk, "sync")
    pending = manager.save_async(Training().checkpoint)
    assert not pending.done
    syncing.open()
    pending.wait()
    assert Training.is_as_it_was(manager.load(1))


def test_only_what_is_missing_has_to_be_within_the_budget(manager, free_memory):
    large = 64 << 20
    free_memory(4 * large)
    assert manager.reserve(large)
    free_memory(large)
    assert manager.reserve(large + (large >> 3))
    assert not manager.reserve(2 * large)


def test_too_much_is_not_reserved(manager, free_memory):
    free_memory(4000)
    assert manager.reserve(1000)
    assert manager.reserve(0)
    free_memory(1 << 20)
    assert not manager.reserve(1 << 40)
    manager.save_async(Training().checkpoint).wait()  # what was reserved before was more than it says


def test_a_closed_manager_gives_its_memory_back(manager, free_memory):
    assert manager.reserve(1 << 20)
    manager.close()
    free_memory(0)
    assert not manager.reserve(1 << 20)


def test_where_the_system_refuses_what_the_budget_allows_the_save_is_not_lost(manager, monkeypatch):
    """Limits on addresses, say, which no estimate of free memory knows of."""
    honest = memory.allocate

    def refuse_much(nbytes: int):
        if nbytes > 4 << 20:
            raise MemoryError
        return honest(nbytes)

    monkeypatch.setattr(memory, "allocate", refuse_much)
    monkeypatch.setattr(stream_writer, "BLOCK_BYTES", 4096)
    large = np.arange(1 << 20)
    assert not manager.reserve(large.nbytes)
    with pytest.warns(DistrustWarning, match="25% of free"):
        pending = manager.save_async(Checkpoint(step=1, model={"w": large}))
    assert pending.done
    assert (manager.load(1).model["w"] == large).all()


# What is free


def write_tree(root: Path, files: dict[str, str | int]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")


MACHINE = {"proc/meminfo": "MemTotal:  4000 kB\nMemFree:  10 kB\nMemAvailable:  3000 kB"}
SYSTEMS: dict[str, tuple[dict[str, str | int], int]] = {
    "no cgroups": ({}, 3000 * 1024),
    "a cgroup without a limit": (
        {
            "proc/self/cgroup": "0::/user/me",
            "sys/fs/cgroup/user/me/memory.max": "max",
            "sys/fs/cgroup/user/me/memory.current": 10,
            "sys/fs/cgroup/user/me/memory.stat": "anon 3",
        },
        3000 * 1024,
    ),
    "a cgroup": (
        {
            "proc/self/cgroup": "0::/user/me",
            "sys/fs/cgroup/user/me/memory.max": 1000,
            "sys/fs/cgroup/user/me/memory.current": 700,
            "sys/fs/cgroup/user/me/memory.stat": "anon 300\ninactive_file 50\nactive_file 9",
        },
        350,
    ),
    "a container, which sees itself as the root": (
        {
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/memory.max": 1000,
            "sys/fs/cgroup/memory.current": 400,
            "sys/fs/cgroup/memory.stat": "inactive_file 0",
        },
        600,
    ),
    "the limit of a parent": (
        {
            "proc/self/cgroup": "0::/user/me/now",
            "sys/fs/cgroup/user/memory.max": 1000,
            "sys/fs/cgroup/user/memory.current": 990,
            "sys/fs/cgroup/user/memory.stat": "inactive_file 0",
            "sys/fs/cgroup/user/me/now/memory.max": 2000,
            "sys/fs/cgroup/user/me/now/memory.current": 0,
            "sys/fs/cgroup/user/me/now/memory.stat": "inactive_file 0",
        },
        10,
    ),
    "a cgroup of the first version": (
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/other\n4:memory:/jobs/7\n0::/",
            "sys/fs/cgroup/memory/jobs/7/memory.limit_in_bytes": 500,
            "sys/fs/cgroup/memory/jobs/7/memory.usage_in_bytes": 300,
            "sys/fs/cgroup/memory/jobs/7/memory.stat": "inactive_file 7\ntotal_inactive_file 100",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 2**63 - 4096,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": 300,
            "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 100",
        },
        300,
    ),
    "more used than allowed": (
        {
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/memory.max": 1000,
            "sys/fs/cgroup/memory.current": 1400,
            "sys/fs/cgroup/memory.stat": "inactive_file 0",
        },
        0,
    ),
    "files that nobody understands": (
        {
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/memory.max": "plenty",
            "sys/fs/cgroup/memory.current": "some",
            "sys/fs/cgroup/memory.stat": "",
        },
        3000 * 1024,
    ),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_smallest_limit_counts(tmp_path, system):
    files, available = SYSTEMS[system]
    write_tree(tmp_path, {**MACHINE, **files})
    assert memory.available_bytes(tmp_path) == available


def test_a_system_that_says_nothing_has_what_is_built_in(tmp_path):
    assert memory.available_bytes(tmp_path) > 1 << 20
