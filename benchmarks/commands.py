"""``distrust ls``, as a whole process, beside a Python that does nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.libraries import STEP

Figures = dict[str, float]

FEW, MANY = 10, 10_000


def start_python() -> Figures:
    """The same interpreter, doing nothing."""
    return _time_command([sys.executable, "-c", "pass"])


def ls(folder: Path) -> Figures:
    """``distrust ls`` of a folder."""
    return _time_command([sys.executable, "-m", "distrust", "ls", str(folder)])


def write_small_checkpoints(folder: Path, count: int) -> None:
    """Real checkpoints of 8 small tensors each, written by the manager.

    They are made one by one in a folder of their own and moved: saving into a folder of thousands would
    measure something else, for hours. fsync does nothing here: nobody needs these to outlive a power cut.
    """
    import numpy as np

    from distrust import Checkpoint, CheckpointManager

    os.fsync = lambda fd: None
    folder.mkdir(parents=True)
    model = {f"layers.{index}": np.full(16, index, np.float32) for index in range(8)}
    with CheckpointManager(folder / "one", keep_last=None) as manager:
        for step in range(STEP, STEP + count):
            path = manager.save(Checkpoint(step=step, model=model, metrics={"loss": 1 / step}))
            path.rename(folder / path.name)


def _time_command(command: list[str]) -> Figures:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # so that its files are cached
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {"seconds": time.perf_counter() - began}
