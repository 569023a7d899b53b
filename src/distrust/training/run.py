"""One run of the trainer: finds where to begin, loads data and engine, trains, and reports the end."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from distrust.activity import current
from distrust.checkpoint import Checkpoint, CheckpointFile, CheckpointManager
from distrust.checkpoint.remote.location import is_url
from distrust.config import TrainConfig
from distrust.config_text import from_mapping, to_words, write_options
from distrust.contract import Engine
from distrust.errors import CheckpointError, ConfigError, DistrustError, ResumeRefused, warn
from distrust.option_values import as_names
from distrust.ranks import Ranks, gather_json, leads, of_leader
from distrust.run_record import RunRecord
from distrust.training import imported, resume, resume_point
from distrust.training.agreement import require_same_options, require_same_run, require_shared_folder
from distrust.training.data_sources import Examples, Sources, read_sources, template_notes
from distrust.training.events import Broadcaster, Observer, Preparing, Reason, RunEnded, RunStarted
from distrust.training.loop import TrainingLoop
from distrust.training.memory_guard import require_limited_device
from distrust.training.mirroring import RunMirror
from distrust.training.prepare_data import PreparedData, prepare_data
from distrust.training.process import StopRequest
from distrust.training.progress import BestTracker, Progress, RunState
from distrust.training.recheck import require_repeatable
from distrust.training.resume import ReadStart, Start
from distrust.training.saver import FollowerSaver, Saver
from distrust.training.step import EngineHolder


class _StopRequested(Exception):
    """Something asked to stop before the first step."""


@dataclass(kw_only=True)
class Run:
    """One call of ``DistrustTrainer.train``. ``publish`` gets the state of the run at every event."""

    config: TrainConfig
    engines: EngineHolder
    manager: CheckpointManager
    mirror: RunMirror
    observers: Iterable[Observer]
    stop: StopRequest
    publish: Callable[[RunState], None]
    read_start: ReadStart
    ranks: Ranks

    def __post_init__(self) -> None:
        best = BestTracker(self.config.metric, self.config.metric_mode)
        self._progress = Progress(max_steps=self.config.max_steps, evaluations=best)
        self._events = Broadcaster(self.observers, publish=self._publish)
        self._saver = (Saver if leads(self.ranks) else FollowerSaver)(self.manager, self._events.emit)
        self._differences: list[str] = []  # between the config and that of the run to resume
        self._start: Start | None = None
        self._finished: tuple[CheckpointFile | None, Reason] | None = None  # if it is complete already
        self.ranks.before_exit(self.manager.close)

    def train(self, *, examples: Examples | None, eval_examples: Examples | None) -> RunEnded:
        """Train to the end, or until something asks to stop; see ``DistrustTrainer.train``."""
        with self.manager:
            ended = self._train(examples, eval_examples)
            if leads(self.ranks):
                self.mirror.finish(self.manager, self._events.emit)
            self._events.emit(ended)  # after the last save: what it reports is durable
        if self._events.error is not None:  # an observer failed; the run is saved
            raise self._events.error
        return ended

    def _train(self, examples: Examples | None, eval_examples: Examples | None) -> RunEnded:
        require_same_options(self.ranks, self.config)
        if leads(self.ranks):
            self.mirror.fetch_newer(self.manager, self._events.emit)
        resume_point.require_newest_on_leader(self.ranks, self.manager)
        options, self._differences, finished, has_start = of_leader(self.ranks, self._begin)
        if not leads(self.ranks):  # they need not see the folder of the run
            self.config = from_mapping(options, where=self.ranks.describe(0))
            self._finished = finished and (None, finished)
            self._start = self.read_start(self.config)[1] if has_start else None
        try:
            if self._finished is not None:
                file = self._finished[0]
                if file is not None:  # an earlier process may not have copied it
                    self._begin_mirror(file.step)
                return self._end_untrained(*self._finished, already_finished=True)
            with resume.errors_with(self._differences, self.config):
                # Errors in the data are raised before anything is created in the run's folder.
                sources = read_sources(
                    self.config, examples=examples, eval_examples=eval_examples, report=self._report
                )
                if leads(self.ranks):
                    self.manager.acquire()  # from here on no other process writes to the run's folder
                loop = self._prepare(sources)
        except _StopRequested:
            if self.ranks.count > 1:  # each rank notices elsewhere: the first one ends all
                raise SystemExit(128 + (self.stop.signal or signal.SIGTERM)) from None
            files = self.manager.scan().files  # by step; intact ones only
            return self._end_untrained(files[-1] if files else None, None, already_finished=False)
        already_finished = loop.stop_reason() is not None
        current.has_steps_to_lose = True
        reason = loop.run()
        durable = self._saver.last_durable
        file = self.manager.inspect(durable[0]) if durable is not None and leads(self.ranks) else None
        return self._end(file, reason, already_finished=already_finished)

    def _begin(self) -> tuple[dict[str, Any], list[str], Reason | None, bool]:
        """Settle the options, and find out whether the run is complete; what followers need of that."""
        asks_for_older = self.config.from_step is not None and self.config.branch is None
        if not asks_for_older and (path := self.manager.rescue()):
            warn(f"{path}: the process before died after this step, which was still in memory: saved")
        resume_point.require_startable(self.config, self.manager)
        if (name := self.config.from_) and not is_url(name):  # recorded: the same in every working directory
            self.config = replace(self.config, from_=os.path.abspath(name))
        record = resume_point.recorded_run(self.config, self.manager)
        if record is not None:
            self._follow_moved_start(record)
            self.config, self._differences = resume.merge_saved_options(self.config, record)
        elif self.config.from_ is not None:
            requested = self.config.non_default().items()
            self.config, self._start = self.read_start(self.config)
            inherited = self.config.non_default().items() - requested
            words = shlex.join(word for name, value in sorted(inherited) for word in to_words(name, value))
            self._events.emit(Preparing(f"starting from {self.config.from_}{f': {words}' if words else ''}"))
        if not self._differences:  # else they are reported, with those of the content
            self._finished = resume_point.find_finished_run(self.config, self.manager)
        if self._finished is not None:
            # Acquiring makes a name durable whose writer was killed. A read-only archive cannot be acquired.
            with contextlib.suppress(CheckpointError):
                self.manager.acquire()
        reason = self._finished and self._finished[1]
        return self.config.non_default(), self._differences, reason, self._start is not None

    def _follow_moved_start(self, record: RunRecord) -> None:
        """Keep the recorded name of what the run began with, if ``from_`` names equal weights elsewhere."""
        recorded, digest = record.settings.get("from"), record.fingerprints.get("from")
        if recorded and self.config.from_ not in (None, recorded):
            with contextlib.suppress(DistrustError):  # it cannot be read: a difference
                if self.read_start(self.config)[1].digest == digest:
                    self.config = replace(self.config, from_=recorded)

    def _prepare(self, sources: Sources) -> TrainingLoop:
        """Load model and data, and restore the checkpoint to resume from, if there is one, or the start.

        Raises _StopRequested at the next report: preparing large data may take minutes.
        """
        config = replace(self.config, weighting=sources.weighting)  # not "auto": it is compared and recorded
        out = config.run_directory
        self._report(f"loading the model {config.model}", 0, 0)
        engine = self._build_engine(config)
        if config.dtype == "auto":  # it is compared and recorded, too
            config = replace(config, dtype=engine.dtype)
        require_limited_device(config, engine)
        require_repeatable(config, engine)
        # Every byte of the checkpoint is verified before it is used.
        checkpoint, file = resume_point.load_resume_point(config, self.manager, engine, self.ranks)
        if checkpoint is not None:
            checkpoint, record = imported.adopt_imported(checkpoint, config)
        elif self.engines.is_spent:
            raise ResumeRefused(
                f"{out}: the engine has already been trained, and no checkpoint was saved to restore it "
                "from; give a new engine"
            )
        config = replace(config, date=config.date or of_leader(self.ranks, date.today().isoformat))
        data = prepare_data(config, sources, engine.tokenizer, context_length=engine.context_length)
        require_same_run(self.ranks, data, engine)
        progress = self._progress
        # Before the restore, which drops evaluations of other data.
        progress.evaluations = replace(progress.evaluations, measured_on=data.measured_on)
        if checkpoint is not None:
            self._restore(checkpoint, record, file, data)
            del checkpoint  # it may be on the device, whose memory the loop measures
        elif self._start is not None:
            self._start.load(engine, config)
            progress.started_from = self._start.digest
        resume_point.require_not_made(self.config, data.max_steps, step=progress.step)
        option = f"--epochs {config.epochs}" if self.config.max_steps is None else "--max-steps"
        source = file.path.parent.parent if file else out
        self._begin_mirror(progress.step)
        data = resume.fit_schedule(data, given=option, step=progress.step, source=source)
        if leads(self.ranks):  # as given: with more epochs, a resume has more steps
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
            ranks=self.ranks,
            mirror=self.mirror,
        )

    def _restore(
        self, checkpoint: Checkpoint, record: RunRecord, file: CheckpointFile | None, data: PreparedData
    ) -> None:
        """Go on from a checkpoint, if it is one of this run."""
        out = data.config.run_directory
        imported.require_steps_left(record, step=checkpoint.step, max_steps=data.max_steps, where=out)
        resume.restore(
            checkpoint,
            record,
            engine=self.engines.current,
            data=data,
            progress=self._progress,
            differences=self._differences,
        )
        imported.warn_imported(checkpoint, record, where=out)
        kind = file and file.path.parent == self.manager.directory and file.kind  # not of a new branch
        if kind := of_leader(self.ranks, lambda: kind):
            self._saver.last_durable = checkpoint.step, kind == "final"

    def _build_engine(self, config: TrainConfig) -> Engine:
        engine = self.engines.build(config)
        if engine.world_size != self.ranks.count:
            raise ConfigError(
                f"engine: it sums the gradients of {engine.world_size} ranks, but {self.ranks.count} train; "
                "build it by engines.create_engine(config, ranks=ranks), and give ranks to the trainer, too"
            )
        if engine.peers is not None:
            require_shared_folder(self.ranks, self.manager.directory)
            self.manager.share(engine.peers)
            self._saver = Saver(self.manager, self._events.emit)  # of a follower, too
        return engine

    def _begin_mirror(self, step: int) -> None:
        if leads(self.ranks):
            self.mirror.begin(self.manager, step, self._events.emit, self._require_no_stop)

    def _report(self, task: str, completed: int, total: int) -> None:
        """Report the progress of the preparation; raises _StopRequested if something asks to stop."""
        self._events.emit(Preparing(task, completed, total))
        self._require_no_stop()

    def _require_no_stop(self) -> None:
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
                *([f"each checkpoint is copied to {self.mirror.name}"] if self.mirror.name else []),
                *([f"--dtype {engine.dtype}"] if engine.dtype != "float32" else []),
                *template_notes(sources.training.stats, sources.training.reader.columns, engine.tokenizer),
                *engine.adapted,
            ),
            ranks=tuple(gather_json(self.ranks, platform.node())) if self.ranks.count > 1 else (),
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
        newest = (file.step, str(file.path), file.state_digest) if file else (0, None, None)
        step, path, digest = of_leader(self.ranks, lambda: newest)
        notices = [notice for notice in gather_json(self.ranks, self.stop.notice) if notice]
        return RunEnded(
            step=step,
            path=Path(path) if path else None,
            state_digest=digest,
            stall_seconds=self._saver.stall_seconds,
            reason=reason or self.stop.reason,
            signal=None if reason else self.stop.signal,
            already_finished=already_finished,
            notice=notices[0] if notices and not reason else None,
        )

    def _publish(self) -> None:
        out, checkpoint = self.config.run_directory, self._saver.last_path
        self.publish(self._progress.snapshot(out=out, checkpoint=checkpoint))
