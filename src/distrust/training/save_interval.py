"""When a run saves by time, decided from measured times alone.

A decision is about the end of the next step: the ranks agree on it with all else, once per step. "auto" saves
as often as two budgets allow: the share of the time that saves stall training, and the bytes per day. Each
save is paid in advance: the time of the session pays for all saves, and the time since the last one for one,
so a pause leads to no burst. After 5 minutes it saves whatever the stall; only the bytes can forbid that.
"""

from __future__ import annotations

from dataclasses import dataclass

from distrust.config import TrainConfig

LONGEST_SECONDS = 300  # "auto" saves at least this often
SECONDS_PER_FAILURE = 60  # until the next save: the disk may recover, and the third failure ends the run
EXPECTED_BYTES_PER_SECOND = 1e9  # of the first save; each later one should stall as the last one did
_UNITS = {"s": 1, "m": 60, "h": 3600}
_GB_PER_DAY = 1e9 / 86400  # bytes per second


@dataclass(slots=True)
class SaveTimes:
    """What a session has measured of its saves, by one clock: seconds and bytes."""

    began: float  # when the first step began
    save_began: float  # when the last save began; without one, as `began`
    durable_since: float  # when the save began that is durable now; without one, as `began`
    saves: int = 0  # that have begun
    failures: int = 0  # since the last one that became durable
    duration: float = 0.0  # of that one
    stall: float = 0.0  # of training, by the last one
    total_stall: float = 0.0  # by all
    nbytes: int = 0  # of a checkpoint; 0 before the first step
    step: float = 0.0  # duration of the last step


def is_due(config: TrainConfig, times: SaveTimes, now: float) -> bool:
    """Whether to save after the next step, with a ``save_every`` that is a time or "auto"."""
    interval, at = str(config.save_every), now + times.step - times.save_began
    # The last save may not have ended, and training would wait for it; or it failed.
    if at < max(times.duration, times.failures * SECONDS_PER_FAILURE):
        return False
    if interval != "auto":
        return at >= int(interval[:-1]) * _UNITS[interval[-1]]
    by_stall, by_bytes = _wait_for_budgets(config, times)
    return times.nbytes > 0 and at >= max(by_bytes, min(by_stall, LONGEST_SECONDS))


def notice(config: TrainConfig, times: SaveTimes) -> str:
    """What "auto" does where a budget and its 5 minutes contradict each other; empty where they do not."""
    stall, by_bytes = times.stall, times.nbytes / (config.save_bytes_per_day * _GB_PER_DAY)
    if config.save_every == "auto" and by_bytes > LONGEST_SECONDS:
        return (
            f"--save-bytes-per-day {config.save_bytes_per_day:g}: a checkpoint has {times.nbytes / 1e9:.3g} "
            f"GB, so --save-every auto saves every {by_bytes / 60:.3g} minutes, not every 5"
        )
    if config.save_every == "auto" and stall > LONGEST_SECONDS * config.save_budget / 100:
        return (
            f"--save-budget {config.save_budget:g}: a save stalls training for {stall:.3g} s, more than this "
            "percentage of 5 minutes; --save-every auto saves every 5 minutes all the same"
        )
    return ""


def _wait_for_budgets(config: TrainConfig, times: SaveTimes) -> tuple[float, float]:
    """The seconds from the begin of the last save after which each budget allows the next: stall, bytes."""

    def wait(cost: float, spent: float, rate: float) -> float:
        return max(cost, spent + cost - (times.save_began - times.began) * rate) / rate

    stall = times.stall if times.saves else times.nbytes / EXPECTED_BYTES_PER_SECOND
    by_bytes = wait(times.nbytes, times.saves * times.nbytes, config.save_bytes_per_day * _GB_PER_DAY)
    return wait(stall, times.total_stall, config.save_budget / 100), by_bytes
