"""The learning rate: a pure function of the step."""

from __future__ import annotations

import math

from distrust.config import Schedule


def warmup(steps: int, ratio: float | None, *, schedule_steps: int) -> int:
    """Steps of the warm-up: ``steps``, or if ``ratio`` is given that share of the schedule, rounded up."""
    return steps if ratio is None else math.ceil(ratio * schedule_steps)


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, schedule: Schedule, schedule_steps: int
) -> float:
    """The learning rate of an optimizer step.

    Rises linearly to ``peak`` during the warm-up, then decays along half a cosine or a line, which
    reaches 0 one step after ``schedule_steps``, or stays constant.

    Args:
        step: counted from 1.
        peak: the highest value.
        warmup_steps: warm-up steps; step ``warmup_steps`` has the peak.
        schedule: ``cosine``, ``linear`` or ``constant``.
        schedule_steps: the last step with a learning rate above 0, unless the schedule is constant.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    # The decay reaches 0 one step after the last: a step with learning rate 0 would train nothing.
    span = max(schedule_steps + 1 - warmup_steps, 1)
    progress = min((step - warmup_steps) / span, 1.0)
    return peak * (1 - progress) if schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * progress))
