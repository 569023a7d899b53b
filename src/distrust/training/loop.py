"""The training loop.

A run is a function of (config, data, base model, seed). Each step is a function of its number and of the
state before it: its batches, learning rate and random numbers derive from the number alone. Saves happen only
between steps. So a run that was killed anywhere resumes from its newest checkpoint and makes the same steps
that it would have made.
"""

from __future__ import annotations

import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from distrust.checkpoint import Checkpoint, CheckpointManager
from distrust.data import MicroBatch
from distrust.errors import CorruptCheckpoint, ErrorTranslator, NonFiniteLoss, OutOfMemory, warn
from distrust.ranks import Ranks, gather_json, leads, of_leader
from distrust.run_record import RunRecord
from distrust.training import resume, resume_point, save_interval
from distrust.training.agreement import Requests, require_equal_weights
from distrust.training.events import Broadcaster, Evaluated, MemoryReset, Reason
from distrust.training.memory_guard import MemoryGuard
from distrust.training.mirroring import RunMirror
from distrust.training.prepare_data import PreparedData
from distrust.training.process import StopRequest
from distrust.training.progress import Progress
from distrust.training.recheck import Rechecker
from distrust.training.recording import record_state
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
    ranks: Ranks
    mirror: RunMirror

    def __post_init__(self) -> None:
        self._config = self.data.config
        self._model_is_folder = Path(self._config.model).is_dir()
        self._notice = ""  # about the interval of saves, given once
        self._memory = MemoryGuard(self._config, self.engines.current)
        self._steps = StepRunner(engines=self.engines, data=self.data, saver=self.saver, memory=self._memory)
        self._recheck = Rechecker(
            steps=self._steps,
            ranks=self.ranks,
            save=lambda: self._save_unsaved(final=False),
            good_step=self.progress.step,
        )
        self._name_durable = ErrorTranslator((OutOfMemory,), self._with_durable)

    def run(self) -> Reason | None:
        """Train until the run is complete or something asks to stop, then save what is not yet saved.

        Returns why the run is complete; None if it is not.
        """
        first_step = self.progress.step + 1
        self.saver.start_clock()
        require_equal_weights(self.ranks, self.engines.current, step=self.progress.step)
        if not self.stop_reason():
            self._check_memory_limit(self._agree(), before_first_step=True)
        if first_step == 1 and self._config.eval_at_start:
            self._evaluate()
        requests = self._agree()

        prepare = self.engines.current.prepare

        def batches_of(step: int) -> list[MicroBatch]:
            return [prepare(batch) for batch in self.data.batches.step(step)]

        with closing(prefetch(batches_of, first=first_step, last=self.data.max_steps)) as steps:
            while not self._should_end(requests):
                with self._name_durable:
                    step, batches = next(steps)
                    ended = self._recheck.run(step, batches)
                self.saver.times.step = ended.seconds
                self.progress.add_step(ended)  # before the event: observers may read the state
                self.events.emit(ended)
                if step == first_step and self._config.save_every:
                    # The first update has created the moments: allocate the snapshot buffer of all saves.
                    device = resume_point.load_device(self._config, self.engines.current, 0)
                    self.saver.reserve(self._checkpoint, device=device)
                is_best = self._evaluation_is_due() and self._evaluate()
                if self._save_is_due(is_best=is_best, by_time=requests.save):
                    self._save(final=False)  # in the background
                self.saver.poll()
                if leads(self.ranks):
                    self.mirror.poll(self.manager, self.events.emit)
                    self._snapshot()  # after the evaluation, whose result belongs to the step
                requests = self._agree()
                if not self._should_end(requests):
                    requests = self._check_memory(requests)

        reason = self.stop_reason()
        self._save_unsaved(final=reason is not None)
        return reason

    def _agree(self) -> Requests:
        """What any rank asks for, once per step."""
        requests = Requests(
            signal=self.stop.signal or 0,
            stop=self.stop.asked,
            failed=self.events.error is not None,
            save=self._timed_save_is_due(),
            reset=self._memory.reset_due(self.progress.step),
            excess=self._memory.find_excess() is not None,
        ).agree(self.ranks)
        self.stop.merge(requests.signal, asked=requests.stop)
        return requests

    def _should_end(self, requests: Requests) -> bool:
        """Whether not to make another step."""
        return self.stop_reason() is not None or requests.to_stop

    def stop_reason(self) -> Reason | None:
        """Why the run is complete, or None: a function of its state alone, so a resume decides the same."""
        if self.progress.step >= self.data.max_steps:
            return "finished"
        exhausted = self.progress.evaluations.out_of_patience(self._config.early_stopping_patience)
        return "early_stopping" if exhausted else None

    def _evaluation_is_due(self) -> bool:
        return self.stop_reason() is not None or self.progress.step % self._config.eval_every == 0

    def _timed_save_is_due(self) -> bool:
        """Whether to save after the next step, by the leader's clock: no two clocks are the same."""
        if isinstance(self._config.save_every, int) or not leads(self.ranks):
            return False
        times = self.saver.times
        if not self._notice and (notice := save_interval.notice(self._config, times)):
            self._notice = notice
            warn(notice)
        return save_interval.is_due(self._config, times, time.perf_counter())

    def _save_is_due(self, *, is_best: bool, by_time: bool) -> bool:
        config = self._config
        if not config.save_every or self.stop_reason():  # the final save follows the loop
            return False
        every = config.save_every  # if it is a time, steps to keep are saved besides
        steps = (every,) if isinstance(every, int) else (config.keep_every, config.mirror_keep_every)
        is_due = by_time or any(n and self.progress.step % n == 0 for n in steps)
        # The best state so far is saved at once: it may remain the best.
        return is_due or (is_best and config.keep_best > 0)

    def _check_memory(self, requests: Requests) -> Requests:
        """Reset the memory if it is due, and stop before a step that would not fit."""
        if requests.reset:
            self._save(final=False)
            self.saver.wait()  # a failure only warns: the run continues without a reset
            is_intact = of_leader(self.ranks, self._is_intact)
            requests = self._agree()
            if requests.to_stop:
                return requests  # asked to stop during the save: no need to reload
            if is_intact:
                with self._name_durable:
                    self._reset_memory()
                requests = self._agree()
        self._check_memory_limit(requests)
        return requests

    def _is_intact(self) -> bool:
        """Whether this step can be read back: after a reset, the file is the only copy of the state."""
        step = self.progress.step
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
        self.saver.wait_snapshot()  # it refers to arrays that are to be freed
        engine = self.engines.rebuild(self._config)  # from here on the checkpoint is the only copy
        state = resume_point.load_step(self._config, self.manager, engine, self.ranks, self.progress.step)
        record = RunRecord.from_checkpoint(state)
        resume.restore(state, record, engine=engine, data=self.data, progress=self.progress)
        del state  # its memory is no step's
        self._memory.restart(engine)  # loading is no step: its peak says nothing about the next
        seconds = time.perf_counter() - start
        self.events.emit(MemoryReset(self.progress.step, previous, self._memory.use, seconds))

    def _check_memory_limit(self, requests: Requests, *, before_first_step: bool = False) -> None:
        """Save, then stop, before a step that would exceed ``max_memory`` or ``max_device_memory``."""
        if not requests.excess:
            return
        self._save_unsaved(final=False)  # before raising, so that nothing is lost
        forecast = self._memory.find_excess()
        described = forecast and forecast.describe_excess(self.progress.step, is_first=before_first_step)
        descriptions = enumerate(gather_json(self.ranks, described))
        index, (problem, advice) = next(each for each in descriptions if each[1])
        where = f"{self.ranks.describe(index)}: " if self.ranks.count > 1 else ""
        raise OutOfMemory(f"{where}{problem}; {self.saver.describe_durable()}. {advice}")

    def _with_durable(self, error: OutOfMemory) -> OutOfMemory:
        return OutOfMemory(f"after step {self.progress.step}: {error}; {self.saver.describe_durable()}")

    def _save_unsaved(self, *, final: bool) -> None:
        """Make the current state durable: as the final checkpoint, or to resume from."""
        if self.progress.step > 0:
            self._save(final=final)
        self.saver.wait(strict=True)  # no later save could make up for a failure

    def _save(self, *, final: bool) -> None:
        """Start to save the current state, unless it is durable."""
        require_equal_weights(self.ranks, self.engines.current, step=self.progress.step)
        self.saver.wait()
        if not self.saver.is_durable(self.progress.step, final=final):
            self.saver.start(self._finite_checkpoint, final=final)

    def _snapshot(self) -> None:
        """Keep the current state in shared memory unless it is durable."""
        if self._config.step_snapshots and not self.saver.is_durable(self.progress.step):
            with suppress(NonFiniteLoss):  # the next step, or a save, raises it on all ranks
                self.saver.snapshot(self._finite_checkpoint, budget=self._config.save_budget)

    def _evaluate(self) -> bool:
        """Evaluate; returns whether it was the best evaluation so far."""
        evaluation, progress = self.data.evaluation, self.progress
        if evaluation is None:  # no evaluation data
            return False
        engine = self.engines.current
        with self._name_durable:
            metrics = evaluation.measure(engine.evaluate, self._config.batch_size, ranks=self.ranks)
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
        return record_state(self.data, self.progress, self.engines.current, self._model_is_folder)
