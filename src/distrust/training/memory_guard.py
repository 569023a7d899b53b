"""What a run takes of memory: whether the next step still fits, and whether a reset is due.

How much a step takes is known by what it did to the high-water mark. Nothing is reset to measure it: a step
that raised the mark tells its peak, and one that did not was never the one that matters.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from dataclasses import dataclass
from itertools import pairwise

from distrust.checkpoint.memory import available_bytes, peak_resident_bytes, resident_bytes
from distrust.config import TrainConfig
from distrust.contract import Engine, MemoryUse
from distrust.errors import DistrustWarning

GIB = 2**30
#: What grew in each of so many steps will grow in the next; what grew once need not.
GROWING_STEPS = 4
#: After a reset, memory has to grow by this much of what it left before another one can free anything.
WORTHWHILE_GROWTH = 0.25
#: What the system needs beside a step.
MARGIN_BYTES = 64 << 20
#: What is available takes a while to read: system and cgroups are asked no more often than this.
SECONDS_BETWEEN_LOOKS = 1.0


class Forecast:
    """What a step takes at one place, as far as the steps so far tell.

    Args:
        use: before the first of them.
    """

    def __init__(self, use: MemoryUse) -> None:
        self._transient = 0
        self.restart(use)

    def restart(self, use: MemoryUse) -> None:
        """Go on from here: what came before was no step, such as loading a model."""
        self._peak = use.peak
        self._levels = deque([use.now], maxlen=GROWING_STEPS + 1)

    def add(self, use: MemoryUse) -> None:
        """Take in a step that has ended."""
        if use.peak > self._peak:
            self._transient = max(self._transient, use.peak - use.now)
            self._peak = use.peak
        self._levels.append(use.now)

    @property
    def now(self) -> int:
        """Bytes that are taken between steps."""
        return self._levels[-1]

    @property
    def next_step(self) -> int:
        """Bytes that the next step may take at its peak."""
        growth = [after - before for before, after in pairwise(self._levels)]
        steady = max(0, min(growth)) if len(growth) == GROWING_STEPS else 0
        return self.now + self._transient + steady


@dataclass(frozen=True, slots=True)
class Excess:
    """A bound that the next step would pass.

    Attributes:
        place: where, in words.
        now: bytes taken there.
        next_step: bytes that the next step may take there.
        bound: bytes that it may not pass.
    """

    place: str
    now: int
    next_step: int
    bound: float


class MemoryGuard:
    """Looks at memory between steps, and says what is to be done. Changes nothing of the run.

    Args:
        config: with the bounds.
        engine: just built.
    """

    def __init__(self, config: TrainConfig, engine: Engine) -> None:
        self._config = config
        self._places = {place: Forecast(use) for place, use in _uses(engine).items()}
        self._left_by_reset: int | None = None
        self._reset_just_now = False
        self._warned_of_reset = self._warned_of_system = False
        self._looked = -SECONDS_BETWEEN_LOOKS

    @property
    def used_bytes(self) -> int:
        """Bytes of the host and the device together."""
        return sum(forecast.now for forecast in self._places.values())

    def restart(self, engine: Engine) -> None:
        """The engine was built again."""
        for place, use in _uses(engine).items():
            self._places[place].restart(use)
        self._reset_just_now = True

    def observe_step(self, engine: Engine) -> int:
        """Take in a step that has ended; returns the bytes that are taken after it."""
        for place, use in _uses(engine).items():
            self._places[place].add(use)
        if self._reset_just_now:  # with a step's own memory: what later levels are compared with
            self._reset_just_now = False
            self._left_by_reset = self._highest
            self._warn_of_futile_reset()
        self._warn_of_system()
        return self.used_bytes

    def reset_due(self, step: int) -> bool:
        """Whether memory is to be reset after this step."""
        every, above = self._config.reload_every, self._config.reload_above
        if every is not None and step % every == 0:
            return True
        if above is None:
            return False
        left = self._left_by_reset or 0
        return self._highest > max(above * GIB, left * (1 + WORTHWHILE_GROWTH))

    def excess(self) -> Excess | None:
        """Where the next step would pass ``max_memory``; None if nowhere."""
        bound = self._config.max_memory
        for place, forecast in self._places.items():
            if bound is not None and forecast.next_step > bound * GIB:
                return Excess(place, forecast.now, forecast.next_step, bound * GIB)
        return None

    @property
    def _highest(self) -> int:
        return max(forecast.now for forecast in self._places.values())

    def _warn_of_futile_reset(self) -> None:
        above = self._config.reload_above
        if above is None or self._highest <= above * GIB or self._warned_of_reset:
            return
        self._warned_of_reset = True
        again = self._highest * (1 + WORTHWHILE_GROWTH) / GIB
        warnings.warn(
            f"--reload-above {above:g}: the run takes {self._highest / GIB:.2f} GiB right after a reset, so "
            f"none can bring it below; the next one comes above {again:.2f} GiB",
            DistrustWarning,
            stacklevel=2,
        )

    def _warn_of_system(self) -> None:
        """Only a warning: what is available is an estimate, and others than this run take of it, too."""
        if self._warned_of_system or time.monotonic() < self._looked + SECONDS_BETWEEN_LOOKS:
            return
        self._looked = time.monotonic()
        host = self._places[HOST]
        available, wanted = available_bytes(), host.next_step - host.now + MARGIN_BYTES
        if available < wanted:
            self._warned_of_system = True
            warnings.warn(
                f"the machine has {available / GIB:.2f} GiB of memory left, the next step may take "
                f"{wanted / GIB:.2f}: the system may end the run, which goes on from its newest checkpoint "
                "then; --max-memory has it stop, saved, before",
                DistrustWarning,
                stacklevel=2,
            )


HOST, DEVICE = "the host", "the device"


def _uses(engine: Engine) -> dict[str, MemoryUse]:
    uses = {HOST: MemoryUse(resident_bytes(), peak_resident_bytes())}
    device = engine.device_memory()
    if device is not None:
        uses[DEVICE] = device
    return uses
