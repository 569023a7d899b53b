"""Saves from a device and loads to one, with a device whose kernels and copies come as late as they may."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from states import SECTIONS, State, content, states
from test_loading import arrays_of, flip, use_mode

from distrust import Checkpoint, CheckpointManager, load_file
from distrust.checkpoint import arrays, memory
from distrust.checkpoint.disk import Disk
from distrust.errors import CheckpointUnreadable, ConfigError, CorruptCheckpoint, DistrustWarning, SaveFailed

torch = pytest.importorskip("torch")

from late_device import LateStream  # noqa: E402 - needs torch

from distrust.checkpoint.arrays import copy_streams, device_read, of_torch  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_thread_left")
DEVICE = torch.device("cuda", 1)


@pytest.fixture
def late(monkeypatch) -> Iterator[type[LateStream]]:
    """The CPU is a device that does everything late."""
    LateStream.restart()
    monkeypatch.setitem(copy_streams.STREAMS, "cpu", LateStream)
    monkeypatch.setattr(copy_streams, "_shared", {})
    yield LateStream
    LateStream.gate.set()


@pytest.fixture
def manager(tmp_path, late) -> Iterator[CheckpointManager]:
    with CheckpointManager(tmp_path / "run", keep_last=None) as manager:
        yield manager


def weights(value: float = 1.0) -> dict[str, Any]:
    """Tensors of two dtypes, one of them in another order than its memory."""
    return {
        "a": torch.full((300, 40), value),
        "b": torch.full((7, 50), value, dtype=torch.bfloat16),
        "c": torch.full((40, 30), value).T,
        "d": torch.full((), value),
    }


def holds(loaded: Checkpoint, value: float) -> bool:
    return all(
        bool((torch.as_tensor(array) == value).all())
        for section in SECTIONS
        for array in getattr(loaded, section).values()
    )


def fill(tensors: dict[str, Any], value: float) -> None:
    for tensor in tensors.values():
        tensor.fill_(value)


def run_fill(tensors: dict[str, Any], value: float) -> None:
    """What the device does of :func:`fill`: torch counts the change when it is queued."""
    fill({name: tensor.data for name, tensor in tensors.items()}, value)


def load(manager: CheckpointManager, step: int) -> Checkpoint:
    return manager.load(step, framework="torch")


# Saves


def test_tensors_may_change_at_once_though_their_copy_to_the_host_is_late(manager, late):
    model, moments = weights(), weights()
    late.gate.clear()
    pending = manager.save_async(Checkpoint(step=1, model=model, optimizer=moments), overlap=True)
    pending.wait_copied()  # the copy to the host has not begun
    assert not pending.done
    fill(model, 2)
    fill(moments, 2)
    late.gate.set()
    pending.wait()

    assert holds(load(manager, 1), 1)


def test_without_the_copy_on_the_device_the_changes_reach_the_file(manager, late, monkeypatch):
    """A planted fault: the test above sees what it is meant to see."""
    monkeypatch.setattr(late, "gather", lambda _, runs: list(runs))
    model = weights()
    late.gate.clear()
    pending = manager.save_async(Checkpoint(step=1, model=model), overlap=True)
    pending.wait_copied()
    fill(model, 2)
    late.gate.set()
    pending.wait()

    assert not holds(load(manager, 1), 1)


@pytest.mark.parametrize("reason", ["it is large", "the device is full", "the device has run out of memory"])
def test_a_state_that_is_not_copied_on_the_device_is_copied_before_wait_copied(
    manager, late, monkeypatch, reason
):
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError

    model = weights()
    if reason == "it is large":
        monkeypatch.setattr(copy_streams, "GATHER_BYTES", 100)
    elif reason == "the device is full":
        late.free = 2 * sum(tensor.nbytes for tensor in model.values()) - 1
    else:
        monkeypatch.setattr(torch, "cat", run_out)
    late.gate.clear()
    pending = manager.save_async(Checkpoint(step=1, model=model), overlap=True)
    waiting = threading.Thread(target=pending.wait_copied)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    late.gate.set()
    waiting.join()
    fill(model, 2)
    pending.wait()
    assert holds(load(manager, 1), 1)

    late.gate.clear()
    pending = manager.save_async(Checkpoint(step=2, model=model), overlap=True)
    fill(model, 3)  # without wait_copied: never a file with both
    late.gate.set()
    with pytest.raises(SaveFailed, match="changed while it was copied"):
        pending.wait()


@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("way", ["save", "save_async", "overlap"])
def test_a_save_has_what_was_queued_before_it_and_nothing_that_was_queued_later(
    manager, late, monkeypatch, gathers, way
):
    if not gathers:
        monkeypatch.setattr(copy_streams, "GATHER_BYTES", 0)
    for step in (1, 2, 3):
        model, generator = weights(0), weights(0)
        del model["c"], generator["c"]  # contiguous at once, as this device is not late with everything
        late.kernels.append(lambda tensors=(model, generator): [run_fill(part, 5) for part in tensors])
        checkpoint = Checkpoint(step=step, model=model, rng=generator)
        if way == "save":
            manager.save(checkpoint)
        else:
            pending = manager.save_async(checkpoint, overlap=way == "overlap")
            pending.wait_copied()
        late.kernels.append(lambda tensors=(model, generator): [run_fill(part, 9) for part in tensors])
        late.run_kernels(len(late.kernels))
        if way != "save":
            pending.wait()
        assert holds(load(manager, step), 5)


def test_arrays_of_the_host_are_copied_at_once_and_those_of_the_device_later(manager, late):
    """Interleaved, as by an optimizer that counts steps on the host."""
    model = {**weights(), "a2": np.ones(50, np.float32), "c2": np.ones(60, np.float32)}
    late.gate.clear()
    pending = manager.save_async(Checkpoint(step=1, model=model), overlap=True)
    pending.wait_copied()  # does not wait for the device
    for array in model.values():
        array.fill(2) if isinstance(array, np.ndarray) else array.fill_(2)
    late.gate.set()
    pending.wait()
    assert holds(load(manager, 1), 1)


@pytest.mark.parametrize("is_pinned", [True, False])
def test_page_locked_tensors_are_read_once_the_device_has_filled_them(manager, late, monkeypatch, is_pinned):
    """Copies to them may be queued (non_blocking=True); torch completes those to other memory at once."""
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: is_pinned)
    original, executed = of_torch.ADAPTER.fill, []

    def fill(*arguments: Any) -> int:
        executed.append(late.executed)
        return original(*arguments)

    late.kernels.append(lambda: None)
    monkeypatch.setattr(arrays, "_adapter_of", lambda _: of_torch.ADAPTER._replace(fill=fill))
    manager.save(Checkpoint(step=1, model=weights()))
    assert executed[0] == is_pinned


def test_a_failed_save_keeps_no_copy_on_the_device(tmp_path, late, monkeypatch):
    copies: list[weakref.ref[Any]] = []
    original = late.gather

    def gather(stream: LateStream, runs: Any) -> Any:
        gathered = original(stream, runs)
        copies.extend(weakref.ref(copy) for run in gathered for copy in run)
        late.kernels[:] = [lambda: None]  # they refer to the copies
        return gathered

    class FullDisk(Disk):
        def create(self, path: Path) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(late, "gather", gather)
    manager = CheckpointManager(tmp_path, disk=FullDisk())
    pending = manager.save_async(Checkpoint(step=1, model=weights()), overlap=True)
    with pytest.raises(SaveFailed, match="No space left"):
        pending.wait()
    deadline = time.monotonic() + 10
    while any(copy() is not None for copy in copies) and time.monotonic() < deadline:
        time.sleep(0.01)  # the thread is ending
    assert copies
    assert not [copy for copy in copies if copy() is not None]
    manager.close()


@settings(
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(states(max_arrays=20))
def test_files_are_the_same_from_every_device(manager, state: State):
    steps = range(state.checkpoint.step, state.checkpoint.step + 3)
    manager.save(state.checkpoint)
    path = manager.directory / f"checkpoint-{steps[0]}.safetensors"
    blocking = manager.inspect(path)
    for overlap in (False, True):
        manager.save_async(state.checkpoint, overlap=overlap).wait()
        background = manager.inspect(path)
        assert background.state_digest == blocking.state_digest
        assert background.header.tensors == blocking.header.tensors
    for label, array in arrays_of(manager.load(path)):
        assert content(array) == state.contents[label]


@pytest.mark.device
def test_states_go_from_the_device_to_a_file_and_back(tmp_path, device, monkeypatch):
    with CheckpointManager(tmp_path, keep_last=None) as manager:
        manager.reserve(1 << 20, device=device)
        for step, limit in enumerate([copy_streams.GATHER_BYTES, 0], 1):
            monkeypatch.setattr(copy_streams, "GATHER_BYTES", limit)
            model = {name: tensor.to(device) for name, tensor in weights(step).items()}
            pending = manager.save_async(Checkpoint(step=step, model=model), overlap=True)
            pending.wait_copied()
            fill(model, 9)
            manager.save(Checkpoint(step=10 + step, model=model, rng={"host": torch.ones(3)}))
            assert holds(manager.load(step, framework="torch", device=device), step)
            loaded = manager.load(10 + step, framework="torch", device=device)
            assert all(bool((tensor == 9).all()) for tensor in loaded.model.values())
            assert {tensor.device.type for tensor in loaded.model.values()} == {device}
            assert loaded.rng["host"].device.type == "cpu"


def test_cuda_copies_in_its_own_stream_behind_that_of_the_caller(monkeypatch):
    """The calls to torch.cuda and their order, recorded where there is no CUDA."""
    calls: list[Any] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            calls.append(("stream on", device.index))

        def wait_stream(self, stream: str) -> None:
            calls.append(("wait for", stream))

        def synchronize(self) -> None:
            calls.append("synchronize")

    def current(name: str) -> Any:
        return lambda target: calls.append(name) or contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current of {device}")
    monkeypatch.setattr(torch.cuda, "device", current("with device"))
    monkeypatch.setattr(torch.cuda, "stream", current("with stream"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 200))
    stream = copy_streams.new_stream(DEVICE)
    target = torch.zeros(3)
    stream.copy([target], [torch.ones(3, requires_grad=True)])
    stream.wait()
    assert calls == [
        ("stream on", 1),
        ("wait for", "current of cuda:1"),
        "with device",
        "with stream",
        "synchronize",
    ]
    assert target.tolist() == [1, 1, 1]
    assert stream.free_bytes() == 100
    assert stream.page_lock is not None


# Page-locked memory


def test_memory_of_saves_is_locked_before_it_is_copied_to_and_unlocked_before_it_goes(manager, late):
    """LateStream.copy checks that one of both sides is in locked memory."""
    assert not late.locked
    manager.reserve(1000, device="cpu")
    (reserved,) = late.locked
    manager.save_async(Checkpoint(step=1, model=weights()), overlap=True).wait()
    assert [*late.locked] == [reserved]
    larger = {"w": torch.ones(3 << 20)}  # the memory is replaced
    manager.save_async(Checkpoint(step=2, model=larger), overlap=True).wait()
    assert len(late.locked) == 1
    manager.save(Checkpoint(step=3, model=weights()))  # the ring
    assert len(late.locked) == 2
    manager.close()
    assert not late.locked


def test_memory_that_grows_is_locked_in_one_piece(late, monkeypatch):
    monkeypatch.setattr(memory, "_LOCK_BYTES", 4096)
    buffer, stream = memory.ReusableMemory(), LateStream(torch.device("cpu"))
    block = buffer.acquire(4 << 20, stream.page_lock)
    assert [*late.locked.values()] == [4 << 20]
    assert buffer.acquire((4 << 20) + 1, stream.page_lock) is block
    assert [*late.locked.values()] == [buffer.touched_bytes]
    view = memoryview(block)
    buffer.release()
    del block
    assert late.locked  # a view is left: a copy may be in progress
    del view
    assert not late.locked


def test_memory_that_grows_a_little_is_not_locked_again(late):
    """The history of a run grows with each save, and locking gigabytes takes seconds."""
    calls = []
    stream = LateStream(torch.device("cpu"))

    def count(address: int, nbytes: int) -> Any:
        calls.append(nbytes)
        return stream.page_lock(address, nbytes)

    buffer = memory.ReusableMemory()
    for megabytes in range(200, 250, 10):
        buffer.acquire(megabytes << 20, count)
    assert calls == [250 << 20]


def test_memory_of_numpy_states_is_not_locked(manager, late):
    manager.save_async(Checkpoint(step=1, model={"w": np.ones(3000)}), overlap=True).wait()
    manager.save(Checkpoint(step=2, model={"w": np.ones(3000)}))
    assert not late.locked


def test_a_manager_that_is_dropped_unlocks_its_memory(tmp_path, late):
    manager = CheckpointManager(tmp_path)
    manager.save_async(Checkpoint(step=1, model=weights()), overlap=True).wait()
    assert late.locked
    del manager
    gc.collect()
    assert not late.locked


def test_an_interrupt_while_memory_is_locked_loses_nothing(late, monkeypatch):
    """LateStream refuses to lock or unlock memory twice."""
    monkeypatch.setattr(memory, "_LOCK_BYTES", 4096)
    buffer, stream = memory.ReusableMemory(), LateStream(torch.device("cpu"))

    def lock_late(address: int, nbytes: int) -> Any:
        unlock = stream.page_lock(address, nbytes)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.05)
        return unlock

    for nbytes in (4 << 20, (4 << 20) + 4096):  # new memory, and more of it
        with pytest.raises(KeyboardInterrupt):
            buffer.acquire(nbytes, lock_late)
        assert len(late.locked) == 1
        buffer.acquire(nbytes, stream.page_lock)
        assert [*late.locked.values()] == [nbytes]
    with pytest.raises(KeyboardInterrupt):
        buffer.acquire((4 << 20) + 8192, lock_late)
    buffer.release()
    gc.collect()
    assert not late.locked


def test_a_forked_child_may_use_memory_of_its_own_though_its_parent_has_locked_some():
    nbytes = 32 << 20
    buffer = memory.ReusableMemory()
    block = buffer.acquire(nbytes, lambda *_: lambda: None)
    block[:4] = b"save"
    if not (child := os.fork()):
        allocated = [memory.allocate(len(block) >> shift) for shift in (0, 1, 2, 2)]
        for part in allocated:
            part[:] = b"c" * len(part)
        is_empty = block[:4] == bytes(4)
        block.close()
        os._exit(not (is_empty and all(part[:] == b"c" * len(part) for part in allocated)))
    assert os.waitpid(child, 0)[1] == 0
    assert block[:4] == b"save"


class Cudart:
    """What torch offers of the CUDA runtime, without a device."""

    def __init__(self, code: int) -> None:
        self._code = code
        self.calls: list[tuple[Any, ...]] = []

    def cudaHostRegister(self, *arguments: int) -> int:  # noqa: N802
        self.calls.append(("register", threading.get_ident(), *arguments))
        return self._code

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.calls.append(("unregister", address))
        return 0


@pytest.fixture
def cudart(monkeypatch):
    def use(code: int) -> Cudart:
        runtime = Cudart(code)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)

        def current(device: torch.device) -> Any:
            runtime.calls.append(("device", device))
            return contextlib.nullcontext()

        monkeypatch.setattr(torch.cuda, "device", current)
        return runtime

    copy_streams._warn_once.cache_clear()
    return use


def test_page_locking_registers_and_unregisters_once(cudart):
    runtime = cudart(0)
    block = memory.allocate(8192)
    address = memory.address_of(block)
    block.lock(8192, functools.partial(copy_streams.page_lock, device=DEVICE))
    (_, device), (_, thread, *arguments) = runtime.calls
    assert device == DEVICE
    assert thread != threading.get_ident()  # whose kernels would raise the error, if it failed
    assert arguments == [address, 8192, 1]
    if not (child := os.fork()):
        block.unlock()
        os._exit(len(runtime.calls) - 2)  # in a child, CUDA must not be used
    assert os.waitpid(child, 0)[1] == 0
    del block
    assert runtime.calls[2:] == [("unregister", address)]


@pytest.mark.parametrize("failure", ["code 2", "no CUDA"])
def test_without_page_locking_saves_work_and_one_warning_says_that_they_are_slower(
    tmp_path, late, cudart, monkeypatch, failure
):
    runtime = cudart(2)

    def missing() -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    if failure == "no CUDA":
        monkeypatch.setattr(torch.cuda, "cudart", missing)
    monkeypatch.setattr(
        late, "page_lock", lambda _, address, nbytes: copy_streams.page_lock(address, nbytes, DEVICE)
    )
    monkeypatch.setattr(late, "is_locked", lambda *_: True)
    with CheckpointManager(tmp_path, keep_last=None) as manager:
        with pytest.warns(DistrustWarning, match="cannot be page-locked"):
            manager.save_async(Checkpoint(step=1, model=weights()), overlap=True)
        manager.save_async(Checkpoint(step=2, model=weights()), overlap=True).wait()  # a warning is an error
        manager.save(Checkpoint(step=3, model=weights()))
        assert all(holds(load(manager, step), 1) for step in (1, 2, 3))
    assert all(call[0] != "unregister" for call in runtime.calls)


# Loads


@pytest.mark.parametrize("is_late", [True, False])
@pytest.mark.parametrize("mode", ["cached", "direct"])
def test_a_load_to_a_device_gives_the_arrays_of_a_load_to_the_host(
    tmp_path, late, monkeypatch, mode, is_late
):
    if not is_late:
        monkeypatch.delitem(copy_streams.STREAMS, "cpu")
    use_mode(mode, monkeypatch)  # tensors of many pieces, so that blocks are used again

    @settings(max_examples=15)
    @given(states(max_arrays=20))
    def check(state: State) -> None:
        with CheckpointManager(tmp_path) as manager:
            path = manager.save(state.checkpoint)
            for loaded in (
                manager.load(path, framework="torch", device="cpu"),
                manager.load_latest(framework="torch", device="cpu"),
                load_file(path, framework="torch", device="cpu"),
            ):
                on_host = dict(arrays_of(manager.load(path, framework="torch")))
                for label, array in arrays_of(loaded):
                    assert content(array) == state.contents[label], label
                    assert (array.dtype, array.shape) == (on_host[label].dtype, on_host[label].shape)
                    assert array.data_ptr() % 64 == 0
        assert not late.locked

    check()


def test_a_damaged_file_is_refused_and_its_memory_freed(tmp_path, late):
    with CheckpointManager(tmp_path, keep_last=None) as manager:
        manager.save(Checkpoint(step=1, model=weights(1)))
        path = manager.save(Checkpoint(step=2, model=weights(2)))
        flip(path, manager.inspect(2).header.tensors[1].offset + 5)
        with pytest.raises(CorruptCheckpoint, match="damaged") as caught:
            manager.load(2, framework="torch", device="cpu")
        assert caught.value.tensor == manager.inspect(2).header.tensors[1].name
        with pytest.warns(DistrustWarning, match="skipped a damaged"):
            loaded = manager.load_latest(framework="torch", device="cpu")
        assert holds(loaded, 1)
    del caught
    gc.collect()
    assert not late.locked


@pytest.mark.parametrize(("count", "is_direct"), [(2000, False), (20, True)])
def test_small_tensors_are_read_through_the_page_cache(tmp_path, monkeypatch, count, is_direct):
    enabled = []
    monkeypatch.setattr(device_read.verified_read, "is_cold", lambda *_: True)
    monkeypatch.setattr(device_read.direct_io, "enable", enabled.append)
    with CheckpointManager(tmp_path) as manager:
        manager.save(
            Checkpoint(step=1, model={f"w{i}": torch.ones((1 << 20) // count) for i in range(count)})
        )
        assert holds(manager.load(1, framework="torch", device="cpu"), 1)
    assert bool(enabled) == is_direct


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("you tried to allocate 4 bytes")])
def test_a_device_without_memory_says_so(tmp_path, monkeypatch, error):
    original = torch.empty

    def refuse(nbytes: int, **options: Any) -> torch.Tensor:
        if nbytes:
            raise error
        return original(nbytes, **options)

    with CheckpointManager(tmp_path) as manager:
        path = manager.save(Checkpoint(step=1, model=weights()))
        monkeypatch.setattr(torch, "empty", refuse)
        with pytest.raises(CheckpointUnreadable, match=f"{path}: cannot be read: no memory for it on cpu"):
            manager.load(1, framework="torch", device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"framework": "numpy", "device": "cpu"}, 'framework="torch"'),
        ({"framework": "torch", "device": "cpu", "mmap": True}, "no mmap"),
        ({"framework": "torch", "device": "meta"}, "give cpu, cuda"),
        ({"framework": "torch", "device": "the first"}, "device='the first': "),
        *(
            ({"framework": "torch", "device": name}, "give cpu, cuda, cuda:N or mps")
            for name in ("", "hpu", "privateuseone", "mkldnn", "cpu:1", "cpu\n", 0, 1.5, [], True, b"cpu")
        ),
        ({"framework": "torch", "device": "cuda:77"}, "device='cuda:77': "),
    ],
)
def test_a_device_that_cannot_be_used_is_refused_in_one_line(tmp_path, options, message):
    with CheckpointManager(tmp_path) as manager:
        manager.save(Checkpoint(step=1, model=weights()))
        with pytest.raises(ConfigError, match=message) as caught:
            manager.load(1, **options)
        assert "\n" not in str(caught.value)
    if "mmap" not in options and options["framework"] == "torch":
        with pytest.raises(ConfigError, match=message):
            CheckpointManager(Path(tmp_path)).reserve(10, device=options["device"])
