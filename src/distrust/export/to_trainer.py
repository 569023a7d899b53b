"""Turns a checkpoint into a folder of transformers' Trainer, which resumes from it without this package.

The Trainer numbers AdamW's moments by its rule for weight decay; it is applied to the model without weights.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer, TrainerState

from distrust import engines
from distrust.checkpoint import Checkpoint, CheckpointFile
from distrust.checkpoint.files import errors_with_path
from distrust.checkpoint.remote.location import Target, require_path
from distrust.config import TrainConfig
from distrust.contract import EngineState
from distrust.engines.loading import reference
from distrust.engines.torch import adapter, optimizer
from distrust.engines.torch.model import meta_model
from distrust.errors import ConfigError
from distrust.importers.trainer_folder import METRICS
from distrust.integrations.transformers import folder
from distrust.run_record import RunRecord
from distrust.training.schedule import learning_rate_of


def to_trainer(
    target: Target, to: Path, *, step: int | None = None, best: bool = False, model: str | None = None
) -> tuple[CheckpointFile, list[str]]:
    """Write a checkpoint as a new folder, for ``train(resume_from_checkpoint=...)``.

    Takes and raises what :func:`distrust.export.export` does; also takes what :class:`DistrustCheckpoints`
    saved. Returns the checkpoint, and a line for each thing that is not kept.
    """
    require_path(to, "--to")
    file, checkpoint = engines.read_checkpoint(target, step=step, best=best, framework="torch")
    dropped = ["losses since the last log: the Trainer's train_loss counts from here"]
    if "integration" in checkpoint.run and model is not None:
        raise ConfigError(f"--model: {file.path} was saved in a Trainer, and needs none; leave it out")
    with errors_with_path(file.path):
        if "integration" not in checkpoint.run:
            checkpoint, dropped = _trainer_form(file, checkpoint, model)
        folder.write(to, checkpoint)
    return file, dropped


def _trainer_form(file: CheckpointFile, saved: Checkpoint, base: str | None) -> tuple[Checkpoint, list[str]]:
    """A run's checkpoint as one of :class:`DistrustCheckpoints`, and what differs from here on."""
    engines.fingerprint_of(file, "model")  # refuses checkpoints that no training made
    config, step = engines.config_of(file, model=base), saved.step
    with engines.base_model_errors(file, config.model, overridden=base is not None):
        model: Any = meta_model(config.model)
    configs = {"model_config": {**model.config.to_dict(), "dtype": "float32"}, "peft_config": None}
    with folder.report_malformed("a model of its config cannot be made"):  # whatever rank it claims
        if config.lora_rank:
            model = adapter.add_adapter(model, config)[0]
            configs["peft_config"] = adapter.peft_config(model, base=reference(config.model)).to_dict()
        bare = adapter.trained_parameters(model)
        weights: Any = {name: meta.new_empty(meta.shape, device="cpu") for name, meta in bare.items()}
    adamw = optimizer.make_optimizer(weights, config)
    optimizer.restore(EngineState(saved.model, saved.optimizer, {}), weights, adamw)
    names = dict(zip(weights, (n for n, p in model.named_parameters() if p.requires_grad), strict=True))
    decayed = {*Trainer.get_decay_parameter_names(None, model)}  # a function: it uses no trainer
    order = [[weights[n] for n in names if (names[n] in decayed) is first] for first in (True, False)]
    steps = config.schedule_steps or config.max_steps or step
    rate = learning_rate_of(config, step + 1, schedule_steps=steps)
    options = {**adamw.defaults, "lr": rate, "initial_lr": config.learning_rate}
    groups = zip(order, (config.weight_decay, 0.0), strict=True)
    adamw.param_groups = [{**options, "params": part, "weight_decay": decay} for part, decay in groups]
    schedule = {"base_lrs": [config.learning_rate] * 2, "_last_lr": [rate] * 2, "lr_lambdas": [None] * 2}
    schedule |= {"last_epoch": step, "_step_count": step + 1}
    dropped = [
        f"data and random numbers: from step {step + 1} on, their order and seeds are the Trainer's",
        f"the schedule: step {step + 1} has the run's learning rate, {rate:g}; the Trainer sets later ones",
    ]
    if config.weighting != "off" or config.weight_column or config.default_weight is not None:
        dropped.append("weights of examples: distrust.integrations.transformers.weighted applies them")
    if config.weight_decay and any((names[n] in decayed) != (weights[n].ndim >= 2) for n in names):
        dropped.append("which parameters decay: the Trainer decides by their names")
    return replace(
        saved,
        model={"parameters": {names[name]: weight for name, weight in weights.items()}},
        optimizer={"optimizer": adamw.state_dict(), "scheduler": schedule},
        rng={},
        history={"trainer_state": _trainer_state(saved, config)},
        run={"integration": {"program": "transformers", **configs}},
    ), dropped


def _trainer_state(checkpoint: Checkpoint, config: TrainConfig) -> Any:
    """TrainerState as uint8 JSON, with a line of its log for each step."""
    with folder.report_malformed("its history is not that of a run"):
        columns = [checkpoint.history[column].tolist() for column in METRICS.values()]
        rows = zip(range(1, checkpoint.step + 1), *columns, strict=True)  # as many as the history has
        lines = [dict(zip(("step", *METRICS), row, strict=True)) for row in rows]
        log = [{name: value for name, value in line.items() if math.isfinite(value)} for line in lines]
    settings = RunRecord.from_checkpoint(checkpoint).settings
    intervals = {key: settings[key] for key in ("log_every", "eval_every", "save_every") if key in settings}
    config = replace(config, **intervals)  # the Trainer takes them, and warns if its arguments differ
    values = {"global_step": checkpoint.step, "max_steps": config.max_steps or 0, "log_history": log}
    values |= {"logging_steps": config.log_every, "eval_steps": config.eval_every}
    steps = config.save_every if isinstance(config.save_every, int) else 0  # by time
    values |= {"save_steps": steps or checkpoint.step, "train_batch_size": config.batch_size}
    return np.frombuffer(json.dumps(asdict(TrainerState(**values)), indent=2).encode(), np.uint8)
