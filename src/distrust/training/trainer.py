"""DistrustTrainer: the loop. It knows no framework, and no format of a checkpoint.

The run is a function of (config, data, base model, seed). Each step is a function of its number and of the
state before it: its batches, its learning rate and its random numbers come from the number alone. Saving
happens only between steps. So a run that was killed anywhere goes on from its newest checkpoint and makes
the very steps that it would have made.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from typing import Any

from distrust.checkpoint import Checkpoint, CheckpointFile, CheckpointManager
from distrust.checkpoint.catalog import RUN_SUBDIRECTORY
from distrust.checkpoint.files import checkpoint_file_name
from distrust.config import EXAMPLES, STEP_METRICS, TrainConfig
from distrust.contract import Engine, EngineState, Losses
from distrust.data import IGNORED, MicroBatch
from distrust.errors import (
    CheckpointError,
    ConfigError,
    CorruptCheckpoint,
    DistrustWarning,
    NonFiniteLoss,
    OutOfMemory,
    ResumeRefused,
)
from distrust.training import imported, resume, resume_point
from distrust.training.best_tracker import BestTracker
from distrust.training.data_sources import Examples, Sources, read_sources
from distrust.training.data_sources import Progress as ReportProgress
from distrust.training.events import (
    Evaluated,
    Event,
    MemoryReset,
    Observer,
    Preparing,
    Reason,
    RunEnded,
    RunStarted,
    StepEnded,
)
from distrust.training.memory_guard import GIB, MemoryGuard
from distrust.training.prefetch import Prefetcher
from distrust.training.prepare_data import PreparedData, prepare_data
from distrust.training.progress import Progress
from distrust.training.run_lock import exclusive_run
from distrust.training.saver import Saver
from distrust.training.schedule import learning_rate, warmup
from distrust.training.signals import StopRequest
from distrust.training.state import Best, RunState

#: How many examples a message names; the error's attribute has them all.
EXAMPLES_NAMED = 20


class _Stopped(Exception):
    """Something asked to stop before the first step."""


class DistrustTrainer:
    """Trains as a config says; called again with the same config, it goes on where it was.

    One run at a time trains in a process.

    Args:
        config: what to train, on what, and how.
        engine: trains it, or makes of the config what does; by default, ``engines.create_engine``. One
            that is given, not made, cannot be built again.
        observers: each is called with every event, in the thread that trains, which waits for it meanwhile.
        examples: dicts to train on, instead of ``config.data``. They pass the same checks as a file's, and
            are read once each time ``train`` is called; those of a generator, only the first time.
        eval_examples: dicts to evaluate on, instead of ``config.eval_data``.

    Raises:
        ConfigError: if memory is to be reset, and the engine cannot be built again; examples beside the
            options that would name or mix them.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        engine: Engine | Callable[[TrainConfig], Engine] | None = None,
        observers: Iterable[Observer] = (),
        examples: Examples | None = None,
        eval_examples: Examples | None = None,
    ) -> None:
        if engine is not None and not callable(engine) and (config.reload_every or config.reload_above):
            raise ConfigError(
                "--reload-every and --reload-above build the engine again: give what makes it of a config, "
                "engine=lambda config: ..., instead of the engine"
            )
        if examples is not None:
            config = replace(config, data=EXAMPLES)
        self._config = config
        self._examples_given, self._eval_examples_given = examples, eval_examples
        self._given_engine = engine
        self._observers = tuple(observers)
        self._out = resume_point.run_folder(config)
        self._manager = CheckpointManager(
            self._out / RUN_SUBDIRECTORY,
            keep_last=config.keep_last,
            keep_best=config.keep_best,
            keep_every=config.keep_every,
            metric=config.metric,
            metric_mode=config.metric_mode,
        )
        self._state = RunState(out=self._out, max_steps=config.max_steps)
        self._stop: StopRequest | None = None
        self._engine_used = False
        self._engine: Engine
        self._memory: MemoryGuard
        self._plan: PreparedData
        self._begin_anew()

    @property
    def state(self) -> RunState:
        """Where the run is, as of the last event; any thread may ask, at any time.

        Before the first call of :meth:`train` it knows nothing of what stands on disk.
        """
        return self._state

    def train(self) -> RunEnded:
        """Train to the last step, or until something asks to stop; then the last checkpoint is durable.

        Raises:
            RunInProgress: if another run of this process is training.
            DistrustError: for everything else that a user can mend; see ``distrust/errors.py``.
        """
        with self._under_way() as stop:
            return self._train(stop)

    async def train_async(self) -> RunEnded:
        """:meth:`train` in a thread of its own: the event loop goes on with other things.

        Cancelling stops the run after its step; CancelledError is raised once its checkpoint is durable, and
        cancelling again does not change that. Signals are heeded where the event loop is the main thread's.

        Raises:
            DistrustError: as :meth:`train` does; also where it was cancelled and could not be saved.
        """
        from distrust.training.asynchronous import run_in_thread

        with self._under_way() as stop:
            return await run_in_thread(lambda: self._train(stop), ask_to_stop=stop.set)

    def stop(self) -> None:
        """Ask the run under way to save and end after its step; from any thread, or from an observer.

        The same config goes on from there. Without a run under way, nothing happens.
        """
        stop = self._stop  # once: the run may end meanwhile
        if stop is not None:
            stop.set()

    @contextlib.contextmanager
    def _under_way(self) -> Iterator[StopRequest]:
        with exclusive_run(self._out), StopRequest() as stop:
            self._begin_anew()
            self._stop, self._state = stop, replace(self._state, running=True)
            try:
                yield stop
            finally:
                self._stop, self._state = None, replace(self._state, running=False)

    def _begin_anew(self) -> None:
        """Forget what an earlier call left in memory: what counts is what it left on disk."""
        config = self._config
        self._progress = Progress(evaluations=BestTracker(config.metric, config.metric_mode))
        self._saver = Saver(self._manager, self._emit)
        self._observer_error: Exception | None = None
        self._stall_told = 0.0

    def _train(self, stop: StopRequest) -> RunEnded:
        with self._manager:
            resume_point.require_startable(self._config, self._manager)
            finished = resume_point.find_finished_run(self._config, self._manager)
            if finished is not None:
                # Its name may not be durable yet: its writer was killed just then. An archive takes no lock.
                with contextlib.suppress(CheckpointError):
                    self._manager.acquire()
                return self._ended_there(*finished, signal=None, already=True)
            try:
                # Before anything is made in the run's folder: it tells what is wrong with the data.
                sources = read_sources(
                    self._config,
                    examples=self._examples_given,
                    eval_examples=self._eval_examples_given,
                    report=self._reporter(stop),
                )
                self._require_evaluation(sources)
                self._manager.acquire()
                self._prepare(sources, stop)
            except _Stopped:
                ended = self._ended_there(
                    self._newest_there(), self._reason(stop, over=None), signal=stop.signal, already=False
                )
            else:
                ended = self._loop(stop)
        if self._observer_error is not None:
            raise self._observer_error
        return ended

    def _loop(self, stop: StopRequest) -> RunEnded:
        begun_at, begun_over = self._progress.step, self._over()
        self._memory = MemoryGuard(self._plan.config, self._engine)
        if not begun_over:
            self._require_room(before_any_step=True)
        if begun_at == 0 and self._plan.config.eval_at_start:
            self._evaluate()
        with Prefetcher(self._plan.batches.step, last=self._plan.max_steps) as batches:
            while self._goes_on(stop):
                step = self._progress.step + 1
                self._step(step, batches.get(step))
                if step == begun_at + 1 and self._plan.config.save_every:
                    # The optimizer's state stands from its first step on.
                    self._saver.reserve(self._checkpoint())
                self._after_step()
                if self._goes_on(stop):
                    self._mind_memory(stop)
        over = self._over()
        self._save_what_is_not(final=over is not None)
        return self._ended(
            self._newest(),
            reason=self._reason(stop, over=over),
            signal=None if over else stop.signal,
            already=begun_over is not None,
        )

    def _goes_on(self, stop: StopRequest) -> bool:
        """Whether there is another step to make."""
        return not (self._over() or stop.is_set or self._observer_error)

    def _over(self) -> Reason | None:
        """Whether there is nothing left to do, and why: a function of the state alone, so of the run."""
        if self._progress.step >= self._plan.max_steps:
            return "finished"
        exhausted = self._progress.evaluations.out_of_patience(self._plan.config.early_stopping_patience)
        return "early_stopping" if exhausted else None

    def _reason(self, stop: StopRequest, *, over: Reason | None) -> Reason:
        if over is not None:
            return over
        if stop.signal is not None:
            return "signal"
        return "stop" if stop.asked else "error"

    def _prepare(self, sources: Sources, stop: StopRequest) -> None:
        """Load everything, and take up the newest checkpoint if there is one.

        Raises:
            _Stopped: if something asks to stop: nothing is lost, and the data may take minutes.
        """
        report = self._reporter(stop)
        report(f"loading the model {self._config.model}", 0, 0)
        engine = self._engine = self._make_engine()
        checkpoint, file = resume_point.find_resume_point(
            self._config, self._manager, framework=engine.framework
        )
        if checkpoint is not None:
            checkpoint = imported.adopt_imported(checkpoint, self._config, where=str(self._out))
            self._config = resume.merge_saved_options(self._config, checkpoint.config, where=str(self._out))
        elif self._engine_used:
            raise ResumeRefused(
                f"{self._out}: the engine has been trained, and nothing was saved that it could go back to; "
                "give a new engine"
            )
        self._plan = prepare_data(
            self._config,
            sources,
            engine.tokenizer,
            context_length=engine.context_length,
            report=report,
        )
        self._progress.evaluations = replace(self._progress.evaluations, measured_on=self._measured_on())
        if checkpoint is not None and file is not None:
            imported.require_steps_left(checkpoint, max_steps=self._plan.max_steps, where=self._out)
            self._take_up(checkpoint)
            imported.warn_imported(checkpoint, where=self._out)
            if file.path.parent == self._manager.directory:  # a branch begins with none of its own
                self._saver.durable = checkpoint.step, file.kind == "final"
        self._require_metric()
        self._state = replace(self._state, max_steps=self._plan.max_steps, epoch_steps=self._epoch_steps())
        self._emit(self._started(file))

    def _require_evaluation(self, sources: Sources) -> None:
        config = self._config
        if config.early_stopping_patience and sources.evaluation is None and not config.eval_fraction:
            raise ConfigError(
                "--early-stopping-patience: there is nothing to evaluate on; give --eval-data, or "
                "--eval-fraction"
            )

    def _require_metric(self) -> None:
        """What the best checkpoint is told by has to be logged; the default may be without an eval set."""
        config, evaluation = self._plan.config, self._plan.evaluation
        known = STEP_METRICS + (() if evaluation is None else evaluation.metric_names)
        if config.metric in known or (evaluation is None and config.metric == TrainConfig.metric):
            return
        there = "there is nothing to evaluate on; give --eval-data, or --eval-fraction"
        if evaluation is not None:
            there = f"no such source class is evaluated; there are {', '.join(known)}"
        raise ConfigError(f"--metric {config.metric}: {there}")

    def _make_engine(self) -> Engine:
        engine = self._given_engine
        if engine is None:
            # Bound late: the loop names no framework, and what it is handed comes from above it.
            engine = import_module("distrust.engines").create_engine
        return engine(self._config) if callable(engine) else engine

    def _reporter(self, stop: StopRequest) -> ReportProgress:
        """Tells the observers what is prepared, and raises _Stopped if something asks to stop."""

        def report(what: str, done: int, total: int) -> None:
            self._emit(Preparing(what, done, total))
            if stop.is_set:
                raise _Stopped

        return report

    def _take_up(self, checkpoint: Checkpoint) -> None:
        resume.require_same_fingerprints(
            self._fingerprints(),
            checkpoint.config,
            config=self._plan.config,
            where=str(self._out),
            known_only=imported.is_imported(checkpoint.run),
        )
        recorded = checkpoint.run.get("environment", {})
        if self._config.threads is None:
            self._engine.restore_environment(recorded)
        self._engine.load_state(EngineState(checkpoint.model, checkpoint.optimizer, checkpoint.rng))
        quantized = self._config.quantization != "none"
        current = self._engine.environment()
        for difference in resume.environment_differences(current, recorded, quantized=quantized):
            warnings.warn(f"no longer bit-identical: {difference}", DistrustWarning, stacklevel=2)
        if self._progress.evaluations.used_other_data(checkpoint.run.get("evaluations")):
            warnings.warn(
                "this is evaluated on other data than the run was until now: which checkpoint is the best, "
                "and how long it is that none was better, is told anew",
                DistrustWarning,
                stacklevel=2,
            )
        self._progress.restore_history(checkpoint.history)
        self._progress.restore(
            step=checkpoint.step,
            metadata=checkpoint.metadata,
            metrics=checkpoint.metrics,
            run=checkpoint.run,
        )

    def _step(self, step: int, batches: Sequence[MicroBatch]) -> None:
        """One optimizer step: a function of its number and of the state before it."""
        began = time.perf_counter()
        config, engine = self._plan.config, self._engine
        self._engine_used = self._given_engine is engine  # not one that was made
        tokens = sum(batch.tokens for batch in batches)
        losses = []
        for micro_step, batch in enumerate(batches):
            engine.begin_micro_step(seed=config.seed, step=step, micro_step=micro_step)
            losses.append(engine.micro_step(batch, tokens=tokens))
        norm = engine.clip_gradients(self._max_norm(batches, tokens))
        self._require_finite(step, batches, losses, norm)
        rate = self._learning_rate(step)
        self._saver.wait_copied()  # the copy of what changes now ran beside the passes above
        engine.update(learning_rate=rate)

        ended = StepEnded(
            step=step,
            loss=_mean([part.cross_entropy for part in losses], tokens),
            weighted_loss=_mean([part.weighted for part in losses], tokens),
            distrust=_mean([batch.distrust * _learned(batch) for batch in batches], tokens),
            learning_rate=rate,
            gradient_norm=norm,
            tokens=tokens,
            seconds=time.perf_counter() - began,
            stall_seconds=self._saver.stall_seconds - self._stall_told,
            memory_bytes=self._memory.observe_step(engine),
        )
        self._stall_told = self._saver.stall_seconds
        self._remember(ended)
        self._emit(ended)

    def _max_norm(self, batches: Sequence[MicroBatch], tokens: int) -> float:
        """What this step's gradient is scaled down to; 0 for no clipping.

        A weighted gradient is larger by its weights: clipped to one norm for all steps, it would lose them
        again. With equal weights the factor is exactly 1.
        """
        if self._plan.config.clipping == "plain":
            return self._plan.config.max_grad_norm
        return self._plan.config.max_grad_norm * _mean([batch.weights for batch in batches], tokens)

    def _remember(self, ended: StepEnded) -> None:
        progress = self._progress
        progress.step = ended.step
        progress.tokens_seen += ended.tokens
        progress.elapsed_seconds += ended.seconds
        progress.remember(ended)

    def _after_step(self) -> None:
        config, step = self._plan.config, self._progress.step
        best = False
        if self._over() or step % config.eval_every == 0:
            best = self._evaluate()
        # The best one so far may be the best of all: it does not wait for the next save.
        due = step % config.save_every == 0 or (best and config.keep_best) if config.save_every else False
        if due and not self._over():
            self._save(final=False)
        self._saver.poll()

    def _mind_memory(self, stop: StopRequest) -> None:
        if self._memory.reset_due(self._progress.step) and self._is_saved_for_good():
            if not self._goes_on(stop):
                return  # stopped while it was saved: nothing need be loaded once more
            self._reset_memory()
        self._require_room()

    def _is_saved_for_good(self) -> bool:
        """Save this step, and read it back: it is about to be all that is left of the run's state."""
        step = self._progress.step
        self._saver.wait()
        if not self._saver.is_durable(step):
            self._save(final=False)
            self._saver.wait()  # one that failed was warned of: the run goes on, without a reset
        try:
            if self._saver.is_durable(step):
                self._manager.validate(step)
                return True
        except CorruptCheckpoint as error:
            warnings.warn(f"{error}. Memory is not reset at step {step}", DistrustWarning, stacklevel=2)
        return False

    def _reset_memory(self) -> None:
        """Drop model, optimizer and caches, and build them again from the base model and the checkpoint."""
        began, before = time.perf_counter(), self._memory.used_bytes
        self._engine.close()
        del self._engine
        self._engine = self._make_engine()
        self._take_up(self._manager.load(self._progress.step, framework=self._engine.framework))
        self._memory.restart(self._engine)
        seconds = time.perf_counter() - began
        self._emit(MemoryReset(self._progress.step, before, self._memory.used_bytes, seconds))

    def _require_room(self, *, before_any_step: bool = False) -> None:
        """Stop, saved, before a step that would take more memory than it may."""
        excess = self._memory.excess()
        if excess is None:
            return
        self._save_what_is_not(final=False)
        advice = (
            "Raise the bound, or add --reload-above or --gradient-checkpointing, and the same command goes "
            "on; a new run may take a smaller --batch-size"
        )
        if before_any_step and excess.now > excess.bound:
            advice = (
                "Libraries, data and model take as much before any step: raise the bound, or begin with a "
                "smaller --model"
            )
        raise OutOfMemory(
            f"--max-memory {excess.bound / GIB:g}: at step {self._progress.step} the run takes "
            f"{excess.now / GIB:.2f} GiB of {excess.place}, and the next step may take "
            f"{excess.next_step / GIB:.2f}; {self._saver.describe_durable()}. {advice}"
        )

    def _save_what_is_not(self, *, final: bool) -> None:
        """The state that the run ends in: as the final one, or to go on from."""
        self._saver.wait()
        if self._progress.step > 0 and not self._saver.is_durable(self._progress.step, final=final):
            self._save(final=final)
        self._saver.wait(strict=True)

    def _evaluate(self) -> bool:
        """Evaluate, and say whether that was the best evaluation so far."""
        evaluation, progress = self._plan.evaluation, self._progress
        if evaluation is None:
            return False
        metrics = evaluation.measure(
            lambda batch: self._engine.evaluate(batch).cross_entropy,
            batch_size=self._plan.config.batch_size,
            pad_token_id=self._plan.pad_token_id,
        )
        progress.metrics.update(metrics)
        progress.evaluations = progress.evaluations.update(progress.metrics, step=progress.step)
        self._emit(Evaluated(progress.step, metrics))
        return progress.evaluations.best_step == progress.step

    def _save(self, *, final: bool) -> None:
        self._saver.start(self._finite_checkpoint, final=final)

    def _finite_checkpoint(self) -> Checkpoint:
        step = self._progress.step
        if not self._engine.is_finite():
            raise NonFiniteLoss(
                f"step {step}: its update left weights or moments that are not finite; it is not saved, and "
                f"{self._saver.describe_durable()}. Lower --learning-rate or --weight-decay",
                step=step,
                examples=self._examples(self._plan.batches.step(step)),
            )
        return self._checkpoint()

    def _checkpoint(self) -> Checkpoint:
        """All that a run is, in one place."""
        config, progress, state = self._plan.config, self._progress, self._engine.state()
        return Checkpoint(
            step=progress.step,
            model=state.model,
            optimizer=state.optimizer,
            rng=state.rng,
            history=progress.history_arrays(),
            config={**config.with_effect("result"), resume.FINGERPRINTS: self._fingerprints()},
            metadata={"tokens_seen": progress.tokens_seen},
            metrics=progress.metrics,
            measured_on=self._measured_on(),
            run={
                **config.with_effect("free"),
                **config.with_effect("bits"),
                "corpus": {
                    "examples": len(self._plan.corpus),
                    "tokens": int(self._plan.corpus.loss_tokens.sum()),
                },
                "environment": self._engine.environment(),
                "elapsed_seconds": progress.elapsed_seconds,
                "evaluations": asdict(progress.evaluations),
                **({imported.CONTINUES: progress.continues} if progress.continues else {}),
            },
        )

    def _ended_there(
        self, file: CheckpointFile | None, reason: Reason, *, signal: int | None, already: bool
    ) -> RunEnded:
        """The end of a run whose state was not taken up: what its newest checkpoint says of itself."""
        if file is not None:
            run = file.header.run_info.get("extra", {})
            self._progress.restore(
                step=file.step, metadata=file.metadata, metrics=file.header.saved_metrics, run=run
            )
            self._state = replace(self._state, max_steps=self._config.max_steps or run.get("max_steps"))
            self._saver.durable = file.step, file.kind == "final"
        return self._ended(file, reason=reason, signal=signal, already=already)

    def _ended(
        self, file: CheckpointFile | None, *, reason: Reason, signal: int | None, already: bool
    ) -> RunEnded:
        ended = RunEnded(
            step=file.step if file else 0,
            path=file.path if file else None,
            state_digest=file.state_digest if file else None,
            stall_seconds=self._saver.stall_seconds,
            reason=reason,
            signal=signal,
            already_finished=already,
        )
        self._emit(ended)
        return ended

    def _newest(self) -> CheckpointFile | None:
        durable = self._saver.durable
        return None if durable is None else self._manager.inspect(durable[0])

    def _newest_there(self) -> CheckpointFile | None:
        files = self._manager.scan().files
        return files[-1] if files else None

    def _started(self, resumed_from: CheckpointFile | None) -> RunStarted:
        plan = self._plan
        schedule_ends = max(plan.schedule_steps, self._warmup_steps())
        if plan.config.schedule != "constant" and plan.max_steps > schedule_ends:
            warnings.warn(
                f"the schedule ends at step {schedule_ends}: beyond it the learning rate is 0. "
                "To learn on, begin a new run with --schedule-steps, or with --schedule constant",
                DistrustWarning,
                stacklevel=2,
            )
        trained, parameters = self._engine.parameters
        return RunStarted(
            out=self._out,
            step=self._progress.step,
            max_steps=plan.max_steps,
            resumed_from=resumed_from.path if resumed_from else None,
            examples=len(plan.corpus),
            tokens=int(plan.corpus.loss_tokens.sum()),
            truncated=plan.corpus.truncated,
            tokens_cut=plan.corpus.tokens_cut,
            distribution=plan.distribution,
            history=self._progress.history,
            trained=trained,
            parameters=parameters,
            engine=self._engine.framework,
            device=str(self._engine.environment().get("device", "")),
            epoch_steps=self._epoch_steps(),
            warmup_steps=self._warmup_steps(),
        )

    def _measured_on(self) -> str:
        """The fingerprint of the eval set, where the best checkpoint is told by it."""
        evaluation = self._plan.evaluation
        if evaluation is None or self._plan.config.metric in STEP_METRICS:
            return ""
        return evaluation.corpus.fingerprint

    def _epoch_steps(self) -> float:
        return self._plan.batches.epoch_steps

    def _warmup_steps(self) -> int:
        config = self._plan.config
        return warmup(config.warmup_steps, config.warmup_ratio, schedule_steps=self._plan.schedule_steps)

    def _fingerprints(self) -> dict[str, str]:
        return {"data": self._plan.corpus.fingerprint, "model": self._engine.fingerprint()}

    def _learning_rate(self, step: int) -> float:
        config = self._plan.config
        return learning_rate(
            step,
            peak=config.learning_rate,
            warmup_steps=self._warmup_steps(),
            schedule=config.schedule,
            schedule_steps=self._plan.schedule_steps,
        )

    def _require_finite(
        self, step: int, batches: Sequence[MicroBatch], losses: Sequence[Losses], norm: float
    ) -> None:
        """No step is made on a loss or gradient that is not finite, so none is ever saved."""
        drawn = self._examples(batches)
        per_example = [loss for part in losses for loss in part.weighted]
        bad = [name for name, loss in zip(drawn, per_example, strict=True) if not math.isfinite(loss)]
        if not bad and math.isfinite(norm):
            return
        what = "the loss" if bad else f"the gradient norm ({norm})"
        guilty = bad or drawn
        more = f" and {len(guilty) - EXAMPLES_NAMED} more" if len(guilty) > EXAMPLES_NAMED else ""
        raise NonFiniteLoss(
            f"step {step}: {what} is not finite; the step was not made, and "
            f"{self._saver.describe_durable()}. Examples: {', '.join(guilty[:EXAMPLES_NAMED])}{more}. "
            "Look at them, or lower --learning-rate",
            step=step,
            examples=guilty,
        )

    def _examples(self, batches: Sequence[MicroBatch]) -> list[str]:
        locations = self._plan.corpus.locations
        return [str(locations[example]) for batch in batches for example in batch.examples]

    def _current_state(self) -> RunState:
        progress, durable = self._progress, self._saver.durable
        rates, evaluations = progress.history["learning_rate"], progress.evaluations
        metrics = dict(progress.metrics)
        if evaluations.loss is not None:
            metrics["eval_loss"] = evaluations.loss
        return replace(
            self._state,
            step=progress.step,
            tokens_seen=progress.tokens_seen,
            elapsed_seconds=progress.elapsed_seconds,
            learning_rate=rates[-1] if rates else None,
            metrics=metrics,
            best=None
            if evaluations.best is None
            else Best(evaluations.metric, evaluations.best, evaluations.best_step),
            checkpoint=None
            if durable is None
            else self._manager.directory
            / checkpoint_file_name(durable[0], "final" if durable[1] else "periodic"),
        )

    def _emit(self, event: Event) -> None:
        """Tell the observers. One that fails ends the run, but saved like any other: then it raises."""
        self._state = self._current_state()
        for observer in self._observers:
            try:
                observer(event)
            except Exception as error:
                self._observer_error = self._observer_error or error


def _mean(sums: Sequence[Any], tokens: int) -> float:
    return float(sum(part.sum() for part in sums) / tokens)


def _learned(batch: MicroBatch) -> Any:
    return (batch.labels != IGNORED).sum(axis=1)
