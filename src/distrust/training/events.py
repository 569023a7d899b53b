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
    """Everything is loaded; the first step is next."""

    out: Path  # the folder of the run
    step: int  # optimizer steps already made
    max_steps: int  # optimizer steps of the whole run
    resumed_from: Path | None  # the checkpoint that the run resumes from
    examples: int  # examples of the training data
    tokens: int  # trained tokens of the training data
    truncated: int  # examples that were cut to max_length, including those that eval_fraction holds out
    tokens_cut: int  # tokens that were cut off
    distribution: Distribution  # of the weights: range, by source class, heaviest and lightest examples
    history: Mapping[str, Sequence[float]]  # name -> value for each step already made
    trained: int  # number of trained parameters
    parameters: int  # number of all parameters
    engine: str  # name of the engine
    device: str  # name of the device; empty if the engine does not say
    epoch_steps: float  # optimizer steps of one pass over the data, as a fraction
    warmup_steps: int  # steps in which the learning rate rises to its peak

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
    """An optimizer step was made."""

    step: int  # its number, from 1
    loss: float  # plain cross-entropy, nats per token
    weighted_loss: float  # weighted cross-entropy, the one that trains
    distrust: float  # mean over the step's tokens of the published term α·r²; logged only
    learning_rate: float  # of this step
    gradient_norm: float  # before clipping
    tokens: int  # trained tokens of the step
    seconds: float  # duration of the step
    stall_seconds: float  # how long checkpoints stalled training since the step before
    memory_bytes: int  # resident on the host plus allocated on the device, after the step


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The evaluation set was evaluated."""

    step: int  # completed optimizer steps
    #: Name -> value, as logged: cross-entropy in nats per token and perplexity, plain and weighted by
    #: provenance, and for each source class.
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
    """The run is complete or was asked to stop; its last checkpoint is durable."""

    step: int  # completed optimizer steps
    path: Path | None  # the last checkpoint, if there is one
    state_digest: str | None  # the state digest of the last checkpoint
    stall_seconds: float  # how long checkpoints stalled training in this session
    reason: Reason  # why the run ended
    signal: int | None  # number of the signal that asked to stop, or None
    already_finished: bool  # whether there was nothing left to do from the start

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do; if not, the same config resumes from here."""
        return self.reason in ("finished", "early_stopping")


Event = (
    Preparing | RunStarted | StepEnded | Evaluated
    | CheckpointStarted | CheckpointSaved | MemoryReset | RunEnded
)  # fmt: skip
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
