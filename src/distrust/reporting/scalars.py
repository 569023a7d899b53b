"""What dashboards draw of a run: the values of an event by the names that they group by."""

from __future__ import annotations

from distrust.config import STEP_METRICS
from distrust.training.events import Evaluated, Event, StepEnded

GIB = 2**30
TRAINING = "train/"


def scalars_of(event: Event) -> tuple[int, dict[str, float]]:
    """The step and, by ``group/name``, the values of an event; none where it is of something else.

    ``train/loss``, ``train/learning_rate`` and the like; ``eval/loss``, ``eval/loss/CLASS``;
    ``speed/tokens_per_second``, ``speed/stall_seconds``, ``memory/gib``.
    """
    match event:
        case StepEnded():
            return event.step, {
                **{f"{TRAINING}{name}": getattr(event, name) for name in STEP_METRICS},
                "speed/tokens_per_second": event.tokens / event.seconds,
                "speed/stall_seconds": event.stall_seconds,
                "memory/gib": event.memory_bytes / GIB,
            }
        case Evaluated():
            return event.step, {
                f"eval/{name.removeprefix('eval_')}": value for name, value in event.metrics.items()
            }
        case _:
            return 0, {}
