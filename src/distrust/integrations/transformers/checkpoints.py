"""Safe, exact checkpoints for the Trainer of transformers and those of TRL: one line in the user's script."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path

from transformers import Trainer, TrainingArguments

from distrust.atomic import atomic_directory
from distrust.checkpoint import CheckpointManager
from distrust.checkpoint.remote.location import require_path
from distrust.checkpoint.retention import MetricMode, Retention
from distrust.errors import ConfigError
from distrust.integrations.transformers.attached import AttachedCheckpoints
from distrust.integrations.transformers.description import require_same_weights
from distrust.integrations.transformers.pure_data import PureData
from distrust.integrations.transformers.support import require_supported
from distrust.integrations.transformers.trainer_state import weights_of


class DistrustCheckpoints:
    """Makes the checkpoints of a Trainer safe and exact.

    After ``DistrustCheckpoints("runs/first").attach(trainer)``, ``trainer.train()`` begins, or resumes from
    the newest intact checkpoint. ``save_strategy``, ``save_steps``, ``eval_*`` and ``enable_jit_checkpoint``
    keep their meaning. The end of training is saved, too.

    Args:
        directory: of the checkpoints of one run.
        keep_last: number of newest checkpoints to keep; None means ``save_total_limit``, or all.
        keep_best: number of best checkpoints by ``metric`` to keep in addition.
        keep_every: keep each checkpoint whose step is a multiple of this in addition.
        metric: a metric of the evaluation, with or without ``eval_``. ``metric_for_best_model`` and
            ``greater_is_better`` replace the default.
        metric_mode: ``min`` if lower is better, or ``max``.
        overlap: copy weights and moments while the next step computes, rather than before it.
        pure_data: derive the random numbers of data set and collator from seed, epoch and indices, so that
            they are the same after a resume. They differ from those without it.

    Raises:
        ConfigError: for invalid rules.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int | None = None,
        keep_best: int = 1,
        keep_every: int | None = None,
        metric: str = "eval_loss",
        metric_mode: MetricMode = "min",
        overlap: bool = True,
        pure_data: bool = False,
    ) -> None:
        self.directory = require_path(directory, "DistrustCheckpoints:").absolute()
        self._rules = Retention(keep_last, keep_best, keep_every, metric, metric_mode)
        self._overlap = overlap
        self._pure_data = pure_data
        self._trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> Trainer:
        """Replace how a Trainer saves and resumes; return it.

        Raises:
            ConfigError: its kind, its version or one of its arguments is not supported.
        """
        require_supported(trainer, pure_data=self._pure_data)
        args, rules = trainer.args, self._rules_for(trainer.args)
        seed = args.seed if args.data_seed is None else args.data_seed
        AttachedCheckpoints(
            trainer,
            CheckpointManager(self.directory, **asdict(rules)),
            rules,
            overlap=self._overlap,
            pure_data=PureData(seed) if self._pure_data else None,
        ).install()
        self._trainer = trainer
        return trainer

    def to_folder(self, path: str | os.PathLike[str], *, step: int | None = None, best: bool = False) -> Path:
        """Write the weights of a checkpoint as a new folder of transformers, or of peft for an adapter.

        Args:
            path: of the folder, which must not exist.
            step: of the checkpoint; default: the newest.
            best: take the one with the best metric.

        Raises:
            CheckpointError: there is no such checkpoint, or it is damaged.
            ConfigError: :meth:`attach` was not called; for both a step and the best one.
            ExportFailed: the folder exists, or cannot be written.
        """
        require_path(path, "to_folder:")
        if self._trainer is None:
            raise ConfigError("to_folder() needs the model: call attach(trainer) first")
        trainer, rules = self._trainer, self._rules_for(self._trainer.args)
        if trainer.args.process_index > 0:  # the first one writes
            return Path(path)
        manager = CheckpointManager(self.directory, **asdict(rules))
        checkpoint = manager.choose(step=step, best=best, framework="torch")[1]
        require_same_weights(checkpoint, trainer)
        with atomic_directory(Path(path)) as folder, weights_of(trainer, checkpoint):
            trainer.save_model(str(folder), _internal_call=True)
        return Path(path)

    def _rules_for(self, args: TrainingArguments) -> Retention:
        rules = self._rules
        metric, mode = _metric_name(rules.metric), rules.metric_mode
        if args.metric_for_best_model is not None:  # such as "loss", which load_best_model_at_end implies
            name = _metric_name(args.metric_for_best_model)
            if metric not in ("eval_loss", name):
                raise ConfigError(f"metric={metric!r}, but metric_for_best_model={name!r}: give one of them")
            metric, mode = name, "max" if args.greater_is_better else "min"
        if args.load_best_model_at_end and not rules.keep_best:
            raise ConfigError(
                "load_best_model_at_end needs keep_best=1: the best checkpoint would be removed"
            )
        limit = args.save_total_limit or 0  # the Trainer keeps all if it is None, or not positive
        keep_last = (limit if limit > 0 else None) if rules.keep_last is None else rules.keep_last
        return replace(rules, keep_last=keep_last, metric=metric, metric_mode=mode)


def _metric_name(metric: str) -> str:
    """As the Trainer's evaluations name it."""
    return metric if metric.startswith("eval_") else f"eval_{metric}"
