"""Makes optimizer steps: each is a function of its number and of the state before it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from distrust.config import TrainConfig
from distrust.contract import Engine, EngineFactory, Losses
from distrust.data import MicroBatch
from distrust.errors import NonFiniteLoss
from distrust.training.events import StepEnded
from distrust.training.memory_guard import MemoryGuard
from distrust.training.prepare_data import PreparedData
from distrust.training.saver import Saver

T = TypeVar("T")

#: A message lists at most this many examples; the error's attribute has them all.
EXAMPLES_LISTED = 20


class EngineHolder:
    """Owns the engine of a run: built by a factory, or passed in, in which case it cannot be built again."""

    current: Engine  # exists once it is built

    def __init__(self, engine: Engine | EngineFactory) -> None:
        self.is_spent = False  # whether an engine that cannot be built again has been trained
        self._source = engine

    @property
    def can_rebuild(self) -> bool:
        """Whether a factory can build the engine again."""
        return callable(self._source)

    def build(self, config: TrainConfig) -> Engine:
        """Build the engine, or take the one that was passed in."""
        self.current = self._source(config) if callable(self._source) else self._source
        return self.current

    def rebuild(self, config: TrainConfig) -> Engine:
        """Free the engine, then build it again from the base model."""
        self.current.close()
        del self.current  # before the next one is built: both may not fit into memory
        return self.build(config)

    def mark_trained(self) -> None:
        """Record that the engine has changed."""
        self.is_spent = not self.can_rebuild


def prefetch(compute: Callable[[int], T], *, first: int, last: int) -> Generator[tuple[int, T], None, None]:
    """Yield each step with its value, a function of the step; a thread computes the next one meanwhile."""
    # One thread: batches are small, and steps need the CPU.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="distrust-prefetch") as thread:
        pending = thread.submit(compute, first)
        for step in range(first, last + 1):
            value = pending.result()
            if step < last:
                pending = thread.submit(compute, step + 1)
            yield step, value


@dataclass(kw_only=True)
class StepRunner:
    """Makes the optimizer steps of a run."""

    engines: EngineHolder
    data: PreparedData
    saver: Saver
    memory: MemoryGuard

    def __post_init__(self) -> None:
        self._config = self.data.config
        self._reported_stall = self.saver.stall_seconds

    def run(self, step: int, batches: Sequence[MicroBatch]) -> StepEnded:
        """Make one optimizer step; raises NonFiniteLoss instead if a loss or the gradient is not finite."""
        start, engine = time.perf_counter(), self.engines.current
        self.engines.mark_trained()  # first: even an interrupted step may change the engine
        tokens = sum(batch.tokens for batch in batches)  # the mean is over the step, not the micro-batch
        losses = engine.accumulate(batches, seed=self._config.seed, step=step, tokens=tokens)
        norm = engine.clip_gradients(self._max_norm(batches, tokens))
        self._require_finite(step, batches, losses, norm)
        rate = self.data.learning_rate(step)
        self.saver.wait_copied()  # the snapshot of the last save overlapped the passes above
        engine.update(learning_rate=rate)
        previous_stall, self._reported_stall = self._reported_stall, self.saver.stall_seconds
        return StepEnded(
            step=step,
            loss=_mean([part.cross_entropy for part in losses], tokens),
            weighted_loss=_mean([part.weighted for part in losses], tokens),
            distrust=_mean([batch.distrust * batch.trained_tokens for batch in batches], tokens),
            learning_rate=rate,
            gradient_norm=norm,
            tokens=tokens,
            seconds=time.perf_counter() - start,
            stall_seconds=self._reported_stall - previous_stall,
            memory=self.memory.observe_step(engine),
            at_risk_seconds=self.saver.take_at_risk(),
        )

    def _max_norm(self, batches: Sequence[MicroBatch], tokens: int) -> float:
        """The norm that this step's gradient is clipped to; 0 for no clipping.

        A weighted gradient grows with its weights, and clipping all steps to one norm would undo that. With
        equal weights the factor is exactly 1.
        """
        if self._config.clipping == "plain":
            return self._config.max_grad_norm
        # Summed in the order of padded rows: the last bits of all runs since the first version depend on it.
        rows = [batch.pad(batch.weights, filler=0) for batch in batches]
        return self._config.max_grad_norm * _mean(rows, tokens)

    def _require_finite(
        self, step: int, batches: Sequence[MicroBatch], losses: Sequence[Losses], norm: float
    ) -> None:
        """Runs before the update, so a state after a non-finite loss is never saved."""
        examples = self.data.locations(batches)
        sums = [loss for part in losses for loss in part.weighted]
        non_finite = [name for name, loss in zip(examples, sums, strict=True) if not math.isfinite(loss)]
        if not non_finite and math.isfinite(norm):
            return
        quantity = "the loss" if non_finite else f"the gradient norm ({norm})"
        suspects = non_finite or examples
        omitted = len(suspects) - EXAMPLES_LISTED
        remainder = f" and {omitted} more" if omitted > 0 else ""
        raise NonFiniteLoss(
            f"step {step}: {quantity} is not finite; the step was not made, and "
            f"{self.saver.describe_durable()}. Examples: {', '.join(suspects[:EXAMPLES_LISTED])}{remainder}. "
            "Check them, or lower --learning-rate",
            step=step,
            examples=suspects,
        )


def _mean(sums: Sequence[Any], tokens: int) -> float:
    return float(sum(part.sum() for part in sums) / tokens)
