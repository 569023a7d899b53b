"""Measures one trainer once, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

from benchmarks.driver import ROOT
from benchmarks.training.work import Work

TIMEOUT_SECONDS = 1800


def measure(name: str, work: Work, *, python: str = sys.executable) -> dict[str, float]:
    """What :mod:`benchmarks.training.trainers` prints, with ``speed`` (tokens/s) and ``peak_mib``.

    Raises:
        RuntimeError: the trainer failed, or made fewer steps.
        subprocess.TimeoutExpired: it took longer than half an hour.
    """
    _remove_output(work)  # of a process that was killed
    environment = {
        **os.environ,
        "DISTRUST_CACHE": str(work.folder / "cache"),
        "HF_HOME": str(work.folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(work.threads),
        "PYTHONWARNINGS": "ignore",
    }
    try:
        process = subprocess.run(
            [python, "-m", "benchmarks.training.trainers", name, work.as_json()],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
    finally:
        _remove_output(work)
    if process.returncode != 0:
        raise RuntimeError(process.stderr)
    figures: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    if figures["steps"] != work.last_step:
        raise RuntimeError(f"made {figures['steps']} steps, not {work.last_step}")
    speed, peak_mib = figures["tokens"] / figures["seconds"], figures["peak_bytes"] / 2**20
    return {"speed": speed, "peak_mib": peak_mib, **figures}


def _remove_output(work: Work) -> None:
    for name in ("run", "out"):
        shutil.rmtree(work.folder / name, ignore_errors=True)
