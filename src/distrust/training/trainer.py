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
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

from distrust import weighting
from distrust.checkpoint import Checkpoint, CheckpointFile, CheckpointManager
from distrust.checkpoint.store import RUN_SUBDIRECTORY
from distrust.config import EXAMPLES, TrainConfig
from distrust.data import IGNORED, Corpus, MicroBatch, evaluation_batches
from distrust.errors import CheckpointError, DistrustWarning, NonFiniteLoss
from distrust.training import origin, resume
from distrust.training.engine import Engine, EngineState, Losses
from distrust.training.events import (
    Evaluated,
    Event,
    Observer,
    Preparing,
    RunEnded,
    RunStarted,
    StepEnded,
)
from distrust.training.plan import Examples, Plan, Sources, make_plan, read_sources
from distrust.training.plan import Progress as ReportProgress
from distrust.training.progress import Progress
from distrust.training.saver import Saver
from distrust.training.schedule import learning_rate
from distrust.training.signals import StopRequest

#: How many examples a message names; the error's attribute has them all.
EXAMPLES_NAMED = 20


class _Stopped(Exception):
    """A signal came before the first step."""


class DistrustTrainer:
    """Trains as a config says; called again with the same config, it goes on where it was.

    Args:
        config: what to train, on what, and how.
        engine: trains it; by default the one that ``distrust.engines`` creates of the config.
        observers: each is called with every event.
        examples: dicts to train on, instead of ``config.data``. They pass the same checks as a file's, and
            are read once each time ``train`` is called; those of a generator, only the first time.
        eval_examples: dicts to evaluate on, instead of ``config.eval_data``.

    Raises:
        ConfigError: examples beside the options that would name or mix them.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        engine: Engine | None = None,
        observers: Iterable[Observer] = (),
        examples: Examples | None = None,
        eval_examples: Examples | None = None,
    ) -> None:
        if examples is not None:
            config = replace(config, data=EXAMPLES)
        self._config = config
        self._examples_given, self._eval_examples_given = examples, eval_examples
        self._given_engine = engine
        self._observers = tuple(observers)
        self._out = origin.folder(config)
        self._manager = CheckpointManager(
            self._out / RUN_SUBDIRECTORY,
            keep_last=config.keep_last,
            keep_best=config.keep_best,
            keep_every=config.keep_every,
            metric=config.metric,
            metric_mode=config.metric_mode,
        )
        self._progress = Progress()
        self._saver = Saver(self._manager, self._emit)
        self._observer_error: Exception | None = None
        self._engine: Engine
        self._plan: Plan

    def train(self) -> RunEnded:
        """Train to the last step, or until a signal asks to stop; then the last checkpoint is durable.

        Raises:
            DistrustError: for everything that a user can mend; see ``distrust/errors.py``.
        """
        self._observer_error = None
        with StopRequest() as stop, self._manager:
            finished = origin.finished(self._config, self._manager)
            if finished is not None:
                # Its name may not be durable yet: its writer was killed just then. An archive takes no lock.
                with contextlib.suppress(CheckpointError):
                    self._manager.acquire()
                return self._ended(finished, signal=None, already=True)
            try:
                # Before anything is made in the run's folder: it tells what is wrong with the data.
                sources = read_sources(
                    self._config,
                    examples=self._examples_given,
                    eval_examples=self._eval_examples_given,
                    report=self._reporter(stop),
                )
                self._manager.acquire()
                self._prepare(sources, stop)
            except _Stopped:
                ended = self._ended(self._newest_there(), signal=stop.signal, already=False)
            else:
                ended = self._loop(stop)
        if self._observer_error is not None:
            raise self._observer_error
        return ended

    def _loop(self, stop: StopRequest) -> RunEnded:
        begun_at, last = self._progress.step, self._plan.max_steps
        while self._progress.step < last and stop.signal is None and self._observer_error is None:
            self._step(self._progress.step + 1)
            if self._progress.step == begun_at + 1 and self._plan.config.save_every:
                # The optimizer's state stands from its first step on.
                self._saver.reserve(self._checkpoint())
            self._after_step(last=self._progress.step == last)
        self._save_what_is_not(final=self._progress.step == last)
        return self._ended(
            self._newest(),
            signal=None if self._progress.step >= last else stop.signal,
            already=begun_at >= last,
        )

    def _prepare(self, sources: Sources, stop: StopRequest) -> None:
        """Load everything, and take up the newest checkpoint if there is one.

        Raises:
            _Stopped: if a signal has come: nothing is lost, and the data may take minutes.
        """
        report = self._reporter(stop)
        report(f"loading the model {self._config.model}", 0, 0)
        engine = self._given_engine
        if engine is None:
            # Bound late: the loop names no framework, and what it is handed comes from above it.
            engine = import_module("distrust.engines").create(self._config)
        self._engine = engine
        checkpoint, file = origin.find(self._config, self._manager, framework=engine.framework)
        if checkpoint is not None:
            self._config = resume.settled(self._config, checkpoint.config, where=str(self._out))
        self._plan = make_plan(
            self._config,
            sources,
            engine.tokenizer,
            context_length=engine.context_length,
            report=report,
        )
        if checkpoint is not None and file is not None:
            self._take_up(checkpoint)
            if file.path.parent == self._manager.directory:  # a branch begins with none of its own
                self._saver.durable = checkpoint.step, file.kind == "final"
        self._emit(self._started(file))

    def _reporter(self, stop: StopRequest) -> ReportProgress:
        """Tells the observers what is prepared, and raises _Stopped if a signal has come."""

        def report(what: str, done: int, total: int) -> None:
            self._emit(Preparing(what, done, total))
            if stop.signal is not None:
                raise _Stopped

        return report

    def _take_up(self, checkpoint: Checkpoint) -> None:
        resume.require_same_fingerprints(
            self._fingerprints(), checkpoint.config, config=self._plan.config, where=str(self._out)
        )
        recorded = checkpoint.run.get("environment", {})
        if self._config.threads is None:
            self._engine.restore_environment(recorded)
        for difference in resume.environment_differences(self._engine.environment(), recorded):
            warnings.warn(f"no longer bit-identical: {difference}", DistrustWarning, stacklevel=2)
        self._engine.load_state(EngineState(checkpoint.model, checkpoint.optimizer, checkpoint.rng))
        self._progress.restore_history(checkpoint.history)
        self._progress.step = checkpoint.step
        self._progress.tokens_seen = checkpoint.metadata["tokens_seen"]
        self._progress.elapsed_seconds = checkpoint.run.get("elapsed_seconds", 0.0)
        self._progress.metrics = dict(checkpoint.metrics)

    def _step(self, step: int) -> None:
        """One optimizer step: a function of its number and of the state before it."""
        began = time.perf_counter()
        config, engine = self._plan.config, self._engine
        batches = self._plan.batches.step(step)
        tokens = sum(batch.tokens for batch in batches)
        losses = []
        for micro_step, batch in enumerate(batches):
            engine.begin_micro_step(seed=config.seed, step=step, micro_step=micro_step)
            losses.append(engine.micro_step(batch, tokens=tokens))
        norm = engine.clip_gradients(config.max_grad_norm)
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
        )
        self._remember(ended)
        self._emit(ended)

    def _remember(self, ended: StepEnded) -> None:
        progress = self._progress
        progress.step = ended.step
        progress.tokens_seen += ended.tokens
        progress.elapsed_seconds += ended.seconds
        progress.metrics = {"loss": ended.loss}  # an eval loss is of the step it was measured at
        progress.remember(ended)

    def _after_step(self, *, last: bool) -> None:
        config, step = self._plan.config, self._progress.step
        if self._plan.evaluation is not None and (last or step % config.eval_every == 0):
            self._evaluate(self._plan.evaluation)
        if config.save_every and step % config.save_every == 0 and not last:
            self._save(final=False)
        self._saver.poll()

    def _save_what_is_not(self, *, final: bool) -> None:
        """The state that the run ends in: as the final one, or to go on from."""
        self._saver.settle()
        durable = self._saver.durable
        stands = durable is not None and durable[0] == self._progress.step and (durable[1] or not final)
        if self._progress.step > 0 and not stands:
            self._save(final=final)
        self._saver.settle(strict=True)

    def _evaluate(self, corpus: Corpus) -> None:
        batches = evaluation_batches(
            corpus, batch_size=self._plan.config.batch_size, pad_token_id=self._plan.pad_token_id
        )
        total = sum(self._engine.evaluate(batch).cross_entropy.sum() for batch in batches)
        loss = float(total / corpus.loss_tokens.sum())
        self._progress.metrics["eval_loss"] = loss
        self._emit(Evaluated(self._progress.step, loss))

    def _save(self, *, final: bool) -> None:
        self._saver.start(self._finite_checkpoint, final=final)

    def _finite_checkpoint(self) -> Checkpoint:
        step = self._progress.step
        if not self._engine.is_finite():
            raise NonFiniteLoss(
                f"step {step}: its update left weights or moments that are not finite; it is not saved, and "
                f"{self._saver.standing()}. Lower --learning-rate or --weight-decay",
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
            run={
                **config.with_effect("free"),
                **config.with_effect("bits"),
                "environment": self._engine.environment(),
                "elapsed_seconds": progress.elapsed_seconds,
            },
        )

    def _ended(self, file: CheckpointFile | None, *, signal: int | None, already: bool) -> RunEnded:
        ended = RunEnded(
            step=file.step if file else 0,
            path=file.path if file else None,
            state_digest=file.state_digest if file else None,
            stall_seconds=self._saver.stall_seconds,
            signal=signal,
            already=already,
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
        if plan.config.schedule != "constant" and plan.max_steps > plan.schedule_steps:
            warnings.warn(
                f"the schedule ends at step {plan.schedule_steps}: beyond it the learning rate is 0. "
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
            effective_examples=weighting.effective_sample_size(plan.weights),
            weight_range=(float(plan.weights.min()), float(plan.weights.max())),
            trained=trained,
            parameters=parameters,
            epoch_steps=len(plan.corpus) / plan.batches.examples_per_step,
        )

    def _fingerprints(self) -> dict[str, str]:
        return {"data": self._plan.corpus.fingerprint, "model": self._engine.fingerprint()}

    def _learning_rate(self, step: int) -> float:
        config = self._plan.config
        return learning_rate(
            step,
            peak=config.learning_rate,
            warmup_steps=config.warmup_steps,
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
            f"step {step}: {what} is not finite; the step was not made, and {self._saver.standing()}. "
            f"Examples: {', '.join(guilty[:EXAMPLES_NAMED])}{more}. Look at them, or lower --learning-rate",
            step=step,
            examples=guilty,
        )

    def _examples(self, batches: Sequence[MicroBatch]) -> list[str]:
        locations = self._plan.corpus.locations
        return [str(locations[example]) for batch in batches for example in batch.examples]

    def _emit(self, event: Event) -> None:
        """Tell the observers. One that fails ends the run, but saved like any other: then it raises."""
        for observer in self._observers:
            try:
                observer(event)
            except Exception as error:
                self._observer_error = self._observer_error or error


def _mean(sums: Sequence[Any], tokens: int) -> float:
    return float(sum(part.sum() for part in sums) / tokens)


def _learned(batch: MicroBatch) -> Any:
    return (batch.labels != IGNORED).sum(axis=1)
