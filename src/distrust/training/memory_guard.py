"""Memory of a run: whether the next step still fits, and whether a reset is due.

The memory of a step is derived from what it did to the peak. Nothing is reset to measure it: a step that
raised the peak reveals its own, and a step that did not raise it never needed the most.
"""

from __future__ import annotations

import time
from collections import deque
from itertools import pairwise

from distrust.checkpoint.memory import available_bytes, peak_resident_bytes, resident_bytes
from distrust.config import TrainConfig
from distrust.contract import Engine, MemoryUse
from distrust.errors import warn

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


class Forecast:
    """Forecast of the memory of the next step, in one place: on the host or on the device."""

    def __init__(self, device: str, use: MemoryUse) -> None:
        self.device = device
        self._transient = 0
        self.restart(use)

    def restart(self, use: MemoryUse) -> None:
        """Start again from this level: what came before was no step, such as loading a model."""
        self._peak = use.peak
        self._levels = deque([use.now], maxlen=GROWING_STEPS + 1)

    def add(self, use: MemoryUse) -> None:
        """Add the memory in use after a step."""
        if use.peak > self._peak:  # only such a step reveals what it needed at its peak
            self._transient = max(self._transient, use.peak - use.now)
            self._peak = use.peak
        self._levels.append(use.now)

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


class MemoryGuard:
    """Measures memory between steps and decides what to do. Changes nothing of the run."""

    def __init__(self, config: TrainConfig, engine: Engine) -> None:
        self._config = config
        self._forecasts = {device: Forecast(device, use) for device, use in _measure(engine).items()}
        self._level_after_reset = 0
        self._is_first_after_reset = False
        self._warned_of_reset = self._warned_of_system = False
        self._last_read = -SECONDS_BETWEEN_READS

    @property
    def used_bytes(self) -> int:
        """Bytes in use on the host and the device together."""
        return sum(forecast.now for forecast in self._forecasts.values())

    def restart(self, engine: Engine) -> None:
        """Measure the engine that was built again."""
        for device, use in _measure(engine).items():
            self._forecasts[device].restart(use)
        self._is_first_after_reset = True

    def observe_step(self, engine: Engine) -> int:
        """Measure after a step; returns the bytes in use."""
        for device, use in _measure(engine).items():
            self._forecasts[device].add(use)
        if self._is_first_after_reset:  # includes what a step itself needs, like the levels compared with it
            self._is_first_after_reset = False
            self._level_after_reset = self._highest
            self._warn_of_futile_reset()
        self._warn_of_system()
        return self.used_bytes

    def reset_due(self, step: int) -> bool:
        """Whether memory is to be reset after this step."""
        every, above = self._config.reload_every, self._config.reload_above
        if every is not None and step % every == 0:
            return True
        return above is not None and self._highest > max(
            above * GIB, self._level_after_reset * (1 + WORTHWHILE_GROWTH)
        )

    def find_excess(self, limit: float) -> Forecast | None:
        """The forecast of a step that would exceed this many bytes; None if it fits."""
        return next((forecast for forecast in self._forecasts.values() if forecast.next_step > limit), None)

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


def _measure(engine: Engine) -> dict[str, MemoryUse]:
    host, device = MemoryUse(resident_bytes(), peak_resident_bytes()), engine.device_memory()
    return {HOST: host} if device is None else {HOST: host, DEVICE: device}
