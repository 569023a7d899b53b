"""The mirror of a manager: disks that are lost, stores that fail, other writers, rules that remove."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint.remote import mirror as mirror_module
from distrust.checkpoint.remote.location import parse
from distrust.checkpoint.remote.mirror import Mirror
from distrust.checkpoint.remote.remote_run import RemoteRun
from distrust.checkpoint.remote.terms import BEAT_SECONDS
from distrust.errors import (
    CheckpointDirectoryLocked,
    ConfigError,
    DamagedCheckpointWarning,
    DistrustWarning,
    RemoteError,
    SaveFailed,
    TakenOver,
)
from tests.remote.fake_store import FakeStore, outage

URL = "s3://bucket/run"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    monkeypatch.setattr(mirror_module, "PAUSE_SECONDS", 0.01)
    return FakeStore()


def mirror(store: FakeStore, **options) -> Mirror:
    return Mirror(URL, **{"patience": 3.0, "timeout": 20.0, "connect": store.connect, **options})


def checkpoint(step: int, **options) -> Checkpoint:
    return Checkpoint(step=step, model={"w": np.full(100, step, "f4")}, **options)


def steps_that_count(store: FakeStore) -> list[int]:
    location = parse(URL, "url")
    return [file.step for file in RemoteRun(location, store.connect(location)).files()]


class Gate:
    """Holds the uploads of checkpoints until it is opened."""

    def __init__(self, store: FakeStore) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        store.before = self

    def __call__(self, action: str, key: str) -> None:
        if action == "put" and key.endswith(".safetensors"):
            self.reached.set()
            assert self.open.wait(30)


def test_a_run_goes_on_from_the_mirror_when_its_disk_is_lost(s3, tmp_path):
    reports = []
    lost = tmp_path / "lost"
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    options = [tmp_path / "metrics.jsonl", tmp_path / "absent"]
    settings = Mirror(
        f"{s3.url}/checkpoints", companions=options, on_mirrored=lambda *report: reports.append(report)
    )
    with CheckpointManager(lost, mirror=settings) as manager:
        manager.save_async(checkpoint(1)).wait_mirrored(30)
        pending = manager.save_async(checkpoint(2))
        assert pending.wait_mirrored(30) == lost / "checkpoint-2.safetensors"
        assert manager.mirrored == 2
        content = pending.path.read_bytes()
    assert [(step, url) for step, url, _ in reports] == [(step, f"{s3.url}/checkpoints") for step in (1, 2)]
    shutil.rmtree(lost)

    with CheckpointManager(tmp_path / "second", mirror=settings) as manager:
        assert manager.load_latest().step == 2
        assert (tmp_path / "second" / "checkpoint-2.safetensors").read_bytes() == content
        manager.save(checkpoint(3))
    assert manager.mirrored == 3
    assert [step for step, *_ in reports] == [1, 2, 3], "what is there already is no news"
    run = RemoteRun(parse(s3.url, "url"))
    assert [file.step for file in run.files()] == [1, 2, 3]
    with (
        pytest.raises(ConfigError, match=r"is the mirror of a run; give .*/checkpoints"),
        CheckpointManager(tmp_path / "third", mirror=s3.url) as manager,
    ):
        manager.begin()
    assert bytes(run.client.read("metrics.jsonl", 0, 99)) == b"{}\n"


@pytest.mark.parametrize("kind", ["azure", "folder"])
def test_every_kind_of_store_can_be_a_mirror(request, tmp_path, kind):
    url = request.getfixturevalue("azure").url if kind == "azure" else tmp_path / "there"
    with CheckpointManager(tmp_path / "a", mirror=Mirror(url, patience=3)) as manager:
        manager.save(checkpoint(1), final=True)
        with (
            pytest.raises(CheckpointDirectoryLocked, match=f"pid {os.getpid()}"),
            CheckpointManager(tmp_path / "b", mirror=Mirror(url, patience=3)) as second,
        ):
            second.save(checkpoint(2))
    with CheckpointManager(tmp_path / "b", mirror=url) as second:
        assert second.load_latest().step == 1


def test_the_newest_copy_counts_wherever_it_is(store, tmp_path):
    with CheckpointManager(tmp_path / "a", mirror=mirror(store)) as manager:
        manager.save(checkpoint(5))
    with CheckpointManager(tmp_path / "b") as manager:
        manager.save(checkpoint(7))
    with CheckpointManager(tmp_path / "b", mirror=mirror(store)) as manager:
        assert manager.fetch_newest() is None
        assert manager.load_latest().step == 7
        manager.begin()
    assert manager.mirrored == 7, "what was here already is uploaded, too"
    with CheckpointManager(tmp_path / "a", mirror=mirror(store)) as manager:
        assert manager.fetch_newest() == tmp_path / "a" / "checkpoint-7.safetensors"
        (tmp_path / "a" / "checkpoint-7.safetensors").write_bytes(b"damaged")
        assert manager.load_latest().step == 7


def test_a_damaged_copy_here_is_replaced_and_not_uploaded(store, tmp_path):
    with CheckpointManager(tmp_path, mirror=mirror(store)) as manager:
        path = manager.save(checkpoint(5))
        content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    with CheckpointManager(tmp_path, mirror=mirror(store)) as manager:
        assert manager.load_latest().step == 5
        assert path.read_bytes() == content
        final = manager.save(checkpoint(6), final=True)
    final.write_bytes(final.read_bytes()[:-1] + b"x")
    store.objects.clear()
    manager = CheckpointManager(tmp_path, mirror=mirror(store))
    manager.acquire()

    def begin_and_close() -> None:
        manager.begin()
        manager.close()

    with pytest.warns(DistrustWarning, match=r"not mirrored: .*checkpoint-6-final.*tensor"):
        begin_and_close()
    assert 6 not in steps_that_count(store)


def test_what_does_not_verify_here_makes_no_older_one_needless(store, tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(checkpoint(5))
        path = manager.save(checkpoint(6))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with CheckpointManager(tmp_path, mirror=mirror(store)) as manager:
        with pytest.warns(DamagedCheckpointWarning):
            assert manager.load_latest().step == 5
        manager.begin()
    assert steps_that_count(store) == [5]


def test_a_second_writer_is_refused_while_the_first_lives(store, tmp_path):
    with CheckpointManager(tmp_path / "a", mirror=mirror(store)) as first:
        first.save(checkpoint(1))
        shutil.copytree(tmp_path / "a", tmp_path / "copy")  # it proves nothing
        for folder in ("b", "copy"):
            second = CheckpointManager(tmp_path / folder, mirror=mirror(store))
            second.acquire()  # watches meanwhile
            with pytest.raises(
                CheckpointDirectoryLocked, match=f"another writer holds.*pid {os.getpid()} on"
            ):
                second.save(checkpoint(2))
            assert not (tmp_path / folder / "checkpoint-2.safetensors").exists()
            second.close()
        first.save(checkpoint(3))
    assert steps_that_count(store) == [1, 3]
    with CheckpointManager(tmp_path / "b", mirror=mirror(store, patience=9999.0)) as second:
        second.save(checkpoint(4))  # at once: the first has said that it ended


def test_a_writer_that_is_replaced_is_told_and_its_last_upload_does_not_count(store, tmp_path):
    first = CheckpointManager(tmp_path / "a", keep_last=1, mirror=mirror(store))
    for step in (1, 2):
        first.save_async(checkpoint(step)).wait_mirrored(30)
    gate = Gate(store)
    first.save(checkpoint(3))
    assert gate.reached.wait(30)  # it has confirmed its term
    store.before = lambda action, key: None

    with CheckpointManager(tmp_path / "b", mirror=mirror(store, take_over=True)) as second:
        assert second.load_latest().step == 2
        second.begin()
        gate.open.set()
        with pytest.raises(TakenOver, match="another process has taken over this run"):
            first.save_async(checkpoint(4)).wait_mirrored(30)
        with pytest.raises(SaveFailed):
            first.begin()
        with pytest.raises(TakenOver):
            first.close()
        assert any(key.startswith(f"{URL}/checkpoint-3.1-") for key in store.objects)
        assert steps_that_count(store) == [1, 2], "nor does it remove anything"
        second.save(checkpoint(3))
    assert steps_that_count(store) == [1, 2, 3]


def test_what_was_saved_while_a_newcomer_waited_is_not_displaced(store, tmp_path):
    with CheckpointManager(tmp_path / "a", mirror=mirror(store)) as first:
        first.save_async(checkpoint(1)).wait_mirrored(30)
        second = CheckpointManager(tmp_path / "b", mirror=mirror(store, take_over=True))
        assert second.load_latest().step == 1
        first.save_async(checkpoint(2)).wait_mirrored(30)
        with pytest.raises(CheckpointDirectoryLocked, match="another writer has gone on to step 2 meanwhile"):
            second.begin()
    assert second.load_latest().step == 2
    with second:
        second.save(checkpoint(3))
    with second:  # what it saved itself is no other's
        second.save(checkpoint(4))
    assert steps_that_count(store) == [2, 3, 4], "three are kept"


def test_a_writer_that_does_not_know_yet_uploads_nothing(store, tmp_path):
    first = CheckpointManager(tmp_path / "a", mirror=mirror(store, patience=60.0))  # it looks every 15 s
    first.save_async(checkpoint(1)).wait_mirrored(30)
    with CheckpointManager(tmp_path / "b", mirror=mirror(store, take_over=True)) as second:
        second.begin()
        with pytest.raises(TakenOver):
            first.save_async(checkpoint(2)).wait_mirrored(30)
    with pytest.raises(TakenOver):
        first.close()
    assert not any("checkpoint-2" in key for _, key in store.requests)
    assert (tmp_path / "a" / "checkpoint-2.safetensors").exists()


def test_a_writer_that_comes_back_before_it_is_replaced_goes_on(store, tmp_path):
    first = CheckpointManager(tmp_path / "a", mirror=mirror(store, patience=60.0))
    first.save(checkpoint(1))
    with CheckpointManager(tmp_path / "b", mirror=mirror(store, patience=0.2)) as second:
        second.acquire()
        for thread in threading.enumerate():
            if thread.name == "watch the mirror":
                thread.join()
        store.connect(parse(URL, "url")).put("terms/00000001.beat", b"again")
        with pytest.raises(CheckpointDirectoryLocked, match="another writer holds"):
            second.begin()
    first.save(checkpoint(2))
    first.close()


WRITER = """
import sys, time, numpy as np
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint.remote.mirror import Mirror
manager = CheckpointManager(sys.argv[1], mirror=Mirror(sys.argv[2], patience=1.5))
for step in range(1, 1000):
    pending = manager.save_async(Checkpoint(step=step, model={"w": np.full(9, step)}), final=step == 3)
    if step == 3 and sys.argv[3] == "leave":
        sys.exit()
    pending.wait_mirrored(60)
    print(step, flush=True)
    time.sleep(0.1)
"""


def start_writer(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_stopped_writer_is_replaced_and_told_when_it_wakes(s3, tmp_path):
    with start_writer(tmp_path / "a", s3.url, "stay") as writer:
        assert writer.stdout.readline() == "1\n"
        writer.send_signal(signal.SIGSTOP)
        try:
            with CheckpointManager(tmp_path / "b", mirror=Mirror(s3.url, patience=1.5)) as manager:
                manager.acquire()
                step = manager.load_latest().step
                manager.begin()
                writer.send_signal(signal.SIGCONT)
                assert writer.wait(30) == 1
                assert "TakenOver" in writer.stderr.read()
                manager.save(checkpoint(500))
        finally:
            writer.kill()
    steps = [file.step for file in RemoteRun(parse(s3.url, "url")).files()]
    assert steps[-1] == 500
    assert steps[-2] <= step, "what the stopped one has added does not count"


def test_a_killed_writer_is_replaced_at_once_on_its_own_disk(s3, tmp_path):
    with start_writer(tmp_path, s3.url, "stay") as writer:
        assert writer.stdout.readline() == "1\n"
        writer.kill()
    with CheckpointManager(tmp_path, mirror=Mirror(s3.url, patience=9999)) as manager:
        assert manager.load_latest().step >= 1
        manager.begin()


def test_a_program_that_ends_without_close_uploads_its_last_checkpoints(s3, tmp_path):
    with start_writer(tmp_path, s3.url, "leave") as writer:
        assert writer.wait(60) == 0, writer.stderr.read()
    assert [file.step for file in RemoteRun(parse(s3.url, "url")).files()] == [1, 2, 3]


def test_a_store_that_ignores_conditions_is_refused(rclone, tmp_path):
    with pytest.raises(RemoteError, match="ignores conditions"):
        CheckpointManager(tmp_path, mirror=rclone.url).save(checkpoint(1))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_lost_answer_to_ones_own_creation_is_recognized(store, tmp_path):
    store.loses_answers = True
    with CheckpointManager(tmp_path, mirror=mirror(store)) as manager:
        manager.save(checkpoint(1))
    assert steps_that_count(store) == [1]
    store.loses_answers, store.ignores_conditions = False, True
    store.objects.clear()
    with pytest.raises(RemoteError, match="ignores conditions"):
        CheckpointManager(tmp_path, mirror=mirror(store)).begin()


def test_an_outage_is_one_warning_and_is_made_up_for(store, tmp_path):
    failures = []

    def fail(action: str, key: str) -> None:
        if action == "put" and key.endswith(".safetensors"):
            failures.append(key)
            raise outage()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with CheckpointManager(tmp_path, keep_last=1, mirror=mirror(store)) as manager:
            manager.save(checkpoint(1))
            manager.save_async(checkpoint(2)).wait_mirrored(30)
            store.before = fail
            for step in range(3, 9):
                pending = manager.save_async(checkpoint(step), final=step == 4)
            pending.wait()
            with pytest.raises(TimeoutError, match="checkpoint-8"):
                pending.wait_mirrored(0.2)
            assert manager.mirrored == 2
            store.before = lambda action, key: None
            pending.wait_mirrored(30)
    assert len(failures) > 6
    first, last = (str(each.message) for each in caught)
    assert first.startswith("step ")
    assert "is not mirrored yet" in first
    assert last == f"{URL}: reachable again; step 8 is there"
    assert steps_that_count(store) == [4, 8], "the final and the newest: the others are needless by then"


def test_what_is_not_there_in_time_is_named_with_the_command_that_uploads_it(store, tmp_path):
    gate = Gate(store)
    manager = CheckpointManager(tmp_path, mirror=mirror(store, timeout=0.0))
    manager.save(checkpoint(1), final=True)
    pending = manager.save_async(checkpoint(2))
    pending.wait()
    with pytest.warns(DistrustWarning, match=f"step 1, 2 is not there yet.*distrust copy {tmp_path} {URL}"):
        manager.close()
    gate.open.set()
    with pytest.raises(RemoteError, match="is not in s3"):
        pending.wait_mirrored(30)


def test_rules_here_that_remove_faster_than_uploads_lose_nothing(store, tmp_path):
    gate = Gate(store)
    rules = {"keep_last": 1, "keep_every": 4}
    with CheckpointManager(tmp_path, **rules, mirror=mirror(store, keep_last=2)) as manager:
        manager.save(checkpoint(1))
        assert gate.reached.wait(30)
        for step in range(2, 11):
            manager.save(checkpoint(step, metrics={"eval_loss": abs(step - 6.0)}), final=step == 3)
        assert len(list(tmp_path.glob("checkpoint-*"))) == 5
        gate.open.set()
    puts = [
        key.split("checkpoint-")[1].split(".")[0]
        for action, key in store.requests
        if action == "put" and "checkpoint-" in key
    ]
    assert puts == ["1", "10", "8", "6", "4", "3-final"], "newest first"
    assert steps_that_count(store) == [3, 4, 6, 8, 10]


def test_a_pinned_step_is_not_needless(store, tmp_path):
    gate = Gate(store)
    with CheckpointManager(tmp_path, keep_last=1, mirror=mirror(store)) as manager:
        for step in range(1, 5):
            manager.save(checkpoint(step))
            assert gate.reached.wait(30)
            if step == 2:
                manager.pin(step)
        gate.open.set()
    assert steps_that_count(store) == [2, 4]


def test_what_cannot_be_removed_there_is_one_warning_and_no_outage(store, tmp_path):
    def refuse(action: str, key: str) -> None:
        if action == "delete":
            raise RemoteError(f"{key}: these credentials may not delete it", url=key)

    store.before = refuse
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with CheckpointManager(tmp_path, keep_last=1, mirror=mirror(store)) as manager:
            for step in range(1, 6):
                manager.save_async(checkpoint(step)).wait_mirrored(30)
    (warning,) = (str(each.message) for each in caught)
    assert warning.startswith("step 3 is mirrored, but: ")
    assert "may not delete it" in warning
    assert steps_that_count(store) == [1, 2, 3, 4, 5]


def test_rules_there_keep_what_the_run_resumed_from(store, tmp_path):
    with CheckpointManager(tmp_path / "a", mirror=mirror(store, keep_last=2)) as manager:
        for step in (10, 20, 30):
            manager.save_async(checkpoint(step)).wait_mirrored(30)
    assert steps_that_count(store) == [20, 30]
    with CheckpointManager(tmp_path / "b", mirror=mirror(store, keep_last=1)) as manager:
        manager.load_latest()
        for step in (40, 50, 60):
            manager.save_async(checkpoint(step)).wait_mirrored(30)
    assert steps_that_count(store) == [30, 50, 60]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.booleans(), st.booleans(), st.lists(st.booleans(), max_size=6)), min_size=1, max_size=8
    )
)
def test_whatever_fails_the_newest_and_the_finals_arrive(tmp_path_factory, monkeypatch, history):
    """Each save may be final, may be followed by a lost disk, and its next requests may fail."""
    monkeypatch.setattr(mirror_module, "PAUSE_SECONDS", 0.0)
    store, failures = FakeStore(), []

    def fail(action: str, key: str) -> None:
        if action != "delete" and "terms/" not in key and failures and failures.pop():
            raise outage()

    manager, finals = None, set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DistrustWarning)
        for step, (final, is_lost, failing) in enumerate(history, 1):
            if manager is None:
                store.before = lambda action, key: None
                folder = tmp_path_factory.mktemp("disk")
                manager = CheckpointManager(folder, keep_last=1, mirror=mirror(store))
                if step > 1:
                    assert manager.load_latest().step == step - 1
                manager.begin()
            failures[:] = failing
            store.before = fail
            manager.save(checkpoint(step), final=final)
            finals |= {step} if final else set()
            if is_lost:
                manager.close()
                shutil.rmtree(folder)
                manager = None
        if manager is not None:
            manager.close()
    store.before = lambda action, key: None
    steps = steps_that_count(store)
    assert steps[-1] == len(history)
    assert finals <= {*steps}
    assert len(steps) <= len(finals) + 3


def test_a_forked_child_has_no_mirror_and_a_copy_has_its_own(store, tmp_path):
    manager = CheckpointManager(tmp_path, mirror=mirror(store))
    manager.save(checkpoint(1))
    child = os.fork()
    if not child:
        os._exit(0 if manager.mirrored is None and manager.fetch_newest() is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    manager.close()
    for clone in (
        copy.deepcopy(manager),
        pickle.loads(pickle.dumps(CheckpointManager(tmp_path, mirror=URL))),
    ):
        assert clone.mirrored is None
        assert clone.list_checkpoints() == [1]


def test_what_cannot_be_a_mirror_is_refused(store, tmp_path):
    with pytest.raises(ConfigError, match="mirror"):
        Mirror("http://host/x")
    with pytest.raises(ConfigError, match="patience=0"):
        Mirror(URL, patience=0)
    with pytest.raises(ConfigError, match="the directory itself"):
        CheckpointManager(tmp_path, mirror=tmp_path)
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(ConfigError, match="no mirror"):
            manager.save_async(checkpoint(1)).wait_mirrored()
        assert manager.mirrored is None
        manager.begin()


def test_what_does_not_count_is_removed_once_the_run_has_passed_it(store, tmp_path):
    with CheckpointManager(tmp_path / "a", mirror=mirror(store)) as manager:
        for step in (10, 20, 40):
            manager.save_async(checkpoint(step), final=step == 20).wait_mirrored(30)
    with CheckpointManager(tmp_path / "b", mirror=mirror(store, keep_last=9)) as manager:
        manager.begin(10)
        manager.save_async(checkpoint(30)).wait_mirrored(30)
        assert any("checkpoint-40.1-" in key for key in store.objects), "the run has not reached it again"
        manager.save_async(checkpoint(50)).wait_mirrored(30)
    assert steps_that_count(store) == [10, 30, 50]
    names = sorted(key.removeprefix(f"{URL}/") for key in store.objects)
    assert [name.split("-")[1].split(".")[0] for name in names if "checkpoint" in name] == [
        "10",
        "20",
        "30",
        "50",
    ]
    assert [name for name in names if "terms" in name] == [
        "terms/00000001.json",
        "terms/00000002.beat",
        "terms/00000002.end",
        "terms/00000002.json",
        "terms/probe",
    ]


def test_what_asks_to_stop_ends_the_watch(store, tmp_path):
    def stop() -> None:
        raise KeyboardInterrupt

    with CheckpointManager(tmp_path / "a", mirror=mirror(store)) as first:
        first.begin()
        second = CheckpointManager(tmp_path / "b", mirror=mirror(store, patience=9999.0))
        with pytest.raises(KeyboardInterrupt), second:
            second.begin(on_wait=stop)
        for thread in threading.enumerate():
            if thread.name == "watch the mirror":
                thread.join(30)
                assert not thread.is_alive()


def test_a_request_that_hangs_delays_no_beat_beyond_the_patience(store, tmp_path):
    seconds = []

    def connect(location, **options):
        seconds.append(options)
        return store.connect(location, **options)

    with CheckpointManager(tmp_path, mirror=Mirror(URL, connect=connect)) as manager:
        manager.begin()
    (brief,) = (options for options in seconds if options)
    assert BEAT_SECONDS + 2 * brief["request_seconds"] + 2 * brief["give_up_after"] < Mirror(URL).patience


def test_nothing_waits_for_an_upload_that_cannot_count(store, tmp_path):
    first = CheckpointManager(tmp_path / "a", mirror=mirror(store, timeout=9999.0))
    gate = Gate(store)
    first.save(checkpoint(1))
    assert gate.reached.wait(30)
    with CheckpointManager(tmp_path / "b", mirror=mirror(store, take_over=True)) as second:
        store.before = lambda action, key: None
        second.begin()
        with pytest.raises(TakenOver):
            first.close()  # its upload still hangs
    gate.open.set()


@pytest.mark.parametrize("when", ["body", "wait"])
def test_an_interrupt_does_not_wait_for_uploads(store, tmp_path, when):
    gate = Gate(store)
    began = threading.Event()

    def use_manager() -> None:
        with CheckpointManager(tmp_path, mirror=mirror(store, timeout=9999.0)) as manager:
            manager.save(checkpoint(1))
            began.set()
            if when == "body":
                raise KeyboardInterrupt
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            manager.wait_mirrored()

    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), pytest.warns(DistrustWarning, match="step 1 is not there yet"):
            use_manager()
    finally:
        signal.signal(signal.SIGALRM, previous)
        gate.open.set()


def test_an_upload_that_was_given_up_ends_in_the_middle(s3, tmp_path, monkeypatch):
    """Else a program that has waited long enough would not end: its thread goes on."""
    file = mirror_module.open_regular_file
    reads = threading.Semaphore(0)

    class Slow:
        def __init__(self, path):
            self._file = file(path)

        def __getattr__(self, name):
            return getattr(self._file, name)

        def read(self, size=-1):
            reads.release()
            threading.Event().wait(0.2)
            return self._file.read(size)

    monkeypatch.setattr(mirror_module, "open_regular_file", Slow)
    large = Checkpoint(step=1, model={"w": np.zeros(16 << 20, "f4")})
    manager = CheckpointManager(tmp_path, mirror=Mirror(s3.url, timeout=0.0))
    manager.save(large)
    assert reads.acquire(timeout=30)
    with pytest.warns(DistrustWarning, match="not there yet"):
        manager.close()
    for thread in threading.enumerate():
        if thread.name.startswith("mirror of"):
            thread.join(10)
            assert not thread.is_alive()
    assert not RemoteRun(parse(s3.url, "url")).files()


def test_a_warning_that_is_an_error_comes_after_the_save(store, tmp_path):
    def fail(action: str, key: str) -> None:
        if action == "put" and key.endswith(".safetensors"):
            raise outage()

    manager = CheckpointManager(tmp_path, keep_last=None, mirror=mirror(store, timeout=9.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager.begin()
        store.before = fail
        with pytest.raises(DistrustWarning, match="is not mirrored yet"):  # noqa: PT012
            for step in range(1, 10**4):
                manager.save(checkpoint(step))
        assert manager.list_checkpoints() == [*range(1, step + 1)]
        store.before = lambda action, key: None
        with pytest.raises(DistrustWarning, match="reachable again"):
            manager.close()


def test_what_the_rules_here_remove_before_it_is_verified_is_uploaded(store, tmp_path):
    with CheckpointManager(tmp_path, keep_last=1) as manager:
        manager.save(checkpoint(10))
    reached, opened = threading.Event(), threading.Event()

    def hold(action: str, key: str) -> None:
        if threading.current_thread().name.startswith("mirror of"):
            reached.set()
            assert opened.wait(30)

    store.before = hold
    with CheckpointManager(tmp_path, keep_last=1, mirror=mirror(store, keep_every=5)) as manager:
        manager.begin()
        assert reached.wait(30)
        manager.save(checkpoint(21))
        assert not (tmp_path / "checkpoint-10.safetensors").exists()
        opened.set()
    assert steps_that_count(store) == [10, 21]


def test_without_credentials_or_a_store_nothing_is_created(tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "DISTRUST_INSTANCE_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for call in ("acquire", "begin", "fetch_newest", "load_latest"):
        with (
            pytest.raises(RemoteError, match="no credentials"),
            CheckpointManager(tmp_path / "new", mirror=URL) as manager,
        ):
            getattr(manager, call)()

    def fail(action: str, key: str) -> None:
        raise outage()

    store = FakeStore()
    store.before = fail
    with pytest.raises(RemoteError), CheckpointManager(tmp_path / "new", mirror=mirror(store)) as manager:
        manager.fetch_newest()
    assert not list(tmp_path.iterdir())


def test_a_manager_that_is_dropped_locks_nobody_out(store, tmp_path):
    manager = CheckpointManager(tmp_path, mirror=mirror(store))
    manager.save_async(checkpoint(1)).wait_mirrored(30)
    manager.wait_mirrored()
    del manager
    with CheckpointManager(tmp_path, mirror=mirror(store, patience=9999.0)) as second:
        second.save(checkpoint(2))
    assert steps_that_count(store) == [1, 2]
