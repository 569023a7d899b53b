"""Memory limit: the run saves and stops before the step that would exceed it, and can be resumed."""

from __future__ import annotations

import os
import signal
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from test_memory_reset import GIB, Hungry

from distrust import CheckpointManager, DistrustTrainer, DistrustWarning, TrainConfig
from distrust.contract import DeviceMemory
from distrust.engines import config_of_run
from distrust.errors import ConfigError, OutOfMemory
from distrust.testing.toy_engine import ToyEngine
from distrust.training import memory_guard, resume_point
from distrust.training.events import MemoryReset
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
def test_stops_before_the_limit_is_exceeded(run, alone, tmp_path, eats, stopped_at):
    steps = []

    def make(config):
        steps.append(Hungry(**eats))
        return steps[-1]

    with pytest.raises(OutOfMemory) as stopped:
        run(tmp_path / "bound", engine=make, save_every=0, max_device_memory=6500.0)
    message = str(stopped.value)
    assert "\n" not in message
    assert message.startswith(f"--max-device-memory 6500: at step {stopped_at} the run uses ")
    assert f"; step {stopped_at} is saved. " in message
    assert saved_steps(tmp_path / "bound") == [stopped_at]
    if stopped_at > 1:
        assert steps[0].peak <= 6500
    ended, _ = run(tmp_path / "bound", save_every=0)
    assert ended.state_digest == alone.state_digest


def forecast_next(*steps: tuple[int, int]) -> int:
    """Bytes that the next step may use, after steps with these (level, peak)."""
    forecast = Forecast("the device", 100, 100)
    for now, peak in steps:
        forecast.add(now, peak)
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
        run(tmp_path, engine=lambda config: Hungry(base=7000), max_device_memory=6500.0)
    assert saved_steps(tmp_path) == []


def test_resets_keep_a_leaking_run_below_the_limit(run, alone, tmp_path):
    ended, _ = run(
        tmp_path / "bound",
        engine=lambda config: Hungry(base=2000, leak=1000),
        save_every=0,
        reload_above=4500.0,
        max_device_memory=6500.0,
    )
    assert ended.state_digest == alone.state_digest


def test_run_below_the_limit_is_not_affected(run, tmp_path):
    ended, _ = run(
        tmp_path, engine=lambda config: Hungry(base=2000, transient=4000), max_device_memory=6500.0
    )
    assert ended.step == 9


def test_low_system_memory_warns_once(run, tmp_path, monkeypatch):
    monkeypatch.setattr(memory_guard, "available_bytes", lambda: 10 << 20)
    monkeypatch.setattr(memory_guard, "SECONDS_BETWEEN_READS", 0.0)
    with pytest.warns(DistrustWarning, match="free memory.*--max-memory") as caught:
        ended, _ = run(tmp_path)
    assert len(caught) == 1
    assert ended.step == 9


def test_each_limit_has_its_own_side(run, tmp_path):
    ended, _ = run(tmp_path / "device", engine=lambda config: Hungry(base=7000), max_memory=6500.0)
    assert ended.finished
    with pytest.raises(OutOfMemory, match=r"--max-memory 0\.001: at step 0 .* of the host"):
        run(tmp_path / "host", engine=Hungry(base=1), max_memory=0.001, max_device_memory=6500.0)


def test_fragmentation_counts(run, tmp_path):
    """What is allocated stays the same, and what is reserved grows."""

    class Fragmented(Hungry):
        @property
        def fragmented(self):
            return self.now - 2000

    with pytest.raises(OutOfMemory, match=r"--max-device-memory 6500: at step 4"):
        run(tmp_path, engine=Fragmented(base=2000, leak=1000), max_device_memory=6500.0)


class Caching(ToyEngine):
    """Takes 30 GiB of a device, 44 in a step, and 30 for each loaded checkpoint, and keeps what gets free."""

    loaded: ClassVar[list[weakref.ref]] = []

    def __init__(self):
        super().__init__()
        self.reserved = 30

    def _take(self, size: int) -> None:
        self.reserved = max(self.reserved, size + 30 * sum(array() is not None for array in self.loaded))

    def load_state(self, state):
        self.loaded.append(weakref.ref(state.model["table"]))
        self._take(30)
        super().load_state(state)

    def micro_step(self, batch, *, tokens):
        self._take(44)
        return super().micro_step(batch, tokens=tokens)

    def release_memory(self):
        self.reserved = 0
        self._take(30)

    def device_memory(self):
        return DeviceMemory(30 * GIB, self.reserved * GIB, self.reserved * GIB, self.reserved * GIB)


def test_a_checkpoint_that_was_loaded_to_the_device_does_not_count(run, alone, tmp_path):

    def make(config):
        return Caching()

    run(tmp_path / "run", engine=make, stop_after=5, max_device_memory=50.0)
    ended, events = run(tmp_path / "run", engine=make, reload_every=7, max_device_memory=50.0)
    assert ended.state_digest == alone.state_digest
    levels = [
        (e.before.device.reserved, e.after.device.reserved) for e in events if isinstance(e, MemoryReset)
    ]
    assert levels == [(44 * GIB, 30 * GIB)]


@pytest.mark.parametrize(("limit", "device"), [(None, "cuda:0"), (9.0, "cuda:0"), (7.9, None)])
def test_a_checkpoint_is_loaded_to_the_device_within_its_limit(limit, device):
    """It takes 2 GiB, and so may the moments, beside the 4 of the model."""
    memory = DeviceMemory(4 * GIB, 4 * GIB, 4 * GIB, 4 * GIB)
    engine = SimpleNamespace(device_for=lambda _: "cuda:0", device_memory=lambda: memory)
    config = TrainConfig(max_device_memory=limit)
    assert resume_point.load_device(config, engine, 2 * GIB) == device


def test_a_limit_of_a_device_without_memory_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match=r"^--max-device-memory 8: .* with --max-memory$"):
        run(tmp_path / "out", max_device_memory=8.0)
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == [".lock"]


def test_a_limit_of_the_run_has_no_effect_where_there_is_no_such_memory(run, alone, tmp_path):
    """The run has moved to a machine without a GPU; its config.toml keeps the limit."""
    run(tmp_path / "run", engine=Hungry(base=7), max_device_memory=8.0, stop_after=3)
    config = config_of_run(tmp_path / "run")
    assert config.max_device_memory == 8
    message = r"^--max-device-memory 8: .* its config\.toml has no effect; limit it with --max-memory$"
    with pytest.warns(DistrustWarning, match=message):
        ended = DistrustTrainer(config, engine=ToyEngine(), observers=[]).train()
    assert ended.state_digest == alone.state_digest
    assert config_of_run(tmp_path / "run") == config


def test_another_limit_is_refused_there(run, tmp_path):
    run(tmp_path, engine=Hungry(base=7), max_device_memory=8.0, stop_after=3)
    with pytest.raises(ConfigError, match=r"^--max-device-memory 9: .* with --max-memory$"):
        run(tmp_path, max_device_memory=9.0)


@pytest.mark.parametrize("method", ["prepare", "is_finite"])
def test_memory_that_runs_out_between_steps_names_the_durable_step(run, tmp_path, method):
    class Exhausted(ToyEngine):
        batches = saves = 0

        @property
        def prepare(self):
            return self.count

        def count(self, batch):  # two of a step
            self.batches += method == "prepare"
            return self.fail(batch, self.batches > 10)

        def is_finite(self):
            self.saves += method == "is_finite"
            return self.fail(super().is_finite(), self.saves > 2)

        def fail(self, value, is_exhausted):
            if is_exhausted:
                raise OutOfMemory("there is not enough memory")
            return value

    completed = {"prepare": 5, "is_finite": 6}[method]
    message = f"^after step {completed}: there is not enough memory; step 4 is saved$"
    with pytest.raises(OutOfMemory, match=message):
        run(tmp_path, engine=Exhausted(), save_every=2, batch_size=2, gradient_accumulation=2)


@pytest.mark.parametrize("method", ["micro_step", "clip_gradients", "update", "evaluate"])
def test_exhausted_memory_names_the_durable_step(run, eval_data, tmp_path, method):
    alone, _ = run(tmp_path / "alone", eval_data=str(eval_data), eval_every=3)

    class Exhausted(ToyEngine):
        steps = 0

        def begin_micro_step(self, *, seed, step, micro_step):
            super().begin_micro_step(seed=seed, step=step, micro_step=micro_step)
            self.steps = step

    def fail_in_step_6(engine, *arguments, **options):
        if engine.steps == 6:
            raise OutOfMemory("there is not enough memory")
        return getattr(ToyEngine, method)(engine, *arguments, **options)

    setattr(Exhausted, method, fail_in_step_6)
    completed = 6 if method == "evaluate" else 5
    options = {"eval_data": str(eval_data), "eval_every": 3, "save_every": 2, "keep_best": 0}
    message = f"^after step {completed}: there is not enough memory; step 4 is saved$"
    with pytest.raises(OutOfMemory, match=message):
        run(tmp_path / "out", engine=Exhausted(), **options)
    ended, _ = run(tmp_path / "out", **options)
    assert ended.state_digest == alone.state_digest


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
    data=sys.argv[2], out=sys.argv[3], max_steps=200, batch_size=2, save_every=0,
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

    # Leaks 2 MiB per event, so the watchdog, which polls every millisecond, is in time.
    code, _, _ = run_with_watchdog("killed", leak=2.0, bound=0.0)
    assert code == -signal.SIGKILL
    assert saved_steps(tmp_path / "killed") == []
    code, _, stderr = run_with_watchdog("bound", leak=2.0, bound=0.35)
    assert code == 1, stderr
    assert stderr.startswith("distrust: --max-memory 0.35: at step ")
    (step,) = saved_steps(tmp_path / "bound")
    assert 0 < step < 200
    assert f"step {step} is saved" in stderr
    # Without the leak, the same command finishes in the same state as a run that never leaked.
    digests = [run_with_watchdog(out, leak=0.0, bound=0.35)[1] for out in ("bound", "alone")]
    assert digests[0] == digests[1] != ""
