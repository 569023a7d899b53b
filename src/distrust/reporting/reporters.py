"""The observers that a config asks for, beside the console."""

from __future__ import annotations

import warnings

from distrust.config import TrainConfig
from distrust.errors import DistrustError, DistrustWarning
from distrust.reporting.metrics import MetricsWriter
from distrust.training.events import Event, Observer


def create_observers(config: TrainConfig) -> list[Observer]:
    """What writes ``metrics.jsonl``, and logs to each of ``report_to``.

    Raises:
        ConfigError: the library of one of them is not installed.
    """
    made: list[Observer] = [MetricsWriter(config)]
    if "tensorboard" in config.report_to:
        from distrust.reporting.tensorboard import TensorBoardWriter

        made.append(Dispensable(TensorBoardWriter(), "TensorBoard"))
    if "wandb" in config.report_to:
        from distrust.reporting.weights_and_biases import WandbWriter

        made.append(Dispensable(WandbWriter(config), "Weights & Biases"))
    return made


class Dispensable:
    """An observer that a run can do without: when it fails, it is warned of, and told nothing more.

    Args:
        observer: to tell.
        name: what a user calls it.
    """

    def __init__(self, observer: Observer, name: str) -> None:
        self._observer: Observer | None = observer
        self._name = name

    def __call__(self, event: Event) -> None:
        """Tell it; an error of ours is the user's to mend, and is not swallowed."""
        if self._observer is None:
            return
        try:
            self._observer(event)
        except DistrustError:
            raise
        except Exception as error:
            self._observer = None
            warnings.warn(
                f"{self._name} fails, and is logged to no more: {_in_a_line(error)}",
                DistrustWarning,
                stacklevel=2,
            )


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
