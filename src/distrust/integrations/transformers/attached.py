"""What a Trainer calls instead of its own methods once checkpoints are attached.

The Trainer decides when to save, this module how. A checkpoint is the state at the end of a complete
optimizer step, taken as a whole (:class:`StepEnd`) after all that the step logs and evaluates; for the last
step of an epoch, after what the epoch's end does. It is saved once it is known which of the two the step was:
at the beginning of the next one, or at the end of the epoch. A callback that saves within a step (that of
``enable_jit_checkpoint``) gets the end of the step before, as long as the optimizer has not changed weights.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from distrust.checkpoint import Checkpoint, CheckpointManager, PendingSave
from distrust.checkpoint.files import checkpoint_file_name
from distrust.checkpoint.retention import Retention
from distrust.checkpoint.step_snapshots import StepSnapshots
from distrust.errors import ConfigError, DistrustWarning
from distrust.integrations.random import generators, set_generators
from distrust.integrations.transformers import trainer_state
from distrust.integrations.transformers.description import describe_model, describe_run, require_same_run
from distrust.integrations.transformers.processes import Processes, add_local_states, load_latest
from distrust.integrations.transformers.pure_data import PureData
from distrust.integrations.transformers.support import REPLACED
from distrust.integrations.transformers.trainer_state import StepEnd
from distrust.ranks import gather_json, leads


class AttachedCheckpoints(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """The checkpoints of one Trainer. Its methods replace the Trainer's of the same name, but for a ``_``."""

    def __init__(
        self,
        trainer: Trainer,
        manager: CheckpointManager,
        rules: Retention,
        *,
        overlap: bool,
        pure_data: PureData | None,
    ) -> None:
        self._trainer = trainer
        self._manager = manager
        self._rules = rules
        self._overlap = overlap
        self._pure_data = pure_data
        self._processes = Processes(trainer.args)
        self._original = {name: getattr(trainer, name) for name in REPLACED}
        self._description: dict[str, Any] = {}  # of the run: what a resume must share
        self._run: dict[str, Any] = {}  # what may differ between equal runs
        self._buffers: dict[str, tuple[Any, str]] = {}  # that training may change
        self._loaded: Checkpoint | None = None  # until all of it is restored
        self._is_over = False  # the last state is saved
        # Where the run is.
        self._epoch, self._batches = -1, 0  # in progress; how many of its batches were trained
        self._batches_to_skip = 0  # in the first epoch after a resume
        self._epoch_generators: dict[str, Any] = {}  # as of the start of the epoch
        self._is_after_epoch = self._is_epoch_complete = False
        self._has_gradients = False  # of batches since the last step
        self._logged_last: tuple[Any, float | None] = (None, None)  # gradient norm and learning rate
        # What is to be saved, and what is.
        self._step_end: StepEnd | None = None  # None while weights are of a step that is not complete
        self._is_requested = self._is_step_ending = self._is_in_optimizer = False
        self._saved: StepEnd | None = None
        self._pending: PendingSave | None = None
        self._snapshots: StepSnapshots | None = None  # of the last step, in case this process dies
        self._best_step: int | None = None  # by the Trainer's own rule, among those with a checkpoint

    def install(self) -> None:
        """Replace the methods of the Trainer, on this instance only."""
        for name in REPLACED:
            setattr(self._trainer, name, getattr(self, name.removeprefix("_")))
        # First: other callbacks may save in the same event, and the position must be up to date by then.
        self._trainer.callback_handler.callbacks.insert(0, self)

    # What replaces the Trainer's methods.

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, **options: Any
    ) -> Any:
        """Begin, or resume from the newest intact checkpoint, also if ``resume_from_checkpoint`` is not True.

        With the path of a Trainer's own folder, training begins there, unless there is a checkpoint already.

        Raises:
            ResumeRefused: the checkpoint is that of another run.
            CheckpointDirectoryLocked: another process trains this run.
            NoIntactCheckpoint: there are checkpoints, but all are damaged.
            SaveFailed: a checkpoint could not be written.
            KeyboardInterrupt: after Ctrl-C, once a single process has saved the last complete step.
        """
        if trial is not None:
            raise ConfigError("DistrustCheckpoints: each trial of a search needs a Trainer of its own")
        if leads(self._processes):
            self._manager.acquire()  # now: not when the first save finds another process
        try:
            self._describe()  # once: configs are large, and training waits for a save
            self._loaded = self._load_latest(resume_from_checkpoint)
            if self._loaded is not None:
                with trainer_state.resume_folder(self._trainer, self._loaded) as folder:
                    return self._original["train"](resume_from_checkpoint=folder, **options)
            if isinstance(resume_from_checkpoint, bool):
                resume_from_checkpoint = None
            if resume_from_checkpoint is not None and self._trainer.args.load_best_model_at_end:
                raise ConfigError("load_best_model_at_end: the best model may be in that folder: begin anew")
            return self._original["train"](resume_from_checkpoint=resume_from_checkpoint, **options)
        except KeyboardInterrupt:
            # Of several processes, others may be within another step.
            if self._processes.count == 1 and self._step_end is not None and not self._is_in_optimizer:
                self._save(self._step_end)
            raise
        finally:
            self._loaded = self._step_end = None  # a later call begins without them
            self._manager.close()

    def get_train_dataloader(self) -> Any:
        """The Trainer's own loader, with pure data if that is asked for."""
        loader = self._original["get_train_dataloader"]()
        if self._pure_data is not None:
            self._pure_data.wrap(getattr(loader, "base_dataloader", loader))  # accelerate's has torch's
        return loader

    def init_training_state(self, *arguments: Any, **options: Any) -> tuple[int, int]:
        """The epoch to begin with, and how many of its batches to skip."""
        epoch, batches = self._original["_init_training_state"](*arguments, **options)
        self._is_over = False
        self._set_best(None)
        if self._loaded is not None:
            state, metadata = self._trainer.state, self._loaded.metadata["trainer"]
            state.compute_steps(self._trainer.args, state.max_steps)  # intervals may have been changed
            saved = trainer_state.saved_trainer_state(self._loaded)
            trainer_state.restore_callbacks(self._trainer, saved)
            self._set_best(metadata["best_step"])
            epoch, batches = metadata["position"]
            is_finished = metadata["finished"] and saved["max_steps"] == state.max_steps
            self._is_over = is_finished or state.global_step >= state.max_steps
            if self._is_over:
                epoch, batches = state.num_train_epochs, 0
            self._logged_last = metadata["grad_norm"], metadata["learning_rate"]
            plan = "nothing is left to train" if self._is_over else f"on to step {state.max_steps}"
            if state.global_step > state.max_steps:
                text = f"the checkpoint is of step {state.global_step}, beyond max_steps={state.max_steps}"
                warnings.warn(DistrustWarning(text), stacklevel=2)
            if leads(self._processes):
                print(f"distrust: resuming after step {state.global_step}: {plan}", file=sys.stderr)
        self._epoch, self._batches_to_skip = epoch - 1, batches
        return epoch, batches

    def load_from_checkpoint(self, *arguments: Any, **options: Any) -> None:
        """Restore the model."""
        if self._loaded is None:
            self._original["_load_from_checkpoint"](*arguments, **options)
        else:
            trainer_state.restore_model(self._trainer, self._loaded)

    def load_optimizer_and_scheduler(self, *arguments: Any) -> None:
        """Restore the optimizer and the learning rate."""
        if self._loaded is None:
            self._original["_load_optimizer_and_scheduler"](*arguments)
        else:
            trainer_state.restore_optimizer(self._trainer, self._loaded)

    def load_scaler(self, *arguments: Any) -> None:
        """Restore the loss scaler of float16."""
        if self._loaded is None:
            self._original["_load_scaler"](*arguments)
        elif self._loaded.optimizer["scaler"] is not None:
            self._trainer.accelerator.scaler.load_state_dict(self._loaded.optimizer["scaler"])

    def load_rng_state(self, *arguments: Any) -> None:
        """Restore the generators; the Trainer calls it once it has fetched the first batches."""
        if self._loaded is None:
            self._original["_load_rng_state"](*arguments)
        else:
            self._restore_generators(self._loaded)

    def maybe_log_save_evaluate(
        self,
        tr_loss: Any,
        grad_norm: Any,
        *arguments: Any,
        learning_rate: float | None = None,
        **options: Any,
    ) -> None:
        """Do what the end of a step does, or the end of an epoch; then take the state as a whole."""
        if self._is_after_epoch and learning_rate is None:  # the resumed epoch had no step left
            grad_norm, learning_rate = self._logged_last
        self._logged_last = grad_norm, learning_rate
        self._is_step_ending = True
        try:
            options["learning_rate"] = learning_rate
            self._original["_maybe_log_save_evaluate"](tr_loss, grad_norm, *arguments, **options)
        finally:
            self._is_step_ending = False
        finished = self._is_finished()
        if finished or self._trainer.control.should_training_stop:  # this state will be saved
            self._trainer.store_flos()  # the sum of all processes
        # Gradients left by a streamed pass belong to the next step. And where training is interrupted within
        # an epoch, what its end did here is not part of the run: a resume goes on after the last step.
        is_complete = not self._has_gradients and (self._is_epoch_complete or finished)
        if self._is_after_epoch and not is_complete:
            return
        self._step_end = StepEnd.of(
            self._trainer,
            position=(self._epoch + 1, 0) if self._is_epoch_complete else (self._epoch, self._batches),
            epoch_generators=self._epoch_generators,
            buffers={name: getattr(module, attribute) for name, (module, attribute) in self._buffers.items()},
            logged_last=self._logged_last,
            best_step=self._best_step,
        )
        is_interrupted = self._trainer.control.should_training_stop and not finished
        if self._is_requested and (is_interrupted or (self._is_after_epoch and not finished)):
            self._save(self._step_end)

    def save_checkpoint(self, *_: Any, **__: Any) -> None:
        """Remember to save; if a callback asks within a step, save now: the process may be about to end."""
        state = self._trainer.state
        self._trainer.store_flos()
        if state.best_global_step == state.global_step:
            self._set_best(state.global_step)
        self._is_requested = True
        if not self._is_step_ending and self._step_end is not None:
            self._save(self._step_end)
            if self._pending is not None:
                self._pending.wait()

    def load_best_model(self) -> None:
        """Save the last state, then load the weights of the best one."""
        self._save_last()
        assert self._best_step is not None  # noqa: S101 - best_model_checkpoint is set with it
        if self._pending is not None:
            self._pending.wait()
        gather_json(self._processes, None)  # now all may read it
        best = self._manager.load(self._best_step, framework="torch")
        trainer_state.restore_model(self._trainer, best)

    # Events of the Trainer.

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Restore what the Trainer resets before this."""
        self._step_end = self._saved = self._pending = None
        self._is_requested = self._is_in_optimizer = self._has_gradients = False
        self._buffers = trainer_state.changing_buffers(self._trainer)
        if self._loaded is not None:
            trainer_state.restore_sums(self._trainer, self._loaded)
            if self._is_over:  # no epoch follows that would restore the rest
                self._trainer.model.train(self._loaded.metadata["trainer"]["is_training"])
                self._restore_generators(self._loaded)

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Restore the generators from which the epoch draws its order."""
        self._epoch += 1
        self._batches, self._batches_to_skip = self._batches_to_skip, 0
        self._is_after_epoch = self._is_epoch_complete = False
        if self._loaded is not None:
            set_generators(self._loaded.rng["epoch" if self._batches else "now"])
        self._epoch_generators = generators()
        if self._pure_data is not None:
            self._pure_data.set_epoch(self._epoch)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Save the step before, which was not the last of its epoch; keep it in shared memory."""
        if self._is_requested and self._step_end is not None:
            self._save(self._step_end)
        if (step_end := self._step_end) is not None and self._processes.count == 1:
            self._snapshots = self._manager.snapshot(
                lambda: self._capture(step_end, finished=False), overlap=self._may_overlap()
            )

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Count a batch."""
        self._batches += 1
        self._has_gradients = True

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Weights and moments change next: wait until the save in progress has copied them."""
        if self._pending is not None:
            self._pending.wait_copied()
        if self._snapshots is not None:
            self._snapshots.wait_copied()
        self._is_in_optimizer = True

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """From now until the step is complete, there is no state to save."""
        self._step_end, self._is_in_optimizer = None, False

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Count the last batch of the step."""
        self._batches += 1
        self._has_gradients = False

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Find out whether the epoch is complete, or training was stopped within it."""
        loader = self._trainer.callback_handler.train_dataloader
        self._is_after_epoch = True
        self._is_epoch_complete = not self._trainer.control.should_training_stop or (
            has_length(loader) and self._batches >= len(loader)
        )
        if self._loaded is not None:  # the epoch had no batch left
            self._restore_generators(self._loaded)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Save the last state, and remove the empty folders that JIT checkpoints leave."""
        self._save_last()
        for folder in Path(self._trainer.args.output_dir).glob("checkpoint-*/"):
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if it is empty

    # How.

    def _describe(self) -> None:
        model = describe_model(self._trainer)
        self._description = describe_run(self._trainer, model, pure_data=self._pure_data is not None)
        self._run = {
            "integration": model,
            "metric": self._rules.metric,
            "metric_mode": self._rules.metric_mode,
            "output_dir": str(self._trainer.args.output_dir),
        }

    def _load_latest(self, resume_from_checkpoint: str | bool | None) -> Checkpoint | None:
        directory = self._manager.directory
        loaded = load_latest(self._processes, self._manager)
        if loaded is None:
            return None
        if resume_from_checkpoint is False:
            raise ConfigError(
                f"resume_from_checkpoint=False, but {directory} has checkpoints: give another directory"
            )
        require_same_run(loaded, self._trainer, self._description)
        if isinstance(resume_from_checkpoint, str):
            text = f"resuming from step {loaded.step} in {directory}, not from {resume_from_checkpoint}"
            warnings.warn(DistrustWarning(text), stacklevel=3)
        return loaded

    def _restore_generators(self, checkpoint: Checkpoint) -> None:
        """The last of what is restored: the memory of the checkpoint is free afterwards."""
        set_generators(checkpoint.rng["now"])
        self._loaded = None

    def _set_best(self, step: int | None) -> None:
        """Keep the Trainer's best, and name it: else the Trainer does not load it at the end."""
        self._best_step = step
        self._manager.pin(step)
        if step is not None:
            file = self._manager.scan().by_step().get(step)  # it may be the final one, or not exist yet
            path = (
                self._manager.directory / checkpoint_file_name(step, "periodic")
                if file is None
                else file.path
            )
            self._trainer.state.best_model_checkpoint = str(path)

    def _is_finished(self) -> bool:
        is_last_epoch = self._epoch + 1 >= self._trainer.state.num_train_epochs
        return trainer_state.is_finished(self._trainer) or (self._is_epoch_complete and is_last_epoch)

    def _capture(self, step_end: StepEnd, *, finished: bool) -> Checkpoint:
        checkpoint = trainer_state.capture(
            self._trainer, step_end, description=self._description, run=self._run, finished=finished
        )
        return add_local_states(self._processes, checkpoint, step_end)

    def _may_overlap(self) -> bool:
        # An optimizer with modes of its own changes weights when training goes on.
        return self._overlap and not hasattr(self._trainer.optimizer.optimizer, "train")

    def _save(self, step_end: StepEnd) -> None:
        self._is_requested = False
        if self._saved is not step_end:
            self._saved = step_end
            checkpoint = self._capture(step_end, finished=False)
            if leads(self._processes):
                self._pending = self._manager.save_async(checkpoint, overlap=self._may_overlap())

    def _save_last(self) -> None:
        if self._is_over or self._step_end is None:  # the latter: stopped within the first step
            return
        self._is_over = True
        finished = self._is_finished()
        if finished or self._saved is not self._step_end:
            checkpoint = self._capture(self._step_end, finished=finished)
            if leads(self._processes):
                path = self._manager.save(checkpoint, final=finished)
                if self._best_step == self._step_end.step:
                    self._trainer.state.best_model_checkpoint = str(path)
