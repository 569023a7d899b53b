"""One run of the trainer: finds where to begin, loads data and engine, trains, and reports the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from distrust.activity import current
from distrust.checkpoint import CheckpointFile, CheckpointManager
from distrust.config import TrainConfig
from distrust.errors import CheckpointError, ResumeRefused, warn
from distrust.run_record import RunRecord
from distrust.training import imported, resume, resume_point
from distrust.training.data_sources import Examples, Sources, read_sources
from distrust.training.events import Broadcaster, Observer, Preparing, Reason, RunEnded, RunStarted
from distrust.training.loop import TrainingLoop
from distrust.training.prepare_data import PreparedData, prepare_data
from distrust.training.process import StopRequest
from distrust.training.progress import BestTracker, Progress, RunState
from distrust.training.saver import Saver
from distrust.training.step import EngineHolder


class _StopRequested(Exception):
    """Something asked to stop before the first step."""


@dataclass(kw_only=True)
class Run:
    """One call of ``DistrustTrainer.train``. ``publish`` gets the state of the run at every event."""

    config: TrainConfig
    engines: EngineHolder
    manager: CheckpointManager
    observers: Iterable[Observer]
    stop: StopRequest
    publish: Callable[[RunState], None]

    def __post_init__(self) -> None:
        best = BestTracker(self.config.metric, self.config.metric_mode)
        self._progress = Progress(max_steps=self.config.max_steps, evaluations=best)
        self._events = Broadcaster(self.observers, publish=self._publish)
        self._saver = Saver(self.manager, self._events.emit)

    def train(self, *, examples: Examples | None, eval_examples: Examples | None) -> RunEnded:
        """Train to the end, or until something asks to stop; see ``DistrustTrainer.train``."""
        with self.manager:
            ended = self._train(examples, eval_examples)
            self._events.emit(ended)  # after the last save: what it reports is durable
        if self._events.error is not None:  # an observer failed; the run is saved
            raise self._events.error
        return ended

    def _train(self, examples: Examples | None, eval_examples: Examples | None) -> RunEnded:
        resume_point.require_startable(self.config, self.manager)
        finished = resume_point.find_finished_run(self.config, self.manager)
        if finished is not None:
            # Acquiring makes a name durable whose writer was killed. A read-only archive cannot be acquired.
            with contextlib.suppress(CheckpointError):
                self.manager.acquire()
            return self._end_untrained(*finished, already_finished=True)
        try:
            # Errors in the data are raised before anything is created in the run's folder.
            sources = read_sources(
                self.config, examples=examples, eval_examples=eval_examples, report=self._report
            )
            self.manager.acquire()  # from here on no other process writes to the run's folder
            loop = self._prepare(sources)
        except _StopRequested:
            files = self.manager.scan().files  # by step; intact ones only
            return self._end_untrained(files[-1] if files else None, None, already_finished=False)
        already_finished = loop.stop_reason() is not None
        current.has_steps_to_lose = True
        reason = loop.run()
        durable = self._saver.last_durable
        file = None if durable is None else self.manager.inspect(durable[0])
        return self._end(file, reason, already_finished=already_finished)

    def _prepare(self, sources: Sources) -> TrainingLoop:
        """Load model and data, and restore the checkpoint to resume from, if there is one.

        Raises _StopRequested at the next report: preparing large data may take minutes.
        """
        config, out = self.config, self.config.run_directory
        self._report(f"loading the model {config.model}", 0, 0)
        engine = self.engines.build(config)
        # Every byte of the checkpoint is verified before it is used.
        begin = resume_point.find_resume_point(config, self.manager, framework=engine.framework)
        if begin is not None:
            checkpoint, file = begin
            checkpoint, record = imported.adopt_imported(checkpoint, config)
            config = resume.merge_saved_options(config, record.config)
        elif self.engines.is_spent:
            raise ResumeRefused(
                f"{out}: the engine has already been trained, and no checkpoint was saved to restore it "
                "from; give a new engine"
            )
        data = prepare_data(config, sources, engine.tokenizer, context_length=engine.context_length)
        progress = self._progress
        # Before the restore, which drops evaluations of other data.
        progress.evaluations = replace(progress.evaluations, measured_on=data.measured_on)
        if begin is not None:
            imported.require_steps_left(record, step=checkpoint.step, max_steps=data.max_steps, where=out)
            resume.restore(checkpoint, record, engine=engine, data=data, progress=progress)
            imported.warn_imported(checkpoint, record, where=out)
            if file.path.parent == self.manager.directory:  # not so for a new branch
                self._saver.last_durable = checkpoint.step, file.kind == "final"
        progress.max_steps, progress.epoch_steps = data.max_steps, data.batches.epoch_steps
        self._events.emit(self._describe_start(data, resumed_from=file if begin else None))
        return TrainingLoop(
            data=data,
            engines=self.engines,
            progress=progress,
            manager=self.manager,
            saver=self._saver,
            events=self._events,
            stop=self.stop,
        )

    def _report(self, task: str, completed: int, total: int) -> None:
        """Report the progress of the preparation; raises _StopRequested if something asks to stop."""
        self._events.emit(Preparing(task, completed, total))
        if self.stop.is_set:
            raise _StopRequested

    def _describe_start(self, data: PreparedData, *, resumed_from: CheckpointFile | None) -> RunStarted:
        # A warm-up that is longer than the schedule postpones its end.
        schedule_end = max(data.schedule_steps, data.warmup_steps)
        if data.config.schedule != "constant" and data.max_steps > schedule_end:
            warn(
                f"the schedule ends at step {schedule_end}; after it the learning rate is 0. To train "
                "longer, begin a new run with --schedule-steps, or with --schedule constant"
            )
        engine = self.engines.current
        trained, parameters = engine.parameters
        return RunStarted(
            out=data.config.run_directory,
            step=self._progress.step,
            max_steps=data.max_steps,
            resumed_from=resumed_from.path if resumed_from else None,
            examples=len(data.corpus),
            tokens=int(data.corpus.loss_tokens.sum()),
            truncated=data.corpus.truncated,
            tokens_cut=data.corpus.tokens_cut,
            distribution=data.distribution,
            history=self._progress.history,  # so that observers can draw the steps before
            trained=trained,
            parameters=parameters,
            engine=engine.framework,
            device=str(engine.environment().get("device", "")),
            epoch_steps=data.batches.epoch_steps,
            warmup_steps=data.warmup_steps,
        )

    def _end_untrained(
        self, file: CheckpointFile | None, reason: Reason | None, *, already_finished: bool
    ) -> RunEnded:
        """End a run whose state was not loaded, from what its newest checkpoint records."""
        if file is not None:
            record = RunRecord.from_header(file.header)
            self._progress.restore(record, step=file.step, metrics=file.header.saved_metrics)
            self._progress.max_steps = self.config.max_steps or record.settings.get("max_steps")
            self._saver.last_durable = file.step, file.kind == "final"
        return self._end(file, reason, already_finished=already_finished)

    def _end(self, file: CheckpointFile | None, reason: Reason | None, *, already_finished: bool) -> RunEnded:
        """The last event: the run is complete if there is a reason, otherwise something asked to stop."""
        return RunEnded(
            step=file.step if file else 0,
            path=file.path if file else None,
            state_digest=file.state_digest if file else None,
            stall_seconds=self._saver.stall_seconds,
            reason=reason or self.stop.reason,
            signal=None if reason else self.stop.signal,
            already_finished=already_finished,
        )

    def _publish(self) -> None:
        out, checkpoint = self.config.run_directory, self._saver.last_path
        self.publish(self._progress.snapshot(out=out, checkpoint=checkpoint))
