"""Background saves: the copy is what is written, and no error is lost."""

from __future__ import annotations

import asyncio
import atexit
import gc
import sys
import threading
import weakref

import numpy as np
import pytest

from distrust import Checkpoint, CheckpointManager, PendingSave
from distrust.checkpoint import arrays, background, stream_writer
from distrust.errors import SaveFailed


def state(step: int, size: int = 16) -> Checkpoint:
    return Checkpoint(step=step, model={"w": np.full(size, step, np.int64)})


LARGE = 4 << 20


@pytest.fixture
def manager(tmp_path):
    with CheckpointManager(tmp_path / "run", keep_last=None) as manager:
        yield manager


def block_file_name(manager: CheckpointManager, step: int) -> None:
    """Create a directory with the name of the file, so that the rename in the background fails."""
    (manager.directory / f"checkpoint-{step}.safetensors").mkdir(parents=True)


def failed_save(manager: CheckpointManager, step: int = 1) -> PendingSave:
    """A save that failed, and whose error no call has raised."""
    block_file_name(manager, step)
    pending = manager.save_async(state(step))
    while not pending.done:
        pass
    return pending


def test_a_background_save_writes_a_checkpoint(write_path, manager):
    pending = manager.save_async(state(1))
    assert pending.path == manager.directory / "checkpoint-1.safetensors"
    assert pending.wait() == pending.path
    assert pending.done
    assert pending.wait(timeout=0) == pending.path
    assert manager.load(1).model["w"].tolist() == [1] * 16
    final = manager.save_async(state(2), final=True)
    manager.close()
    assert final.done
    assert final.path.name == "checkpoint-2-final.safetensors"
    assert manager.list_checkpoints() == [1, 2]


def test_changes_after_the_call_do_not_change_the_file(write_path, manager):
    torch = pytest.importorskip("torch")
    plain = np.ones(LARGE)
    strided = np.ones(2 * LARGE)[::2]
    tensor = torch.ones(LARGE)
    view = torch.ones(2, LARGE)[1]
    parameter = torch.nn.Parameter(torch.ones(LARGE))
    tree = {"plain": plain, "strided": strided, "tensor": tensor, "view": view, "parameter": parameter}
    metadata = {"list": [1]}

    pending = manager.save_async(Checkpoint(step=1, model=tree, metadata=metadata))
    plain[:] = strided[:] = 2
    tensor.fill_(2)
    view.fill_(2)
    parameter.data.fill_(2)
    metadata["list"].append(2)
    tree.clear()
    pending.wait()

    loaded = manager.load(1)
    assert len(loaded.model) == 5
    for name, array in loaded.model.items():
        assert (array == 1).all(), name
    assert loaded.metadata == {"list": [1]}


def test_at_most_one_save_is_in_progress(manager):
    pendings = [manager.save_async(state(step, size=100_000)) for step in range(6)]
    assert all(pending.done for pending in pendings[:-1])  # at most one is in progress
    manager.save(state(6))
    assert pendings[-1].done
    assert manager.list_checkpoints() == list(range(7))


def test_saves_from_many_threads_are_all_written(manager):
    threads = [
        threading.Thread(
            target=lambda step=step: (manager.save if step % 2 else manager.save_async)(state(step))
        )
        for step in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    manager.close()
    assert manager.list_checkpoints() == list(range(16))
    for step in range(16):
        manager.validate(step)


CALLS = {
    "save": lambda manager, pending: manager.save(state(2)),
    "save_async": lambda manager, pending: manager.save_async(state(2)),
    "cleanup": lambda manager, pending: manager.cleanup(),
    "close": lambda manager, pending: manager.close(),
    "wait": lambda manager, pending: pending.wait(),
    "await": lambda manager, pending: asyncio.run(wait_for(pending)),
}


async def wait_for(pending: PendingSave):
    return await pending


@pytest.mark.parametrize("name", CALLS)
def test_an_error_in_the_background_is_raised_once(manager, name):
    pending = failed_save(manager)
    with pytest.raises(SaveFailed, match=r"checkpoint-1\.safetensors") as caught:
        CALLS[name](manager, pending)
    assert caught.value.path == pending.path

    manager.save(state(3))
    manager.save_async(state(4)).wait()
    manager.close()
    assert manager.list_checkpoints() == [3, 4]
    assert list(manager.directory.glob(".c*")) == []
    with pytest.raises(SaveFailed):
        pending.wait()  # waiting for this save always raises its error


def test_an_error_is_raised_at_the_end_of_a_with_block(tmp_path):
    with pytest.raises(SaveFailed), CheckpointManager(tmp_path) as manager:
        failed_save(manager)
    with CheckpointManager(tmp_path) as second:  # the lock was released nevertheless
        second.save(state(2))


def test_an_unsupported_state_is_refused_at_once(manager):
    first = manager.save_async(state(1, size=LARGE))
    with pytest.raises(Exception, match="cannot be saved"):
        manager.save_async(Checkpoint(step=2, model={"x": object()}))
    first.wait()
    manager.save(state(3))
    assert manager.list_checkpoints() == [1, 3]


def test_an_awaited_save_returns_its_path(manager):
    async def main():
        pending = manager.save_async(state(1, size=LARGE))
        assert await pending == pending.path
        assert await pending == pending.path
        return await asyncio.gather(*[wait_for(manager.save_async(state(step))) for step in (2, 3)])

    paths = asyncio.run(main())
    assert [path.name for path in paths] == ["checkpoint-2.safetensors", "checkpoint-3.safetensors"]
    assert manager.list_checkpoints() == [1, 2, 3]


def test_cancelling_a_waiting_caller_does_not_cancel_the_write(manager, capfd):
    async def main():
        pending = manager.save_async(state(1, size=2 * LARGE))
        task = asyncio.ensure_future(pending)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return pending

    pending = asyncio.run(main())  # the loop is closed before the write has ended
    assert pending.wait() == pending.path
    manager.validate(1)
    assert capfd.readouterr() == ("", "")


def test_a_cancelled_caller_does_not_consume_the_error(manager):
    async def main(pending):
        task = asyncio.ensure_future(wait_for(pending))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main(failed_save(manager)))
    with pytest.raises(SaveFailed):
        manager.close()


def test_a_wait_that_timed_out_does_not_consume_the_error(manager):
    block_file_name(manager, 1)
    pending = manager.save_async(state(1, size=2 * LARGE))
    with pytest.raises((TimeoutError, SaveFailed)) as caught:
        pending.wait(timeout=0)
    if caught.type is SaveFailed:
        pytest.skip("the write ended before the wait began")
    with pytest.raises(SaveFailed):
        manager.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux accepts such a stack size")
def test_if_no_thread_can_be_started_the_save_is_synchronous(manager):
    original = threading.stack_size(1 << 46)  # larger than the address space
    try:
        manager.save(state(1))
        assert manager.save_async(state(2)).done
    finally:
        threading.stack_size(original)
    manager.save_async(state(3)).wait()
    for step in (1, 2, 3):
        manager.validate(step)


def test_an_interrupt_while_the_thread_starts_abandons_the_save(manager, monkeypatch):
    original = threading.Thread.start

    def start_then_interrupt(thread):
        original(thread)
        if thread.name.startswith("save "):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start_then_interrupt)
        with pytest.raises(KeyboardInterrupt):
            manager.save_async(state(1))
    manager.save_async(state(2)).wait()
    assert manager.list_checkpoints() == [2]
    manager.validate(2)


def test_tensors_changed_during_the_copy_fail_the_save(manager, monkeypatch):
    torch = pytest.importorskip("torch")  # only torch counts changes
    weights = torch.zeros(64)
    original = arrays.fill

    def change_then_fill(*arguments):
        if threading.current_thread() is not threading.main_thread():
            weights.add_(1)
        original(*arguments)

    monkeypatch.setattr(arrays, "fill", change_then_fill)
    pending = manager.save_async(Checkpoint(step=1, model={"w": weights}), overlap=True)
    with pytest.raises(SaveFailed, match=r"checkpoint-1\.safetensors: not saved: .*wait_copied"):
        pending.wait()
    assert manager.list_checkpoints() == []


def test_the_arrays_are_released_once_they_are_copied(manager, monkeypatch):
    """Not only once they are written: the program may need their memory."""
    original, hold = stream_writer.write_snapshot, threading.Event()
    monkeypatch.setattr(
        stream_writer, "write_snapshot", lambda *arguments: (hold.wait(), original(*arguments))[1]
    )
    for overlap in (False, True):
        hold.clear()
        array = np.ones(1000)
        alive = weakref.ref(array)
        checkpoint = Checkpoint(step=1 + overlap, model={"w": array})
        pending = manager.save_async(checkpoint, overlap=overlap)
        pending.wait_copied()
        del array, checkpoint
        gc.collect()
        assert alive() is None
        hold.set()
        pending.wait()


def test_threads_can_list_while_another_saves(manager):
    """They share the cache of headers."""
    failures = []

    def list_repeatedly():
        try:
            while not stop.is_set():
                manager.list_checkpoints()
        except Exception as error:
            failures.append(error)

    stop = threading.Event()
    threads = [threading.Thread(target=list_repeatedly) for _ in range(4)]
    for thread in threads:
        thread.start()
    for step in range(1, 12):
        manager.save_async(state(step))
    manager.close()
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_save_leaks_no_exit_hook(manager):
    """The interpreter never frees the slot of an unregistered hook."""
    manager.save_async(state(1)).wait()
    hooks = atexit._ncallbacks()
    for step in range(2, 12):
        manager.save_async(state(step)).wait()
    assert atexit._ncallbacks() == hooks


END = """
import sys
import numpy as np
from distrust import Checkpoint, CheckpointManager

manager = CheckpointManager(sys.argv[1])
pending = manager.save_async(Checkpoint(step=1, model={"w": np.ones(8 << 20)}))
print("ending", flush=True)
if sys.argv[2] == "exception":
    raise KeyError("unrelated")
if sys.argv[2] == "sys.exit":
    sys.exit(3)
"""


@pytest.mark.parametrize(("how", "code"), [("end", 0), ("exception", 1), ("sys.exit", 3)])
def test_a_save_started_just_before_the_interpreter_exits_is_written(tmp_path, run_python, how, code):
    result = run_python(END, tmp_path, how)

    assert (result.returncode, result.stdout) == (code, "ending\n"), result.stderr
    manager = CheckpointManager(tmp_path)
    manager.validate(1)
    assert manager.load_latest().model["w"].sum() == 8 << 20
    assert list(tmp_path.glob(".c*")) == []


FAIL_AND_END = """
import os, sys
from distrust import Checkpoint, CheckpointManager
from distrust.errors import SaveFailed

manager = CheckpointManager(sys.argv[1])
os.makedirs(os.path.join(sys.argv[1], "checkpoint-1.safetensors"))
pending = manager.save_async(Checkpoint(step=1))
if sys.argv[2] == "waited":
    try:
        pending.wait()
    except SaveFailed:
        pass
if sys.argv[2] == "closed":
    while not pending.done:
        pass
    try:
        manager.close()
    except SaveFailed:
        pass
"""


def test_an_error_that_no_call_raised_is_printed_at_exit(tmp_path, run_python):
    result = run_python(FAIL_AND_END, tmp_path, "ignored")
    assert "a save in the background failed" in result.stderr
    assert "checkpoint-1.safetensors" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("how", ["waited", "closed"])
def test_an_error_that_a_call_raised_is_not_printed(tmp_path, run_python, how):
    assert run_python(FAIL_AND_END, tmp_path, how).stderr == ""


INTERRUPTED = """
import sys, threading, time
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint.disk import Disk
from distrust.errors import CheckpointDirectoryLocked

proceed = threading.Event()
original = Disk.sync

def slow(disk, descriptor):
    proceed.wait()
    original(disk, descriptor)

Disk.sync = slow
try:
    with CheckpointManager(sys.argv[1]) as manager:
        manager.save_async(Checkpoint(step=1))
        raise KeyboardInterrupt
except KeyboardInterrupt:
    pass
try:
    CheckpointManager(sys.argv[1]).acquire()
except CheckpointDirectoryLocked:
    print("still locked")
proceed.set()
"""


def test_after_an_interrupt_the_write_in_progress_keeps_the_lock(tmp_path, run_python, write_path):
    """Otherwise the next writer would remove the file that is being written."""
    result = run_python(write_path + INTERRUPTED, tmp_path)
    assert result.stdout == "still locked\n", result.stderr
    with CheckpointManager(tmp_path) as manager:
        assert manager.load_latest().step == 1


FORKED_CLONES = """
import copy, os, sys
from distrust import Checkpoint, CheckpointManager

manager = CheckpointManager(sys.argv[1])
clone = copy.copy(manager)
child = os.fork()
if child == 0:
    manager.save(Checkpoint(step=1))
    clone.save(Checkpoint(step=2))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(manager.list_checkpoints())
"""


def test_clones_share_their_writer_in_a_forked_child_too(tmp_path, run_python):
    result = run_python(FORKED_CLONES, tmp_path)
    assert result.stdout == "[1, 2]\n", result.stderr


HASH_THEN_FORK = """
import os, sys
import numpy as np
from blake3 import blake3
from distrust import Checkpoint, CheckpointManager

blake3(bytes(32 << 20), max_threads=blake3.AUTO)  # starts the threads of the digest library
manager = CheckpointManager(sys.argv[1])
child = os.fork()
if child == 0:
    manager.save(Checkpoint(step=1, model={"w": np.zeros(8 << 20)}))
    manager.validate(1)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_child_does_not_wait_for_the_parents_threads(tmp_path, run_python):
    result = run_python(HASH_THEN_FORK, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.usefixtures("no_thread_left")
def test_an_interrupt_during_the_registration_frees_the_slot(manager, monkeypatch):
    """A caller that waits for the abandoned thread does not hang."""

    class Interrupting(set):
        def add(self, _):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(background, "_unreported_at_exit", Interrupting)
        with pytest.raises(KeyboardInterrupt):
            manager.save_async(state(1))

    closing = threading.Thread(target=manager.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()
    manager.save(state(2))
    assert manager.list_checkpoints() == [2]
