"""Listing a directory again and again: what did not change is not read twice, and what did change is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import catalog, serialization
from distrust.errors import CheckpointNotFound


def written(directory: Path, *steps: int) -> list[Path]:
    with CheckpointManager(directory, keep_last=None) as manager:
        return [manager.save(Checkpoint(step=step, model={"w": np.ones(3)})) for step in steps]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as long unchanged, though they were written just now."""
    monkeypatch.setattr(catalog, "STABLE_AFTER_NANOSECONDS", -(10**12))


def test_an_unchanged_file_is_read_once(tmp_path, settled):
    written(tmp_path, 1, 2)
    known: catalog.ScanCache = {}
    first = catalog.scan(tmp_path, known)
    again = catalog.scan(tmp_path, known)
    assert [file.step for file in first.files] == [1, 2]
    assert all(a.header is b.header for a, b in zip(first.files, again.files, strict=True))
    fresh = catalog.scan(tmp_path)
    assert fresh.files[0].header is not first.files[0].header
    assert [file.digest for file in fresh.files] == [file.digest for file in first.files]


def test_a_new_file_is_found_and_one_that_is_gone_is_forgotten(tmp_path, settled):
    paths = written(tmp_path, 1, 2)
    known: catalog.ScanCache = {}
    catalog.scan(tmp_path, known)
    paths[0].unlink()
    written(tmp_path, 3)
    assert [file.step for file in catalog.scan(tmp_path, known).files] == [2, 3]
    assert [path.name for path in known] == ["checkpoint-2.safetensors", "checkpoint-3.safetensors"]


def test_a_file_that_was_replaced_or_damaged_is_read_again(tmp_path, settled):
    paths = written(tmp_path, 1, 2, 3)
    known: catalog.ScanCache = {}
    before = catalog.scan(tmp_path, known)
    with CheckpointManager(tmp_path, keep_last=None) as manager:
        manager.save(Checkpoint(step=1, model={"w": np.zeros(3)}))
    with paths[1].open("r+b") as file:
        file.seek(100)
        file.write(b"x")
    os.truncate(paths[2], paths[2].stat().st_size - 1)

    after = catalog.scan(tmp_path, known)

    assert [file.step for file in after.files] == [1]
    assert after.files[0].state_digest != before.files[0].state_digest
    assert [file.step for file in after.damaged] == [2, 3]
    assert list(known) == [paths[0]]
    assert [file.step for file in catalog.scan(tmp_path, known).damaged] == [2, 3]


def test_a_file_written_just_now_is_not_taken_for_known(tmp_path):
    """Changed again within a tick of the clock, it would show the same times."""
    written(tmp_path, 1)
    known: catalog.ScanCache = {}
    assert len(catalog.scan(tmp_path, known).files) == 1
    assert known == {}


def test_a_known_file_that_goes_while_it_is_listed_is_gone(tmp_path, settled, monkeypatch):
    paths = written(tmp_path, 1, 2)
    known: catalog.ScanCache = {}
    catalog.scan(tmp_path, known)
    honest = catalog.list_names

    def removed_just_after(directory):
        entries = honest(directory)
        paths[0].unlink(missing_ok=True)
        return entries

    monkeypatch.setattr(catalog, "list_names", removed_just_after)
    assert [file.step for file in catalog.scan(tmp_path, known).files] == [2]


def interfered(monkeypatch: pytest.MonkeyPatch, module: object, name: str, act: Callable[[], object]) -> None:
    """Have ``act`` happen just before the first call."""
    honest, calls = getattr(module, name), []

    def after_that(*arguments, **named):
        calls.append(arguments)
        if len(calls) == 1:
            act()
        return honest(*arguments, **named)

    monkeypatch.setattr(module, name, after_that)


def test_a_best_one_that_goes_before_it_is_read_makes_room_for_a_better_one(tmp_path, monkeypatch):
    with CheckpointManager(tmp_path, keep_last=1, keep_best=1, metric="m") as manager:
        manager.save(Checkpoint(step=1, metrics={"m": 1.0}))
        manager.save(Checkpoint(step=2, metrics={"m": 2.0}))
        better = Checkpoint(step=3, metrics={"m": 0.5})
        interfered(monkeypatch, serialization, "load", lambda: manager.save(better))
        assert CheckpointManager(tmp_path, metric="m").load_best().step == 3


READS = {
    "load": ((serialization, "load"), lambda manager: manager.load(1).step),
    "inspect": ((catalog, "read_header"), lambda manager: manager.inspect(1).step),
    "validate": ((catalog, "verify"), lambda manager: manager.validate(1)),
}


@pytest.mark.parametrize("how", READS)
def test_a_step_whose_final_one_comes_before_it_is_read_is_there(tmp_path, monkeypatch, how):
    (module, name), read = READS[how]
    with CheckpointManager(tmp_path) as manager:
        manager.save(Checkpoint(step=1))
        interfered(monkeypatch, module, name, lambda: manager.save(Checkpoint(step=1), final=True))
        assert read(CheckpointManager(tmp_path)) in (1, None)


@pytest.mark.parametrize("how", READS)
def test_a_step_that_goes_before_it_is_read_is_missed_by_name(tmp_path, monkeypatch, how):
    (module, name), read = READS[how]
    paths = written(tmp_path, 1, 2)
    interfered(monkeypatch, module, name, paths[0].unlink)
    with pytest.raises(CheckpointNotFound, match=r"no checkpoint of step 1; there are 2$"):
        read(CheckpointManager(tmp_path))
