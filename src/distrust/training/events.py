"""What a run tells those who watch it. The loop knows none of them: it calls each with every event."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distrust.data import Distribution

Reason = Literal["finished", "early_stopping", "signal", "stop", "error"]
"""Why a run is over: its last step is made; its metric no longer improved; a signal came; ``stop()`` was
called, or who awaited it was cancelled; an observer failed."""


@dataclass(frozen=True, slots=True)
class Preparing:
    """Something that takes a while, before the first step.

    Attributes:
        what: in a few words.
        done: how many of its parts are done.
        total: how many there are; 0 where it has none.
    """

    task: str
    completed: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class RunStarted:
    """Everything is loaded, and the first step comes next.

    Attributes:
        out: the folder of the run.
        step: optimizer steps made already.
        max_steps: those of the whole run.
        resumed_from: the checkpoint that the run goes on from.
        examples: in the training data.
        tokens: learned ones in the training data.
        truncated: examples that were cut, with those that `eval_fraction` keeps out.
        tokens_cut: tokens that they lost.
        distribution: of the weights: their range, by source class, the heaviest and the lightest examples.
        history: by name, the value of each step made already.
        trained: how many numbers are trained.
        parameters: how many the model has.
        engine: what trains, by name.
        device: where, as the engine calls it; empty if it does not say.
        epoch_steps: optimizer steps of one pass over the data, as a fraction.
        warmup_steps: in which the learning rate rises to its peak.
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
        """(Σu)²/Σu² of the examples' weights u, times how often `mix` draws each."""
        return self.distribution.effective_examples

    @property
    def weight_range(self) -> tuple[float, float]:
        """The smallest and the largest u."""
        lowest, *_, highest = self.distribution.quantiles["weight"]
        return lowest, highest


@dataclass(frozen=True, slots=True)
class StepEnded:
    """An optimizer step was made.

    Attributes:
        step: its number, from 1.
        loss: plain cross-entropy, nats a token.
        weighted_loss: what the gradient was of.
        distrust: mean over the step's tokens of the published term α·r²; logged only.
        learning_rate: of this step.
        gradient_norm: before clipping.
        tokens: learned ones.
        seconds: that the step took.
        stall_seconds: how long training waited for checkpoints since the step before.
        memory_bytes: resident on the host and allocated on the device, after it.
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
    """The eval set was evaluated.

    Attributes:
        step: optimizer steps made.
        metrics: by name, as they are logged: losses are cross-entropy, nats a token; weighted by provenance,
            and of each source class, too.
    """

    step: int
    metrics: Mapping[str, float]

    @property
    def loss(self) -> float:
        """Plain cross-entropy."""
        return self.metrics["eval_loss"]


@dataclass(frozen=True, slots=True)
class CheckpointStarted:
    """A checkpoint is about to be written: what is to be durable before it must be so now.

    Attributes:
        step: of the checkpoint.
        path: where it will stand.
    """

    step: int
    path: Path


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A checkpoint is durable.

    Attributes:
        step: of the checkpoint.
        path: where it stands.
        stall_seconds: how long training waited for it.
    """

    step: int
    path: Path
    stall_seconds: float


@dataclass(frozen=True, slots=True)
class MemoryReset:
    """Model, optimizer and caches were dropped and built again from the checkpoint of this step.

    Attributes:
        step: optimizer steps made.
        before_bytes: resident on the host and allocated on the device, before.
        after_bytes: the same, after.
        seconds: that it took, without the save.
    """

    step: int
    before_bytes: int
    after_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The run is over, or was asked to stop; its last checkpoint is durable.

    Attributes:
        step: optimizer steps made.
        path: the last checkpoint, if there is one.
        state_digest: the identity of its state.
        stall_seconds: how long training waited for checkpoints, all of this session together.
        reason: why it is over.
        signal: the number of the signal that asked to stop, or None.
        already: whether there was nothing left to do.
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
        """Whether there is nothing left to do; else the same config goes on from here."""
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
