"""A load that fails frees its memory at once, not when the garbage collector runs."""

from __future__ import annotations

import contextlib
import gc
import mmap
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distrust import Checkpoint, CheckpointManager
from distrust.errors import CorruptCheckpoint
from tests.older_files import A, write_checksums, write_directory, write_tensor_file

SIZE = 4 << 20

LOADS: dict[str, Callable[[CheckpointManager], object]] = {
    "load": lambda manager: manager.load(2),
    "load, mapped": lambda manager: manager.load(2, mmap=True),
    "load, lazily": lambda manager: manager.load(2, mmap=True, verify="lazy").model["w"],
    "load_latest": lambda manager: manager.load_latest(),
    "validate": lambda manager: manager.validate(2),
}


def large_buffers() -> int:
    """The number of blocks of memory and mapped files that may hold a checkpoint."""
    return sum(isinstance(object_, mmap.mmap) and len(object_) >= SIZE for object_ in gc.get_objects())


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.filterwarnings("ignore:skipped a damaged checkpoint")
def test_a_load_that_fails_frees_its_memory_at_once(tmp_path, no_collector, name):
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            path = manager.save(Checkpoint(step=step, model={"w": np.ones(SIZE // 8)}))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    manager = CheckpointManager(tmp_path)
    loaded = manager.load(1)
    assert large_buffers() >= 1, "the measure itself: a checkpoint in memory is counted"
    del loaded
    buffers_before = large_buffers()

    with contextlib.suppress(CorruptCheckpoint):
        LOADS[name](manager)

    assert large_buffers() == buffers_before


@pytest.mark.parametrize("defect", ["a number", "a member"])
def test_a_load_of_a_foreign_folder_that_fails_frees_its_memory_at_once(tmp_path, no_collector, defect):
    weights = np.ones(SIZE // 4, np.float32)
    if defect == "a number":
        weights[-1] = np.nan
    path = write_directory(tmp_path / "checkpoint-10", model={A: weights}, optimizer={})
    if defect == "a member":
        raw = bytearray((path / "model.npz").read_bytes())
        raw[SIZE // 2] ^= 1  # the CRC of the member no longer matches
        (path / "model.npz").write_bytes(raw)
        write_checksums(path)
    assert_load_frees_memory(path)


def test_a_load_of_a_foreign_file_that_fails_frees_its_memory_at_once(tmp_path, no_collector):
    weights = np.ones(SIZE // 4, np.float32)
    weights[-1] = np.nan
    path = write_tensor_file(tmp_path / "checkpoint-10.safetensors", model={A: weights})
    assert_load_frees_memory(path)


def assert_load_frees_memory(path: Path) -> None:
    manager = CheckpointManager(path.parent)
    with contextlib.suppress(CorruptCheckpoint):
        manager.load(10)  # imports the readers
    gc.collect()
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpoint):
            manager.load(10)
        remaining, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak > SIZE, "the measure itself: the arrays were in memory"
    assert remaining < SIZE / 4
