"""The training loop.

A run is a function of (config, data, base model, seed). Each step is a function of its number and of the
state before it: its batches, learning rate and random numbers derive from the number alone. Saves happen only
between steps. So a run that was killed anywhere resumes from its newest checkpoint and makes the same steps
that it would have made.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from distrust.checkpoint import Checkpoint, CheckpointManager
from distrust.config import flag
from distrust.data import MicroBatch
from distrust.errors import CorruptCheckpoint, ErrorTranslator, NonFiniteLoss, OutOfMemory, warn
from distrust.run_record import RunRecord
from distrust.training import resume, resume_point
from distrust.training.events import Broadcaster, Evaluated, MemoryReset, Reason
from distrust.training.memory_guard import GIB, LIMITS, MemoryGuard
from distrust.training.prepare_data import PreparedData
from distrust.training.process import StopRequest
from distrust.training.progress import Progress
from distrust.training.saver import Saver
from distrust.training.step import EngineHolder, StepRunner, prefetch


@dataclass(kw_only=True)
class TrainingLoop:
    """Trains, evaluates and saves. The engine is in the state after ``progress.step``."""

    data: PreparedData
    engines: EngineHolder
    progress: Progress
    manager: CheckpointManager
    saver: Saver
    events: Broadcaster
    stop: StopRequest

    def __post_init__(self) -> None:
        self._config = self.data.config
        self._model_is_folder = Path(self._config.model).is_dir()
        self._memory = MemoryGuard(self._config, self.engines.current)
        self._steps = StepRunner(engines=self.engines, data=self.data, saver=self.saver, memory=self._memory)
        self._name_durable = ErrorTranslator((OutOfMemory,), self._with_durable)

    def run(self) -> Reason | None:
        """Train until the run is complete or something asks to stop, then save what is not yet saved.

        Returns why the run is complete; None if it is not.
        """
        first_step = self.progress.step + 1
        if not self.stop_reason():
            self._check_memory_limit(before_first_step=True)
        if first_step == 1 and self._config.eval_at_start:
            self._evaluate()

        prepare = self.engines.current.prepare

        def batches_of(step: int) -> list[MicroBatch]:
            return [prepare(batch) for batch in self.data.batches.step(step)]

        with closing(prefetch(batches_of, first=first_step, last=self.data.max_steps)) as steps:
            while self._should_continue():
                with self._name_durable:
                    step, batches = next(steps)
                    ended = self._steps.run(step, batches)
                self.progress.add_step(ended)  # before the event: observers may read the state
                self.events.emit(ended)
                if step == first_step and self._config.save_every:
                    # The first update has created the moments: allocate the snapshot buffer of all saves.
                    device = resume_point.load_device(self._config, self.engines.current, 0)
                    self.manager.reserve(self._checkpoint().nbytes, device=device)
                is_best = self._evaluation_is_due() and self._evaluate()
                if self._save_is_due(is_best=is_best):
                    self.saver.start(self._finite_checkpoint, final=False)  # in the background
                self.saver.poll()
                self._check_memory()

        reason = self.stop_reason()
        self._save_unsaved(final=reason is not None)
        return reason

    def _should_continue(self) -> bool:
        """Whether to make another step."""
        return not (self.stop_reason() or self.stop.is_set or self.events.error)

    def stop_reason(self) -> Reason | None:
        """Why the run is complete, or None: a function of its state alone, so a resume decides the same."""
        if self.progress.step >= self.data.max_steps:
            return "finished"
        exhausted = self.progress.evaluations.out_of_patience(self._config.early_stopping_patience)
        return "early_stopping" if exhausted else None

    def _evaluation_is_due(self) -> bool:
        return self.stop_reason() is not None or self.progress.step % self._config.eval_every == 0

    def _save_is_due(self, *, is_best: bool) -> bool:
        if not self._config.save_every or self.stop_reason():  # the final save follows the loop
            return False
        # The best state so far is saved at once: it may remain the best.
        return self.progress.step % self._config.save_every == 0 or (is_best and self._config.keep_best > 0)

    def _check_memory(self) -> None:
        """Reset the memory if it is due, and stop before a step that would not fit."""
        if not self._should_continue():
            return
        if self._memory.reset_due(self.progress.step) and self._save_and_verify():
            if not self._should_continue():
                return  # asked to stop during the save: no need to reload
            with self._name_durable:
                self._reset_memory()
        self._check_memory_limit()

    def _save_and_verify(self) -> bool:
        """Save this step and read it back: after the reset, the file is the only copy of the state."""
        step = self.progress.step
        self.saver.wait()
        if not self.saver.is_durable(step):
            self.saver.start(self._finite_checkpoint, final=False)
            self.saver.wait()  # a failure only warns: the run continues without a reset
        try:
            if self.saver.is_durable(step):
                self.manager.validate(step)
                return True
        except CorruptCheckpoint as error:
            warn(f"{error}. Memory is not reset at step {step}")
        return False

    def _reset_memory(self) -> None:
        """Drop model, optimizer and caches, and rebuild them from the base model and the checkpoint."""
        start, previous = time.perf_counter(), self._memory.use
        engine = self.engines.rebuild(self._config)  # from here on the checkpoint is the only copy
        file = self.manager.inspect(self.progress.step)
        device = resume_point.load_device(self._config, engine, file.bytes)
        checkpoint = self.manager.load(self.progress.step, framework=engine.framework, device=device)
        record = RunRecord.from_checkpoint(checkpoint)
        resume.restore(checkpoint, record, engine=engine, data=self.data, progress=self.progress)
        del checkpoint  # its memory is no step's
        self._memory.restart(engine)  # loading is no step: its peak says nothing about the next
        seconds = time.perf_counter() - start
        self.events.emit(MemoryReset(self.progress.step, previous, self._memory.use, seconds))

    def _check_memory_limit(self, *, before_first_step: bool = False) -> None:
        """Save, then stop, before a step that would exceed ``max_memory`` or ``max_device_memory``."""
        if (forecast := self._memory.find_excess()) is None:
            return
        self._save_unsaved(final=False)  # before raising, so that nothing is lost
        advice = (
            "Raise the limit, or add --reload-above or --gradient-checkpointing, and the same command "
            "resumes; a new run may use a smaller --batch-size"
        )
        if before_first_step and forecast.now > forecast.limit * GIB:
            advice = "It is exceeded before any step: raise the limit, or use a smaller --model"
        raise OutOfMemory(
            f"{flag(LIMITS[forecast.side])} {forecast.limit:g}: at step {self.progress.step} the run uses "
            f"{forecast.now / GIB:.2f} GiB of {forecast.side}, and the next step may use "
            f"{forecast.next_step / GIB:.2f}; {self.saver.describe_durable()}. {advice}"
        )

    def _with_durable(self, error: OutOfMemory) -> OutOfMemory:
        return OutOfMemory(f"after step {self.progress.step}: {error}; {self.saver.describe_durable()}")

    def _save_unsaved(self, *, final: bool) -> None:
        """Make the current state durable: as the final checkpoint, or to resume from."""
        self.saver.wait()
        if self.progress.step > 0 and not self.saver.is_durable(self.progress.step, final=final):
            self.saver.start(self._finite_checkpoint, final=final)
        self.saver.wait(strict=True)  # no later save could make up for a failure

    def _evaluate(self) -> bool:
        """Evaluate; returns whether it was the best evaluation so far."""
        evaluation, progress = self.data.evaluation, self.progress
        if evaluation is None:  # no evaluation data
            return False
        engine = self.engines.current
        with self._name_durable:
            metrics = evaluation.measure(engine.evaluate, batch_size=self._config.batch_size)
        progress.metrics.update(metrics)  # saved with the checkpoint of this step
        progress.evaluations = progress.evaluations.update(progress.metrics, step=progress.step)
        self.events.emit(Evaluated(progress.step, metrics))
        return progress.evaluations.best_step == progress.step

    def _finite_checkpoint(self) -> Checkpoint:
        step = self.progress.step
        with self._name_durable:
            is_finite = self.engines.current.is_finite()
        if not is_finite:
            raise NonFiniteLoss(
                f"step {step}: its update left weights or moments that are not finite; it is not saved, and "
                f"{self.saver.describe_durable()}. Lower --learning-rate or --weight-decay",
                step=step,
                examples=self.data.locations(self.data.batches.step(step)),
            )
        return self._checkpoint()

    def _checkpoint(self) -> Checkpoint:
        """The whole state of the run; arrays are those of the engine."""
        data, progress, engine = self.data, self.progress, self.engines.current
        state = engine.state()
        record = RunRecord(
            config=self._config.with_effect("result"),
            settings={**self._config.with_effect("free"), **self._config.with_effect("bits")},
            fingerprints=resume.fingerprints(data, engine)  # a resume on other data is refused
            | ({"from": progress.started_from} if progress.started_from else {}),
            tokens_seen=progress.tokens_seen,
            corpus={"examples": len(data.corpus), "tokens": int(data.corpus.loss_tokens.sum())},
            environment=engine.environment(),  # a resume warns of differences
            elapsed_seconds=progress.elapsed_seconds,
            evaluations=asdict(progress.evaluations),  # a resume stops early at the same step
            continues=progress.continues,
            model_is_folder=self._model_is_folder,
        )
        return Checkpoint(
            step=progress.step,
            model=state.model,  # the engine's own arrays: the saver copies them before the next update
            optimizer=state.optimizer,
            rng=state.rng,
            history=progress.history_arrays(),
            metrics=progress.metrics,
            measured_on=data.measured_on,
            **record.sections(),
        )
