"""The commit protocol with real processes: one writer, and at every instant the old file or the new one."""

from __future__ import annotations

import copy
import errno
import gc
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import stat
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import header, lock, tree
from distrust.errors import CheckpointDirectoryLocked, SaveFailed

# Python 3.12 and later warn of a fork in a process with threads, such as those that hash.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

TEMPORARY = ".checkpoint-7.safetensors.0123456789abcdef.tmp"


def state(step: int) -> Checkpoint:
    return Checkpoint(step=step, model={"w": np.full(16, step, np.int64)})


def wait_until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch) -> None:
    """A writer that is refused has waited a moment, in case that the holder was dying: here it is not."""
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.1)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_the_mode_of_a_file_follows_the_umask(tmp_path, umask):
    original = os.umask(umask)
    try:
        with CheckpointManager(tmp_path) as manager:
            path = manager.save(state(1))
    finally:
        os.umask(original)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_only_checkpoints_and_the_lock_remain(tmp_path, write_path):
    with CheckpointManager(tmp_path, keep_last=2) as manager:
        for step in range(4):
            manager.save(state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock",
        "checkpoint-2.safetensors",
        "checkpoint-3.safetensors",
    ]


# One writer per directory


def test_a_second_writer_in_the_same_process_is_refused(tmp_path):
    with CheckpointManager(tmp_path) as first:
        first.save(state(1))
        second = CheckpointManager(tmp_path)
        for write in (
            second.acquire,
            second.cleanup,
            lambda: second.save(state(2)),
            lambda: second.save_async(state(2)),
        ):
            with pytest.raises(
                CheckpointDirectoryLocked, match=rf"{re.escape(str(tmp_path))}.*pid {os.getpid()}\b"
            ):
                write()
        assert second.list_checkpoints() == [1]
        assert second.load_latest().step == 1
        assert second.load(1).step == 1
        second.validate(1)
        first.save(state(2))
    with second:
        second.save(state(3))
    assert first.list_checkpoints() == [1, 2, 3]


HOLD = """
import sys
from distrust import Checkpoint, CheckpointManager
manager = CheckpointManager(sys.argv[1])
manager.save(Checkpoint(step=1))
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_second_writer_in_another_process_is_refused_until_the_first_ends(tmp_path, start_python):
    first = start_python(HOLD, tmp_path)
    assert first.stdout.readline() == "ready\n"
    manager = CheckpointManager(tmp_path)
    with pytest.raises(CheckpointDirectoryLocked, match=rf"pid {first.pid}\b") as caught:
        manager.save(state(2))
    assert caught.value.path == tmp_path
    assert manager.list_checkpoints() == [1]

    first.communicate("", timeout=30)
    with manager:
        manager.save(state(2))
    assert manager.list_checkpoints() == [1, 2]


def test_a_writer_waits_a_moment_for_a_holder_that_is_dying(tmp_path, monkeypatch):
    """The kernel releases a killed writer's lock only when it has torn the process down."""
    first = CheckpointManager(tmp_path)
    first.save(state(1))
    monkeypatch.setattr(time, "sleep", lambda seconds: first.close())
    with CheckpointManager(tmp_path) as second:
        second.save(state(2))
    assert second.list_checkpoints() == [1, 2]


def test_a_dropped_manager_releases_the_lock(tmp_path):
    manager = CheckpointManager(tmp_path)
    manager.save(state(1))
    del manager
    gc.collect()
    with CheckpointManager(tmp_path) as manager:
        manager.save(state(2))


def test_a_closed_manager_can_write_again(tmp_path):
    manager = CheckpointManager(tmp_path)
    for step in (1, 2):
        manager.save(state(step))
        manager.close()
        manager.close()
    assert manager.list_checkpoints() == [1, 2]


def test_a_released_lock_leaks_no_finalizer(tmp_path):
    manager = CheckpointManager(tmp_path)
    manager.acquire()
    manager.close()
    count = len(weakref.finalize._registry)
    for _ in range(10):
        manager.acquire()
        manager.close()
    assert len(weakref.finalize._registry) == count


def test_clones_share_the_writer(tmp_path):
    with CheckpointManager(tmp_path, keep_last=2) as manager:
        clone = copy.copy(manager)
        clone.save(state(1))
        manager.save(state(2))
        copy.copy(clone).save_async(state(3))
        manager.save(state(4))
        assert clone.list_checkpoints() == manager.list_checkpoints() == [3, 4]
    with CheckpointManager(tmp_path) as second:
        second.save(state(5))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deep", "pickle"]
)
def test_deep_copies_only_read_until_the_first_releases_the_lock(tmp_path, duplicate):
    rules = {"keep_last": 2, "keep_best": 3, "keep_every": 5, "metric": "m", "metric_mode": "max"}
    with CheckpointManager(tmp_path, **rules) as manager:
        manager.save(state(1))
        reader = duplicate(manager)
        assert reader.load(1).step == 1
        with pytest.raises(CheckpointDirectoryLocked):
            reader.save(state(2))
        manager.save(state(2))
    with reader:
        for step in range(3, 12):
            reader.save(state(step))
        assert reader.list_checkpoints() == [5, 10, 11]  # the rules are copied too


# Forked children


@pytest.fixture
def child():
    """Runs a function in a forked child; it must end there within 30 seconds without an error."""
    children = []

    def fork(function) -> int:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                function()
                status = 0
            except BaseException as error:
                print(f"in the child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        children.append(pid)
        return pid

    def join(pid: int) -> None:
        status = []
        wait_until(lambda: status.append(os.waitpid(pid, os.WNOHANG)) or status[-1][0] == pid)
        children.remove(pid)
        assert os.waitstatus_to_exitcode(status[-1][1]) == 0

    fork.join = join
    yield fork
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_forked_manager_only_reads_until_the_parent_releases_the_lock(tmp_path, child, write_path):
    """With arrays so large that they are hashed on several threads, which do not exist in a fork."""
    large = Checkpoint(step=1, model={"w": np.arange(1 << 20)})
    manager = CheckpointManager(tmp_path)
    manager.save(large)
    manager.validate(1)

    def read() -> None:
        assert manager.load(1).model["w"][-1] == (1 << 20) - 1
        manager.validate(1)
        with pytest.raises(CheckpointDirectoryLocked, match=f"pid {os.getppid()}"):
            manager.save(state(2))
        manager.close()

    child.join(child(read))
    with pytest.raises(CheckpointDirectoryLocked):  # the child did not release the parent's lock
        CheckpointManager(tmp_path).acquire()
    manager.save(state(3))
    manager.close()

    def write() -> None:
        manager.save(Checkpoint(step=4, model=large.model))
        manager.save_async(Checkpoint(step=5, model=large.model)).wait()

    child.join(child(write))
    assert manager.list_checkpoints() == [3, 4, 5]
    manager.validate(5)


def test_a_fork_during_a_background_save_does_not_deadlock(tmp_path, child, write_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(state(1))
        pending = manager.save_async(Checkpoint(step=2, model={"w": np.ones(4 << 20)}))

        def read() -> None:
            assert manager.load(1).step == 1
            manager.close()

        child.join(child(read))
        pending.wait()
        manager.validate(2)


def test_a_fork_while_a_thread_reads_does_not_deadlock(tmp_path, child, monkeypatch):
    manager = CheckpointManager(tmp_path)
    manager.save(state(1))
    original, inside, proceed = tree.unflatten, threading.Event(), threading.Event()

    def slow(node, take, *depth):
        # Not when the header is parsed, but when its cached properties are computed.
        if threading.current_thread() is reader and take is not header._refuse_tensor:
            inside.set()
            proceed.wait()
        return original(node, take, *depth)

    monkeypatch.setattr(tree, "unflatten", slow)
    reader = threading.Thread(target=manager.load, args=(1,))
    reader.start()
    inside.wait()

    def read() -> None:
        assert manager.load(1).step == 1

    try:
        child.join(child(read))
    finally:
        proceed.set()
        reader.join()


def test_threads_of_a_forked_child_share_one_new_state(tmp_path, child):
    manager = CheckpointManager(tmp_path, keep_last=None)
    manager.save(state(1))
    manager.close()

    def write() -> None:
        original = lock.DirectoryLock.__init__

        def slow(*arguments) -> None:
            time.sleep(0.1)
            original(*arguments)

        lock.DirectoryLock.__init__ = slow  # both threads find the state uninitialized
        with ThreadPoolExecutor(2) as threads:
            first, second = threads.map(lambda _: manager._state.mutex, range(2))
            assert first is second
            list(threads.map(manager.save, [state(2), state(3)]))

    child.join(child(write))
    assert manager.list_checkpoints() == [1, 2, 3]


DIE_WITH_A_CHILD = """
import fcntl, multiprocessing, os, sys, time
from distrust import Checkpoint, CheckpointManager

def fork():
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    return child

original, children = fcntl.flock, []

def fork_then_lock(descriptor, operation):
    if not children:  # the first is the directory's; new files are locked, too
        children.append(fork())
    original(descriptor, operation)

if sys.argv[2] == "while it takes the lock":
    fcntl.flock = fork_then_lock
manager = CheckpointManager(sys.argv[1])
manager.save(Checkpoint(step=1))
if children:
    (child,) = children
elif sys.argv[2] == "os.fork":
    child = fork()
else:
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    process.start()
    child = process.pid
print(child, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["os.fork", "multiprocessing", "while it takes the lock"])
def test_a_restart_is_not_refused_while_a_child_of_the_dead_writer_lives(tmp_path, start_python, how):
    writer = start_python(DIE_WITH_A_CHILD, tmp_path, how)
    child = int(writer.stdout.readline())
    try:
        with pytest.raises(CheckpointDirectoryLocked):
            CheckpointManager(tmp_path).acquire()
        writer.kill()
        writer.wait()
        os.kill(child, 0)  # the child is alive
        with CheckpointManager(tmp_path) as manager:
            assert manager.load_latest().step == 1
            manager.save(state(2))
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


def in_spawned_process(manager: CheckpointManager) -> list[int]:
    with pytest.raises(CheckpointDirectoryLocked):
        manager.acquire()
    return manager.list_checkpoints()


def test_a_manager_can_be_handed_to_a_spawned_worker(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(state(1))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.apply(in_spawned_process, [manager]) == [1]


# Leftovers of dead writers


def test_only_temporary_files_of_dead_writers_are_removed(tmp_path):
    other_names = [
        ".checkpoint-notes.tmp",
        ".checkpoint-7.safetensors.tmp",
        ".model.safetensors.0123456789abcdef.tmp",
        "checkpoint-7.safetensors.0123456789abcdef.tmp",
        "notes.tmp",
    ]
    for name in [TEMPORARY, TEMPORARY.replace("-7", "-8-final"), *other_names]:
        (tmp_path / name).write_bytes(b"half")
    reader = CheckpointManager(tmp_path)
    assert reader.list_checkpoints() == []
    assert (tmp_path / TEMPORARY).exists()  # reading removes nothing

    with CheckpointManager(tmp_path) as manager:
        manager.acquire()
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".lock", *other_names])


def test_a_refused_second_writer_removes_nothing(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.acquire()
        (tmp_path / TEMPORARY).write_bytes(b"being written")
        with pytest.raises(CheckpointDirectoryLocked):
            CheckpointManager(tmp_path).acquire()
        assert (tmp_path / TEMPORARY).exists()


SAVE_LARGE = """
import sys
import numpy as np
from distrust import Checkpoint, CheckpointManager
manager = CheckpointManager(sys.argv[1])
manager.save(Checkpoint(step=20, model={"w": np.ones(1 << 24)}))
"""


def test_a_writer_killed_during_a_save_leaves_the_old_file(tmp_path, start_python, write_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(state(10))
        old = manager.save(state(20)).read_bytes()

    writer = start_python(write_path + SAVE_LARGE, tmp_path)
    wait_until(lambda: any(tmp_path.glob(".checkpoint-20*.tmp")) or writer.poll() is not None)
    writer.kill()
    writer.wait()

    assert [path.name[:14] for path in tmp_path.glob(".c*")] == [".checkpoint-20"]
    assert (tmp_path / "checkpoint-20.safetensors").read_bytes() == old
    with manager:
        assert manager.load_latest().model["w"].tolist() == [20] * 16
        manager.save(state(30))
        assert manager.list_checkpoints() == [10, 20, 30]
    assert list(tmp_path.glob(".c*")) == []


SAVE_FOREVER = """
import os, sys
import numpy as np
from distrust import Checkpoint, CheckpointManager

def make(step):
    return Checkpoint(step=step, model={"w": np.full(200_000, step)}, metadata={"of": step})

with CheckpointManager(sys.argv[1], keep_last=2) as manager:
    manager.acquire()
    steps = manager.list_checkpoints()
    step = manager.load_latest().step if steps else 0
    while True:
        step += 1
        if step % 3:
            manager.save(make(step), final=step % 50 == 0)
        else:
            manager.save_async(make(step)).wait()
        os.write(1, f"{step}\\n".encode())
"""


def test_what_was_reported_durable_survives_sigkill_at_any_moment(tmp_path, start_python, write_path):
    randomness = random.Random(20)
    manager = CheckpointManager(tmp_path)
    reported: list[int] = []
    for _ in range(3):
        writer = start_python(write_path + SAVE_FOREVER, tmp_path)
        first = writer.stdout.readline()
        time.sleep(randomness.uniform(0, 0.05))
        writer.send_signal(signal.SIGKILL)
        # Not communicate(): it would lose what readline() buffered beyond the first line.
        remainder, stderr = writer.stdout.read(), writer.stderr.read()
        assert writer.wait() == -signal.SIGKILL, stderr
        reported += map(int, [first, *remainder.splitlines()])

        scan = manager.scan()
        assert scan.damaged == ()
        steps = manager.list_checkpoints()
        newest = reported[-1]
        # The next one may have been committed but not reported.
        assert steps[-1] in (newest, newest + 1)
        assert newest in steps
        for step in steps:
            loaded = manager.load(step)
            assert loaded.metadata == {"of": step}
            assert (loaded.model["w"] == step).all()
    assert reported == sorted(reported)
    with manager:
        manager.acquire()
    remaining = {path.name for path in tmp_path.iterdir()}
    assert remaining == {".lock", *(file.path.name for file in manager.scan().files)}


# Saves that cannot be written


LIMITED = """
import os, resource, sys
import numpy as np
from distrust import Checkpoint, CheckpointManager
from distrust.errors import SaveFailed

limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
manager = CheckpointManager(sys.argv[1])
for save in (manager.save, lambda state: manager.save_async(state).wait()):
    try:
        save(Checkpoint(step=2, model={"w": np.ones(100_000)}))
    except SaveFailed as error:
        assert error.needed > 800_000, error.needed
        assert error.free > 0, error.free
        assert str(error.path) in str(error) and "\\n" not in str(error)
        print(error)
    else:
        sys.exit("it was saved")
if limit:
    manager.save(Checkpoint(step=3, model={"w": np.ones(1)}))
"""


@pytest.mark.parametrize("limit", [0, 20_000], ids=["no space", "little space"])
def test_without_space_the_old_file_is_unchanged(tmp_path, run_python, write_path, limit):
    with CheckpointManager(tmp_path) as manager:
        old = manager.save(state(1)).read_bytes()

    result = run_python(write_path + LIMITED, tmp_path, limit)

    assert result.returncode == 0, result.stderr
    assert "checkpoint-2.safetensors: not saved" in result.stdout
    assert (tmp_path / "checkpoint-1.safetensors").read_bytes() == old
    assert manager.list_checkpoints() == ([1, 3] if limit else [1])
    assert list(tmp_path.glob(".c*")) == []


def test_a_directory_with_the_name_of_the_file(tmp_path, write_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(state(1))
        (tmp_path / "checkpoint-2.safetensors").mkdir()
        with pytest.raises(SaveFailed, match=r"checkpoint-2\.safetensors"):
            manager.save(state(2))
        assert list(tmp_path.glob(".c*")) == []
        manager.save(state(3))
        assert manager.list_checkpoints() == [1, 3]


def test_a_removed_directory(tmp_path):
    directory = tmp_path / "run"
    with CheckpointManager(directory) as manager:
        manager.save(state(1))
        shutil.rmtree(directory)
        with pytest.raises(SaveFailed):
            manager.save(state(2))
        assert not directory.exists()


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_file_with_the_name_of_the_directory(tmp_path, inside):
    (tmp_path / "run").write_text("a file")
    manager = CheckpointManager(tmp_path / "run" / inside)
    for write in (manager.acquire, lambda: manager.save(state(1)), lambda: manager.save_async(state(1))):
        with pytest.raises(SaveFailed, match="run"):
            write()
    assert (tmp_path / "run").read_text() == "a file"


def test_a_link_with_the_name_of_the_lock_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("x")
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / ".lock").symlink_to(precious)
    with pytest.raises(SaveFailed):
        CheckpointManager(directory).save(state(1))
    assert precious.read_text() == "x"


SAVE_FAST = """
import itertools, sys
import numpy as np
from distrust import Checkpoint, CheckpointManager

manager = CheckpointManager(sys.argv[1], keep_last=1)
for step in itertools.count(1):
    manager.save(Checkpoint(step=step, model={"w": np.full(4, step)}))
    print(step, flush=True)
"""


def test_readers_always_find_an_intact_checkpoint_while_a_writer_saves(tmp_path, start_python, write_path):
    """Even if the writer removes what they have just listed."""
    writer = start_python(write_path + SAVE_FAST, tmp_path)
    assert writer.stdout.readline()
    reader = CheckpointManager(tmp_path)
    loaded_steps = []
    while len(loaded_steps) < 100 or loaded_steps[-1] == loaded_steps[0]:  # on a busy disk saves take longer
        assert writer.poll() is None
        loaded = reader.load_latest()
        assert (loaded.model["w"] == loaded.step).all()
        assert reader.scan().damaged == ()
        loaded_steps.append(loaded.step)
    assert loaded_steps == sorted(loaded_steps)


def test_a_checkpoint_is_loaded_by_step_or_path(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        path = manager.save(state(5))
        for name in (5, path, str(path), Path(os.path.relpath(path))):
            assert manager.load(name).step == 5
            assert manager.inspect(name).step == 5
            manager.validate(name)


def test_a_lock_acquired_repeatedly_leaks_no_finalizer(tmp_path):
    manager = CheckpointManager(tmp_path)
    count = len(weakref.finalize._registry)
    for _ in range(10):
        manager.acquire()
        manager.close()
    assert len(weakref.finalize._registry) <= count


def test_the_note_in_the_lock_is_quoted_in_the_message(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.acquire()
        (tmp_path / ".lock").write_text("pid 1\ndistrust: all is well\x1b[2J")
        with pytest.raises(CheckpointDirectoryLocked) as refused:
            CheckpointManager(tmp_path).acquire()
    assert str(refused.value).removeprefix(str(tmp_path)).isprintable()


def test_a_parent_that_a_sandbox_denies_is_not_synced(tmp_path, monkeypatch):
    """Permissions allow it, but it cannot be opened: so no writer created anything there."""
    original = os.open

    def deny_parents(path, *arguments, **options):
        if Path(path) in tmp_path.parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "open", deny_parents)
    with CheckpointManager(tmp_path / "run") as manager:
        manager.save(state(1))
        assert manager.list_checkpoints() == [1]
