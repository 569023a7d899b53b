"""Checkpoints inside mlx-lm's own loop, ``mlx_lm.tuner.trainer.train``, which runs as it is.

The loop asks for a batch when the iteration before is complete and evaluated: there its state is saved. It
numbers its iterations by ``range(1, args.iters + 1)``: a resumed one gets the end of that range, so that its
reports, evaluations and files are those of an undisturbed run. An epoch's order comes from numpy's generator:
a resume sets the generators of the epoch's start, reads its earlier batches, and sets the checkpoint's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import sha256
from math import lcm
from types import FunctionType, SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner import trainer

from distrust.checkpoint import Checkpoint, CheckpointManager
from distrust.errors import CheckpointNotFound, ConfigError, ResumeRefused
from distrust.integrations.random import generators, set_generators
from distrust.integrations.settings import refuse_differences

#: Those of mlx-lm's ``TrainingArgs`` that a resumed run may change: no weight or report depends on them.
FREE_ARGUMENTS = {"iters", "steps_per_save", "adapter_file", "clear_cache_threshold"}
_OTHER_LOOP = "mlx-lm has another loop: install 0.32.2, which was tested, and leave trainer.train as it is"


class DistrustCheckpoints:
    """Trains with mlx-lm's loop, and resumes exactly: run the same script again.

    Args:
        directory: of the checkpoints.
        every: iterations between checkpoints: a multiple of ``args.grad_accumulation_steps`` and of
            ``args.steps_per_report``, because mlx-lm's sums over these cannot be saved.
        seed: numpy's generator, which orders the batches, gets it when a run begins, unless it is None.
        rules: what to keep, as for :class:`CheckpointManager`. ``eval_loss`` is the validation loss that
            mlx-lm prints at the iteration of a checkpoint.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, every: int = 100, seed: int | None = 0, **rules: Any
    ) -> None:
        self.every, self.seed = every, seed
        self.manager = CheckpointManager(directory, **rules)

    def train(
        self,
        model: Any,
        optimizer: Any,
        train_dataset: Any,
        val_dataset: Any = None,
        *,
        args: trainer.TrainingArgs,
        training_callback: Any = None,
        **options: Any,
    ) -> None:
        """Begin, or resume from the newest intact checkpoint; a finished run only loads its weights.

        Takes what mlx-lm's ``train`` takes, but ``iterate_batches``. To train longer, raise ``args.iters``.

        Raises:
            ConfigError: ``every`` does not fit ``args``; several processes; mlx-lm has another loop.
            ResumeRefused: the checkpoint is of other data, arguments, model or optimizer.
        """
        loop, unit = trainer.train, lcm(args.grad_accumulation_steps, args.steps_per_report)
        if type(loop) is not FunctionType or loop.__closure__ or "range" not in loop.__code__.co_names:
            raise ConfigError(_OTHER_LOOP)
        if not unit or self.every < 1 or self.every % unit:
            names = "args.grad_accumulation_steps and of args.steps_per_report, each at least 1"
            raise ConfigError(f"every={self.every} is no multiple of {names}: give one of {unit or 1}")
        if mx.distributed.init().size() > 1 or "iterate_batches" in options:
            raise ConfigError("several processes and iterate_batches= are not supported: leave them out")
        self._model, self._optimizer, self._iterations = model, optimizer, args.iters
        self._callback = training_callback or trainer.TrainingCallback()
        self._settings = {
            "seed": self.seed,
            "len(train_dataset)": len(train_dataset),
            "len(val_dataset)": len(val_dataset or ()),
            **{f"args.{name}": value for name, value in vars(args).items() if name not in FREE_ARGUMENTS},
            **_describe(model, optimizer),
        }
        optimizer.init(model.trainable_parameters())
        with self.manager:
            self.manager.acquire()
            if self._resume(unit):
                if not os.path.exists(args.adapter_file):
                    weights = dict(tree_flatten(model.trainable_parameters()))
                    mx.save_safetensors(str(args.adapter_file), weights)
                return
            scope = {**loop.__globals__, "range": self._number}  # of a copy: the module stays as it is
            loop = FunctionType(loop.__code__, scope, argdefs=loop.__defaults__)
            callback = SimpleNamespace(on_train_loss_report=self._report, on_val_loss_report=self._evaluate)
            options |= {"iterate_batches": self._batches, "training_callback": callback}
            loop(model, optimizer, train_dataset, val_dataset, args, **options)
            self.manager.save(self._capture(), final=True)

    def _resume(self, unit: int) -> bool:
        """Load the newest intact checkpoint, if there is one; return whether the run is finished."""
        self._numbered = False
        self._begin = self._iteration = self._earlier_tokens = self._tokens = 0
        self._metrics: dict[str, float] = {}  # of this iteration
        self._epoch_start = generators()
        try:
            file, checkpoint = self.manager.choose(framework="mlx")
        except CheckpointNotFound:
            if self.seed is not None:
                np.random.seed(self.seed)
            return False
        is_finished = file.kind == "final" and file.step == self._iterations
        refuse_differences(file.step, checkpoint.config, self._settings)
        if file.step > self._iterations or (file.step % unit and not is_finished):
            end = f"args.iters={self._iterations}"
            raise ResumeRefused(f"the run ended at iteration {file.step}: it cannot go on to {end}")
        self._model.update(tree_unflatten(list(checkpoint.model.items())))
        self._optimizer.state = checkpoint.optimizer
        mx.eval(self._model.state, self._optimizer.state)
        set_generators(checkpoint.rng["now"])
        self._begin, self._iteration, self._epoch_start = file.step, file.step, checkpoint.rng["epoch"]
        self._tokens = self._earlier_tokens = checkpoint.metadata["trained_tokens"]
        return is_finished

    def _number(self, *bounds: int) -> range:
        """The ``range`` of mlx-lm's loop, which may have others."""
        is_of_iterations = bounds == (1, self._iterations + 1)
        self._numbered |= is_of_iterations
        return range(1 + self._begin, bounds[1]) if is_of_iterations else range(*bounds)

    def _batches(self, dataset: Any, batch_size: int, *, loop: bool = False, **options: Any) -> Iterator[Any]:
        """The ``iterate_batches`` of mlx-lm's loop, and of its evaluations, which set no ``loop``."""
        batches = trainer.iterate_batches(dataset, batch_size, loop=loop, **options)
        if not loop:
            yield from batches
            return
        if not self._numbered:
            raise ConfigError(_OTHER_LOOP)
        epoch = max(1, len(dataset) // batch_size)  # mlx-lm itself refuses a dataset without a batch
        if self._iteration % epoch:
            state = generators()
            set_generators(self._epoch_start)
            for _ in range(self._iteration % epoch):
                next(batches)
            set_generators(state)
        while True:
            if self._iteration % epoch == 0:
                self._epoch_start = generators()
            if self._iteration % self.every == 0 and self._iteration > self._begin:
                self.manager.save_async(self._capture())
            batch = next(batches)
            self._iteration, self._metrics = self._iteration + 1, {}  # in progress, until the loop asks again
            yield batch

    def _capture(self) -> Checkpoint:
        return Checkpoint(
            step=self._iteration,
            model=dict(tree_flatten(self._model.trainable_parameters())),
            optimizer=self._optimizer.state,
            rng={"now": generators(), "epoch": self._epoch_start},
            config=self._settings,
            metadata={"trained_tokens": self._tokens},
            metrics=self._metrics,
            run={"integration": {"program": "mlx-lm"}},
        )

    def _report(self, info: dict[str, Any]) -> None:
        self._tokens = self._earlier_tokens + info["trained_tokens"]
        self._callback.on_train_loss_report({**info, "trained_tokens": self._tokens})

    def _evaluate(self, info: dict[str, Any]) -> None:
        self._metrics = {"eval_loss": info["val_loss"]}
        self._callback.on_val_loss_report(info)


def _describe(model: Any, optimizer: Any) -> dict[str, Any]:
    """What of them a resumed run may not change, by name."""
    layers = [(name, _options(layer)) for name, layer in model.named_modules()]  # such as the scale of LoRA
    layout = [(name, array.shape, str(array.dtype)) for name, array in tree_flatten(model.parameters())]
    settings = {f"the shape of {name}": a.shape for name, a in tree_flatten(model.trainable_parameters())}
    settings["the digest of the model's layers"] = sha256(repr((layers, layout)).encode()).hexdigest()[:12]
    for part in getattr(optimizer, "optimizers", [optimizer]):
        name, schedule = type(part).__name__, part._schedulers.get("learning_rate")
        settings |= {f"{name}.{key}": value for key, value in _options(part).items()}
        steps = mx.array([*range(64), *(2**power for power in range(6, 24))], mx.uint64)
        rates = [float(schedule(step) if schedule else part.learning_rate) for step in steps]
        digest = sha256(repr(rates).encode()).hexdigest()[:12]
        settings[f"the first learning rate of {name}, and the digest of all"] = [rates[0], digest]
    return settings


def _options(instance: object) -> dict[str, Any]:
    """The plain values of a layer or optimizer, without what changes while it is used."""
    kinds, names = (bool, int, float, str, list, tuple), vars(instance).keys() - {"_training", "_initialized"}
    return {name: vars(instance)[name] for name in sorted(names) if type(vars(instance)[name]) in kinds}
