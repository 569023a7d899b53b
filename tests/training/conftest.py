"""Fixtures of this folder: no test waits for a disk."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from distrust import DistrustTrainer, TrainConfig
from distrust.checkpoint.disk import Disk
from distrust.testing.toy_engine import TOY, ToyEngine
from distrust.training.events import RunEnded


@pytest.fixture(scope="module", autouse=True)
def _no_fsync(no_fsync: None) -> None:
    """Tests of power loss check the calls, not the disk."""


@pytest.fixture(scope="session")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunEnded:
    """The end of an undisturbed run of the fixture ``run``, with no options."""
    config = TrainConfig(out=str(tmp_path_factory.mktemp("alone")), **{**TOY, "data": str(data)})
    return DistrustTrainer(config, engine=ToyEngine(), observers=[]).train()


@pytest.fixture
def failing_saves(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the saves with these numbers fail at their fsync, counted from 1."""

    def fail(*numbers: int) -> None:
        original_create, original_sync = Disk.create, Disk.sync
        checkpoints: set[int] = set()  # descriptors: the cache of tokens syncs its files, too
        count = 0

        def create(disk: Disk, path: Path) -> int:
            descriptor = original_create(disk, path)
            checkpoints.add(descriptor)
            return descriptor

        def sync(disk: Disk, descriptor: int) -> None:
            nonlocal count
            if descriptor in checkpoints:
                checkpoints.remove(descriptor)
                count += 1
                if count in numbers:
                    raise OSError(errno.ENOSPC, "No space left on device")
            original_sync(disk, descriptor)

        monkeypatch.setattr(Disk, "create", create)
        monkeypatch.setattr(Disk, "sync", sync)

    return fail
