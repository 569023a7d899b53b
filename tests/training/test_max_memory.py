"""Memory limit: the run saves and stops before the step that would exceed it, and can be resumed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from test_memory_reset import GIB, Hungry

from distrust import CheckpointManager, DistrustWarning
from distrust.contract import MemoryUse
from distrust.engines.runtime import translate_out_of_memory
from distrust.errors import OutOfMemory
from distrust.training import memory_guard
from distrust.training.memory_guard import Forecast


def saved_steps(out: Path) -> list[int]:
    return CheckpointManager(out / "checkpoints").list_checkpoints()


@pytest.mark.parametrize(
    ("eats", "stopped_at"),
    [
        ({"base": 2000, "leak": 1000}, 4),  # at 6000; it grew by 1000 in each step, so 7000 comes next
        ({"base": 1000, "leak": 500, "transient": 3000}, 5),  # at 3500; the next one's peak would be 7000
        ({"base": 6000, "leak": 1000}, 1),
    ],
)
def test_stops_before_the_limit_is_exceeded(run, tmp_path, eats, stopped_at):
    alone, _ = run(tmp_path / "alone")
    steps = []

    def make(config):
        steps.append(Hungry(**eats))
        return steps[-1]

    with pytest.raises(OutOfMemory) as stopped:
        run(tmp_path / "bound", engine=make, save_every=0, max_memory=6500.0)
    message = str(stopped.value)
    assert "\n" not in message
    assert message.startswith(f"--max-memory 6500: at step {stopped_at} the run uses ")
    assert f"; step {stopped_at} is saved. " in message
    assert saved_steps(tmp_path / "bound") == [stopped_at]
    if stopped_at > 1:
        assert steps[0].peak <= 6500
    ended, _ = run(tmp_path / "bound", save_every=0)
    assert ended.state_digest == alone.state_digest


def forecast_next(*steps: tuple[int, int]) -> int:
    """Bytes that the next step may use, after steps with these (level, peak)."""
    forecast = Forecast("the device", MemoryUse(100, 100))
    for now, peak in steps:
        forecast.add(MemoryUse(now, peak))
    return forecast.next_step


def test_one_jump_is_no_trend():
    levels = (100, 100, 600, 600)
    assert forecast_next(*((now, 600) for now in levels)) == 600 + 500  # the peak of the first step


def test_growth_in_each_step_is_a_trend():
    levels = (110, 130, 160, 170)
    assert forecast_next(*((now, 100) for now in levels)) == 170 + 10


def test_the_largest_need_of_a_step_is_remembered():
    """A later step that also raises the peak, because the level has risen, may need less."""
    assert forecast_next((100, 900), (850, 1000)) == 850 + 800


def test_limit_exceeded_at_the_start(run, tmp_path):
    with pytest.raises(
        OutOfMemory,
        match=r"at step 0 the run uses 7000\.00 GiB of the device.*nothing was saved.* before any step",
    ):
        run(tmp_path, engine=lambda config: Hungry(base=7000), max_memory=6500.0)
    assert saved_steps(tmp_path) == []


def test_resets_keep_a_leaking_run_below_the_limit(run, tmp_path):
    alone, _ = run(tmp_path / "alone")
    ended, _ = run(
        tmp_path / "bound",
        engine=lambda config: Hungry(base=2000, leak=1000),
        save_every=0,
        reload_above=4500.0,
        max_memory=6500.0,
    )
    assert ended.state_digest == alone.state_digest


def test_run_below_the_limit_is_not_affected(run, tmp_path):
    ended, _ = run(tmp_path, engine=lambda config: Hungry(base=2000, transient=4000), max_memory=6500.0)
    assert ended.step == 9


def test_low_system_memory_warns_once(run, tmp_path, monkeypatch):
    monkeypatch.setattr(memory_guard, "available_bytes", lambda: 10 << 20)
    monkeypatch.setattr(memory_guard, "SECONDS_BETWEEN_READS", 0.0)
    with pytest.warns(DistrustWarning, match="free memory.*--max-memory") as caught:
        ended, _ = run(tmp_path)
    assert len(caught) == 1
    assert ended.step == 9


class OwnOutOfMemoryError(RuntimeError):
    """Named like the error of torch."""


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OwnOutOfMemoryError("of 2 GiB\n1 is free"), RuntimeError("Insufficient Memory (8)")],
)
def test_framework_errors_become_one_line(error):
    with (
        pytest.raises(OutOfMemory, match=r"--batch-size.*--gradient-checkpointing") as caught,
        translate_out_of_memory("insufficient memory"),
    ):
        raise error
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_translated():
    with pytest.raises(RuntimeError, match="shapes differ"), translate_out_of_memory("insufficient memory"):
        raise RuntimeError("shapes differ")


LEAKING = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from distrust.testing.toy_engine import ToyEngine
from distrust import DistrustError, DistrustTrainer, TrainConfig
from distrust.checkpoint.memory import resident_bytes
kept = []
def keep(event):
    kept.append(np.ones(int(float(sys.argv[4]) * 2**17)))
bound = float(sys.argv[5])
config = TrainConfig(
    data=sys.argv[2], out=sys.argv[3], max_steps=400, batch_size=2, save_every=0,
    max_memory=bound or None)
try:
    print(DistrustTrainer(config, engine=ToyEngine(), observers=[keep]).train().state_digest)
except DistrustError as error:
    sys.exit(f"distrust: {error}")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the watcher reads Linux's proc")
def test_leaking_run_saves_before_it_would_be_killed(start_python, data, tmp_path):
    """A watchdog like that of batch systems: it reads the resident memory and sends SIGKILL."""
    limit = 0.4 * GIB

    def run_with_watchdog(out: str, *, leak: float, bound: float) -> tuple[int, str, str]:
        process = start_python(LEAKING, Path(__file__).parent, data, tmp_path / out, leak, bound)
        while process.poll() is None:
            pages = Path(f"/proc/{process.pid}/statm").read_text().split()
            if pages and int(pages[1]) * os.sysconf("SC_PAGE_SIZE") > limit:
                process.kill()
                break
            time.sleep(0.001)
        stdout, stderr = process.communicate(timeout=60)
        return process.returncode, stdout, stderr

    # Leaks 0.5 MiB per event, so the watchdog, which polls every millisecond, is in time.
    code, _, _ = run_with_watchdog("killed", leak=1.0, bound=0.0)
    assert code == -signal.SIGKILL
    assert saved_steps(tmp_path / "killed") == []
    code, _, stderr = run_with_watchdog("bound", leak=1.0, bound=0.35)
    assert code == 1, stderr
    assert stderr.startswith("distrust: --max-memory 0.35: at step ")
    (step,) = saved_steps(tmp_path / "bound")
    assert 0 < step < 400
    assert f"step {step} is saved" in stderr
    # Without the leak, the same command finishes in the same state as a run that never leaked.
    digests = [run_with_watchdog(out, leak=0.0, bound=0.35)[1] for out in ("bound", "alone")]
    assert digests[0] == digests[1] != ""
