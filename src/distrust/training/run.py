"""One run of the trainer: finds where to begin, loads data and engine, trains, and reports the end."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import date

from distrust.activity import current
from distrust.checkpoint import CheckpointFile, CheckpointManager
from distrust.config import TrainConfig, as_names
from distrust.config_text import to_words, write_options
from distrust.errors import CheckpointError, DistrustError, ResumeRefused
from distrust.run_record import RunRecord
from distrust.training import imported, resume, resume_point
from distrust.training.data_sources import Examples, Sources, read_sources, template_notes
from distrust.training.events import Broadcaster, Observer, Preparing, Reason, RunEnded, RunStarted
from distrust.training.loop import TrainingLoop
from distrust.training.memory_guard import require_limited_device
from distrust.training.prepare_data import PreparedData, prepare_data
from distrust.training.process import StopRequest
from distrust.training.progress import BestTracker, Progress, RunState
from distrust.training.resume import ReadStart, Start
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
    read_start: ReadStart

    def __post_init__(self) -> None:
        best = BestTracker(self.config.metric, self.config.metric_mode)
        self._progress = Progress(max_steps=self.config.max_steps, evaluations=best)
        self._events = Broadcaster(self.observers, publish=self._publish)
        self._saver = Saver(self.manager, self._events.emit)
        self._differences: list[str] = []  # between the config and that of the run to resume

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
        if self.config.from_ is not None:  # recorded: the same in every working directory
            self.config = replace(self.config, from_=os.path.abspath(self.config.from_))
        record, start, finished = resume_point.recorded_run(self.config, self.manager), None, None
        if record is not None:
            self._follow_moved_start(record)
            self.config, self._differences = resume.merge_saved_options(self.config, record)
        elif self.config.from_ is not None:
            requested = self.config.non_default().items()
            self.config, start = self.read_start(self.config)
            inherited = self.config.non_default().items() - requested
            words = shlex.join(word for name, value in sorted(inherited) for word in to_words(name, value))
            self._events.emit(Preparing(f"starting from {self.config.from_}{f': {words}' if words else ''}"))
        if not self._differences:  # else they are reported, with those of the content
            finished = resume_point.find_finished_run(self.config, self.manager)
        if finished is not None:
            # Acquiring makes a name durable whose writer was killed. A read-only archive cannot be acquired.
            with contextlib.suppress(CheckpointError):
                self.manager.acquire()
            return self._end_untrained(*finished, already_finished=True)
        try:
            with resume.errors_with(self._differences, self.config):
                # Errors in the data are raised before anything is created in the run's folder.
                sources = read_sources(
                    self.config, examples=examples, eval_examples=eval_examples, report=self._report
                )
                self.manager.acquire()  # from here on no other process writes to the run's folder
                loop = self._prepare(sources, start)
        except _StopRequested:
            files = self.manager.scan().files  # by step; intact ones only
            return self._end_untrained(files[-1] if files else None, None, already_finished=False)
        already_finished = loop.stop_reason() is not None
        current.has_steps_to_lose = True
        reason = loop.run()
        durable = self._saver.last_durable
        file = None if durable is None else self.manager.inspect(durable[0])
        return self._end(file, reason, already_finished=already_finished)

    def _follow_moved_start(self, record: RunRecord) -> None:
        """Keep the recorded name of what the run began with, if ``from_`` names equal weights elsewhere."""
        recorded, digest = record.settings.get("from"), record.fingerprints.get("from")
        if recorded and self.config.from_ not in (None, recorded):
            with contextlib.suppress(DistrustError):  # it cannot be read: a difference
                if self.read_start(self.config)[1].digest == digest:
                    self.config = replace(self.config, from_=recorded)

    def _prepare(self, sources: Sources, start: Start | None) -> TrainingLoop:
        """Load model and data, and restore the checkpoint to resume from, if there is one, or the start.

        Raises _StopRequested at the next report: preparing large data may take minutes.
        """
        config = replace(self.config, weighting=sources.weighting)  # not "auto": it is compared and recorded
        out = config.run_directory
        self._report(f"loading the model {config.model}", 0, 0)
        engine = self.engines.build(config)
        if config.dtype == "auto":  # it is compared and recorded, too
            config = replace(config, dtype=engine.dtype)
        require_limited_device(config, engine)
        # Every byte of the checkpoint is verified before it is used.
        checkpoint, file = resume_point.find_resume_point(config, self.manager, engine) or (None, None)
        if checkpoint is not None:
            checkpoint, record = imported.adopt_imported(checkpoint, config)
        elif self.engines.is_spent:
            raise ResumeRefused(
                f"{out}: the engine has already been trained, and no checkpoint was saved to restore it "
                "from; give a new engine"
            )
        config = replace(config, date=config.date or date.today().isoformat())
        data = prepare_data(config, sources, engine.tokenizer, context_length=engine.context_length)
        progress = self._progress
        # Before the restore, which drops evaluations of other data.
        progress.evaluations = replace(progress.evaluations, measured_on=data.measured_on)
        if checkpoint is not None and file is not None:
            imported.require_steps_left(record, step=checkpoint.step, max_steps=data.max_steps, where=out)
            differences = self._differences
            resume.restore(
                checkpoint, record, engine=engine, data=data, progress=progress, differences=differences
            )
            imported.warn_imported(checkpoint, record, where=out)
            if file.path.parent == self.manager.directory:  # not so for a new branch
                self._saver.last_durable = checkpoint.step, file.kind == "final"
            del checkpoint  # it may be on the device, whose memory the loop measures
        elif start is not None:
            start.load(engine, config)
            progress.started_from = start.digest
        resume_point.require_not_made(self.config, data.max_steps, step=progress.step)
        option = f"--epochs {config.epochs}" if self.config.max_steps is None else "--max-steps"
        source = file.path.parent.parent if file else out
        data = resume.fit_schedule(data, given=option, step=progress.step, source=source)
        # As given: with more epochs, a resume has more steps.
        write_options(replace(data.config, max_steps=self.config.max_steps))
        progress.max_steps, progress.epoch_steps = data.max_steps, data.batches.epoch_steps
        progress.step_metrics = data.step_metrics
        self._events.emit(self._describe_start(data, sources, resumed_from=file))
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

    def _describe_start(
        self, data: PreparedData, sources: Sources, *, resumed_from: CheckpointFile | None
    ) -> RunStarted:
        engine = self.engines.current
        trained, parameters = engine.parameters
        return RunStarted(
            out=data.config.run_directory,
            model=data.config.model,
            data=as_names(data.config.data),
            weighting=sources.weighting,
            step_metrics=data.step_metrics,
            step=self._progress.step,
            max_steps=data.max_steps,
            resumed_from=resumed_from.path if resumed_from else None,
            examples=len(data.corpus),
            tokens=int(data.corpus.loss_tokens.sum()),
            counts=data.corpus.counts,
            sequences=data.corpus.sequences,
            distribution=data.distribution,
            history=self._progress.history,  # so that observers can draw the steps before
            trained=trained,
            parameters=parameters,
            engine=engine.framework,
            device=str(engine.environment().get("device", "")),
            epoch_steps=data.batches.epoch_steps,
            warmup_steps=data.warmup_steps,
            notes=(
                *sources.notes,
                *([f"--dtype {engine.dtype}"] if engine.dtype != "float32" else []),
                *template_notes(sources.training.stats, sources.training.reader.columns, engine.tokenizer),
                *engine.adapted,
            ),
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
