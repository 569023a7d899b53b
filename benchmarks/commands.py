"""``distrust ls`` as a whole process, compared with a Python that does nothing."""

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
    """Time the same interpreter, doing nothing."""
    return _time_command([sys.executable, "-c", "pass"])


def ls(folder: Path) -> Figures:
    """Time ``distrust ls`` of a folder."""
    return _time_command([sys.executable, "-m", "distrust", "ls", str(folder)])


def write_small_checkpoints(folder: Path, count: int) -> None:
    """Write real checkpoints of 8 small tensors each with the manager.

    They are saved one by one in a separate folder and moved: saving into a folder of thousands would measure
    something else, for hours. fsync is disabled: nothing here must survive a power cut.
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
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # so that its files are in the page cache
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {"seconds": time.perf_counter() - began}
