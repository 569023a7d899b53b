"""The contract between the loop and a framework: what the loop needs of one, and no more.

Small on purpose: one forward and backward pass, one update, one evaluation, and state in and out. The loop
decides when each happens; an engine decides nothing about order, schedule, saving or stopping. Batches come
as numpy arrays and numbers go back as numpy arrays, so that the loop knows no framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from distrust.data import MicroBatch, Tokenizer

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Losses:
    """Of each example of a micro-batch, the sum over its learned tokens, in nats.

    Attributes:
        cross_entropy: float64[batch].
        weighted: float64[batch]: of weight times cross-entropy; what the gradient is of.
    """

    cross_entropy: np.ndarray[Any, Any]
    weighted: np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class EngineState:
    """What an engine has to have to go on bit for bit: nested dicts and lists of arrays and scalars.

    Attributes:
        model: name -> array of everything that is trained.
        optimizer: moments and counters.
        rng: the state of every generator of random numbers.
    """

    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    rng: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes taken at one place.

    Attributes:
        now: at this moment.
        peak: the most ever taken, or as many as now where that is not known.
    """

    now: int
    peak: int


class Engine(Protocol):
    """A model, its adapter and its optimizer, in some framework."""

    @property
    def framework(self) -> Literal["numpy", "torch", "mlx"]:
        """Of the arrays that :meth:`load_state` takes."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The base model's."""

    @property
    def context_length(self) -> int | None:
        """Tokens that the model can see at once, if it says."""

    @property
    def parameters(self) -> tuple[int, int]:
        """How many numbers are trained, and how many there are."""

    def fingerprint(self) -> str:
        """Digest of the base model's weights: equal for equal ones, wherever they were loaded from."""

    def environment(self) -> dict[str, Any]:
        """What may change the last bits: versions, device, threads, kernels."""

    def restore_environment(self, recorded: dict[str, Any]) -> None:
        """Take back what of a recorded environment can be chosen, such as the number of threads."""

    def begin_micro_step(self, *, seed: int, step: int, micro_step: int) -> None:
        """Seed every generator of random numbers by these three, and by nothing else.

        The first micro-step also drops the gradients that an interrupted step may have left.
        """

    def micro_step(self, batch: MicroBatch, *, tokens: int) -> Losses:
        """Forward and backward: add the gradient of Σ weight · cross-entropy / ``tokens`` to what is there.

        Args:
            batch: the examples.
            tokens: learned tokens of the whole optimizer step, all its micro-batches together.
        """

    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradients down to ``max_norm`` (0: leave them); returns the norm before."""

    def update(self, *, learning_rate: float) -> None:
        """Make the optimizer step."""

    def is_finite(self) -> bool:
        """Whether everything that is trained, and its moments, is finite."""

    def evaluate(self, batch: MicroBatch) -> Losses:
        """Forward only, without dropout; changes nothing."""

    def state(self) -> EngineState:
        """The state after the last update, as the engine's own arrays: copy before the next update."""

    def load_state(self, state: EngineState) -> None:
        """Take a state back, into the existing parameters.

        Raises:
            ResumeRefused: if names, shapes or dtypes differ.
        """

    def device_memory(self) -> MemoryUse | None:
        """What is allocated on the device; None where that is the host's memory."""

    def close(self) -> None:
        """Let go of model, optimizer and caches, whoever still holds the engine. It is not used again."""
