"""Repeated listings of a directory: unchanged files are read once, changed files second."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import catalog, serialization
from distrust.errors import CheckpointNotFound, DamagedCheckpointWarning


def save_steps(directory: Path, *steps: int) -> list[Path]:
    with CheckpointManager(directory, keep_last=None) as manager:
        return [manager.save(Checkpoint(step=step, model={"w": np.ones(3)})) for step in steps]


@pytest.fixture
def no_stable_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files written just now count as unchanged for a long time."""
    monkeypatch.setattr(catalog, "STABLE_AFTER_NANOSECONDS", -(10**12))


def test_an_unchanged_file_is_read_once(tmp_path, no_stable_delay):
    save_steps(tmp_path, 1, 2)
    cache: catalog.ScanCache = {}
    first = catalog.scan(tmp_path, cache)
    second = catalog.scan(tmp_path, cache)
    assert [file.step for file in first.files] == [1, 2]
    assert all(a.header is b.header for a, b in zip(first.files, second.files, strict=True))
    fresh = catalog.scan(tmp_path)
    assert fresh.files[0].header is not first.files[0].header
    assert [file.digest for file in fresh.files] == [file.digest for file in first.files]


def test_a_new_file_is_listed_and_a_removed_one_is_dropped_from_the_cache(tmp_path, no_stable_delay):
    paths = save_steps(tmp_path, 1, 2)
    cache: catalog.ScanCache = {}
    catalog.scan(tmp_path, cache)
    paths[0].unlink()
    save_steps(tmp_path, 3)
    assert [file.step for file in catalog.scan(tmp_path, cache).files] == [2, 3]
    assert [path.name for path in cache] == ["checkpoint-2.safetensors", "checkpoint-3.safetensors"]


def test_a_replaced_or_damaged_file_is_read_again(tmp_path, no_stable_delay):
    paths = save_steps(tmp_path, 1, 2, 3)
    cache: catalog.ScanCache = {}
    old = catalog.scan(tmp_path, cache)
    with CheckpointManager(tmp_path, keep_last=None) as manager:
        manager.save(Checkpoint(step=1, model={"w": np.zeros(3)}))
    with paths[1].open("r+b") as file:
        file.seek(100)
        file.write(b"x")
    os.truncate(paths[2], paths[2].stat().st_size - 1)

    new = catalog.scan(tmp_path, cache)

    assert [file.step for file in new.files] == [1]
    assert new.files[0].state_digest != old.files[0].state_digest
    assert [file.step for file in new.damaged] == [2, 3]
    assert list(cache) == [paths[0]]
    assert [file.step for file in catalog.scan(tmp_path, cache).damaged] == [2, 3]


def test_a_file_written_just_now_is_not_cached(tmp_path):
    """A second change within one tick of the clock leaves the same times."""
    save_steps(tmp_path, 1)
    cache: catalog.ScanCache = {}
    assert len(catalog.scan(tmp_path, cache).files) == 1
    assert cache == {}


def test_a_cached_file_that_is_removed_during_the_listing_is_not_listed(
    tmp_path, no_stable_delay, monkeypatch
):
    paths = save_steps(tmp_path, 1, 2)
    cache: catalog.ScanCache = {}
    catalog.scan(tmp_path, cache)
    original = catalog.list_names

    def list_then_remove(directory):
        entries = original(directory)
        paths[0].unlink(missing_ok=True)
        return entries

    monkeypatch.setattr(catalog, "list_names", list_then_remove)
    assert [file.step for file in catalog.scan(tmp_path, cache).files] == [2]


def test_a_writer_that_replaces_the_only_checkpoint_is_never_seen_without_one(tmp_path, monkeypatch):
    """The names were listed before the newer one was committed, and read after the older one was removed."""
    original, listings = catalog.list_names, []
    with CheckpointManager(tmp_path, keep_last=1, keep_best=0) as manager:
        manager.save(Checkpoint(step=1))

        def list_then_save(directory):
            entries = original(directory)
            listings.append(entries)
            if len(listings) == 1:
                manager.save(Checkpoint(step=2))
            return entries

        monkeypatch.setattr(catalog, "list_names", list_then_save)
        assert CheckpointManager(tmp_path).list_checkpoints() == [2]
        listings.clear()
        manager.save(Checkpoint(step=1), final=True)
        assert CheckpointManager(tmp_path).load_latest().step == 2


def test_a_file_changed_in_place_with_its_old_time_is_read_again(tmp_path, no_stable_delay):
    """Such as by a tool that restores a file's times: nothing can set the time of change."""
    (path,) = save_steps(tmp_path, 1)
    cache: catalog.ScanCache = {}
    assert len(catalog.scan(tmp_path, cache).files) == 1
    original = path.stat()
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"x")
    times = original.st_atime_ns, original.st_mtime_ns
    os.utime(path, ns=times)
    while path.stat().st_ctime_ns == original.st_ctime_ns:  # until the clock has ticked
        os.utime(path, ns=times)
    assert [file.step for file in catalog.scan(tmp_path, cache).damaged] == [1]


@pytest.mark.parametrize("damaged_kind", ["periodic", "final"])
def test_newest_warns_of_a_damaged_file_of_the_same_step(tmp_path, damaged_kind):
    paths = {}
    with CheckpointManager(tmp_path) as manager:
        paths["periodic"] = manager.save(Checkpoint(step=2))
        content = paths["periodic"].read_bytes()
        paths["final"] = manager.save(Checkpoint(step=2), final=True)
    paths["periodic"].write_bytes(content)  # as if the writer was killed before it removed this
    os.truncate(paths[damaged_kind], 100)
    with pytest.warns(DamagedCheckpointWarning, match=paths[damaged_kind].name):
        assert catalog.newest(tmp_path).kind != damaged_kind


def run_before_first_call(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str, act: Callable[[], object]
) -> list[tuple]:
    """Call ``act`` just before the first call of a function; return the arguments of all calls."""
    original, calls = getattr(module, name), []

    def call_after_act(*arguments, **named):
        calls.append(arguments)
        if len(calls) == 1:
            act()
        return original(*arguments, **named)

    monkeypatch.setattr(module, name, call_after_act)
    return calls


def test_load_best_lists_again_if_the_best_is_removed_before_it_is_read(tmp_path, monkeypatch):
    with CheckpointManager(tmp_path, keep_last=1, keep_best=1, metric="m") as manager:
        manager.save(Checkpoint(step=1, metrics={"m": 1.0}))
        manager.save(Checkpoint(step=2, metrics={"m": 2.0}))
        better = Checkpoint(step=3, metrics={"m": 0.5})
        run_before_first_call(monkeypatch, serialization, "load", lambda: manager.save(better))
        assert CheckpointManager(tmp_path, metric="m").load_best().step == 3


READS = {
    "load": ((serialization, "load"), lambda manager: manager.load(1)),
    "inspect": ((catalog, "read_header"), lambda manager: manager.inspect(1)),
    "validate": ((catalog, "verify"), lambda manager: manager.validate(1)),
}


@pytest.mark.parametrize("method", READS)
def test_a_step_is_read_although_its_final_replaces_it_first(tmp_path, monkeypatch, method):
    (module, name), read = READS[method]
    with CheckpointManager(tmp_path) as manager:
        manager.save(Checkpoint(step=1))
        final = Checkpoint(step=1)
        calls = run_before_first_call(monkeypatch, module, name, lambda: manager.save(final, final=True))
        read(CheckpointManager(tmp_path))
    assert [path.name for path, *_ in calls] == ["checkpoint-1.safetensors", "checkpoint-1-final.safetensors"]


@pytest.mark.parametrize("method", READS)
def test_a_step_removed_before_it_is_read_is_reported_as_missing(tmp_path, monkeypatch, method):
    (module, name), read = READS[method]
    paths = save_steps(tmp_path, 1, 2)
    run_before_first_call(monkeypatch, module, name, paths[0].unlink)
    with pytest.raises(CheckpointNotFound, match=r"no checkpoint of step 1; there are 2$"):
        read(CheckpointManager(tmp_path))
