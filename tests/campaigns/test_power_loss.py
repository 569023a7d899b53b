"""The campaign of power cuts in short form, its model of a disk, and what it has found."""

from __future__ import annotations

import contextlib
import errno
import re
import threading
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from campaigns import failing_calls, power_loss
from campaigns.power import search
from campaigns.power.cut import FATES, PAGE_BYTES, World
from campaigns.power.recording import (
    Create,
    Killed,
    RecordingDisk,
    Rename,
    Reserve,
    Sync,
    SyncDirectory,
    SyncFailed,
    Truncate,
    Unlink,
    Write,
)
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import lock, retention, shared_writer, storage
from distrust.errors import CheckpointError, DistrustWarning, SaveFailed

ROOT = Path("/disk")
A, B = ROOT / "a", ROOT / "b"
fates = st.sampled_from(FATES)
generators = st.integers().map(Random)


@pytest.fixture
def _few(monkeypatch):
    """Fewer disks in a case."""
    monkeypatch.setattr(search, "SEQUENCES_PER_CASE", 2)
    monkeypatch.setattr(search, "RANDOM_FATES", 4)


@pytest.mark.usefixtures("_few")
def test_every_invariant_holds_on_the_disks_of_some_sequences(capsys):
    assert power_loss.main(["--seed", "5", "--cases", "2"]) == 0
    assert "every invariant held" in capsys.readouterr().out


@pytest.mark.usefixtures("_few")
def test_every_invariant_holds_where_several_ranks_write_each_checkpoint(capsys):
    assert power_loss.main(["--seed", "5", "--cases", "1", "--shared"]) == 0
    assert "every invariant held" in capsys.readouterr().out


@pytest.mark.usefixtures("_few")
def test_every_invariant_holds_where_calls_fail(capsys):
    assert failing_calls.main(["--seed", "5", "--cases", "2"]) == 0
    assert "every invariant held" in capsys.readouterr().out


# It can fail


@pytest.mark.parametrize("fault", power_loss.FAULTS)
def test_a_call_that_is_left_out_is_found(capsys, fault):
    assert power_loss.main(["--leave-out", fault, "--cases", "20"]) == 1
    out = capsys.readouterr().out
    assert "COUNTEREXAMPLE" in out
    again = re.search("again: python -m campaigns.power_loss (.*)", out)[1].split()
    assert again == ["--seed", "1", "--case", "0", "--leave-out", fault]
    assert power_loss.main(again) == 1


def sync_all_but(omitted: str):
    original = storage.sync_names

    def sync_names(directory, disk):
        if omitted == "parents":
            disk.sync_directory(directory)
        elif omitted == "names":
            original(directory.parent, disk)

    return sync_names


def commit_before_sync(file: storage.AtomicCheckpointFile) -> None:
    file._writers.finish()
    file._disk.truncate(file._descriptor, file._size)
    file._disk.rename(file._temporary, file.path)
    file._disk.sync(file._descriptor)
    file._disk.sync_directory(file.path.parent)


def sync_again_if_it_fails(file: storage.AtomicCheckpointFile) -> None:
    file._writers.finish()
    file._disk.truncate(file._descriptor, file._size)
    try:
        file._disk.sync(file._descriptor)
    except OSError:
        file._disk.sync(file._descriptor)
    file._disk.rename(file._temporary, file.path)
    file._disk.sync_directory(file.path.parent)


MUTANTS = {
    "the parents are not synced at the start": (
        power_loss, lock, "sync_names", sync_all_but("parents"),
    ),
    "renamed before it is synced": (power_loss, storage.AtomicCheckpointFile, "commit", commit_before_sync),
    "a failed sync is tried again": (
        failing_calls, storage.AtomicCheckpointFile, "commit", sync_again_if_it_fails,
    ),
    "the oldest are kept": (
        power_loss, retention, "last_steps", lambda steps, rules: {min(each.step for each in steps)},
    ),
    "nothing is swept": (power_loss, storage, "_TEMPORARY_NAME", re.compile("none")),
}  # fmt: skip


#: The case that has found it last; if it does not any more, others do.
FOUND_BY = {"a failed sync is tried again": "3"}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_protocol_is_found(monkeypatch, capsys, mutant):
    campaign, owner, name, wrong = MUTANTS[mutant]
    monkeypatch.setattr(owner, name, wrong)
    attempts = ["--case", FOUND_BY.get(mutant, "0")], ["--cases", "60"]
    assert any(campaign.main(arguments) == 1 for arguments in attempts), capsys.readouterr().out


def test_a_leader_that_commits_before_the_parts_are_durable_is_found(monkeypatch, capsys):
    """A rank tells its digests first, and syncs its part then."""
    commit, tell = storage.AtomicCheckpointFile.commit, shared_writer._tell
    parts: dict[int, storage.AtomicCheckpointFile] = {}

    def commit_later(file):
        if not file.is_part:
            return commit(file)
        parts[threading.get_ident()] = file
        return None

    def tell_first(peers, path, value):
        words = tell(peers, path, value)
        if part := parts.pop(threading.get_ident(), None):
            commit(part)
        return words

    monkeypatch.setattr(storage.AtomicCheckpointFile, "commit", commit_later)
    monkeypatch.setattr(shared_writer, "_tell", tell_first)
    assert power_loss.main(["--shared", "--cases", "10"]) == 1
    assert "COUNTEREXAMPLE" in capsys.readouterr().out


# What a power cut may leave


def file_of(content: bytes, *, size: int, synced: bool) -> list:
    operations = [Create(A, 1), Reserve(1, len(content)), Write(1, 0, content), Truncate(1, size)]
    return [*operations, Sync(1), SyncDirectory(ROOT)] if synced else operations


@given(fates, fates, generators, st.integers(1, 3 * PAGE_BYTES))
def test_what_was_synced_survives_whatever_comes_after(names, contents, rng, size):
    world = World(ROOT, {})
    for operation in file_of(b"x" * 3 * PAGE_BYTES, size=size, synced=True):
        world.apply(operation)
    for operation in (Create(B, 2), Write(2, 0, b"y"), Create(ROOT / "c", 3), Unlink(ROOT / "c")):
        world.apply(operation)
    assert world.is_certain(A)
    assert world.after_cut(names, contents, rng)[A] == b"x" * size


def test_what_was_not_synced_may_be_left_in_any_version():
    world = World(ROOT, {})
    for operation in file_of(b"xy" * PAGE_BYTES, size=PAGE_BYTES + 7, synced=False):
        world.apply(operation)
    assert not world.is_certain(A)
    rng = Random(1)
    images = [
        world.after_cut(names, contents, rng) for _ in range(40) for names in FATES for contents in FATES
    ]
    versions = {image.get(A) for image in images}
    complete = b"xy" * (PAGE_BYTES // 2) + b"xyxyxyx"
    assert {None, b"", complete, bytes(PAGE_BYTES + 7), bytes(PAGE_BYTES) + complete[PAGE_BYTES:]} <= versions
    assert any(content and 0 < len(content.rstrip(b"\0")) < PAGE_BYTES for content in versions)  # torn


def test_a_rename_replaces_in_one_instant_and_in_any_order_with_others():
    world = World(ROOT, {A: b"old", B: b"new", ROOT / "c": b"c"})
    for operation in (Rename(B, A), Unlink(ROOT / "c")):
        world.apply(operation)
    assert world.is_certain(A)
    assert not world.is_certain(B)
    images = {
        tuple((path.name, content) for path, content in world.after_cut(names, "kept", rng).items())
        for names in FATES
        for rng in map(Random, range(100))
    }
    old, new, b, c = ("a", b"old"), ("a", b"new"), ("b", b"new"), ("c", b"c")
    assert images == {(old, b, c), (old, b), (new, c), (new,), (new, b), (new, b, c)}


def test_a_sync_makes_durable_what_its_own_writer_has_written():
    world = World(ROOT, {})
    pages = [Write(1, 0, b"x" * PAGE_BYTES), Write(1, PAGE_BYTES, b"y" * PAGE_BYTES, 1)]
    for operation in [Create(A, 1), Reserve(1, 2 * PAGE_BYTES), *pages, Sync(1), SyncDirectory(ROOT)]:
        world.apply(operation)
    assert world.after_cut("lost", "lost", Random(0))[A] == b"x" * PAGE_BYTES + bytes(PAGE_BYTES)
    world.apply(Sync(1, 1))
    assert world.after_cut("lost", "lost", Random(0))[A] == b"x" * PAGE_BYTES + b"y" * PAGE_BYTES


def test_a_sync_that_failed_makes_nothing_durable_and_nor_does_the_next():
    lost_count = 0
    for size in range(1, 9):
        world = World(ROOT, {})
        content = b"x" * size * PAGE_BYTES
        for operation in [Create(A, 1), Write(1, 0, content), SyncFailed(1), Sync(1), SyncDirectory(ROOT)]:
            world.apply(operation)
        lost_count += world.after_cut("kept", "kept", Random(0))[A] != content
    assert lost_count


# What it has found


class Recorded:
    """A manager on a recording disk, and the model of the disk."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.world = World(root, {})
        self.disk = RecordingDisk(self.world.apply)
        self.directory = root / "run" / "checkpoints"

    def manager(self, **rules) -> CheckpointManager:
        return CheckpointManager(self.directory, disk=self.disk, **rules)

    @contextlib.contextmanager
    def killed_after(self, calls: int):
        self.disk.dies_after = self.disk.calls + calls
        with contextlib.suppress(Killed):
            yield
        self.disk.dies_after = None


@pytest.mark.parametrize("calls", range(14))
def test_a_folder_made_by_one_who_was_killed_is_durable_before_a_checkpoint_in_it_is(tmp_path, calls):
    recorded = Recorded(tmp_path / "disk")
    with recorded.killed_after(calls), recorded.manager() as manager:
        manager.save(Checkpoint(step=1))
    with recorded.manager() as manager:
        assert recorded.world.is_certain(manager.save(Checkpoint(step=2)))


@pytest.mark.parametrize("calls", range(14))
def test_nothing_goes_for_a_checkpoint_whose_name_is_not_durable(tmp_path, calls):
    """Its writer was killed between renaming it and syncing the directory."""
    recorded = Recorded(tmp_path / "disk")
    with recorded.manager() as manager:
        manager.save(Checkpoint(step=1))
        with recorded.killed_after(calls):
            manager.save(Checkpoint(step=2))
    with recorded.manager() as manager:
        manager.cleanup(keep_last=1)
        [remaining] = manager.scan().files
        assert recorded.world.is_certain(remaining.path)


def test_nothing_goes_for_a_checkpoint_whose_sync_failed_after_its_rename(tmp_path):
    recorded = Recorded(tmp_path / "disk")
    with recorded.manager() as manager:
        manager.save(Checkpoint(step=1))
        recorded.disk.fails = lambda name, _: errno.EIO if name == "sync_directory" else None
        with pytest.raises(SaveFailed, match="written completely"):
            manager.save(Checkpoint(step=2))
        with pytest.raises(SaveFailed, match="cannot be written to"):
            manager.cleanup(keep_last=1)
        assert manager.list_checkpoints() == [1, 2]
        recorded.disk.fails = None
        assert manager.cleanup(keep_last=1) == [1]
        assert recorded.world.is_certain(manager.directory / "checkpoint-2.safetensors")


def test_a_checkpoint_that_cannot_be_removed_is_said_so_and_the_save_before_stands(tmp_path):
    recorded = Recorded(tmp_path / "disk")
    with recorded.manager(keep_last=1) as manager:
        manager.save(Checkpoint(step=1))
        recorded.disk.fails = lambda name, _: errno.EPERM if name == "unlink" else None
        with pytest.warns(DistrustWarning, match=r"could not clean up: .*checkpoint-1.*cannot be removed"):
            assert recorded.world.is_certain(manager.save(Checkpoint(step=2)))
        with pytest.raises(CheckpointError, match=r"checkpoint-1\.safetensors: cannot be removed"):
            manager.cleanup()


def test_a_start_that_failed_counts_for_nothing(tmp_path):
    """Its names were not synced: the next attempt does all of it again."""
    recorded = Recorded(tmp_path / "disk")
    with recorded.manager() as manager:
        for failing in range(1, 12):
            at = recorded.disk.calls + failing
            recorded.disk.fails = lambda _, number, at=at: errno.EIO if number == at else None
            with contextlib.suppress(SaveFailed):
                manager.acquire()
        recorded.disk.fails = None
        assert recorded.world.is_certain(manager.save(Checkpoint(step=1)))
