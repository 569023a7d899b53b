"""The learning rate: a pure function of the step."""

from __future__ import annotations

import math

from distrust.config import TrainConfig
from distrust.option_values import Schedule


def warmup(steps: int, ratio: float | None, *, schedule_steps: int) -> int:
    """Steps of the warm-up: ``steps``, or if ``ratio`` is given that share of the schedule, rounded up."""
    return steps if ratio is None else math.ceil(ratio * schedule_steps)


def learning_rate_of(config: TrainConfig, step: int, *, schedule_steps: int) -> float:
    """The learning rate of an optimizer step of a run, counted from 1."""
    return learning_rate(
        step,
        peak=config.learning_rate,
        warmup_steps=warmup(config.warmup_steps, config.warmup_ratio, schedule_steps=schedule_steps),
        schedule=config.schedule,
        schedule_steps=schedule_steps,
        decay_ratio=config.decay_ratio,
    )


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    schedule: Schedule,
    schedule_steps: int,
    decay_ratio: float = 0.1,
) -> float:
    """The learning rate of an optimizer step.

    Rises linearly to ``peak`` during the warm-up, then decays along half a cosine or a line, which
    reaches 0 one step after ``schedule_steps``, or stays constant. ``wsd`` stays constant first, and decays
    along a line over the last steps of the schedule (Hu et al. 2024, arXiv:2404.06395; Hägele et al. 2024,
    arXiv:2405.18392).

    Args:
        step: counted from 1.
        peak: the highest value.
        warmup_steps: warm-up steps; step ``warmup_steps`` has the peak.
        schedule: ``cosine``, ``linear``, ``constant`` or ``wsd``.
        schedule_steps: the last step with a learning rate above 0, unless the schedule is constant.
        decay_ratio: share of ``schedule_steps`` that decays with ``wsd``, rounded up.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    start = warmup_steps  # the last step with the peak
    if schedule == "wsd":
        start = max(start, schedule_steps - math.ceil(decay_ratio * schedule_steps))
    # The decay reaches 0 one step after the last: a step with learning rate 0 would train nothing.
    progress = min(max(step - start, 0) / max(schedule_steps + 1 - start, 1), 1.0)
    return peak * 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else peak * (1 - progress)
