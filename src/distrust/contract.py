"""The contract between the training loop and a framework: all that the loop needs from an engine.

It is deliberately small: one forward and backward pass, one update, one evaluation, and the state in and out.
The loop decides when each happens; an engine decides nothing about order, schedule, saving or stopping.
Batches and losses are numpy arrays, so the loop knows no framework. The loop and the engines both import
this module, and neither imports the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from distrust.config import TrainConfig
from distrust.data import MicroBatch, Tokenizer
from distrust.option_values import Precision

if TYPE_CHECKING:
    import numpy as np

    from distrust.checkpoint.shared_writer import Peers

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

    @property
    def world_size(self) -> int:
        """Number of ranks whose gradients :meth:`accumulate` sums; 1 for an engine that trains alone."""

    @property
    def peers(self) -> Peers | None:
        """How the ranks write a checkpoint together, if each has a part of the state; else the leader does.

        Then :meth:`state` has a shard of each array of ``model`` and ``optimizer``, and :meth:`load_state`
        takes the contents of these from the leader.
        """

    def accumulate(
        self, batches: Sequence[MicroBatch], *, seed: int, step: int, tokens: int
    ) -> Sequence[Losses]:
        """The gradient of Σ weight · cross-entropy / ``tokens``: forward and backward of each micro-batch.

        Gradients are summed in the order of the micro-batches, whichever rank computes them: a run has the
        same bits on any number of ranks. All ranks get all batches and return all losses.

        Args:
            batches: the micro-batches of the step.
            seed: of the run; random generators derive from it, from the step and from the micro-batch's
                number, and from nothing else.
            step: of the optimizer, from 1.
            tokens: the trained tokens of the whole step.
        """

    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradients down to ``max_norm`` (0: no clipping); returns the norm before.

        Waits for the device, and fetches the losses of the step's micro-batches at the same time.
        """

    def update(self, *, learning_rate: float) -> None:
        """Make the optimizer step."""

    def is_finite(self) -> bool:
        """Whether all trained parameters and their moments are finite."""

    def checksum(self) -> int:
        """A number that differs, as a rule, if any bit of the trained parameters or moments does."""

    def frozen_checksums(self) -> Mapping[str, int]:
        """For each frozen weight, a number that differs if any one bit of it does."""

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

    def device_for(self, nbytes: int) -> str | None:
        """The device that a state of this size is loaded to; None for the host."""

    def release_memory(self) -> None:
        """Return freed memory of the device to the system."""

    def close(self) -> None:
        """Free model, optimizer and caches, even if references to the engine remain. It is not used again."""


def accumulate_alone(
    engine: Any, batches: Sequence[MicroBatch], *, seed: int, step: int, tokens: int
) -> list[Losses]:
    """:meth:`Engine.accumulate` of an engine that trains alone, and has methods for one micro-batch."""
    losses: list[Losses] = []
    for micro_step, batch in enumerate(batches):
        engine.begin_micro_step(seed=seed, step=step, micro_step=micro_step)
        losses.append(engine.micro_step(batch, tokens=tokens))
    return losses


EngineFactory = Callable[[TrainConfig], Engine]
