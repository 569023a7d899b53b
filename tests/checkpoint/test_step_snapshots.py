"""Snapshots of steps in shared memory: what a process leaves behind, however and whenever it dies."""

from __future__ import annotations

import gc
import itertools
import os
import random
import shutil
import signal
import stat
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distrust import Checkpoint, CheckpointManager, CorruptCheckpoint, DistrustWarning
from distrust.checkpoint import catalog, parallel, snapshot, step_snapshots, stream_writer
from distrust.checkpoint.step_snapshots import folder_of, seconds_between

RNG = np.ones(3)
ALWAYS = 1e9  # percent of the time: every step


@pytest.fixture(autouse=True)
def shared_memory(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setenv("DISTRUST_SHM", str(folder))
    return folder


def state(step: int, size: int = 200) -> Checkpoint:
    return Checkpoint(
        step=step, model={"w": np.full(size, step), "b": np.arange(step)}, rng={"n": np.ones(3)}
    )


def take(manager: CheckpointManager, step: int, **options: object) -> None:
    manager.snapshot(state(step), budget=ALWAYS, **options).wait()


def take_twice(manager: CheckpointManager) -> None:
    for step in (1, 2):
        take(manager, step)


def die_in_fork(work: Callable[[], object], number: int = signal.SIGKILL) -> None:
    """Run it in a fork, which then dies by a signal, if it has not died before."""
    pid = os.fork()
    if pid == 0:
        end_fork(work, number)
    os.waitpid(pid, 0)


def end_fork(work: Callable[[], object], number: int) -> NoReturn:
    try:
        work()
    except BaseException:
        traceback.print_exc()
    finally:
        os.kill(os.getpid(), number)
        os._exit(1)


def rescue(directory: Path) -> int | None:
    """The step that is rescued, whose content must be right."""
    with CheckpointManager(directory) as manager:
        if manager.rescue() is None:
            return None
        loaded = manager.load_latest()
    assert np.array_equal(loaded.model["w"], state(loaded.step, loaded.model["w"].size).model["w"])
    assert np.array_equal(loaded.model["b"], np.arange(loaded.step))
    return loaded.step


def steps(directory: Path, *numbers: int) -> Callable[[], None]:
    def work() -> None:
        manager = CheckpointManager(directory)
        for step in numbers:
            take(manager, step)

    return work


@pytest.mark.parametrize(
    ("name", "number"),
    [("run", signal.SIGKILL), ("run", signal.SIGABRT), (os.fsdecode(b"\xff\n"), signal.SIGSEGV)],
)
def test_a_process_that_dies_leaves_its_last_step(tmp_path, shared_memory, name, number):
    die_in_fork(steps(tmp_path / name, 1, 2, 3), number)
    assert rescue(tmp_path / name) == 3
    assert list(shared_memory.iterdir()) == [], "it is in the directory now"
    assert rescue(tmp_path / name) is None


@pytest.fixture(scope="module", params=[False, True], ids=["at once", "overlapped"])
def writes(request, tmp_path_factory) -> list[bytes]:
    """The bytes of a slot while step 3 replaces step 1 there: before each line of the code that writes it."""
    base = tmp_path_factory.mktemp("writes")
    dumps: list[bytes] = []
    threads: list[int] = []  # the one that was started last writes; the others wait for it
    lock = threading.Lock()
    traced = {module.__file__ for module in (step_snapshots, snapshot, stream_writer)}

    def trace(frame, event, _):
        if frame.f_code.co_filename not in traced:
            return None
        with lock:
            if (thread := threading.get_ident()) not in threads:
                threads.append(thread)
            if thread == threads[-1] and (content := slot.read_bytes()) not in dumps[-1:]:
                dumps.append(content)
        return trace

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTRUST_SHM", str(base))
        manager = CheckpointManager(base / "run")
        take(manager, 1)
        take(manager, 2)
        slot = folder_of(base / "run") / "0.safetensors"
        threading.settrace(trace)  # of the thread that copies and hashes
        sys.settrace(trace)
        try:
            take(manager, 3, overlap=request.param)
        finally:
            sys.settrace(None)
            threading.settrace(None)
        dumps.append(slot.read_bytes())
        manager.close()
    return [dump for dump, following in zip(dumps, [*dumps[1:], b""], strict=True) if dump != following]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, 100), part=st.floats(0, 1))
def test_whatever_prefix_of_its_writes_a_slot_has_it_is_torn_or_complete(tmp_path, writes, number, part):
    """A write of many bytes may be cut anywhere, too. The other slot has the step before."""
    number %= len(writes) - 1
    old, new = writes[number], writes[number + 1]
    changed = [index for index in range(len(new)) if old[index : index + 1] != new[index : index + 1]]
    cut = [*changed, len(new)][round(part * len(changed))]
    slot = tmp_path / "0.safetensors"
    slot.write_bytes(new[:cut] + old[cut:])
    if cut == len(new) and number == len(writes) - 2:
        assert catalog.verify_content(slot).step == 3
    elif cut == changed[0] and number == 0:
        assert catalog.verify_content(slot).step == 1
    else:
        with pytest.raises(CorruptCheckpoint):
            catalog.verify_content(slot)


def test_killed_at_random_instants_at_most_one_step_is_lost(tmp_path):
    """Each process goes on from the step that was rescued, and says through a pipe when a step has ended."""
    rng, directory, ended, resumed = random.Random(7), tmp_path / "run", 0, 0
    for _ in range(8):
        resumed = rescue(directory) or resumed
        assert ended - resumed <= 1
        ended = resumed
        source, target = os.pipe()

        def train(first: int = resumed + 1, target: int = target) -> None:
            manager = CheckpointManager(directory)
            for step in range(first, first + 10_000):
                os.write(target, b".")
                manager.snapshot(state(step, 100_000), budget=ALWAYS).wait()

        pid = os.fork()
        if pid == 0:
            end_fork(train, signal.SIGKILL)
        os.close(target)
        for _ in range(rng.randint(2, 5)):
            ended += len(os.read(source, 1))
        time.sleep(rng.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ended += len(os.read(source, 1 << 20))
        os.close(source)
    assert ended > 8, "each process made a step, at least"


@pytest.mark.parametrize("damage", ["header", "data", "both"])
def test_a_damaged_slot_counts_for_nothing(tmp_path, damage):
    directory = tmp_path / "run"
    die_in_fork(steps(directory, 1, 2))
    for name, step in (("0.safetensors", 1), ("1.safetensors", 2)):
        if step == 2 or damage == "both":
            path = folder_of(directory) / name
            content = bytearray(path.read_bytes())
            content[0 if damage == "header" else -9] ^= 1
            path.write_bytes(content)
    assert rescue(directory) == (None if damage == "both" else 1)


def test_removed_at_the_end_only_if_a_checkpoint_is_as_new(tmp_path, shared_memory):
    with CheckpointManager(tmp_path / "run") as manager:
        take(manager, 1)
        manager.save(state(1))
        take(manager, 2)
    assert stat.S_IMODE(folder_of(tmp_path / "run").stat().st_mode) == 0o700, "step 2 is nowhere else"
    with CheckpointManager(tmp_path / "run") as manager:
        assert manager.load_latest().step == 1, "whoever only reads rescues nothing"
        manager.acquire()
        assert manager.load_latest().step == 2
        take(manager, 3)
        manager.save(state(3))
    assert list(shared_memory.iterdir()) == []


def test_what_the_user_removed_does_not_come_back(tmp_path):
    directory = tmp_path / "run"

    def work() -> None:
        manager = CheckpointManager(directory)
        manager.save(state(1))
        take(manager, 2)

    die_in_fork(work)
    (directory / "checkpoint-1.safetensors").unlink()
    assert rescue(directory) is None
    die_in_fork(steps(directory, 3))
    (directory / ".lock").unlink()
    assert rescue(directory) is None, "it is another directory under the same name"


def test_another_directory_under_the_same_name(tmp_path):
    """As in two containers that share /dev/shm; or the directory was moved away."""
    directory = tmp_path / "run"
    die_in_fork(steps(directory, 1))
    directory.rename(tmp_path / "moved")
    CheckpointManager(directory).acquire()
    assert rescue(directory) is None
    shutil.rmtree(directory)
    (tmp_path / "moved").rename(directory)
    assert rescue(directory) == 1


@pytest.mark.parametrize("earlier", [0, 2])
def test_a_snapshot_that_fails_ends_no_training(tmp_path, earlier):
    array = pytest.importorskip("torch").zeros(20_000_000)
    with CheckpointManager(tmp_path / "run") as manager:
        for step in range(1, earlier + 1):
            take(manager, step)
        snapshots = manager.snapshot(Checkpoint(step=3, model={"w": array}), budget=ALWAYS, overlap=True)
        array.add_(1)
        snapshots.wait()
        reference = weakref.ref(array)
        del array
        with pytest.warns(DistrustWarning, match="model or optimizer changed while it was copied"):
            manager.snapshot(state(4), budget=ALWAYS)
        gc.collect()
        assert reference() is None, "its error lives on"
        assert rescue_slots(tmp_path / "run") == (earlier or None)
        manager.save(state(5))


def test_a_state_that_outgrows_the_memory(tmp_path, monkeypatch):
    with CheckpointManager(tmp_path / "run") as manager:
        take_twice(manager)
        monkeypatch.setattr(step_snapshots, "available_bytes", lambda: 10_000)
        take(manager, 3, overlap=True)
        assert rescue_slots(tmp_path / "run") == 3, "it still fits"
        manager.snapshot(state(4, 1_000_000), budget=ALWAYS, overlap=True).wait()
        with pytest.warns(DistrustWarning, match="exceed a quarter of the free 10,000"):
            take(manager, 5)
        assert rescue_slots(tmp_path / "run") == 3


def rescue_slots(directory: Path) -> int | None:
    """The newest step in the slots that verifies."""
    files = step_snapshots.read_slots(folder_of(directory), catalog.verify_content)
    return files[0].step if files else None


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_only_model_and_optimizer_overlap(tmp_path, framework):
    library = pytest.importorskip(framework)
    model, random_state = library.ones(1_000_000), library.ones(1000)

    def work() -> None:
        if framework == "torch":
            library.set_num_threads(1)  # those of this process do not exist in a fork, and it would hang
        manager = CheckpointManager(tmp_path / "run")
        for step in range(1, 4):
            model[:] = random_state[:] = step
            checkpoint = Checkpoint(step=step, model={"w": model}, rng={"n": random_state})
            snapshots = manager.snapshot(checkpoint, budget=ALWAYS, overlap=True)
            random_state[:] = 9
            snapshots._pending.wait_copied()  # not until it is complete, which the budget would allow
            model[:] = 9
            snapshots.wait()

    die_in_fork(work)
    with CheckpointManager(tmp_path / "run") as manager:
        manager.rescue()
        loaded = manager.load_latest()
    assert (loaded.rng["n"] == 3).all()
    assert (loaded.model["w"] == 3).all()


def test_nothing_refers_to_a_snapshot_that_has_ended(tmp_path):
    ended = []
    with CheckpointManager(tmp_path / "run") as manager:
        for step in range(1, 4):
            take(manager, step)
            ended.append(weakref.ref(manager._state.snapshots._pending))
        gc.collect()
        assert [reference() is None for reference in ended] == [True, True, False]


def test_an_own_step_is_not_what_load_latest_gives(tmp_path):
    with CheckpointManager(tmp_path / "run") as manager:
        manager.save(state(1))
        take(manager, 2)
        assert manager.load_latest().step == 1


def test_an_own_step_is_none_of_another_process_after_a_failure(tmp_path):
    with CheckpointManager(tmp_path / "run") as manager:
        manager.save(state(1))
    with CheckpointManager(tmp_path / "run") as manager:
        for step in (2, 3):
            take(manager, step)
        model = {"w": np.array([object()])}
        manager.snapshot(Checkpoint(step=4, model=model), budget=ALWAYS, overlap=True).wait()
        with pytest.warns(DistrustWarning, match="arrays of object cannot be saved"):
            take(manager, 5)
        assert manager.load_latest().step == 1
        assert rescue_slots(tmp_path / "run") == 3, "if this process dies, it is not lost"


def test_without_a_new_thread_the_caller_copies_and_keeps_its_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "cores", lambda: 7)
    with CheckpointManager(tmp_path / "run") as manager:
        take(manager, 1)
        with monkeypatch.context() as patches:
            patches.setattr(threading.Thread, "start", refuse)
            take(manager, 2, overlap=True)
        assert rescue_slots(tmp_path / "run") == 2
        assert parallel.worthwhile_threads(1 << 30) == 7


@pytest.mark.parametrize("name", ["Memory", "_Slot"])
@pytest.mark.parametrize("count", [0, 1])
def test_an_interrupt_leaves_two_slots_that_can_be_used(tmp_path, monkeypatch, name, count):
    with CheckpointManager(tmp_path / "run") as manager:
        with monkeypatch.context() as patches:
            patches.setattr(step_snapshots, name, interrupted_after(count, getattr(step_snapshots, name)))
            with pytest.raises(KeyboardInterrupt):
                take(manager, 1)
        take_twice(manager)
        slots = step_snapshots.read_slots(folder_of(tmp_path / "run"), catalog.verify_content)
        assert [file.step for file in slots] == [2, 1]


def interrupted_after(count: int, make: Callable[..., object]) -> Callable[..., object]:
    calls = itertools.count()

    def call(*arguments: object) -> object:
        if next(calls) == count:
            raise KeyboardInterrupt
        return make(*arguments)

    return call


def refuse(thread: threading.Thread) -> NoReturn:
    raise RuntimeError("can't start new thread")


def test_arrays_that_change_before_they_are_copied(tmp_path):
    directory, array = tmp_path / "run", np.zeros(1_000_000)

    def work() -> None:
        manager = CheckpointManager(directory)
        for step in range(1, 4):
            checkpoint = Checkpoint(step=step, model={"w": array})
            manager.snapshot(lambda kept=checkpoint: kept, budget=ALWAYS, overlap=True).wait_copied()
            array.fill(step)
        manager.snapshot(Checkpoint(step=4, model={"w": array}), budget=ALWAYS).wait()

    die_in_fork(work)
    with CheckpointManager(directory) as manager:
        manager.rescue()
        assert (manager.load_latest().model["w"] == 3).all()


@pytest.mark.parametrize("framework", ["numpy", "torch", "mlx"])
def test_arrays_of_each_framework(tmp_path, framework):
    pytest.importorskip("mlx.core" if framework == "mlx" else framework)
    with CheckpointManager(tmp_path / "source") as source:
        source.save(state(1))
        loaded = source.load_latest(framework=framework)
    with CheckpointManager(tmp_path / "run") as manager:
        manager.snapshot(loaded, overlap=True).wait_copied()
        manager.rescue()
        digests = [CheckpointManager(tmp_path / name).inspect(1).state_digest for name in ("source", "run")]
    assert digests[0] == digests[1]


def test_a_state_that_grows(tmp_path):
    with CheckpointManager(tmp_path / "run") as manager:
        for step, size in enumerate([10, 10, 2000, 3_000_000, 10, 3_000_000], 1):
            manager.snapshot(state(step, size), budget=ALWAYS).wait()
    assert rescue(tmp_path / "run") == 6


def test_no_room(tmp_path, monkeypatch, shared_memory):
    monkeypatch.setattr(step_snapshots, "available_bytes", lambda: 10_000)
    with CheckpointManager(tmp_path / "run") as manager:
        with pytest.warns(DistrustWarning, match="exceed a quarter of the free 10,000"):
            take_twice(manager)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            take(manager, 3)
    assert list(shared_memory.iterdir()) == []


@pytest.mark.parametrize("kind", ["open to others", "a link", "a slot is a link"])
def test_a_folder_that_others_may_change_is_not_used(tmp_path, shared_memory, kind):
    directory = tmp_path / "run"
    die_in_fork(steps(directory, 1, 2))
    folder = folder_of(directory)
    if kind == "open to others":
        folder.chmod(0o755)
    elif kind == "a link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        for name in ("0.safetensors", "1.safetensors"):
            (folder / name).rename(tmp_path / name)
            (folder / name).symlink_to(tmp_path / name)
    assert rescue(directory) is None
    if kind != "a slot is a link":
        match = "is a link, or is not private"
        with CheckpointManager(directory) as manager, pytest.warns(DistrustWarning, match=match):
            take_twice(manager)


@pytest.mark.parametrize(("idle", "seconds"), [(0.0, 1.1), (0.008, 0.7), (0.02, 0.1), (9.0, 0.1)])
def test_how_often(idle, seconds):
    """1 ms of stall and 20 ms beside it, on two cores, at one percent: the time of an idle core is free."""
    interval = seconds_between(stall=0.001, background=0.02, idle=idle, cores=2, budget=1)
    assert interval == pytest.approx(seconds)
