"""The snapshot of a background save: the state at the call, within a memory budget, in reserved memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from states import as_tensor

from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import arrays, file_writer, memory, snapshot, stream_writer
from distrust.checkpoint.disk import Disk
from distrust.errors import DistrustWarning

pytestmark = pytest.mark.usefixtures("no_thread_left")


class Gate:
    """A call that blocks, on every thread except the main one, until the gate is opened."""

    def __init__(self, call: Callable) -> None:
        self._call = call
        self._open = threading.Event()

    def __call__(self, *arguments, **options):
        if threading.current_thread() is not threading.main_thread():
            self._open.wait()
        return self._call(*arguments, **options)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(monkeypatch):
    """Block a function of a module, or a method, until its gate is opened."""
    gates = []

    def close(owner, name: str) -> Gate:
        gate = Gate(getattr(owner, name))
        monkeypatch.setattr(owner, name, lambda *arguments, **options: gate(*arguments, **options))
        gates.append(gate)
        return gate

    yield close
    for gate in gates:
        gate.open()


@pytest.fixture
def manager(tmp_path, gate):  # so that the gates open before it is closed
    manager = CheckpointManager(tmp_path / "run", keep_last=None)
    yield manager
    manager.close()


@pytest.fixture
def free_memory(monkeypatch) -> Callable[[int], None]:
    """Set how many bytes appear to be available."""
    return lambda nbytes: monkeypatch.setattr(snapshot, "available_bytes", lambda: nbytes)


class Training:
    """A state of numpy and torch arrays that are modified in place."""

    def __init__(self, device: str = "cpu") -> None:
        ones = np.ones(3000, np.int64)
        self.arrays = {
            section: {"numpy": ones.copy(), "torch": as_tensor(ones, device)}
            for section in ("model", "optimizer", "rng", "history")
        }

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(step=1, **self.arrays)

    def modify(self, *sections: str) -> None:
        for section in sections:
            for array in self.arrays[section].values():
                array[:] = 2

    @staticmethod
    def is_unmodified(loaded: Checkpoint) -> bool:
        return all(
            (array == 1).all()
            for section in ("model", "optimizer", "rng", "history")
            for array in getattr(loaded, section).values()
        )


@pytest.mark.device
@pytest.mark.usefixtures("write_path")
def test_without_overlap_the_caller_may_modify_everything_at_once(manager, gate, device):
    training = Training(device)
    writing = gate(file_writer, "AtomicCheckpointFile")

    pending = manager.save_async(training.checkpoint)
    pending.wait_copied()
    training.modify("model", "optimizer", "rng", "history")
    writing.open()
    pending.wait()

    assert training.is_unmodified(manager.load(1))


@pytest.mark.device
@pytest.mark.usefixtures("write_path")
def test_with_overlap_the_caller_may_modify_weights_after_wait_copied(manager, gate, device):
    training = Training(device)
    copying, writing = gate(arrays, "fill"), gate(file_writer, "AtomicCheckpointFile")

    pending = manager.save_async(training.checkpoint, overlap=True)
    training.modify("rng", "history")
    copying.open()
    pending.wait_copied()
    training.modify("model", "optimizer")
    assert not pending.done
    writing.open()
    pending.wait()

    assert training.is_unmodified(manager.load(1))


def test_second_save_waits_for_the_snapshot_buffer(manager, gate):
    syncing = gate(Disk, "sync")
    first = manager.save_async(Checkpoint(step=1, model={"w": np.full(3000, 1)}), overlap=True)
    second: list = []
    caller = threading.Thread(
        target=lambda: second.append(manager.save_async(Checkpoint(step=2, model={"w": np.full(3000, 2)})))
    )
    caller.start()
    assert not second
    syncing.open()
    caller.join()
    assert first.done
    second[0].wait()
    for step in (1, 2):
        assert (manager.load(step).model["w"] == step).all()


def test_wait_copied_returns_if_the_copy_fails(manager, monkeypatch):
    original = arrays.fill

    def fail(*arguments) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(5, "the device is gone")
        original(*arguments)

    monkeypatch.setattr(arrays, "fill", fail)
    pending = manager.save_async(Training().checkpoint, overlap=True)
    pending.wait_copied()
    with pytest.raises(OSError, match="the device is gone"):
        pending.wait()
    monkeypatch.undo()

    assert manager.list_checkpoints() == []
    manager.save_async(Training().checkpoint, overlap=True).wait()
    assert Training.is_unmodified(manager.load(1))


def test_wait_copied_returns_at_once_if_nothing_needs_a_copy(manager, gate):
    syncing = gate(Disk, "sync")
    pending = manager.save_async(Checkpoint(step=1))
    pending.wait_copied()
    assert not pending.done
    syncing.open()
    assert pending.wait() == pending.path


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.usefixtures("write_path")
def test_state_over_the_memory_budget_is_saved_synchronously(manager, free_memory, overlap):
    training = Training()
    free_memory(4 * 8 * 8 * 3000 - 1)  # a quarter of it is one byte less than the state

    with pytest.warns(DistrustWarning, match="step 1.*25% of free"):
        pending = manager.save_async(training.checkpoint, overlap=overlap)

    assert pending.done
    assert pending.path == pending.wait(timeout=0) == manager.directory / "checkpoint-1.safetensors"
    pending.wait_copied()
    training.modify("model", "optimizer", "rng", "history")
    manager.validate(1)
    assert training.is_unmodified(manager.load(1))


def test_state_within_the_memory_budget_is_saved_in_the_background(manager, free_memory, gate):
    free_memory(4 * 8 * 8 * 3000)
    syncing = gate(Disk, "sync")
    pending = manager.save_async(Training().checkpoint)
    assert not pending.done
    syncing.open()
    pending.wait()


def test_reserved_memory_is_used_even_if_little_is_available_later(manager, free_memory, gate):
    free_memory(1 << 30)
    assert manager.reserve(8 * 8 * 3000)
    free_memory(0)
    assert manager.reserve(8 * 8 * 3000)  # already reserved
    syncing = gate(Disk, "sync")
    pending = manager.save_async(Training().checkpoint)
    assert not pending.done
    syncing.open()
    pending.wait()
    assert Training.is_unmodified(manager.load(1))


def test_only_additional_memory_counts_against_the_budget(manager, free_memory):
    large = 64 << 20
    free_memory(4 * large)
    assert manager.reserve(large)
    free_memory(large)
    assert manager.reserve(large + (large >> 3))
    assert not manager.reserve(2 * large)


def test_reserve_rejects_more_than_the_budget(manager, free_memory):
    free_memory(4000)
    assert manager.reserve(1000)
    assert manager.reserve(0)
    free_memory(1 << 20)
    assert not manager.reserve(1 << 40)
    manager.save_async(Training().checkpoint).wait()  # reserve rounded up, so the state fits


def test_closed_manager_releases_its_memory(manager, free_memory):
    assert manager.reserve(1 << 20)
    manager.close()
    free_memory(0)
    assert not manager.reserve(1 << 20)


def test_save_is_synchronous_if_the_system_refuses_memory_within_the_budget(manager, monkeypatch):
    """For example a limit on the address space, which the estimate does not know."""
    original = memory.allocate

    def refuse_large(nbytes: int):
        if nbytes > 4 << 20:
            raise MemoryError
        return original(nbytes)

    monkeypatch.setattr(memory, "allocate", refuse_large)
    monkeypatch.setattr(stream_writer, "BLOCK_BYTES", 4096)
    large = np.arange(1 << 20)
    assert not manager.reserve(large.nbytes)
    with pytest.warns(DistrustWarning, match="25% of free"):
        pending = manager.save_async(Checkpoint(step=1, model={"w": large}))
    assert pending.done
    assert (manager.load(1).model["w"] == large).all()


# Available memory


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
    "a container, in which the cgroup is the root": (
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
    "a cgroup of version 1": (
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
    "unparsable files": (
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
def test_smallest_limit_applies(tmp_path, system):
    files, available = SYSTEMS[system]
    write_tree(tmp_path, {**MACHINE, **files})
    assert memory.available_bytes(tmp_path) == available


def test_without_proc_the_physical_memory_is_returned(tmp_path):
    assert memory.available_bytes(tmp_path) > 1 << 20
