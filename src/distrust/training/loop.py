"""The training loop.

A run is a function of (config, data, base model, seed). Each step is a function of its number and of the
state before it: its batches, learning rate and random numbers derive from the number alone. Saves happen only
between steps. So a run that was killed anywhere resumes from its newest checkpoint and makes the same steps
that it would have made.
"""

from __future__ import annotations

import time
from dataclasses import asdict

from distrust.checkpoint import Checkpoint, CheckpointManager
from distrust.errors import CorruptCheckpoint, NonFiniteLoss, OutOfMemory, warn
from distrust.run_record import RunRecord
from distrust.training import resume
from distrust.training.events import Broadcaster, Evaluated, MemoryReset, Reason
from distrust.training.memory_guard import GIB, MemoryGuard
from distrust.training.prefetch import Prefetcher
from distrust.training.prepare_data import PreparedData
from distrust.training.progress import Progress
from distrust.training.saver import Saver
from distrust.training.signals import StopRequest
from distrust.training.step import EngineHolder, StepRunner


class TrainingLoop:
    """Trains, evaluates and saves. The engine is in the state after ``progress.step``."""

    def __init__(
        self,
        data: PreparedData,
        *,
        engines: EngineHolder,
        progress: Progress,
        manager: CheckpointManager,
        saver: Saver,
        events: Broadcaster,
        stop: StopRequest,
    ) -> None:
        self._data = data
        self._config = data.config
        self._engines = engines
        self._progress = progress
        self._manager = manager
        self._saver = saver
        self._events = events
        self._stop = stop
        self._memory = MemoryGuard(data.config, engines.current)
        self._steps = StepRunner(engines, data, saver=saver, memory=self._memory)

    def run(self) -> Reason | None:
        """Train until the run is complete or something asks to stop; then save what is not yet saved.

        Returns:
            Why the run is complete; None if it is not.
        """
        first_step = self._progress.step + 1
        if not self.stop_reason():
            self._check_memory_limit(before_first_step=True)
        if first_step == 1 and self._config.eval_at_start:
            self._evaluate()

        with Prefetcher(self._data.batches.step, last=self._data.max_steps) as batches:
            while self._should_continue():
                step = self._progress.step + 1
                ended = self._steps.run(step, batches.get(step))
                self._progress.add_step(ended)  # before the event: observers may read the state
                self._events.emit(ended)
                if step == first_step and self._config.save_every:
                    self._saver.reserve(self._checkpoint())  # the first update has created the moments
                is_best = self._evaluation_is_due() and self._evaluate()
                if self._save_is_due(is_best=is_best):
                    self._save(final=False)  # in the background
                self._saver.poll()
                self._check_memory()

        reason = self.stop_reason()
        self._save_unsaved(final=reason is not None)
        return reason

    def _should_continue(self) -> bool:
        """Whether to make another step."""
        return not (self.stop_reason() or self._stop.is_set or self._events.error)

    def stop_reason(self) -> Reason | None:
        """Why the run is complete, or None: a function of its state alone, so a resume decides the same."""
        if self._progress.step >= self._data.max_steps:
            return "finished"
        exhausted = self._progress.evaluations.out_of_patience(self._config.early_stopping_patience)
        return "early_stopping" if exhausted else None

    def _evaluation_is_due(self) -> bool:
        return self.stop_reason() is not None or self._progress.step % self._config.eval_every == 0

    def _save_is_due(self, *, is_best: bool) -> bool:
        if not self._config.save_every or self.stop_reason():  # the final save follows the loop
            return False
        # The best state so far is saved at once: it may remain the best.
        return self._progress.step % self._config.save_every == 0 or (is_best and self._config.keep_best > 0)

    def _check_memory(self) -> None:
        """Reset the memory if it is due, and stop before a step that would not fit."""
        if not self._should_continue():
            return
        if self._memory.reset_due(self._progress.step) and self._save_and_verify():
            if not self._should_continue():
                return  # asked to stop during the save: no need to reload
            self._reset_memory()
        self._check_memory_limit()

    def _save_and_verify(self) -> bool:
        """Save this step and read it back: after the reset, the file is the only copy of the state."""
        step = self._progress.step
        self._saver.wait()
        if not self._saver.is_durable(step):
            self._save(final=False)
            self._saver.wait()  # a failure only warns: the run continues without a reset
        try:
            if self._saver.is_durable(step):
                self._manager.validate(step)
                return True
        except CorruptCheckpoint as error:
            warn(f"{error}. Memory is not reset at step {step}")
        return False

    def _reset_memory(self) -> None:
        """Drop model, optimizer and caches, and rebuild them from the base model and the checkpoint."""
        start, used_bytes = time.perf_counter(), self._memory.used_bytes
        engine = self._engines.rebuild(self._config)  # from here on the checkpoint is the only copy
        checkpoint = self._manager.load(self._progress.step, framework=engine.framework)
        record = RunRecord.from_checkpoint(checkpoint)
        resume.restore(checkpoint, record, engine=engine, data=self._data, progress=self._progress)
        self._memory.restart(engine)  # loading is no step: its peak says nothing about the next
        seconds = time.perf_counter() - start
        self._events.emit(MemoryReset(self._progress.step, used_bytes, self._memory.used_bytes, seconds))

    def _check_memory_limit(self, *, before_first_step: bool = False) -> None:
        """Save, then stop, before a step that would exceed ``max_memory``."""
        excess = self._memory.excess()
        if excess is None:
            return
        self._save_unsaved(final=False)  # before raising, so that nothing is lost
        advice = (
            "Raise the limit, or add --reload-above or --gradient-checkpointing, and the same command "
            "resumes; a new run may use a smaller --batch-size"
        )
        if before_first_step and excess.now > excess.limit:
            advice = "It is exceeded before any step: raise the limit, or use a smaller --model"
        raise OutOfMemory(
            f"--max-memory {excess.limit / GIB:g}: at step {self._progress.step} the run uses "
            f"{excess.now / GIB:.2f} GiB of {excess.place}, and the next step may use "
            f"{excess.next_step / GIB:.2f}; {self._saver.describe_durable()}. {advice}"
        )

    def _save_unsaved(self, *, final: bool) -> None:
        """Make the current state durable: as the final checkpoint, or to resume from."""
        self._saver.wait()
        if self._progress.step > 0 and not self._saver.is_durable(self._progress.step, final=final):
            self._save(final=final)
        self._saver.wait(strict=True)  # no later save could make up for a failure

    def _save(self, *, final: bool) -> None:
        self._saver.start(self._finite_checkpoint, final=final)

    def _evaluate(self) -> bool:
        """Evaluate; returns whether it was the best evaluation so far."""
        evaluation, progress = self._data.evaluation, self._progress
        if evaluation is None:  # no evaluation data
            return False
        engine = self._engines.current
        metrics = evaluation.measure(
            lambda batch: engine.evaluate(batch).cross_entropy,
            batch_size=self._config.batch_size,
            pad_token_id=self._data.pad_token_id,
        )
        progress.metrics.update(metrics)  # saved with the checkpoint of this step
        progress.evaluations = progress.evaluations.update(progress.metrics, step=progress.step)
        self._events.emit(Evaluated(progress.step, metrics))
        return progress.evaluations.best_step == progress.step

    def _finite_checkpoint(self) -> Checkpoint:
        step = self._progress.step
        if not self._engines.current.is_finite():
            raise NonFiniteLoss(
                f"step {step}: its update left weights or moments that are not finite; it is not saved, and "
                f"{self._saver.describe_durable()}. Lower --learning-rate or --weight-decay",
                step=step,
                examples=self._data.locations(self._data.batches.step(step)),
            )
        return self._checkpoint()

    def _checkpoint(self) -> Checkpoint:
        """The whole state of the run; arrays are those of the engine."""
        data, progress, engine = self._data, self._progress, self._engines.current
        state = engine.state()
        record = RunRecord(
            config=self._config.with_effect("result"),
            settings={**self._config.with_effect("free"), **self._config.with_effect("bits")},
            fingerprints=resume.fingerprints(data, engine),  # a resume on other data is refused
            tokens_seen=progress.tokens_seen,
            corpus={"examples": len(data.corpus), "tokens": int(data.corpus.loss_tokens.sum())},
            environment=engine.environment(),  # a resume warns of differences
            elapsed_seconds=progress.elapsed_seconds,
            evaluations=asdict(progress.evaluations),  # a resume stops early at the same step
            continues=progress.continues,
        )
        return record.to_checkpoint(
            step=progress.step,
            model=state.model,  # the engine's own arrays: the saver copies them before the next update
            optimizer=state.optimizer,
            rng=state.rng,
            history=progress.history_arrays(),
            metrics=progress.metrics,
            measured_on=data.measured_on,
        )
