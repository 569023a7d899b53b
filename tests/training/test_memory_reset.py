"""Memory resets: the run stays bit-identical, and the engine is freed completely."""

from __future__ import annotations

import gc
import io
import re
import signal
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distrust import CheckpointManager, DistrustTrainer, DistrustWarning, TrainConfig
from distrust.contract import DeviceMemory
from distrust.engines import create_engine, open_checkpoint
from distrust.errors import ConfigError
from distrust.reporting.console import ConsoleReporter
from distrust.testing.toy_engine import ToyEngine
from distrust.training.events import CheckpointSaved, CheckpointStarted, MemoryReset, StepEnded

GIB = 2**30


def made_anew(config):
    return ToyEngine()


def resets(events):
    return [event.step for event in events if isinstance(event, MemoryReset)]


@settings(max_examples=7, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    reload_every=st.integers(1, 9),
    save_every=st.integers(0, 4),
    stop=st.none() | st.integers(1, 8),
    evaluated=st.booleans(),
)
def test_reset_is_bit_identical(run, alone, eval_data, reload_every, save_every, stop, evaluated):
    evaluation = {"eval_data": str(eval_data), "eval_every": 2} if evaluated else {}
    with tempfile.TemporaryDirectory() as folder:
        options = {"save_every": save_every, "keep_last": 1, "reload_every": reload_every, **evaluation}
        events = []
        for until in (stop, None) if stop else (None,):
            ended, reset_events = run(Path(folder, "reset"), engine=made_anew, stop_after=until, **options)
            events += reset_events
        assert resets(events) == [step for step in range(reload_every, 9, reload_every) if step != stop]
        assert [event.step for event in events if isinstance(event, StepEnded)] == list(range(1, 10))
        assert ended.state_digest == alone.state_digest
        # No step was saved twice, and each checkpoint existed as long as it was needed.
        saved = [event.step for event in events if isinstance(event, CheckpointSaved)]
        assert len(saved) == len(set(saved))


def test_reset_frees_the_engine(run, tmp_path):
    engines, alive = [], []

    def make(config):
        gc.collect()
        alive.append([engine for engine in engines if engine() is not None])
        engine = ToyEngine()
        engines.append(weakref.ref(engine))
        return engine

    run(tmp_path, engine=make, reload_every=2)
    assert alive == [[]] * 5  # at first, and at steps 2, 4, 6 and 8


def test_reset_closes_an_engine_that_is_still_referenced(run, tmp_path):
    engines = []

    def make(config):
        assert all(engine.closed for engine in engines)
        engines.append(ToyEngine())
        return engines[-1]

    run(tmp_path, engine=make, reload_every=4)
    assert len(engines) == 3


def test_reset_emits_an_event(run, tmp_path):
    words = io.StringIO()
    with ConsoleReporter(log_every=1, stream=words) as console:
        run(tmp_path, engine=made_anew, reload_every=6, observers=[console])
    assert re.search(r"step 6: memory reset, \d+\.\d\d to \d+\.\d\d GiB in \d+\.\d s\n", words.getvalue())


def test_reset_of_a_device_shows_both(run, tmp_path):
    words = io.StringIO()
    with ConsoleReporter(log_every=1, stream=words) as console:
        run(tmp_path, engine=lambda config: Hungry(base=2, leak=1), reload_every=6, observers=[console])
    line = r"memory reset, \S+ to \S+ GiB on the host, 8\.00 to 2\.00 GiB on the device, in \d+\.\d s\n"
    assert re.search(line, words.getvalue())


def test_reset_requires_a_factory(data, tmp_path):
    for option in ({"reload_every": 1}, {"reload_above": 1.0}):
        config = TrainConfig(out=str(tmp_path), data=str(data), **option)
        with pytest.raises(ConfigError, match="give a factory"):
            DistrustTrainer(config, engine=ToyEngine())


def test_reload_is_not_counted_as_stall(run, tmp_path, monkeypatch):
    honest, loading = CheckpointManager.load, []

    def load(manager, *args, **options):
        loading.append(trainer_stall())
        return honest(manager, *args, **options)

    def trainer_stall():
        return sum(event.stall_seconds for event in stalls if isinstance(event, CheckpointSaved))

    stalls = []
    monkeypatch.setattr(CheckpointManager, "load", load)
    ended, events = run(tmp_path, engine=made_anew, reload_every=3, save_every=0, observers=[stalls.append])
    durations = [event.seconds for event in events if isinstance(event, MemoryReset)]
    assert len(loading) == len(durations) == 2
    assert ended.stall_seconds == pytest.approx(trainer_stall())


def test_no_reset_without_a_checkpoint(run, alone, tmp_path, failing_saves):
    """A failed save warns, and the run continues."""
    failing_saves(1)
    with pytest.warns(DistrustWarning, match="the next save tries again"):
        ended, events = run(tmp_path / "reset", engine=made_anew, reload_every=3, save_every=0)
    assert resets(events) == [6]
    assert ended.state_digest == alone.state_digest


def test_no_reset_from_a_damaged_checkpoint(run, alone, tmp_path):

    def damage(event):
        if isinstance(event, CheckpointSaved) and event.step == 3:
            raw = bytearray(event.path.read_bytes())
            raw[-1] ^= 1
            event.path.write_bytes(raw)

    with pytest.warns(DistrustWarning, match="Memory is not reset at step 3"):
        ended, events = run(
            tmp_path / "reset", engine=made_anew, reload_every=3, save_every=0, observers=[damage]
        )
    assert resets(events) == [6]
    assert ended.state_digest == alone.state_digest


def test_a_stop_during_a_save_that_fails_is_answered_at_once(run, tmp_path, failing_saves):
    failing_saves(1)

    def stop(event):
        if isinstance(event, CheckpointStarted) and event.step == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.warns(DistrustWarning, match="the next save tries again"):
        ended, _ = run(tmp_path, engine=made_anew, reload_every=3, save_every=0, observers=[stop])
    assert (ended.step, ended.signal) == (3, signal.SIGTERM)


@pytest.mark.parametrize("when", ["while it saves", "while it loads"])
def test_signal_during_a_reset_stops_the_run(run, alone, tmp_path, when):
    engines = []

    def make(config):
        engines.append(config)
        if len(engines) == 2 and when == "while it loads":
            signal.raise_signal(signal.SIGTERM)
        return ToyEngine()

    def stop(event):
        if isinstance(event, CheckpointSaved) and event.step == 3 and when == "while it saves":
            signal.raise_signal(signal.SIGTERM)

    options = {"engine": make, "reload_every": 3, "save_every": 0}
    ended, _ = run(tmp_path / "reset", observers=[stop], **options)
    assert (ended.step, ended.signal) == (3, signal.SIGTERM)
    assert len(engines) == (1 if when == "while it saves" else 2)  # stopped before it was loaded again
    assert run(tmp_path / "reset", **options)[0].state_digest == alone.state_digest


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_reset_frees_a_real_model(tiny_model, data, tmp_path, lora_rank):
    """No weights, gradients or moments of the previous engine remain in memory."""
    import torch

    options = {
        "model": str(tiny_model),
        "data": str(data),
        "max_steps": 3,
        "batch_size": 2,
        "learning_rate": 5e-3,
        "lora_rank": lora_rank,
        "lora_dropout": 0.2,
        "threads": 1,
    }
    references, alive = [], []

    def make(config):
        alive.append([reference() for reference in references if reference() is not None])
        engine = create_engine(config)
        references.extend(weakref.ref(part) for part in (engine, *engine.model.parameters()))
        return engine

    def train(out, **more):
        config = TrainConfig(out=str(tmp_path / out), save_every=0, **options)
        return DistrustTrainer(replace(config, **more), engine=make).train()

    alone = train("alone")
    del references[:], alive[:]
    gc.collect()
    tensors_at_start = sum(issubclass(type(object_), torch.Tensor) for object_ in gc.get_objects())
    assert train("reset", reload_every=1).state_digest == alone.state_digest
    assert alive == [[], [], []]
    gc.collect()
    assert sum(issubclass(type(object_), torch.Tensor) for object_ in gc.get_objects()) <= tensors_at_start
    engine, _ = open_checkpoint(tmp_path / "reset")  # nor the memory that the checkpoint was read into
    tensors = [value for values in engine.state().optimizer["state"].values() for value in values.values()]
    assert tensors
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from distrust.testing.toy_engine import ToyEngine
from distrust import DistrustTrainer, TrainConfig
made = []
def make(config):
    made.append(config)
    if len(made) == 2 and sys.argv[4] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return ToyEngine()
config = TrainConfig(
    data=sys.argv[2], out=sys.argv[3], max_steps=9, batch_size=2, gradient_accumulation=2, learning_rate=0.05,
    warmup_steps=2, save_every=0, reload_every=4)
print(DistrustTrainer(config, engine=make, observers=()).train().state_digest)
"""


def test_kill_during_a_reset_loses_nothing(run, alone, run_python, forked_python, data, tmp_path):
    folder = Path(__file__).parent
    process = run_python(KILLED, folder, data, tmp_path / "reset", "kill", python=forked_python)
    assert process.returncode == -signal.SIGKILL
    assert CheckpointManager(tmp_path / "reset" / "checkpoints").list_checkpoints() == [4]
    process = run_python(KILLED, folder, data, tmp_path / "reset", "live", python=forked_python)
    assert process.stdout.strip() == alone.state_digest, process.stderr


class Hungry(ToyEngine):
    """Reserves GiB of device memory: at the start, with each step, and temporarily during a step.

    All but ``fragmented`` of it is allocated.
    """

    fragmented = 0

    def __init__(self, *, base: float, leak: float = 0.0, transient: float = 0.0) -> None:
        super().__init__()
        self.now = self.peak = base
        self.leak, self.transient = leak, transient

    def update(self, *, learning_rate):
        super().update(learning_rate=learning_rate)
        self.now += self.leak
        self.peak = max(self.peak, self.now + self.transient)

    def device_memory(self):
        reserved, peak, gaps = (int(size * GIB) for size in (self.now, self.peak, self.fragmented))
        return DeviceMemory(reserved - gaps, peak - gaps, reserved, peak)


@pytest.mark.parametrize(
    ("base", "leak", "expected"),
    [
        (2000, 1000, [4, 8]),  # 6000 is above the bound
        (2000, 0, []),
        (6000, 0, [1]),  # a reset does not help, so it is not repeated
        (6000, 1000, [1, 4, 7]),  # each time memory has grown by a quarter
    ],
)
def test_reload_above_resets_only_if_it_helps(run, tmp_path, base, leak, expected):
    """The sizes exceed any host's memory, so only the device counts."""

    def make(config):
        return Hungry(base=base, leak=leak)

    def reset():
        return run(tmp_path, engine=make, save_every=0, reload_above=5500.0)

    if base < 5500:
        _, events = reset()
    else:
        with pytest.warns(
            DistrustWarning, match=r"right after a reset, so no reset can bring it below"
        ) as caught:
            _, events = reset()
        assert len(caught) == 1
    assert resets(events) == expected
    for event in events:
        if isinstance(event, MemoryReset):
            assert event.before.device.reserved - event.after.device.reserved >= leak * GIB
