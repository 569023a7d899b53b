"""DistrustTrainer: the loop. It knows no framework, and no format of a checkpoint.

The run is a function of (config, data, base model, seed). Each step is a function of its number and of the
state before it: its batches, its learning rate and its random numbers come from the number alone. Saving
happens only between steps. So a run that was killed anywhere goes on from its newest checkpoint and makes
the very steps that it would have made.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from distrust import weighting
from distrust.checkpoint import Checkpoint, CheckpointFile, CheckpointManager, PendingSave
from distrust.checkpoint.store import RUN_SUBDIRECTORY
from distrust.config import TrainConfig
from distrust.data import IGNORED, MicroBatch, evaluation_batches
from distrust.errors import DistrustWarning, NonFiniteLoss
from distrust.training import origin, resume
from distrust.training.engine import Engine, EngineState, Losses
from distrust.training.events import (
    CheckpointStarted,
    Evaluated,
    Event,
    Observer,
    Preparing,
    RunEnded,
    RunStarted,
    StepEnded,
)
from distrust.training.plan import Plan, make_plan, read_sources
from distrust.training.progress import HISTORY, Progress
from distrust.training.schedule import learning_rate
from distrust.training.signals import StopRequest

#: How many examples a message names; the error's attribute has them all.
EXAMPLES_NAMED = 20


class DistrustTrainer:
    """Trains as a config says; called again with the same config, it goes on where it was.

    Args:
        config: what to train, on what, and how.
        engine: trains it; by default the one that ``distrust.engines`` creates of the config.
        observers: each is called with every event.
    """

    def __init__(
        self, config: TrainConfig, *, engine: Engine | None = None, observers: Iterable[Observer] = ()
    ) -> None:
        self._config = config
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
        self._saved_step: int | None = None
        self._steps_made = 0
        self._engine: Engine
        self._plan: Plan

    def train(self) -> RunEnded:
        """Train to the last step, or until a signal asks to stop; then the last checkpoint is durable.

        Raises:
            DistrustError: for everything that a user can mend; see ``distrust/errors.py``.
        """
        with StopRequest() as stop, self._manager:
            self._manager.acquire()
            finished = origin.finished(self._config, self._manager)
            if finished is not None:
                return self._ended(finished, stop, already=True)
            self._prepare()
            max_steps = self._plan.config.max_steps
            assert max_steps is not None  # noqa: S101 - settled by the plan
            while self._progress.step < max_steps and stop.signal is None:
                self._steps_made += 1
                self._step(self._progress.step + 1)
                self._after_step(last=self._progress.step == max_steps)
            if self._saved_step != self._progress.step and self._progress.step > 0:
                self._save(final=False)
            return self._ended(self._newest(), stop, already=self._steps_made == 0 and stop.signal is None)

    def _prepare(self) -> None:
        """Load everything, and take up the newest checkpoint if there is one."""
        sources = read_sources(self._config)  # first: it is quick, and tells what is wrong with the data
        self._emit(Preparing(f"loading the model {self._config.model}"))
        engine = self._given_engine
        if engine is None:
            # Bound late: the loop names no framework, and what it is handed comes from above it.
            engine = import_module("distrust.engines").create(self._config)
        self._engine = engine
        checkpoint, path = origin.find(self._config, self._manager, framework=engine.framework)
        if checkpoint is not None:
            self._config = resume.settled(self._config, checkpoint.config, where=str(self._out))
        self._plan = make_plan(
            self._config,
            sources,
            engine.tokenizer,
            context_length=engine.context_length,
            report=lambda what, done, total: self._emit(Preparing(what, done, total)),
        )
        if checkpoint is not None:
            self._take_up(checkpoint)
        self._emit(self._started(path))

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
        if self._manager.list_checkpoints():  # not so in a branch that has none of its own yet
            self._saved_step = checkpoint.step

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
        progress.history.append(tuple(getattr(ended, name) for name in HISTORY))

    def _after_step(self, *, last: bool) -> None:
        config, step = self._plan.config, self._progress.step
        if self._plan.evaluation is not None and (last or step % config.eval_every == 0):
            self._evaluate()
        if last or (config.save_every and step % config.save_every == 0):
            self._save(final=last)

    def _evaluate(self) -> None:
        corpus = self._plan.evaluation
        assert corpus is not None  # noqa: S101 - asked by the caller
        batches = evaluation_batches(
            corpus, batch_size=self._plan.config.batch_size, pad_token_id=self._plan.pad_token_id
        )
        total = sum(self._engine.evaluate(batch).cross_entropy.sum() for batch in batches)
        loss = float(total / corpus.loss_tokens.sum())
        self._progress.metrics["eval_loss"] = loss
        self._emit(Evaluated(self._progress.step, loss))

    def _save(self, *, final: bool) -> PendingSave:
        began = time.perf_counter()
        if not self._engine.is_finite():
            raise NonFiniteLoss(
                f"step {self._progress.step}: its update left weights or moments that are not finite; "
                f"it is not saved, and {self._last_saved()}. Lower --learning-rate or --weight-decay",
                step=self._progress.step,
                examples=self._examples(self._plan.batches.step(self._progress.step)),
            )
        pending = self._manager.save_async(self._checkpoint(), final=final)
        self._saved_step = self._progress.step
        self._emit(CheckpointStarted(self._saved_step, pending.path, time.perf_counter() - began))
        return pending

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

    def _ended(self, file: CheckpointFile | None, stop: StopRequest, *, already: bool) -> RunEnded:
        ended = RunEnded(
            step=file.step if file else 0,
            path=file.path if file else None,
            state_digest=file.state_digest if file else None,
            signal=stop.signal,
            already=already,
        )
        self._emit(ended)
        return ended

    def _newest(self) -> CheckpointFile | None:
        """The checkpoint of the step that the run has reached, once it is durable."""
        if self._saved_step is None:
            return None
        self._manager.close()
        return self._manager.inspect(self._saved_step)

    def _started(self, resumed_from: Path | None) -> RunStarted:
        plan = self._plan
        assert plan.config.max_steps is not None  # noqa: S101 - settled by the plan
        if plan.config.schedule != "constant" and plan.config.max_steps > (plan.config.schedule_steps or 0):
            warnings.warn(
                f"the schedule ends at step {plan.config.schedule_steps}: beyond it the learning rate is 0. "
                "To learn on, begin a new run with --schedule-steps, or with --schedule constant",
                DistrustWarning,
                stacklevel=2,
            )
        trained, parameters = self._engine.parameters
        return RunStarted(
            out=self._out,
            step=self._progress.step,
            max_steps=plan.config.max_steps,
            resumed_from=resumed_from,
            examples=len(plan.corpus),
            tokens=int(plan.corpus.loss_tokens.sum()),
            truncated=plan.corpus.truncated,
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
        assert config.schedule_steps is not None  # noqa: S101 - settled by the plan
        return learning_rate(
            step,
            peak=config.learning_rate,
            warmup_steps=config.warmup_steps,
            schedule=config.schedule,
            schedule_steps=config.schedule_steps,
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
            f"step {step}: {what} is not finite; the step was not made, and {self._last_saved()}. "
            f"Examples: {', '.join(guilty[:EXAMPLES_NAMED])}{more}. Look at them, or lower --learning-rate",
            step=step,
            examples=guilty,
        )

    def _examples(self, batches: Sequence[MicroBatch]) -> list[str]:
        locations = self._plan.corpus.locations
        return [str(locations[example]) for batch in batches for example in batch.examples]

    def _last_saved(self) -> str:
        return f"step {self._saved_step} is saved" if self._saved_step else "nothing was saved yet"

    def _emit(self, event: Event) -> None:
        for observer in self._observers:
            observer(event)


def _mean(sums: Sequence[Any], tokens: int) -> float:
    return float(sum(part.sum() for part in sums) / tokens)


def _learned(batch: MicroBatch) -> Any:
    return (batch.labels != IGNORED).sum(axis=1)
