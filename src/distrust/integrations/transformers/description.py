"""What describes a run of a Trainer: must be the same when it is resumed, or is needed to use its weights."""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import has_length

from distrust.checkpoint import Checkpoint
from distrust.errors import ResumeRefused
from distrust.integrations.settings import refuse_differences

#: Beginnings of the names of arguments that change no weight: where, when and how often something is done.
#: The number of steps and epochs is among them: a run may be made longer.
_FREE_ARGUMENTS = (
    "dataloader_num_workers", "dataloader_pin", "dataloader_prefetch", "dataset_num_proc", "ddp_", "debug",
    "deepspeed", "disable_tqdm", "do_", "enable_jit", "eval_", "fsdp", "greater_", "hub_", "include_",
    "load_best", "local_rank", "log_", "logging_", "max_steps", "metric_for", "num_train_epochs",
    "output_dir", "parallelism", "per_device_eval", "prediction_", "project", "push_to", "report_to",
    "restore_", "resume_", "run_name", "save_", "skip_memory", "trackio", "use_cpu",
)  # fmt: skip
#: Entries of the configs of a model and an adapter that change no weight.
_FREE_CONFIG = {
    "_name_or_path", "architectures", "base_model_name_or_path", "inference_mode", "peft_version", "revision",
    "transformers_version", "use_cache",
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


def describe_run(trainer: Trainer, model: Mapping[str, Any], *, pure_data: bool) -> dict[str, Any]:
    """What must be the same when a run is resumed, by name, as plain values; ``model``: its description."""
    arguments, dataset = trainer.args.to_dict(), trainer.train_dataset
    frozen = {name: value for name, value in trainer.model.named_parameters() if not value.requires_grad}
    parts = {"model": model["model_config"], "adapter": model["peft_config"]}
    return {
        **{name: _plain(v) for name, v in arguments.items() if not name.startswith(_FREE_ARGUMENTS)},
        **{
            f"{part}.{name}": value
            for part, config in parts.items()
            for name, value in (config or {}).items()
            if name not in _FREE_CONFIG
        },
        "pure_data": pure_data,
        "trainer": type(trainer).__name__,
        "weights of the examples": getattr(trainer, "distrust_weights", None),
        "number of examples": len(dataset) if has_length(dataset) else None,
        "frozen weights": _fingerprint(frozen),
    }


def require_same_run(checkpoint: Checkpoint, trainer: Trainer, description: Mapping[str, Any]) -> None:
    """Check that a checkpoint was written by the run that :func:`describe_run` describes.

    Raises:
        ResumeRefused: it was not; or names, shapes or dtypes of the trained weights differ.
    """
    require_same_weights(checkpoint, trainer)
    names = sorted(description.keys() & checkpoint.config.keys())  # versions of a library differ in others
    saved = {name: checkpoint.config[name] for name in names}
    refuse_differences(checkpoint.step, saved, {name: description[name] for name in names})


def require_same_weights(checkpoint: Checkpoint, trainer: Trainer) -> None:
    """Check that a checkpoint has the trained weights of this Trainer's model, whatever their values.

    Raises:
        ResumeRefused: names, shapes or dtypes differ, or it is no checkpoint of a Trainer.
    """
    if checkpoint.metadata.get("integration") != "transformers":
        raise ResumeRefused("these checkpoints are not those of a Trainer: give another directory")
    weights, parameters = checkpoint.model["parameters"], trainable_parameters(trainer)
    refuse_differences(checkpoint.step, _describe_tensors(weights), _describe_tensors(parameters))


def trainable_parameters(trainer: Trainer) -> Tensors:
    """The parameters that are trained, by their name in ``trainer.model``."""
    return {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}


def describe_model(trainer: Trainer) -> dict[str, Any]:
    """What a folder of transformers or peft needs besides the weights; None where there is no config."""
    model = trainer.model
    config, adapters = getattr(model, "config", None), getattr(model, "peft_config", None) or {}
    active = getattr(model, "active_adapter", None)  # a name, a list of names, or a method
    adapter = adapters.get(active) if isinstance(active, str) else next(iter(adapters.values()), None)
    to_json = getattr(config, "to_json_string", None)
    return {
        "program": "transformers",
        "model_config": None if to_json is None else json.loads(to_json(use_diff=False)),
        "peft_config": None if adapter is None else _plain(adapter.to_dict()),
    }


def _fingerprint(tensors: Tensors) -> str:
    """A digest of names, shapes, dtypes, and 64 values of each: a sample, as a base may be large."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in tensors.items():
        values = value.detach().reshape(-1)
        sample = values[:: max(1, values.numel() // 64)][:64].contiguous().view(torch.uint8).cpu()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _describe_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {name: f"{value.dtype}{list(value.shape)}" for name, value in tensors.items()}


def _plain(value: Any) -> Any:
    """As plain JSON values: enums by value, sets sorted, what is left as text."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(entry) for entry in value)
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
