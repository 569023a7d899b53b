"""Reads the trained weights of a folder in transformers' or peft's layout: a LoRA adapter or a full model.

The base model is built without its weights, to compare names, order and shapes of the parameters. The errors
are those of :func:`distrust.importers.trainer_folder.read`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distrust.config_text import from_mapping
from distrust.engines.target_modules import kinds, select
from distrust.engines.torch import adapter
from distrust.engines.torch.model import meta_model
from distrust.errors import ConfigError, ModelError, ResumeRefused, join_first, quote_untrusted
from distrust.importers.detect import ADAPTER_CONFIG, PEFT_WEIGHTS
from distrust.importers.safe_load import read_json, read_tensors, to_float32

WEIGHTS = "model.safetensors"
MAX_NAME_CHARACTERS = 1000
#: A message lists at most this many names.
NAMES_SHOWN = 3

#: Options in peft's config -> ours.
_OPTIONS = {
    "r": "lora_rank", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_rslora": "rslora",
    "use_dora": "dora",
}  # fmt: skip
#: Other fields of peft's config, which do not change the training or are checked separately. Patterns in the
#: file are never matched: which modules are adapted follows from the names of the weights.
_IGNORED = {
    *("base_model_name_or_path", "revision", "peft_type", "peft_version", "task_type", "auto_mapping"),
    *("inference_mode", "runtime_config", "target_modules", "fan_in_fan_out", "layers_pattern"),
    *("exclude_modules", "layers_to_transform"),
    *("init_lora_weights", "bias", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
#: Every other initialization changes the base model as well.
_PLAIN_INITIALIZATIONS = (True, False, None, "gaussian", "orthogonal")
_ADAPTER_WEIGHT = re.compile(
    r"base_model\.model\.(.+)\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)(?:\.weight)?"
)


class TrainedWeights(NamedTuple):
    """What was trained."""

    base: str  # the base model, a folder or a hub name
    options: Mapping[str, Any]  # our options that the folder proves, by key
    parameters: dict[str, torch.nn.Parameter]  # without weights: only names, order and shapes count
    weights: Mapping[str, torch.Tensor]  # float32, by the same names


def read_full_model(folder: Path, base: str | None) -> TrainedWeights:
    """Read a model of which all weights were trained."""
    base = str(folder) if base is None else base
    saved = read_tensors(folder / WEIGHTS)
    model = meta_model(base)
    parameters = dict(model.named_parameters())
    # Shared weights have several names, and may be saved under any or all of them.
    aliases = dict(model.named_parameters(remove_duplicate=False)).keys() - parameters.keys()
    _require_same_names(folder, base, saved.keys() - aliases, parameters.keys())
    weights = _to_float32(folder / WEIGHTS, saved, parameters)
    return TrainedWeights(base, {"lora_rank": 0}, parameters, weights)


def read_adapter(folder: Path, base: str | None) -> TrainedWeights:
    """Read a LoRA adapter of peft."""
    path = folder / PEFT_WEIGHTS
    config = read_json(folder / ADAPTER_CONFIG)
    _require_plain_lora(config, folder, base_given=base is not None)
    saved = read_tensors(path)
    matches = {name: _ADAPTER_WEIGHT.fullmatch(name) for name in saved}
    modules = {match[1] for match in matches.values() if match}
    if unknown := [quote_untrusted(name) for name, match in matches.items() if not match]:
        raise refusal(folder, f"{PEFT_WEIGHTS} holds {unknown[0]}, which is not part of a plain LoRA")
    ranks = {value.shape[:1] for name, value in saved.items() if "lora_A" in name or "embedding_A" in name}
    rank = config.get("r")
    # peft would allocate what the config claims.
    if type(rank) is not int or ranks != {(rank,)}:
        raise refusal(folder, f"the rank of its weights is not the rank in {ADAPTER_CONFIG}")
    base, model = _base_model(config, folder) if base is None else (base, meta_model(base))
    if not modules <= dict(model.named_modules()).keys():
        raise refusal(folder, f"it adapts modules that --model {base} does not have")
    lora_options = {key: config[name] for name, key in _OPTIONS.items() if config.get(name) is not None}
    adaptable = adapter.adaptable(model)
    # What target_modules may have been, the shortest first.
    for targets in (["all-linear"], kinds(modules), sorted(modules)):
        fields = {**lora_options, "target_modules": targets}
        train_config = from_mapping(fields, where=str(folder / ADAPTER_CONFIG))
        with contextlib.suppress(ConfigError):  # they select what cannot be adapted
            if {*select(train_config, adaptable).names} == modules:
                break
    adapted, _ = adapter.add_adapter(model, train_config)  # raises for the last of these
    parameters = adapter.trained_parameters(adapted)
    # peft's name of each parameter, by its id().
    peft_names = {id(value): name for name, value in adapter.to_peft_names(adapted, parameters).items()}
    _require_same_names(folder, base, saved.keys(), peft_names.values())
    weights = {name: saved[peft_names[id(parameter)]] for name, parameter in parameters.items()}
    proven = {name: getattr(train_config, name) for name in (*_OPTIONS.values(), "target_modules")}
    return TrainedWeights(base, proven, parameters, _to_float32(path, weights, parameters))


def _require_plain_lora(config: Mapping[str, Any], folder: Path, *, base_given: bool) -> None:
    if config.get("peft_type") != "LORA" or config.get("task_type") not in ("CAUSAL_LM", None):
        raise refusal(folder, "its adapter is not a LoRA of a causal language model")
    for name, value in config.items():
        if name not in _IGNORED and name not in _OPTIONS and value:
            raise refusal(folder, f"{ADAPTER_CONFIG} sets {quote_untrusted(name)}, which is not supported")
    if config.get("bias") not in ("none", None):
        raise refusal(folder, f"{ADAPTER_CONFIG} sets bias, but biases are not trained here")
    initialization = config.get("init_lora_weights")
    if not any(initialization is plain or initialization == plain for plain in _PLAIN_INITIALIZATIONS):
        raise refusal(folder, f"{ADAPTER_CONFIG} sets init_lora_weights, which changed the base model")
    # The name of a hub model alone would load its newest revision.
    if config.get("revision") and not base_given:
        raise refusal(folder, "its base model is a specific revision; pass a folder with it as --model")


def _base_model(config: Mapping[str, Any], folder: Path) -> tuple[str, torch.nn.Module]:
    """The base model that an adapter names, and that model without its weights."""
    name = config.get("base_model_name_or_path")
    # The name becomes a path or an address, and part of messages.
    if type(name) is not str or not 0 < len(name) <= MAX_NAME_CHARACTERS or not name.isprintable():
        raise refusal(folder, f"{ADAPTER_CONFIG} does not name the base model; pass it as --model")
    try:
        return name, meta_model(name)
    except ModelError as error:
        problem = f"its base model {quote_untrusted(name)} cannot be loaded"
        raise ModelError(f"{folder}: {problem}; pass its location as --model ({error})") from error


def _to_float32(
    path: Path, saved: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    return {
        name: to_float32(saved[name], shape=parameter.shape, what=quote_untrusted(name), path=path)
        for name, parameter in parameters.items()
    }


def _require_same_names(folder: Path, base: str, saved: Collection[str], built: Collection[str]) -> None:
    for owner, a, b in (("the model", saved, built), ("the folder", built, saved)):
        if missing := sorted(set(a) - set(b)):
            listed = join_first(map(quote_untrusted, missing), NAMES_SHOWN)
            raise refusal(folder, f"it does not fit --model {base}: {owner} lacks {listed}")


def refusal(path: Path, reason: str) -> ResumeRefused:
    """The error for a folder that is valid, but that no run here could resume from."""
    return ResumeRefused(f"{path}: cannot be resumed here: {reason}")
