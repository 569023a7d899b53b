"""Events of a run, and their delivery to observers. The loop knows no observer: each gets every event."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from distrust.contract import DeviceMemory
from distrust.data import Distribution
from distrust.data.corpus import Counts
from distrust.errors import printable
from distrust.weighting import Weighting

#: Why a run ended: its last step was made; its metric stopped improving; a signal arrived; ``stop()`` was
#: called or the awaiting task was cancelled; an observer failed.
Reason = Literal["finished", "early_stopping", "signal", "stop", "error"]


class _Printed:
    __slots__ = ()

    def __str__(self) -> str:
        """One line: no large fields, and numbers in four digits."""
        values = {part.name: getattr(self, part.name) for part in fields(self) if part.repr}  # type: ignore[arg-type]
        metrics = values.pop("metrics", {})
        values |= {name: value for name, value in metrics.items() if "/" not in name}  # not of each class
        shown = (f"{name}={v:.4g}" if type(v) is float else f"{name}={v}" for name, v in values.items())
        return printable(f"{type(self).__name__}({', '.join(shown)})")


@dataclass(frozen=True, slots=True)
class Preparing(_Printed):
    """A task before the first step, which may take a while."""

    task: str  # short description
    completed: int = 0  # completed parts
    total: int = 0  # number of parts; 0 if not known


@dataclass(frozen=True, slots=True)
class RunStarted(_Printed):
    """Everything is loaded; the first step is next."""

    out: Path  # the folder of the run
    model: str  # name of the base model
    data: tuple[str, ...]  # names of the training data
    weighting: Weighting  # how provenance weighs the examples
    #: The metrics of a step that are logged: without weights, none about them.
    step_metrics: tuple[str, ...] = field(repr=False)
    step: int  # optimizer steps already made
    max_steps: int  # optimizer steps of the whole run
    resumed_from: Path | None  # the checkpoint that the run resumes from
    examples: int  # examples of the training data
    tokens: int  # trained tokens of the training data
    #: Of records that were cut or left out, including those that ``eval_fraction`` holds out.
    counts: Counts = field(repr=False)
    #: Of the weights: range, effective sample size, by source class, heaviest and lightest examples.
    distribution: Distribution = field(repr=False)
    history: Mapping[str, Sequence[float]] = field(repr=False)  # name -> value for each step already made
    trained: int  # number of trained parameters
    parameters: int  # number of all parameters
    engine: str  # name of the engine
    device: str  # name of the device; empty if the engine does not say
    epoch_steps: float  # optimizer steps of one pass over the data, as a fraction
    warmup_steps: int  # steps in which the learning rate rises to its peak
    sequences: int  # of the examples: more than one each where the chat template rewrites earlier turns
    #: A line each: columns that are used and ignored, why weighting is off, modules that get an adapter.
    notes: tuple[str, ...] = ()
    ranks: tuple[str, ...] = field(default=(), repr=False)  # the machine of each; empty for one process

    @property
    def is_weighted(self) -> bool:
        """Whether examples differ in weight, so that there is anything to show about weights."""
        return "weighted_loss" in self.step_metrics


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Memory of the run's process between two steps, in bytes. A peak is the most so far."""

    host: int  # resident
    host_peak: int
    device: DeviceMemory | None  # None on a CPU


@dataclass(frozen=True, slots=True)
class StepEnded(_Printed):
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
    memory: MemoryUse  # after the step
    at_risk_seconds: float = 0.0  # most work since the step before that a crash would have cost


@dataclass(frozen=True, slots=True)
class Evaluated(_Printed):
    """The evaluation set was evaluated."""

    step: int  # completed optimizer steps
    #: Name -> value, as logged: cross-entropy in nats per token and perplexity, plain, weighted by provenance
    #: if examples are weighted, and for each source class.
    metrics: Mapping[str, float]

    @property
    def loss(self) -> float:
        """Plain cross-entropy, nats per token."""
        return self.metrics["eval_loss"]


@dataclass(frozen=True, slots=True)
class CheckpointStarted(_Printed):
    """A checkpoint is about to be written. An observer that must be durable before it syncs its files now."""

    step: int
    path: Path


@dataclass(frozen=True, slots=True)
class CheckpointSaved(_Printed):
    """A checkpoint is durable."""

    step: int
    path: Path
    stall_seconds: float  # how long it stalled training
    at_risk_seconds: float = 0.0  # work that a crash just before would have cost


@dataclass(frozen=True, slots=True)
class CheckpointMirrored(_Printed):
    """A checkpoint is in the mirror: it survives the loss of this machine."""

    step: int
    url: str  # of the mirror
    behind_seconds: float  # how long after it was durable here


@dataclass(frozen=True, slots=True)
class MemoryReset(_Printed):
    """Model, optimizer and caches were dropped and rebuilt from the checkpoint of this step."""

    step: int
    before: MemoryUse
    after: MemoryUse
    seconds: float  # without the save


@dataclass(frozen=True, slots=True)
class RunEnded(_Printed):
    """The run is complete or was asked to stop; its last checkpoint is durable."""

    step: int  # completed optimizer steps
    path: Path | None  # the last checkpoint, if there is one
    state_digest: str | None  # the state digest of the last checkpoint
    stall_seconds: float  # how long checkpoints stalled training in this session
    reason: Reason  # why the run ended
    signal: int | None  # number of the signal that asked to stop, or None
    already_finished: bool  # whether there was nothing left to do from the start
    notice: str | None = None  # the preemption notice that asked to stop, and when it came

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do; if not, the same config resumes from here."""
        return self.reason in ("finished", "early_stopping")


Event = (
    Preparing | RunStarted | StepEnded | Evaluated
    | CheckpointStarted | CheckpointSaved | CheckpointMirrored | MemoryReset | RunEnded
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
