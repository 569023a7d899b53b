"""The real ``distrust train`` on a disk that another process fills: its exit codes, and what it prints."""

from __future__ import annotations

import functools
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from campaigns.campaign import CounterExample
from campaigns.disks import volumes
from campaigns.disks.volumes import Filler
from distrust import CheckpointManager
from distrust.training.saver import MAX_FAILURES

#: A run of some seconds, most of which it takes to load the model.
_TRAINING = (
    *("--max-steps", "30", "--save-every", "2", "--batch-size", "1", "--max-length", "32"),
    *("--lora-rank", "2", "--lora-dropout", "0.1", "--threads", "1"),
)
_SECONDS = 150


def real_training(chance: random.Random, home: Path, counts: Counter[str]) -> None:
    """``distrust train`` on a disk that another process fills; freed in time, or after it has stopped."""
    alone = undisturbed()
    volumes.private_mounts(home)
    kind = chance.choice(["ext4", "tmpfs", "ext3"])
    root = volumes.make(kind, home, mib=24)
    out, said = root / "run", home / "errors.txt"
    failures = chance.randint(1, MAX_FAILURES)
    full_from = 2 * chance.randint(1, 5)
    filler = Filler(root)
    with said.open("wb") as errors:
        process = subprocess.Popen(_command(out), stdout=subprocess.DEVNULL, stderr=errors)
        _wait(
            process,
            lambda: max(CheckpointManager(out / "checkpoints").list_checkpoints(), default=0) >= full_from,
        )
        filler.leave(0)
        _wait(process, lambda: _warned(said) >= failures)
        if failures < MAX_FAILURES:
            filler.gone()
        code = process.wait(_SECONDS)
    stopped_at = _judge_what_it_said(said.read_text().splitlines(), code, out, counts)
    filler.gone()
    if stopped_at is not None:
        again = subprocess.run(_command(out), capture_output=True, text=True)
        if again.returncode != 0 or f"Resuming from step {stopped_at} " not in again.stdout:
            raise CounterExample(f"the same command: exit code {again.returncode}: {again.stderr}")
        counts["distrust train, disk full: the same command went on"] += 1
    if _final_digest(out) != alone:
        raise CounterExample(f"it ended in state {_final_digest(out)}, the run left alone in {alone}")


def _judge_what_it_said(lines: list[str], code: int, out: Path, counts: Counter[str]) -> int | None:
    """The step that stands, if the run stopped; None if it went on to its end."""
    counts["distrust train, disk full: failed saves"] += len(lines)
    if not all("No space left" in line for line in lines):
        raise CounterExample(f"it printed: {lines}")
    if code == 0:
        counts["distrust train, disk full: went on by itself"] += 1
        return None
    stands = _newest(out)
    if code != 1 or len(lines) < MAX_FAILURES or f"step {stands} is saved" not in lines[-1]:
        raise CounterExample(f"exit code {code}, step {stands} stands, and it printed: {lines}")
    counts["distrust train, disk full: stopped, exit code 1"] += 1
    return stands


@functools.cache
def undisturbed() -> str:
    """The state in which the real run ends that is left alone."""
    with tempfile.TemporaryDirectory(prefix="distrust-") as folder:
        out = Path(folder) / "alone"
        subprocess.run(_command(out), stdout=subprocess.DEVNULL, check=True)
        return _final_digest(out)


def _command(out: Path) -> list[str]:
    return [sys.executable, "-m", "distrust", "train", "--out", str(out), *_TRAINING]


def _final_digest(out: Path) -> str:
    shown = subprocess.run(
        [sys.executable, "-m", "distrust", "show", str(out), "--json"], capture_output=True, text=True
    )
    checkpoint = json.loads(shown.stdout)
    if checkpoint["kind"] != "final":
        raise CounterExample("the run ended without a final checkpoint")
    return str(checkpoint["state_digest"])


def _wait(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    """Until the condition holds, or the process has ended."""
    volumes.eventually(lambda: process.poll() is not None or condition(), seconds=_SECONDS)


def _newest(out: Path) -> int:
    return max(CheckpointManager(out / "checkpoints").list_checkpoints(), default=0)


def _warned(said: Path) -> int:
    return said.read_text().count("\n")
