"""The contract between the training loop and a framework: all that the loop needs from an engine.

It is deliberately small: one forward and backward pass, one update, one evaluation, and the state in and out.
The loop decides when each happens; an engine decides nothing about order, schedule, saving or stopping.
Batches and losses are numpy arrays, so the loop knows no framework. The loop and the engines both import
this module, and neither imports the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from distrust.config import Precision, TrainConfig
from distrust.data import MicroBatch, Tokenizer

if TYPE_CHECKING:
    import numpy as np

#: ``max_length`` of a config that gives none, unless the model's context is shorter.
DEFAULT_MAX_LENGTH = 1024
#: The engine of runs whose recorded environment does not name one: those of the earliest version.
DEFAULT_RECORDED_ENGINE: Final = "torch"


class Losses(Protocol):
    """For each sequence of a micro-batch, the sum over its trained tokens, in nats.

    An engine whose device computes ahead of the host may fetch them when they are first read.
    """

    @property
    def cross_entropy(self) -> np.ndarray[Any, Any]:
        """float64[b]."""

    @property
    def weighted(self) -> np.ndarray[Any, Any]:
        """float64[b]: weight times cross-entropy, whose gradient trains."""


@dataclass(frozen=True, slots=True)
class LossSums:
    """:class:`Losses` in the host's memory."""

    cross_entropy: np.ndarray[Any, Any]  # float64[b]
    weighted: np.ndarray[Any, Any]  # float64[b]


@dataclass(frozen=True, slots=True)
class EngineState:
    """Everything an engine needs to resume bit for bit: nested dicts and lists of arrays and scalars."""

    model: Mapping[str, Any]  # name -> array of each trained parameter
    optimizer: Mapping[str, Any]  # moments and counters
    rng: Mapping[str, Any]  # the state of every random generator


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of a device that this process uses, in bytes. A peak is the most so far.

    Where a framework records no peak, it is what is reserved: allocators keep what a step has freed.
    """

    allocated: int  # by arrays
    allocated_peak: int
    reserved: int  # taken from the device: what is allocated, what is cached, and the gaps between
    reserved_peak: int


class Engine(Protocol):
    """A model as a run needs it, with every member, in one framework. Exhausted memory raises OutOfMemory."""

    @property
    def framework(self) -> Literal["numpy", "torch", "mlx"]:
        """Framework of the arrays that :meth:`load_state` takes."""

    @property
    def dtype(self) -> Precision:
        """Precision of the computation: that of the config, or what its "auto" is on this device."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The base model's tokenizer."""

    @property
    def context_length(self) -> int | None:
        """Tokens that the model can attend to at once; None if it does not say."""

    @property
    def parameters(self) -> tuple[int, int]:
        """Number of trained parameters, and of all parameters."""

    @property
    def adapted(self) -> tuple[str, ...]:
        """What gets an adapter: a line for each kind of module. Empty if there is no adapter."""

    def fingerprint(self) -> str:
        """Digest of the base model's weights: equal weights give equal digests, wherever they come from."""

    def environment(self) -> dict[str, Any]:
        """What may change the last bits: versions, device, threads, kernels."""

    def restore_environment(self, recorded: dict[str, Any]) -> None:
        """Apply what can be chosen of a recorded environment, such as the number of threads."""

    @property
    def prepare(self) -> Callable[[MicroBatch], MicroBatch]:
        """Put a batch into the form, and the memory, from which the device takes it.

        Called ahead of the step, in another thread, also while the engine is built again: the function holds
        no reference to the engine. Passes take batches that are not prepared, too.
        """

    def begin_micro_step(self, *, seed: int, step: int, micro_step: int) -> None:
        """Seed every random generator from these three numbers, and from nothing else.

        The first micro-step also clears gradients that an interrupted step may have accumulated.
        """

    def micro_step(self, batch: MicroBatch, *, tokens: int) -> Losses:
        """Forward and backward: accumulate the gradient of Σ weight · cross-entropy / ``tokens``.

        ``tokens`` are the trained tokens of the whole optimizer step, over all its micro-batches.
        """

    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradients down to ``max_norm`` (0: no clipping); returns the norm before.

        Waits for the device, and fetches the losses of the step's micro-steps at the same time.
        """

    def update(self, *, learning_rate: float) -> None:
        """Make the optimizer step."""

    def is_finite(self) -> bool:
        """Whether all trained parameters and their moments are finite."""

    def evaluate(self, batch: MicroBatch) -> Losses:
        """Forward only, without dropout; changes no state."""

    def state(self) -> EngineState:
        """The state after the last update, as the engine's own arrays: copy them before the next update."""

    def load_state(self, state: EngineState) -> None:
        """Copy a saved state into the existing parameters.

        Raises:
            ResumeRefused: names, shapes or dtypes differ.
        """

    def device_memory(self) -> DeviceMemory | None:
        """Memory used on the device, also where it is a part of the host's (Apple's GPUs); None on a CPU."""

    def close(self) -> None:
        """Free model, optimizer and caches, even if references to the engine remain. It is not used again."""


EngineFactory = Callable[[TrainConfig], Engine]
