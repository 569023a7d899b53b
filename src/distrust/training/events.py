"""Events of a run, and their delivery to observers. The loop knows no observer: each gets every event."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distrust.data import Distribution

#: Why a run ended: its last step was made; its metric stopped improving; a signal arrived; ``stop()`` was
#: called or the awaiting task was cancelled; an observer failed.
Reason = Literal["finished", "early_stopping", "signal", "stop", "error"]


@dataclass(frozen=True, slots=True)
class Preparing:
    """A task before the first step, which may take a while."""

    task: str  # short description
    completed: int = 0  # completed parts
    total: int = 0  # number of parts; 0 if not known


@dataclass(frozen=True, slots=True)
class RunStarted:
    """Everything is loaded; the first step is next.

    Attributes:
        out: the folder of the run.
        step: optimizer steps already made.
        max_steps: optimizer steps of the whole run.
        resumed_from: the checkpoint that the run resumes from.
        examples: examples of the training data.
        tokens: trained tokens of the training data.
        truncated: examples that were cut to `max_length`, including those that `eval_fraction` holds out.
        tokens_cut: tokens that were cut off.
        distribution: of the weights: range, by source class, heaviest and lightest examples.
        history: name -> value for each step already made.
        trained: number of trained parameters.
        parameters: number of all parameters.
        engine: name of the engine.
        device: name of the device; empty if the engine does not say.
        epoch_steps: optimizer steps of one pass over the data, as a fraction.
        warmup_steps: steps in which the learning rate rises to its peak.
    """

    out: Path
    step: int
    max_steps: int
    resumed_from: Path | None
    examples: int
    tokens: int
    truncated: int
    tokens_cut: int
    distribution: Distribution
    history: Mapping[str, Sequence[float]]
    trained: int
    parameters: int
    engine: str
    device: str
    epoch_steps: float
    warmup_steps: int

    @property
    def effective_examples(self) -> float:
        """Effective sample size (Σu)²/Σu² of the weights u, times how often `mix` samples each example."""
        return self.distribution.effective_examples

    @property
    def weight_range(self) -> tuple[float, float]:
        """The smallest and the largest weight."""
        lowest, *_, highest = self.distribution.quantiles["weight"]
        return lowest, highest


@dataclass(frozen=True, slots=True)
class StepEnded:
    """An optimizer step was made.

    Attributes:
        step: its number, from 1.
        loss: plain cross-entropy, nats per token.
        weighted_loss: weighted cross-entropy, the one that trains.
        distrust: mean over the step's tokens of the published term α·r²; logged only.
        learning_rate: of this step.
        gradient_norm: before clipping.
        tokens: trained tokens of the step.
        seconds: duration of the step.
        stall_seconds: how long checkpoints stalled training since the step before.
        memory_bytes: resident on the host plus allocated on the device, after the step.
    """

    step: int
    loss: float
    weighted_loss: float
    distrust: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float
    stall_seconds: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The evaluation set was evaluated.

    Attributes:
        step: optimizer steps made.
        metrics: name -> value, as logged: cross-entropy in nats per token and perplexity, plain and weighted
            by provenance, and for each source class.
    """

    step: int
    metrics: Mapping[str, float]

    @property
    def loss(self) -> float:
        """Plain cross-entropy, nats per token."""
        return self.metrics["eval_loss"]


@dataclass(frozen=True, slots=True)
class CheckpointStarted:
    """A checkpoint is about to be written. An observer that must be durable before it syncs its files now."""

    step: int
    path: Path


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A checkpoint is durable."""

    step: int
    path: Path
    stall_seconds: float  # how long it stalled training


@dataclass(frozen=True, slots=True)
class MemoryReset:
    """Model, optimizer and caches were dropped and rebuilt from the checkpoint of this step."""

    step: int
    before_bytes: int  # resident on the host plus allocated on the device
    after_bytes: int
    seconds: float  # without the save


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The run is complete or was asked to stop; its last checkpoint is durable.

    Attributes:
        step: optimizer steps made.
        path: the last checkpoint, if there is one.
        state_digest: the state digest of the last checkpoint.
        stall_seconds: how long checkpoints stalled training in this session.
        reason: why the run ended.
        signal: number of the signal that asked to stop, or None.
        already_finished: whether there was nothing left to do from the start.
    """

    step: int
    path: Path | None
    state_digest: str | None
    stall_seconds: float
    reason: Reason
    signal: int | None
    already_finished: bool

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do; if not, the same config resumes from here."""
        return self.reason in ("finished", "early_stopping")


Event = (
    Preparing
    | RunStarted
    | StepEnded
    | Evaluated
    | CheckpointStarted
    | CheckpointSaved
    | MemoryReset
    | RunEnded
)
Observer = Callable[[Event], None]


class Broadcaster:
    """Passes each event to all observers, in the training thread; ``publish`` is called before them."""

    def __init__(self, observers: Iterable[Observer], *, publish: Callable[[], None]) -> None:
        #: The first exception that an observer raised. It ends the run, but only after a save.
        self.error: Exception | None = None
        self._observers = tuple(observers)
        self._publish = publish

    def emit(self, event: Event) -> None:
        """Pass on an event; collects errors instead of raising them."""
        self._publish()
        for observer in self._observers:
            try:
                observer(event)
            except Exception as error:
                self.error = self.error or error
