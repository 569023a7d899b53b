"""Background saves: what was copied is what is written, and no error is lost."""

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
def manager(tmp_path, write_path):
    with CheckpointManager(tmp_path / "run", keep_last=None) as manager:
        yield manager


def stand_in_the_way(manager: CheckpointManager, step: int) -> None:
    """No file can be renamed onto a directory: a failure that only the background meets."""
    (manager.directory / f"checkpoint-{step}.safetensors").mkdir(parents=True)


def failing(manager: CheckpointManager, step: int = 1) -> PendingSave:
    """A save that failed, and that nobody has been told of."""
    stand_in_the_way(manager, step)
    pending = manager.save_async(state(step))
    while not pending.done:
        pass
    return pending


def test_a_background_save_is_a_save(manager):
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


def test_what_changes_after_the_call_does_not_change_the_file(manager):
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


def test_saves_follow_one_another(manager):
    pendings = [manager.save_async(state(step, size=100_000)) for step in range(6)]
    assert all(pending.done for pending in pendings[:-1])  # at most one is under way
    manager.save(state(6))
    assert pendings[-1].done
    assert manager.list_checkpoints() == list(range(7))


def test_saves_from_many_threads_are_all_there(manager):
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


TELL = {
    "save": lambda manager, pending: manager.save(state(2)),
    "save_async": lambda manager, pending: manager.save_async(state(2)),
    "cleanup": lambda manager, pending: manager.cleanup(),
    "close": lambda manager, pending: manager.close(),
    "wait": lambda manager, pending: pending.wait(),
    "await": lambda manager, pending: asyncio.run(awaited(pending)),
}


async def awaited(pending: PendingSave):
    return await pending


@pytest.mark.parametrize("how", TELL)
def test_a_failure_in_the_background_is_told_once(manager, how):
    pending = failing(manager)
    with pytest.raises(SaveFailed, match=r"checkpoint-1\.safetensors") as caught:
        TELL[how](manager, pending)
    assert caught.value.path == pending.path

    manager.save(state(3))
    manager.save_async(state(4)).wait()
    manager.close()
    assert manager.list_checkpoints() == [3, 4]
    assert list(manager.directory.glob(".c*")) == []
    with pytest.raises(SaveFailed):
        pending.wait()  # who asks for this very save is always told


def test_a_failure_is_told_by_the_end_of_a_with_block(tmp_path):
    with pytest.raises(SaveFailed), CheckpointManager(tmp_path) as manager:
        failing(manager)
    with CheckpointManager(tmp_path) as other:  # the lock was let go of all the same
        other.save(state(2))


def test_a_state_that_is_refused_is_refused_at_once_and_stops_nothing(manager):
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
        return await asyncio.gather(*[awaited(manager.save_async(state(step))) for step in (2, 3)])

    paths = asyncio.run(main())
    assert [path.name for path in paths] == ["checkpoint-2.safetensors", "checkpoint-3.safetensors"]
    assert manager.list_checkpoints() == [1, 2, 3]


def test_who_is_cancelled_while_waiting_cancels_no_write(manager, capfd):
    async def main():
        pending = manager.save_async(state(1, size=2 * LARGE))
        task = asyncio.ensure_future(pending)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return pending

    pending = asyncio.run(main())  # and the loop is closed before the write has ended
    assert pending.wait() == pending.path
    manager.validate(1)
    assert capfd.readouterr() == ("", "")


def test_who_was_cancelled_has_not_been_told_of_the_failure(manager):
    async def main(pending):
        task = asyncio.ensure_future(awaited(pending))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main(failing(manager)))
    with pytest.raises(SaveFailed):
        manager.close()


def test_a_wait_that_timed_out_was_not_told(manager):
    stand_in_the_way(manager, 1)
    pending = manager.save_async(state(1, size=2 * LARGE))
    with pytest.raises((TimeoutError, SaveFailed)) as caught:
        pending.wait(timeout=0)
    if caught.type is SaveFailed:
        pytest.skip("it was written before it could be waited for")
    with pytest.raises(SaveFailed):
        manager.close()


@pytest.mark.skipif(sys.platform != "linux", reason="such a stack can only be asked for on Linux")
def test_where_no_thread_can_be_started_it_is_saved_without(manager):
    before = threading.stack_size(1 << 46)  # more than there are addresses
    try:
        manager.save(state(1))
        assert manager.save_async(state(2)).done
    finally:
        threading.stack_size(before)
    manager.save_async(state(3)).wait()
    for step in (1, 2, 3):
        manager.validate(step)


def test_an_interrupt_while_the_thread_starts_leaves_no_save_that_nobody_knows_of(manager, monkeypatch):
    honest = threading.Thread.start

    def interrupted(thread):
        honest(thread)
        if thread.name.startswith("save "):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            manager.save_async(state(1))
    manager.save_async(state(2)).wait()
    assert manager.list_checkpoints() == [2]
    manager.validate(2)


def test_tensors_changed_too_early_are_not_saved_as_a_mixture(manager, monkeypatch):
    torch = pytest.importorskip("torch")  # only torch counts changes
    weights = torch.zeros(64)
    honest = arrays.fill

    def changed_meanwhile(*arguments):
        if threading.current_thread() is not threading.main_thread():
            weights.add_(1)
        honest(*arguments)

    monkeypatch.setattr(arrays, "fill", changed_meanwhile)
    pending = manager.save_async(Checkpoint(step=1, model={"w": weights}), overlap=True)
    with pytest.raises(SaveFailed, match=r"checkpoint-1\.safetensors: not saved: .*wait_copied"):
        pending.wait()
    assert manager.list_checkpoints() == []


def test_the_arrays_are_let_go_of_when_they_are_copied(manager, monkeypatch):
    """Not only when they are written: a program may need their memory before."""
    honest, hold = stream_writer.write_snapshot, threading.Event()
    monkeypatch.setattr(stream_writer, "write_snapshot", lambda *given: (hold.wait(), honest(*given))[1])
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


def test_threads_that_list_while_others_save_see_whole_lists(manager):
    """The list of known headers is shared by them all."""
    failures = []

    def look():
        try:
            while not over.is_set():
                manager.list_checkpoints()
        except Exception as error:
            failures.append(error)

    over = threading.Event()
    lookers = [threading.Thread(target=look) for _ in range(4)]
    for looker in lookers:
        looker.start()
    for step in range(1, 30):
        manager.save_async(state(step))
    manager.close()
    over.set()
    for looker in lookers:
        looker.join()
    assert failures == []


def test_a_save_leaves_nothing_behind_in_the_interpreter(manager):
    """A hook that is taken back keeps its place there."""
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
def test_a_save_begun_just_before_the_interpreter_ends_is_there(tmp_path, run_python, write_path, how, code):
    done = run_python(write_path + END, tmp_path, how)

    assert (done.returncode, done.stdout) == (code, "ending\n"), done.stderr
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
if sys.argv[2] == "taken":
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


def test_a_failure_that_nobody_took_is_printed_at_exit(tmp_path, run_python):
    done = run_python(FAIL_AND_END, tmp_path, "ignored")
    assert "a save in the background failed" in done.stderr
    assert "checkpoint-1.safetensors" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("how", ["taken", "closed"])
def test_a_failure_that_somebody_took_is_not_printed_again(tmp_path, run_python, how):
    assert run_python(FAIL_AND_END, tmp_path, how).stderr == ""


INTERRUPTED = """
import sys, threading, time
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint.disk import Disk
from distrust.errors import CheckpointDirectoryLocked

written = threading.Event()
honest = Disk.sync

def slow(disk, descriptor):
    written.wait()
    honest(disk, descriptor)

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
written.set()
"""


def test_an_interrupt_leaves_the_lock_to_the_write_that_goes_on(tmp_path, run_python, write_path):
    """Were it let go of, the next writer would sweep the file that is being written."""
    done = run_python(write_path + INTERRUPTED, tmp_path)
    assert done.stdout == "still locked\n", done.stderr
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
    done = run_python(FORKED_CLONES, tmp_path)
    assert done.stdout == "[1, 2]\n", done.stderr


HASHED_BEFORE_THE_FORK = """
import os, sys
import numpy as np
from blake3 import blake3
from distrust import Checkpoint, CheckpointManager

blake3(bytes(32 << 20), max_threads=blake3.AUTO)  # somebody else's threads
manager = CheckpointManager(sys.argv[1])
child = os.fork()
if child == 0:
    manager.save(Checkpoint(step=1, model={"w": np.zeros(8 << 20)}))
    manager.validate(1)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_child_does_not_wait_for_its_parents_threads(tmp_path, run_python):
    done = run_python(HASHED_BEFORE_THE_FORK, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("no_thread_left")
def test_an_interrupt_just_after_the_slot_was_taken_leaves_it_free(manager, monkeypatch):
    """The thread that was not to begin is over for those, too, who wait for it."""

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
