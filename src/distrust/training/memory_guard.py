"""Memory of a run: whether the next step still fits, and whether a reset is due.

On a device, what the allocator has reserved counts: gaps that no array fits into are not free for others.
The memory of a step is derived from what it did to the peak. Nothing is reset to measure it: a step that
raised the peak reveals its own, and a step that did not raise it never needed the most.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from itertools import pairwise

from distrust.checkpoint.memory import available_bytes, peak_resident_bytes, resident_bytes
from distrust.config import TrainConfig, flag
from distrust.config_text import RUN_CONFIG, from_toml
from distrust.contract import Engine
from distrust.errors import ConfigError, warn
from distrust.training.events import MemoryUse

GIB = 2**30
#: Memory that grew in each of this many steps is expected to grow in the next; a single growth is not.
GROWING_STEPS = 4
#: After a reset, memory must grow by this share before another reset can free anything.
WORTHWHILE_GROWTH = 0.25
#: Free memory that the system needs during a step.
MARGIN_BYTES = 64 << 20
#: Reading the available memory takes a while: the system and cgroups are read no more often than this.
SECONDS_BETWEEN_READS = 1.0
HOST, DEVICE = "the host", "the device"
LIMITS = {HOST: "max_memory", DEVICE: "max_device_memory"}  # the option that limits each


class Forecast:
    """Forecast of the memory of the next step, on one side: on the host or on the device."""

    def __init__(self, side: str, now: int, peak: int, *, limit: float = math.inf) -> None:
        self.side = side
        self.limit = limit  # GiB
        self._transient = 0
        self.restart(now, peak)

    def restart(self, now: int, peak: int) -> None:
        """Start again from this level: what came before was no step, such as loading a model."""
        self._peak = peak
        self._levels = deque([now], maxlen=GROWING_STEPS + 1)

    def add(self, now: int, peak: int) -> None:
        """Add the bytes in use after a step, and the most so far."""
        if peak > self._peak:  # only such a step reveals what it needed at its peak
            self._transient = max(self._transient, peak - now)
            self._peak = peak
        self._levels.append(now)

    @property
    def now(self) -> int:
        """Bytes in use between steps."""
        return self._levels[-1]

    @property
    def next_step(self) -> int:
        """Bytes that the next step may use at its peak."""
        growth = [later - earlier for earlier, later in pairwise(self._levels)]
        # The smallest growth: a cache that grew once, or in some steps only, is no trend.
        steady = max(0, min(growth)) if len(growth) == GROWING_STEPS else 0
        return self.now + self._transient + steady

    def describe_excess(self, step: int, *, is_first: bool) -> tuple[str, str]:
        """The problem of a next step that would exceed the limit, and advice; ``is_first``: none was made."""
        problem = (
            f"{flag(LIMITS[self.side])} {self.limit:g}: at step {step} the run uses {self.now / GIB:.2f} GiB "
            f"of {self.side}, and the next step may use {self.next_step / GIB:.2f}"
        )
        if is_first and self.now > self.limit * GIB:
            return problem, "It is exceeded before any step: raise the limit, or use a smaller --model"
        return problem, (
            "Raise the limit, or add --reload-above or --gradient-checkpointing, and the same command "
            "resumes; a new run may use a smaller --batch-size"
        )


class MemoryGuard:
    """Measures memory between steps and decides what to do. Changes nothing of the run."""

    def __init__(self, config: TrainConfig, engine: Engine) -> None:
        self._config = config
        self.use = _measure(engine, is_loaded=True)  # at the last measurement
        self._forecasts = {
            side: Forecast(side, *level, limit=getattr(config, LIMITS[side]) or math.inf)
            for side, level in _levels(self.use).items()
        }
        self._level_after_reset = 0
        self._is_first_after_reset = False
        self._warned_of_reset = self._warned_of_system = False
        self._last_read = -SECONDS_BETWEEN_READS

    def restart(self, engine: Engine) -> None:
        """Measure the engine that was built again."""
        self.use = _measure(engine, is_loaded=True)
        for side, level in _levels(self.use).items():
            self._forecasts[side].restart(*level)
        self._is_first_after_reset = True

    def observe_step(self, engine: Engine) -> MemoryUse:
        """Measure after a step."""
        self.use = _measure(engine)
        for side, level in _levels(self.use).items():
            self._forecasts[side].add(*level)
        if self._is_first_after_reset:  # includes what a step itself needs, like the levels compared with it
            self._is_first_after_reset = False
            self._level_after_reset = self._highest
            self._warn_of_futile_reset()
        self._warn_of_system()
        return self.use

    def reset_due(self, step: int) -> bool:
        """Whether memory is to be reset after this step."""
        every, above = self._config.reload_every, self._config.reload_above
        if every is not None and step % every == 0:
            return True
        return above is not None and self._highest > max(
            above * GIB, self._level_after_reset * (1 + WORTHWHILE_GROWTH)
        )

    def find_excess(self) -> Forecast | None:
        """The forecast of a step that would exceed its limit; None if it fits."""
        return next((f for f in self._forecasts.values() if f.next_step > f.limit * GIB), None)

    @property
    def _highest(self) -> int:
        return max(forecast.now for forecast in self._forecasts.values())

    def _warn_of_futile_reset(self) -> None:
        above = self._config.reload_above
        if above is None or self._highest <= above * GIB or self._warned_of_reset:
            return
        self._warned_of_reset = True
        next_reset = self._highest * (1 + WORTHWHILE_GROWTH) / GIB
        warn(
            f"--reload-above {above:g}: the run uses {self._highest / GIB:.2f} GiB right after a reset, so "
            f"no reset can bring it below; the next reset is above {next_reset:.2f} GiB"
        )

    def _warn_of_system(self) -> None:
        """Only a warning: the available memory is an estimate, and other processes use it, too."""
        if self._warned_of_system or time.monotonic() < self._last_read + SECONDS_BETWEEN_READS:
            return
        self._last_read = time.monotonic()
        host = self._forecasts[HOST]
        available, required = available_bytes(), host.next_step - host.now + MARGIN_BYTES
        if available < required:
            self._warned_of_system = True
            warn(
                f"the machine has {available / GIB:.2f} GiB of free memory, and the next step may need "
                f"{required / GIB:.2f} GiB: the system may kill the run, which then resumes from its newest "
                "checkpoint. With --max-memory the run saves and stops before"
            )


def require_limited_device(config: TrainConfig, engine: Engine) -> None:
    """Refuse a limit for the memory of a device that has none of its own.

    One that the run's ``config.toml`` has is ignored with a warning: the run began on another device.
    """
    limit = config.max_device_memory
    if limit is None or engine.device_memory() is not None:
        return
    problem = f"--max-device-memory {limit:g}: this run trains in the memory of the host"
    with contextlib.suppress(ConfigError):  # there is no such file
        if from_toml(config.run_directory / RUN_CONFIG).max_device_memory == limit:
            warn(f"{problem}, so this limit of its {RUN_CONFIG} has no effect; limit it with --max-memory")
            return
    raise ConfigError(f"{problem}; limit it with --max-memory")


def _measure(engine: Engine, *, is_loaded: bool = False) -> MemoryUse:
    if is_loaded and engine.device_memory() is not None:  # the cache of the device may hold a checkpoint
        engine.release_memory()
    host = resident_bytes()  # the system's counters may differ by some pages
    return MemoryUse(host, max(host, peak_resident_bytes()), engine.device_memory())


def _levels(use: MemoryUse) -> dict[str, tuple[int, int]]:
    levels = {HOST: (use.host, use.host_peak)}
    if use.device is not None:
        levels[DEVICE] = use.device.reserved, use.device.reserved_peak
    return levels
