"""Reads what a run with ``--from`` starts from: a run, a checkpoint, or an adapter folder."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from distrust.checkpoint import Checkpoint, serialization
from distrust.checkpoint.remote.location import parse_target
from distrust.config import TrainConfig, flag
from distrust.engines import config_of, read_checkpoint, select_engine, written_config
from distrust.engines.state_conversion import target_modules
from distrust.engines.target_modules import as_trained
from distrust.errors import ConfigError
from distrust.importers import convert
from distrust.importers.detect import is_adapter_folder
from distrust.importers.host_arrays import HostArray
from distrust.option_values import BUNDLED
from distrust.run_record import RunRecord
from distrust.training.resume import Start, take_open_options

#: Adapter options that may differ from the source's. The last three are ways to name modules: that the same
#: ones are adapted is checked when the weights are loaded.
_MAY_DIFFER = ("lora_dropout", "target_modules", "exclude_modules", "layers")


def read_start(config: TrainConfig) -> tuple[TrainConfig, Start]:
    """The weights that ``config.from_`` names, and the config with the options that it takes from there.

    Raises:
        CheckpointError: there are none, or they are damaged.
        ConfigError: naming every option that contradicts them, or that is missing.
        ResumeRefused: they are not those of a plain LoRA.
        MissingDependency: their framework is not installed.
    """
    path, framework = parse_target(str(config.from_), "--from"), select_engine(config)
    if isinstance(path, Path) and is_adapter_folder(path):
        imported = convert.read(path, None if config.model == BUNDLED else config.model)
        # An adapter may be in the format of the other engine.
        arrays = {name: np.ascontiguousarray(np.asarray(a)) for name, a in imported.model.items()}
        model = {name: HostArray("F32", a.shape, a.reshape(-1).view(np.uint8)) for name, a in arrays.items()}
        # mlx-lm does not record the modules, but the names of the arrays show them. They may be a stranger's.
        options = {"target_modules": target_modules(model), **imported.options}
        checkpoint = replace(imported, model=model, options=options).to_checkpoint(framework)
        source = RunRecord.from_checkpoint(checkpoint).train_config(where=str(path))
        source = as_trained(source, None, (), where=str(path))
    else:
        file, checkpoint = read_checkpoint(path, framework=framework)
        source = config_of(file)
        if written := written_config(path, flag="--from"):  # its names are absolute; no more is taken
            source = replace(source, model=written.model, data=written.data)
    record = RunRecord.from_checkpoint(checkpoint)
    if "data" not in record.settings and config.data is None:
        raise ConfigError(f"--from {path}: does not record what it was trained on; give --data")
    completed = take_open_options(config, source)
    wrong = [
        f"{flag(name)} is {getattr(completed, name)}, but --from {path} has {getattr(source, name)}"
        for name in [option.name for option in fields(config) if option.metadata["group"] == "LoRA"]
        if name not in _MAY_DIFFER and getattr(completed, name) != getattr(source, name)
    ]
    if wrong:
        raise ConfigError(wrong)
    digest = serialization.state_digest(Checkpoint(step=0, model=checkpoint.model), "periodic")
    return completed, Start(checkpoint.model, digest, record.fingerprints.get("model"), source.dtype)
