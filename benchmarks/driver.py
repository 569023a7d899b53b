"""Which case runs when: repeat by repeat, each in a fresh process, group by group in random order.

Cases of a group run one after the other, because they are compared; the random order keeps a case from always
following the same neighbour. What a case wrote is removed before the next one starts, and the disk is left
alone for a moment, because a file system may still be discarding the blocks.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.results import NOT_INSTALLED, Results
from benchmarks.states import Spec

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 900


@dataclass(frozen=True, slots=True)
class Turn:
    """One measurement to make.

    Attributes:
        spec: the state.
        repeat: from 0.
        case: what runs.
    """

    spec: Spec
    repeat: int
    case: Case


def plan(specs: Sequence[Spec], cases: Sequence[Case], repeats: int, results: Results) -> list[Turn]:
    """All turns in order; what is not installed is noted in ``results`` and skipped."""
    missing = {case.name for case in cases if not all(map(_is_installed, case.modules))}
    turns = []
    for spec in specs:
        fitting = [case for case in cases if case.fits(spec)]
        for case in fitting:
            if case.name in missing:
                results.fail(spec, case.name, NOT_INSTALLED)
        for repeat in range(repeats):
            chosen = [case for case in fitting if case.name not in missing]
            turns += [Turn(spec, repeat, case) for case in _shuffle(chosen, seed=repeat)]
    return turns


def measure(turns: Sequence[Turn], directory: Path, pause: float, results: Results) -> Iterator[Turn]:
    """Run every turn; yields each before it starts.

    Args:
        turns: by state.
        directory: on the disk to measure; what is created in it is removed.
        pause: seconds between two turns.
        results: receives every figure and failure.
    """
    for spec, of_state in groupby(turns, key=lambda turn: turn.spec):
        prepared = directory / "prepared"
        with EmptyFolder(prepared):
            for turn in of_state:
                yield turn
                if turn.case.name in results.failures.get(spec.text, {}):
                    continue  # what failed once is not tried again
                try:
                    results.add(spec, turn.repeat, turn.case.name, _measure(turn, directory, prepared))
                except RuntimeError as error:
                    results.fail(spec, turn.case.name, str(error))
                time.sleep(pause)


def _measure(turn: Turn, directory: Path, prepared: Path) -> dict[str, float]:
    reads = turn.case.reads
    if reads is not None and not (prepared / reads).exists():
        _child("prepare", reads, turn.spec, directory, prepared)
    folder = directory / "measured"
    with EmptyFolder(folder):
        return _child("measure", turn.case.name, turn.spec, folder, prepared)


def _child(verb: str, name: str, spec: Spec, folder: Path, prepared: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.child", verb, name, spec.text, str(folder), str(prepared)]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
    }
    try:
        process = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took more than {TIMEOUT_SECONDS} s") from None
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"ended with {process.returncode}"]
        raise RuntimeError(lines[-1])
    figures: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return figures


class EmptyFolder:
    """A new folder, removed on the way out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Path:
        self.path.mkdir(parents=True)
        return self.path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path)
        # Write names and freed blocks to the disk now, not during the next case.
        descriptor = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _shuffle(cases: Sequence[Case], *, seed: int) -> Iterator[Case]:
    for _, group in groupby(cases, key=lambda case: case.group):
        members = list(group)
        random.Random(seed).shuffle(members)
        yield from members


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent does not exist
        return False
